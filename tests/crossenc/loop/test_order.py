"""Which lists make which batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.errors import ConfigError
from crossenc.loop.order import Order, OrderSettings, Parts, batch_ends, epoch_order, micro_batches, share


def equal_parts(num_parts: int, num_lists: int, load: float) -> Parts:
    return Parts(np.full(num_parts, num_lists), np.full(num_parts, load))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.001, 0.5)), min_size=1, max_size=40),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(0, 5),
)
def test_every_epoch_is_a_permutation_whatever_the_parts_and_the_window(parts, shuffled, epoch):
    sizes, loads = zip(*parts, strict=True)
    order = epoch_order(Parts(np.array(sizes), np.array(loads)), some(shuffled_lists=shuffled), epoch)
    assert sorted(order) == list(range(sum(sizes)))


def some(**values: int | None) -> OrderSettings:
    return OrderSettings(**{"batch_lists": 4, "seed": 3, **values})


def test_epochs_and_seeds_differ_and_the_same_ones_do_not():
    for parts in (equal_parts(5, 10, 0.1), equal_parts(5, 10, 0.3)):
        orders = [epoch_order(parts, some(seed=s), e).tolist() for s, e in ((1, 0), (1, 1), (2, 0))]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert epoch_order(parts, some(seed=1), 0).tolist() == orders[0]


def test_data_that_a_worker_keeps_is_shuffled_as_a_whole():
    expected = np.random.default_rng((3, 1)).permutation(7_500).tolist()
    assert epoch_order(equal_parts(75, 100, 1 / 75), some(), 1).tolist() == expected
    assert Order(np.ones(7_500, np.int64), some(batch_lists=7_500), 2).batch(1).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_of_larger_data_a_worker_needs_no_more_at_once_than_it_keeps_and_each_part_in_one_stretch(seed):
    loads = np.random.default_rng(seed).uniform(0.02, 0.125, 200)
    order = epoch_order(Parts(np.full(200, 500), loads), some(seed=seed), 0) // 500
    places = np.argsort(order, kind="stable").reshape(200, 500)
    first, last = places[:, 0], places[:, -1]
    needed = [loads[(first <= place) & (place <= last)].sum() for place in range(0, len(order), 500)]
    assert max(needed) < 1
    assert np.mean(needed) > 0.6
    assert min(len(set(order[start : start + 500].tolist())) for start in range(0, len(order), 500)) >= 4
    assert np.median([len(set(order[start : start + 16].tolist())) for start in range(0, len(order), 16)]) >= 6


def test_fewer_lists_are_shuffled_together_when_a_window_is_set():
    parts = equal_parts(64, 100, 1 / 64)
    order = epoch_order(parts, some(shuffled_lists=400), 0) // 100
    spread = [len(set(order[start : start + 100].tolist())) for start in range(0, 6_400, 100)]
    assert min(spread) >= 2 and max(spread) <= 7, "four parts, and those on their way in and out"


def test_batches_of_tokens_hold_whole_lists_and_no_more_than_fits():
    ends = batch_ends(np.array([5, 5, 20, 1, 9, 1]), OrderSettings(batch_tokens=10))
    assert ends.tolist() == [2, 3, 5, 6]


def test_steps_and_epochs_are_counted_over_the_run():
    order = Order(np.ones(10, np.int64), OrderSettings(batch_lists=4), num_epochs=2)
    assert order.num_steps == 6
    assert [order.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [round(order.epochs_after(step), 3) for step in range(7)] == [0, 0.333, 0.667, 1, 1.333, 1.667, 2]
    assert [len(order.batch(step)) for step in (0, 1, 2, 3)] == [4, 4, 2, 4]
    assert sorted(np.concatenate([order.batch(step) for step in range(3, 6)])) == list(range(10))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 6))
def test_a_batch_is_shared_out_whole_and_evenly(tokens, num_workers):
    num_tokens = np.array(tokens)
    shares = share(np.arange(len(tokens)), num_tokens, num_workers)
    assert sorted(np.concatenate(shares)) == list(range(len(tokens)))
    loads = [int(num_tokens[part].sum()) for part in shares]
    assert max(loads) - min(loads) <= max(tokens), "no worker has more than one list too many"


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=20), st.booleans())
def test_passes_hold_all_lists_once_and_stay_below_the_limit(lists, is_packed):
    sizes = np.array([len(tokens) for tokens in lists])
    lengths = np.array([length for tokens in lists for length in tokens])
    passes = micro_batches(sizes, lengths, 100, is_packed=is_packed)
    assert sorted(np.concatenate(passes)) == list(range(len(lists)))
    for places in passes:
        tokens = [lists[place] for place in places]
        cost = sum(map(sum, tokens)) if is_packed else sum(map(len, tokens)) * max(map(max, tokens))
        assert cost <= 100 or len(places) == 1


@pytest.mark.parametrize("sizes", [{}, {"batch_lists": 4, "batch_tokens": 4}, {"batch_lists": 0}])
def test_a_size_that_cannot_be_is_refused(sizes):
    with pytest.raises(ConfigError):
        OrderSettings(**sizes)
