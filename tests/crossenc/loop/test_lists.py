"""Lists of tokenised pairs: taken by number, joined, checked."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.loop.lists import TokenizedLists, concatenate, concatenate_pairs, offsets_of, ranges
from crossenc.records import TokenizedPairs


def lists_of(*lists: list[list[int]], with_types: bool = True) -> TokenizedLists:
    """Lists whose pairs have these token ids; a pair's label is its first id, a list's weight its place."""
    pairs = [pair for one in lists for pair in one]
    ids = np.array([token for pair in pairs for token in pair], np.int32)
    return TokenizedLists(
        pairs=TokenizedPairs(
            input_ids=ids,
            offsets=offsets_of(np.array([len(pair) for pair in pairs], np.int64)),
            token_type_ids=(ids % 2).astype(np.uint8) if with_types else None,
            truncated=np.array([len(pair) > 2 for pair in pairs], np.bool_),
        ),
        sizes=np.array([len(one) for one in lists], np.int64),
        labels=np.array([pair[0] for pair in pairs], np.float32),
        weights=np.arange(len(lists), dtype=np.float32),
        origins=tuple(f"file, row {row}" for row in range(len(lists))),
    )


THREE = lists_of([[1, 2], [3]], [[4, 5, 6]], [[7], [8, 9], [10]])


def test_lists_are_taken_in_the_order_asked_for_and_may_come_twice():
    taken = THREE.take(np.array([2, 0, 2]))
    assert len(taken) == 3 and taken.sizes.tolist() == [3, 2, 3]
    assert taken.pairs.input_ids.tolist() == [7, 8, 9, 10, 1, 2, 3, 7, 8, 9, 10]
    assert taken.pairs.offsets.tolist() == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert taken.pairs.token_type_ids is not None
    assert taken.pairs.token_type_ids.tolist() == [1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    assert taken.labels.tolist() == [7, 8, 10, 1, 3, 7, 8, 10] and taken.weights.tolist() == [2, 0, 2]
    assert taken.origins == ("file, row 2", "file, row 0", "file, row 2")
    assert THREE.take(np.array([1])).pairs.truncated.tolist() == [True]
    assert THREE.take(np.array([-1])).origins == ("file, row 2",)


def test_no_lists_can_be_taken_and_joined():
    nothing = THREE.take(np.array([], np.int64))
    assert len(nothing) == len(nothing.pairs) == 0 and nothing.pairs.offsets.tolist() == [0]
    assert concatenate([nothing, THREE]).pairs.input_ids.tolist() == THREE.pairs.input_ids.tolist()
    assert len(concatenate([])) == 0


def test_a_number_that_is_no_list_is_an_error():
    with pytest.raises(IndexError):
        THREE.take(np.array([3]))


def test_lists_of_tokenizers_with_and_without_token_types_do_not_join():
    with pytest.raises(ValueError, match="different tokenizers"):
        concatenate([THREE, lists_of([[1]], with_types=False)])
    joined = concatenate_pairs([lists_of([[1]], with_types=False).pairs] * 2)
    assert joined.token_type_ids is None and joined.offsets.tolist() == [0, 1, 2]


def test_lists_whose_parts_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="3 lists of 6 pairs have 6 pairs, 5 labels"):
        TokenizedLists(THREE.pairs, THREE.sizes, THREE.labels[:5], THREE.weights, THREE.origins)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_ranges_are_those_of_a_loop(spans: list[tuple[int, int]]):
    starts = np.array([start for start, _ in spans], np.int64)
    lengths = np.array([length for _, length in spans], np.int64)
    assert ranges(starts, lengths).tolist() == [start + i for start, length in spans for i in range(length)]


@given(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 3))
def test_taking_all_of_what_was_cut_and_joined_changes_nothing(order: list[int], cut: int):
    whole = THREE.take(np.array(order, np.int64))
    numbers = np.arange(len(order))
    again = concatenate([whole.take(numbers[:cut]), whole.take(numbers[cut:])])
    assert again.pairs.input_ids.tolist() == whole.pairs.input_ids.tolist()
    assert (again.sizes.tolist(), again.origins) == (whole.sizes.tolist(), whole.origins)


def test_lists_need_neither_torch_nor_the_trainers_packages():
    code = "import sys, crossenc.loop.lists; assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
