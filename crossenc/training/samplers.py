"""Which rows make a batch: by chance, without equal texts, by label; and from which of several datasets it comes.

A batch is a list of row numbers. A dataset is whatever has a length and gives a row, a dict, by its number. Every
sampler is told the epoch by `set_epoch`; with the same seed and epoch it gives the same batches. Knows no model.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import BatchSampler, ConcatDataset
from transformers.utils import ExplicitEnum

from crossenc.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

#: Names of columns that hold labels, the first one found counts.
LABEL_COLUMNS = ("label", "labels", "score", "scores")
#: The column that tells rows of several datasets apart.
DATASET_NAME = "dataset_name"
#: Times that NoDuplicatesBatchSampler goes through the rows again to give as many batches as it announced.
_EXTRA_PASSES = 2


class BatchSamplers(ExplicitEnum):  # type: ignore[misc]
    """The names of batch samplers, for `CrossEncoderTrainingArguments.batch_sampler`.

    `batch_sampler` shuffles. `no_duplicates` never has the same text in two rows of a batch, which losses with
    negatives from the batch need; `no_duplicates_hashed` gives the same batches and reads the rows once, keeping a
    hash of each text. `group_by_label` has at least two rows of at least two labels in each batch.
    """

    BATCH_SAMPLER = "batch_sampler"
    NO_DUPLICATES = "no_duplicates"
    NO_DUPLICATES_HASHED = "no_duplicates_hashed"
    GROUP_BY_LABEL = "group_by_label"


class MultiDatasetBatchSamplers(ExplicitEnum):  # type: ignore[misc]
    """The names for `CrossEncoderTrainingArguments.multi_dataset_batch_sampler`.

    `proportional` draws from each dataset in proportion to its size and uses all rows; `round_robin` takes turns until
    one dataset has no batch left.
    """

    ROUND_ROBIN = "round_robin"
    PROPORTIONAL = "proportional"


class _HasEpoch(BatchSampler):
    """A batch sampler whose order depends on a seed and the epoch."""

    epoch = 0
    seed: int | None = 0
    generator: torch.Generator | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next batches are for."""
        self.epoch = epoch

    def _start(self) -> None:
        if self.generator is not None and self.seed is not None:
            self.generator.manual_seed(self.seed + self.epoch)


class DefaultBatchSampler(_HasEpoch):
    """Batches of what torch's BatchSampler takes: row numbers of a sampler, `batch_size` at a time.

    A batch sampler of one's own derives from it, and is passed as a class: `batch_sampler=MySampler`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last)
        self.dataset = dataset
        self.valid_label_columns = list(LABEL_COLUMNS if valid_label_columns is None else valid_label_columns)
        self.generator = generator
        self.seed = seed


class NoDuplicatesBatchSampler(DefaultBatchSampler):
    """Shuffled rows, where no two of a batch have a value in common beside their labels.

    A row that would clash waits for a later batch. Where a pass over the rows gives fewer batches than `len` says,
    which `drop_last` can cause, rows are drawn again. `precompute_hashes` reads all rows once, before the first batch.
    """

    def __init__(self, dataset: Any, *args: Any, precompute_hashes: bool = False, **settings: Any) -> None:
        super().__init__(dataset, *args, **settings)
        self._precomputes, self._hashes = precompute_hashes, list[frozenset[int]]()

    def __iter__(self) -> Iterator[list[int]]:
        self._start()
        if self._precomputes and not self._hashes:
            self._hashes = [frozenset(map(hash, self._texts(row))) for row in range(len(self.dataset))]
        num_given, num_announced = 0, len(self)
        for number in range(1 + _EXTRA_PASSES):
            for batch in self._pass():
                yield batch
                num_given += 1
                if number > 0 and num_given == num_announced:
                    return
            if num_given >= num_announced:
                return
        logger.warning(
            "%d batches without equal texts were found of %d: choose a smaller batch size", num_given, num_announced
        )

    def _pass(self) -> Iterator[list[int]]:
        """Batches until every row was in one, or in none for want of others that it does not clash with."""
        waiting = deque(torch.randperm(len(self.dataset), generator=self.generator).tolist())
        while waiting:
            batch, seen, clashing = list[int](), set[Hashable](), list[int]()
            while waiting and len(batch) < self.batch_size:
                row = waiting.popleft()
                values = self._hashes[row] if self._hashes else self._texts(row)
                if seen.isdisjoint(values):
                    batch.append(row)
                    seen |= values
                else:
                    clashing.append(row)
            waiting.extendleft(reversed(clashing))
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def _texts(self, row: int) -> frozenset[str]:
        """A row's values as text; those of its label column say nothing."""
        values = dict(self.dataset[row])
        label = next((name for name in self.valid_label_columns if name in values), None)
        return frozenset(str(value) for name, value in values.items() if name not in (label, DATASET_NAME))

    def __len__(self) -> int:
        num_full, rest = divmod(len(self.dataset), self.batch_size)
        return num_full + (rest > 0 and not self.drop_last)


