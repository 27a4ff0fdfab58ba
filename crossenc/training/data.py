"""Datasets as the trainer reads them: checked, named where there are several, in batches.

A dataset is a datasets.Dataset or anything else with a length whose rows are dicts; a stream is a
datasets.IterableDataset or anything else without a length. Several datasets are a dict, such as a DatasetDict.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, SequentialSampler

from crossenc.errors import InputError
from crossenc.training.samplers import DATASET_NAME

_RESERVED = ("return_loss", DATASET_NAME)


class NamedRows(Dataset[dict[str, Any]]):
    """The rows of a dataset, each with the dataset's name; the dataset itself stays as it is."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], DATASET_NAME: self.name}


class NamedStream(IterableDataset[dict[str, Any]]):
    """The same of a stream."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({**row, DATASET_NAME: self.name} for row in self.rows)


class NoRows(Dataset[dict[str, Any]]):
    """A dataset without rows."""

    def __len__(self) -> int:
        return 0


def is_stream(data: Any) -> bool:
    """Whether `data` is rows without a known number of them."""
    return not hasattr(data, "__len__")


def named(data: Any, name: str) -> Dataset[dict[str, Any]]:
    """The rows of `data`, each with a name."""
    return NamedStream(data, name) if is_stream(data) else NamedRows(data, name)


def check_datasets(train: Any, evaluation: Any) -> None:
    """Raise InputError for several streams to train on, and for columns whose names are taken."""
    if isinstance(train, Mapping) and any(is_stream(data) for data in train.values()):
        raise InputError(
            "in a dict, CrossEncoderTrainer does not support an IterableDataset for the `train_dataset`. "
            "Please convert the dataset to a `Dataset` or `DatasetDict` before passing it to the trainer. "
            "Streams may be mixed into one with datasets.interleave_datasets"
        )
    for given in (train, evaluation):
        for name, data in (given if isinstance(given, Mapping) else {"": given}).items():
            if taken := sorted(set(getattr(data, "column_names", None) or ()) & set(_RESERVED)):
                raise InputError(f"the dataset {name} has a column {taken[0]!r}, a name used inside: rename it")


def check_names(loss: Any, train: Any, evaluation: Any) -> None:
    """With a dict of losses, raise InputError unless each dataset is in a dict and has a loss of its name."""
    if not isinstance(loss, Mapping):
        return
    for kind, data in (("train", train), ("eval", evaluation)):
        if data is None:
            continue
        if not isinstance(data, Mapping):
            raise InputError(
                f"If the provided `loss` is a dict, then the `{kind}_dataset` must be a `DatasetDict`. "
                "Give each dataset the name of its loss"
            )
        if missing := sorted(set(data) - set(loss)):
            raise InputError(
                "If the provided `loss` is a dict, then all keys from the "
                f"`{kind}_dataset` dictionary must occur in `loss` also. Currently, {missing} "
                f"{'occurs' if len(missing) == 1 else 'occur'} in `{kind}_dataset` but not in `loss`."
            )


def data_loader(
    data: Any,
    batch_size: int,
    drop_last: bool,
    sampler_for: Callable[[Any], BatchSampler],
    join: Callable[["ConcatDataset[Any]", Sequence[BatchSampler]], BatchSampler],
    settings: Mapping[str, Any],
) -> "DataLoader[Any]":
    """Batches of a dataset, a stream or a dict of datasets.

    `sampler_for` gives the batch sampler of one dataset, `join` that of several. `settings` go to torch's DataLoader.
    """
    if isinstance(data, Mapping):
        joined: ConcatDataset[Any] = ConcatDataset(data.values())
        samplers = [sampler_for(_unnamed(rows)) for rows in data.values()]
        return DataLoader(joined, batch_sampler=join(joined, samplers), **settings)
    if is_stream(data):
        return DataLoader(data, batch_size=batch_size, drop_last=drop_last, **settings)
    return DataLoader(data, batch_sampler=sampler_for(_unnamed(data)), **settings)


def _unnamed(data: Any) -> Any:
    """The dataset inside: batch samplers may look at its columns."""
    return data.rows if isinstance(data, NamedRows) else data


def in_order(data: Any, batch_size: int) -> BatchSampler:
    """Batches of all rows from first to last."""
    return BatchSampler(SequentialSampler(data), batch_size, drop_last=False)


def loader_settings(args: Any, collator: Callable[..., Any]) -> dict[str, Any]:
    """What the training arguments say of data loaders."""
    return {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        # Without an accelerator torch warns of pinned memory, which has no use then.
        "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
