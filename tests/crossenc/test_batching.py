from itertools import pairwise, zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.batching import padded_tokens, token_budget_batches

lengths_strategy = st.lists(st.integers(0, 60), max_size=80).map(lambda values: np.array(values, dtype=np.int64))


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_pairs_are_cut_longest_first_into_batches_within_the_budget() -> None:
    lengths = np.array([3, 9, 5, 4, 9])
    # 9 + 9 fill 18; 5, 4 and 3 padded to 5 fill 15 of 18.
    assert as_lists(token_budget_batches(lengths, 18)) == [[1, 4], [2, 3, 0]]


def test_a_pair_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert as_lists(token_budget_batches(np.array([2, 50, 2]), 10)) == [[1], [0, 2]]


def test_windows_do_not_share_batches() -> None:
    lengths = np.array([1, 2, 3, 4])
    assert as_lists(token_budget_batches(lengths, 100, window=2)) == [[1, 0], [3, 2]]


def test_a_cap_on_pairs_applies_beside_the_token_budget() -> None:
    lengths = np.array([1, 1, 1, 1, 1])
    assert as_lists(token_budget_batches(lengths, 100, max_batch_pairs=2)) == [[0, 1], [2, 3], [4]]


def test_no_pairs_make_no_batches() -> None:
    assert token_budget_batches(np.empty(0, np.int64), 10) == []
    assert padded_tokens(np.empty(0, np.int64), 10) == 0


def test_packed_batches_are_filled_with_tokens_longest_pairs_first() -> None:
    lengths = np.array([3, 9, 5, 4, 9])
    assert as_lists(token_budget_batches(lengths, 18, is_packed=True)) == [[1, 4], [2, 3, 0]]
    assert as_lists(token_budget_batches(lengths, 27, is_packed=True)) == [[1, 4, 2, 3], [0]]
    assert as_lists(token_budget_batches(lengths, 1, is_packed=True)) == [[1], [4], [2], [3], [0]]
    assert as_lists(token_budget_batches(lengths, 27, max_batch_pairs=3, is_packed=True)) == [[1, 4, 2], [3, 0]]


@given(lengths_strategy, st.integers(1, 200), st.integers(1, 30), st.none() | st.integers(1, 10))
def test_every_pair_is_in_exactly_one_packed_batch_that_is_as_full_as_it_can_be(
    lengths: np.ndarray, max_batch_tokens: int, window: int, max_batch_pairs: int | None
) -> None:
    batches = token_budget_batches(lengths, max_batch_tokens, window, max_batch_pairs, is_packed=True)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    tokens = np.maximum(1, lengths)
    for batch, following in zip_longest(batches, batches[1:]):
        assert len(batch) == 1 or tokens[batch].sum() <= max_batch_tokens
        assert max_batch_pairs is None or len(batch) <= max_batch_pairs
        assert len(set((batch // window).tolist())) == 1
        assert (np.diff(lengths[batch]) <= 0).all()
        if following is not None and following[0] // window == batch[0] // window and len(batch) != max_batch_pairs:
            assert tokens[batch].sum() + tokens[following[0]] > max_batch_tokens


def test_padded_tokens_count_every_pair_at_its_batchs_longest() -> None:
    assert padded_tokens(np.array([3, 9, 5, 4, 9]), 18) == 2 * 9 + 3 * 5


@pytest.mark.parametrize("limits", [{"max_batch_tokens": 0}, {"window": 0}, {"max_batch_pairs": 0}])
def test_a_limit_below_one_is_refused_by_name(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        token_budget_batches(np.array([1]), **{"max_batch_tokens": 8, **limits})


@given(lengths_strategy, st.integers(1, 200), st.integers(1, 30), st.none() | st.integers(1, 10))
def test_every_pair_is_in_exactly_one_batch_and_batches_keep_the_limits(
    lengths: np.ndarray, max_batch_tokens: int, window: int, max_batch_pairs: int | None
) -> None:
    batches = token_budget_batches(lengths, max_batch_tokens, window, max_batch_pairs)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_batch_tokens
        assert max_batch_pairs is None or len(batch) <= max_batch_pairs
        assert len(set((batch // window).tolist())) == 1
        assert (np.diff(lengths[batch]) <= 0).all()


@given(lengths_strategy, st.integers(1, 200), st.integers(1, 30))
def test_no_batch_could_have_taken_the_next_pair_of_its_window(
    lengths: np.ndarray, max_batch_tokens: int, window: int
) -> None:
    batches = token_budget_batches(lengths, max_batch_tokens, window)
    for batch, following in pairwise(batches):
        if batch[0] // window == following[0] // window:
            assert (len(batch) + 1) * max(1, lengths[batch[0]]) > max_batch_tokens