class GroupByLabelBatchSampler(DefaultBatchSampler):
    """Batches with at least two rows of at least two labels each.

    Labels take turns in a random order, each giving two rows, until fewer than two labels have rows left; the rest
    is left out. `batch_size` is even and at least 4.
    """

    def __init__(self, dataset: Any, *args: Any, **settings: Any) -> None:
        super().__init__(dataset, *args, **settings)
        if self.batch_size < 4 or self.batch_size % 2:
            raise ConfigError(f"batch_size is {self.batch_size}: to group by label it must be even and at least 4")
        rows_of: dict[Any, list[int]] = defaultdict(list)
        for row, label in enumerate(_labels(dataset, self.valid_label_columns)):
            rows_of[label].append(row)
        self._groups = [rows for rows in rows_of.values() if len(rows) >= 2]
        if len(self._groups) < 2:
            raise InputError(
                f"{len(self._groups)} labels have two rows or more, and group_by_label needs two such labels: "
                "use another batch_sampler"
            )

    def __iter__(self) -> Iterator[list[int]]:
        self._start()
        queues = [self._shuffled(rows) for rows in self._groups]
        batch: list[int] = []
        last = -1
        labels = list(range(len(queues)))
        while len(labels) >= 2:
            labels = [labels[i] for i in torch.randperm(len(labels), generator=self.generator).tolist()]
            if labels[0] == last:  # two turns of a label in a row could fill a batch
                labels.append(labels.pop(0))
            for label in labels:
                batch += [queues[label].popleft(), queues[label].popleft()]
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            last = labels[-1]
            labels = [label for label in labels if len(queues[label]) >= 2]
        if len(batch) >= 4 and not self.drop_last:
            yield batch

    def _shuffled(self, rows: list[int]) -> deque[int]:
        return deque(rows[i] for i in torch.randperm(len(rows), generator=self.generator).tolist())

    def __len__(self) -> int:
        turns = sorted((len(rows) // 2 for rows in self._groups), reverse=True)
        num_rows = 2 * sum(min(num, turns[1]) for num in turns)
        num_full, rest = divmod(num_rows, self.batch_size)
        return num_full + (rest >= 4 and not self.drop_last)


class MultiDatasetDefaultBatchSampler(_HasEpoch):
    """Batches out of several datasets, each batch from one of them, by a batch sampler for each.

    `dataset` is their concatenation, whose row numbers the batches hold. One of one's own derives from it, has
    `__iter__` and `__len__`, and is passed as a class.
    """

    def __init__(
        self,
        dataset: "ConcatDataset[Any]",
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        if len(dataset.datasets) != len(batch_samplers):
            raise ConfigError(f"there are {len(dataset.datasets)} datasets and {len(batch_samplers)} batch samplers")
        first = batch_samplers[0]
        super().__init__(dataset, batch_size=first.batch_size, drop_last=first.drop_last)  # type: ignore[arg-type]
        self.dataset = dataset
        self.batch_samplers = list(batch_samplers)
        self.generator = generator
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for sampler in self.batch_samplers:
            if isinstance(sampler, _HasEpoch):
                sampler.set_epoch(epoch)

    def _offsets(self) -> list[int]:
        """The row number in the concatenation of each dataset's first row."""
        return [0, *accumulate(len(dataset) for dataset in self.dataset.datasets)]  # type: ignore[arg-type]


class RoundRobinBatchSampler(MultiDatasetDefaultBatchSampler):
    """A batch of each dataset in turn, until one has none left."""

    def __iter__(self) -> Iterator[list[int]]:
        self._start()
        offsets = self._offsets()
        for batches in zip(*self.batch_samplers, strict=False):
            for offset, batch in zip(offsets, batches, strict=False):
                yield [offset + row for row in batch]

    def __len__(self) -> int:
        return min(map(len, self.batch_samplers)) * len(self.batch_samplers)


class ProportionalBatchSampler(MultiDatasetDefaultBatchSampler):
    """All batches of all datasets, in a random order of datasets."""

    def __iter__(self) -> Iterator[list[int]]:
        self._start()
        owners = [number for number, sampler in enumerate(self.batch_samplers) for _ in range(len(sampler))]
        offsets, batches = self._offsets(), [iter(sampler) for sampler in self.batch_samplers]
        for turn in torch.randperm(len(owners), generator=self.generator).tolist():
            batch = next(batches[owners[turn]], None)
            if batch is not None:  # a sampler may announce more than it has
                yield [offsets[owners[turn]] + row for row in batch]

    def __len__(self) -> int:
        return sum(map(len, self.batch_samplers))


def _labels(dataset: Any, columns: Sequence[str]) -> list[Any]:
    """Each row's label."""
    known = list(dataset.column_names) if hasattr(dataset, "column_names") else list(dataset[0])
    column = next((name for name in columns if name in known), None)
    if column is None:
        raise InputError(f"group_by_label needs a column {' or '.join(columns)}; there are {', '.join(known)}")
    values = dataset[column] if hasattr(dataset, "column_names") else [row[column] for row in dataset]
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]
