"""Lists of data that is larger than what a worker keeps: each part is read about once an epoch."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from crossenc.card import DatasetFacts
from crossenc.errors import StorageError
from crossenc.loop.lists import LabelStatistics, TokenizedLists
from crossenc.loop.order import Order, OrderSettings, Parts
from crossenc.records import TokenizedPairs
from pipelines import train_batches, train_lists
from pipelines.storage import Location, locate
from pipelines.train_batches import Batch, Lists, read_ahead
from pipelines.train_data import PreparedData, PreparedPart
from pipelines.train_lists import expect_lists, parts_of, read_lists

NUM_PARTS, PART_LISTS, LIST_TOKENS = 60, 40, 30
#: A part of lists of one pair each has so many bytes, as `parts_of` counts them.
PART_BYTES = PART_LISTS * (5 * LIST_TOKENS + 13 + 200)


@dataclass
class Store:
    """Parts that are made when they are read: list i has the label i and its tokens are all i."""

    prepared: PreparedData
    reads: Counter[str]
    broken: bool = False

    def read(self, place: Location, part: PreparedPart) -> TokenizedLists:
        self.reads[part.part_id] += 1
        if self.broken:
            raise StorageError(f"{place} is damaged")
        numbers = int(part.part_id) * PART_LISTS + np.arange(PART_LISTS)
        offsets = np.arange(PART_LISTS + 1) * LIST_TOKENS
        tokens = np.repeat(numbers, LIST_TOKENS).astype(np.int32)
        pairs = TokenizedPairs(tokens, offsets, None, np.zeros(PART_LISTS, bool))
        ones = np.ones(PART_LISTS, np.int64)
        return TokenizedLists(pairs, ones, numbers.astype(np.float32), ones.astype(np.float32), ("",) * PART_LISTS)

    def lists(self) -> tuple[Lists, Parts]:
        num_pairs = np.ones(NUM_PARTS * PART_LISTS, np.int64)
        num_tokens = num_pairs * LIST_TOKENS
        read, expect = (lambda numbers: read_lists(self.prepared, numbers)), (lambda n: expect_lists(self.prepared, n))
        return Lists(num_pairs, num_tokens, read, expect), parts_of(self.prepared, num_pairs, num_tokens)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    num = NUM_PARTS * PART_LISTS
    parts = tuple(PreparedPart(f"{n}", f"train/{n}.parquet", "a", PART_LISTS, 1, f"{n}") for n in range(NUM_PARTS))
    statistics = LabelStatistics(0, 1, 0.5, 2, num, num, num)
    facts = DatasetFacts("a", num, {}, {}, 0, ())
    folder = locate(str(tmp_path))
    made = Store(PreparedData(folder, num, num, num, num, {}, parts, statistics, facts, "digest"), Counter())
    monkeypatch.setattr(train_lists, "_read_part", made.read)
    monkeypatch.setattr(train_lists, "_kept_parts", train_lists._KeptParts())
    monkeypatch.setattr(train_lists, "_KEPT_BYTES", 12 * PART_BYTES)
    monkeypatch.setattr(train_batches, "_EXPECTED_TOKENS", 2 * 16 * LIST_TOKENS)
    return made


def numbers_of(batch: Batch) -> list[int]:
    return batch.lists.labels.astype(int).tolist()


def test_each_part_is_read_about_once_an_epoch_though_a_fifth_of_them_is_kept(store):
    lists, parts = store.lists()
    assert parts.loads == pytest.approx(np.full(NUM_PARTS, 1 / 12))
    order = Order(lists.num_tokens, OrderSettings(batch_lists=16), 3, parts)
    seen = [number for batch in read_ahead(lists, order, 0, 0, 1) for number in numbers_of(batch)]
    assert Counter(seen) == dict.fromkeys(range(NUM_PARTS * PART_LISTS), 3)
    assert 2 * NUM_PARTS < store.reads.total() <= 3.5 * NUM_PARTS


def test_a_run_goes_on_anywhere_with_the_same_batches_for_any_number_of_workers(store):
    lists, parts = store.lists()
    order = Order(lists.num_tokens, OrderSettings(batch_lists=16), 1, parts)
    whole = {batch.step: sorted(numbers_of(batch)) for batch in read_ahead(lists, order, 0, 0, 1)}
    assert whole == {step: sorted(order.batch(step).tolist()) for step in range(order.num_steps)}
    shared = [list(read_ahead(lists, order, 100, rank, 3)) for rank in range(3)]
    for batches in zip(*shared, strict=True):
        assert sorted(number for batch in batches for number in numbers_of(batch)) == whole[batches[0].step]
        assert {(batch.num_lists, batch.num_tokens) for batch in batches} == {(16, 16 * LIST_TOKENS)}
    assert [batch.step for batch in shared[0]] == list(range(100, order.num_steps))


def test_a_worker_for_whom_no_list_is_left_reads_one_that_counts_nothing(store):
    lists, parts = store.lists()
    order = Order(lists.num_tokens, OrderSettings(batch_lists=1), 1, parts)
    first = [next(read_ahead(lists, order, 0, rank, 2)).lists for rank in range(2)]
    assert [part.weights.tolist() for part in first] == [[1.0], [0.0]]


def test_lists_are_announced_some_steps_before_they_are_read(store):
    lists, parts = store.lists()
    order = Order(lists.num_tokens, OrderSettings(batch_lists=16), 1, parts)
    events: list[tuple[str, tuple[int, ...]]] = []

    def noting(name, call):
        return lambda numbers: (events.append((name, tuple(numbers))), call(numbers))[1]

    noted = replace(lists, read=noting("read", lists.read), expect=noting("expect", lists.expect))
    steps = [batch.step for batch in read_ahead(noted, order, 0, 0, 1)]
    announced = [numbers for name, numbers in events if name == "expect"]
    assert len(announced) == len(steps) == 150
    for step in range(len(steps) - 2):
        assert events.index(("expect", announced[step + 2])) < events.index(("read", announced[step]))


def test_eight_parts_are_kept_however_large_they_are(store, monkeypatch):
    monkeypatch.setattr(train_lists, "_KEPT_BYTES", 2 * PART_BYTES)
    _, parts = store.lists()
    assert parts.loads.tolist() == [1 / 8] * NUM_PARTS
    for _ in range(3):
        read_lists(store.prepared, np.arange(0, 8 * PART_LISTS, PART_LISTS))
    assert store.reads.total() == 8


def test_a_part_that_could_not_be_read_is_read_again_when_it_is_asked_for_again(store):
    store.broken = True
    expect_lists(store.prepared, np.array([0]))
    with pytest.raises(StorageError, match="damaged"):
        read_lists(store.prepared, np.array([0]))
    store.broken = False
    assert read_lists(store.prepared, np.array([1, 0])).labels.tolist() == [1, 0]
