"""Which lists make which batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.errors import ConfigError
from crossenc.loop.order import Order, OrderSettings, batch_ends, epoch_order, micro_batches, share


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 5), st.integers(1, 90))
def test_every_epoch_is_a_permutation_whatever_the_window(num_lists, shuffled, epoch, batch):
    settings = OrderSettings(batch_lists=batch, shuffled_lists=shuffled, seed=3)
    assert sorted(epoch_order(num_lists, settings, epoch)) == list(range(num_lists))


def test_epochs_and_seeds_differ_and_the_same_ones_do_not():
    orders = [epoch_order(50, OrderSettings(batch_lists=4, seed=s), e).tolist() for s, e in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch_order(50, OrderSettings(batch_lists=4, seed=1), 0).tolist() == orders[0]


def test_lists_are_shuffled_near_each_other_when_a_window_is_set():
    settings = OrderSettings(batch_lists=4, shuffled_lists=4096)
    order = epoch_order(65_536, settings, 0)
    blocks = {tuple(sorted(set((order[start : start + 4096] // 2048).tolist()))) for start in range(0, 65_536, 4096)}
    assert all(len(found) == 2 for found in blocks), "a window holds two whole blocks of neighbours"
    assert order[:4096].tolist() != sorted(order[:4096].tolist())


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
