"""Batch samplers: which rows stand together, how many batches there are, and that seeds repeat them."""

import logging
from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler

from crossenc.errors import ConfigError, InputError
from crossenc.training.samplers import (
    DefaultBatchSampler,
    GroupByLabelBatchSampler,
    NoDuplicatesBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows(texts: list[str], **columns: list[Any]) -> list[dict[str, Any]]:
    return [
        {"query": f"q{i}", "document": text, **{k: v[i] for k, v in columns.items()}} for i, text in enumerate(texts)
    ]


@given(texts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), size=st.integers(1, 5), hashes=st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_text_is_twice_in_a_batch_and_every_row_is_in_one(texts: list[str], size: int, hashes: bool) -> None:
    sampler = NoDuplicatesBatchSampler(rows(texts), size, False, generator=generator(), precompute_hashes=hashes)
    batches = list(sampler)
    assert all(len({texts[row] for row in batch}) == len(batch) <= size for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(len(texts)))


def test_labels_and_names_of_datasets_are_no_duplicates() -> None:
    data = rows(list("abcd"), score=[1.0] * 4, dataset_name=["x"] * 4)
    assert [len(batch) for batch in NoDuplicatesBatchSampler(data, 4, True, generator=generator())] == [4]


def test_hashes_give_the_same_batches_and_read_rows_once() -> None:
    data = rows([f"{i % 7}" for i in range(30)])
    plain, hashed = (
        NoDuplicatesBatchSampler(data, 4, False, generator=generator(), precompute_hashes=hashes)
        for hashes in (False, True)
    )
    assert list(plain) == list(hashed)
    data[:] = rows([f"{i}" for i in range(30)])
    assert list(plain) != list(hashed)


def test_rows_are_drawn_again_until_there_are_as_many_batches_as_announced(caplog: pytest.LogCaptureFixture) -> None:
    data = rows(["a"] * 6 + ["b"] * 3 + ["c"] * 3)
    sampler = NoDuplicatesBatchSampler(data, 3, True, generator=generator())
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert all(len(batch) == 3 for batch in batches)
    with caplog.at_level(logging.WARNING):
        assert list(NoDuplicatesBatchSampler(rows(["a"] * 8), 2, True, generator=generator())) == []
    assert "0 batches without equal texts were found of 4: choose a smaller batch size" in caplog.text


@given(labels=st.lists(st.integers(0, 3), min_size=4, max_size=60), size=st.sampled_from([4, 6, 8]), last=st.booleans())
@settings(max_examples=80, deadline=None)
def test_batches_by_label_have_two_rows_of_two_labels(labels: list[int], size: int, last: bool) -> None:
    data = rows(["x"] * len(labels), label=labels)
    if sum(num >= 2 for num in Counter(labels).values()) < 2:
        with pytest.raises(InputError, match="needs two such labels"):
            GroupByLabelBatchSampler(data, size, last)
        return
    sampler = GroupByLabelBatchSampler(data, size, last, generator=generator())
    batches = list(sampler)
    assert len(batches) == len(sampler)
    for number, batch in enumerate(batches):
        found = Counter(labels[row] for row in batch)
        assert len(found) >= 2 and min(found.values()) >= 2
        assert len(batch) == size or (number == len(batches) - 1 and not last)
    used = [row for batch in batches for row in batch]
    assert len(set(used)) == len(used)


def test_labels_are_found_in_datasets_and_their_absence_is_told() -> None:
    data = datasets.Dataset.from_dict({"text": list("abcdef"), "scores": [0, 0, 0, 1, 1, 1]})
    for form in (data, data.with_format("torch")):
        assert len(list(GroupByLabelBatchSampler(form, 4, False, generator=generator()))) == 1
    with pytest.raises(InputError, match="needs a column label or labels or score or scores; there are text"):
        GroupByLabelBatchSampler(data.remove_columns("scores"), 4, False)
    for size in (2, 5):
        with pytest.raises(ConfigError, match="it must be even and at least 4"):
            GroupByLabelBatchSampler(data, size, False)


def several(kind: type, sizes: tuple[int, ...]) -> Any:
    shared = generator()
    data = [rows(["x"] * size) for size in sizes]
    samplers = [DefaultBatchSampler(RandomSampler(d, generator=shared), 2, False) for d in data]
    return kind(ConcatDataset(data), samplers, shared, 3)


def owners(batches: list[list[int]], sizes: tuple[int, ...]) -> list[set[int]]:
    """For each batch the datasets that its rows are from."""
    of_row = [number for number, size in enumerate(sizes) for _ in range(size)]
    return [{of_row[row] for row in batch} for batch in batches]


def test_batches_are_of_one_dataset_in_proportion_or_in_turns() -> None:
    sizes = (4, 10, 3)
    proportional, turns = several(ProportionalBatchSampler, sizes), several(RoundRobinBatchSampler, sizes)
    batches = list(proportional)
    assert len(batches) == len(proportional) == 2 + 5 + 2
    assert sorted(row for batch in batches for row in batch) == list(range(17))
    assert all(len(found) == 1 for found in owners(batches, sizes))
    assert owners(list(turns), sizes) == [{0}, {1}, {2}] * 2 and len(turns) == 6
    with pytest.raises(ConfigError, match="2 datasets and 1 batch samplers"):
        ProportionalBatchSampler(ConcatDataset([rows(["x"]), rows(["y"])]), [BatchSampler([0], 1, False)])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [ProportionalBatchSampler, RoundRobinBatchSampler])
def test_epochs_differ_and_repeat(kind: type) -> None:
    sampler, again = several(kind, (8, 8)), several(kind, (8, 8))
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]
    again.set_epoch(1)
    assert list(again) == epochs[1] == list(sampler)


def test_an_epoch_reaches_the_samplers_of_each_dataset() -> None:
    data = [rows([str(i) for i in range(6)])] * 2
    samplers = [NoDuplicatesBatchSampler(d, 2, True, generator=generator(), seed=1) for d in data]
    ProportionalBatchSampler(ConcatDataset(data), samplers).set_epoch(4)
    assert [sampler.epoch for sampler in samplers] == [4, 4]
