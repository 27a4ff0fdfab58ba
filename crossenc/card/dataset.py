"""A dataset as a model card shows it: size, columns, statistics, samples. Knows columns of values, no model."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

#: Rows that statistics are taken over, and rows shown.
STATISTICS_ROWS, SAMPLE_ROWS = 1000, 3
#: Where the package datasets has a file of the hub from. Only a whole commit hash is a revision that stays.
_HUB_FILE = re.compile(r"hf://datasets/(?P<id>[^@]+)@((?P<revision>[0-9a-f]{40})/|[^/]*/)")


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What is shown of one dataset. `num_rows` is None where that is not known without reading all of it.

    `columns` maps a column's name to its kind; `statistics` to lines such as "mean: 12.5 tokens". `samples` holds
    the first rows as they are.
    """

    name: str
    num_rows: int | None
    columns: Mapping[str, str]
    statistics: Mapping[str, Sequence[str]]
    num_statistics_rows: int
    samples: Sequence[Mapping[str, Any]]
    dataset_id: str | None = None
    revision: str | None = None


def describe_dataset(
    rows: Iterable[Mapping[str, Any]],
    num_rows: int | None,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
    *,
    name: str = "Unnamed dataset",
    dataset_id: str | None = None,
    revision: str | None = None,
) -> DatasetFacts:
    """Facts of a dataset from its first rows; `rows` may be a datasets.Dataset, or any rows as mappings.

    `num_rows` is None where nobody knows it. `count_tokens` gives the number of tokens of each of several texts.
    """
    first = list(islice(iter(rows), STATISTICS_ROWS))
    names = list(first[0]) if first else []
    values = {column: [row[column] for row in first] for column in names}
    described = {column: _describe(values[column], count_tokens) for column in names}
    return DatasetFacts(
        name=name,
        num_rows=num_rows,
        columns={column: kind for column, (kind, _) in described.items()},
        statistics={column: lines for column, (_, lines) in described.items()},
        num_statistics_rows=len(first),
        samples=first[:SAMPLE_ROWS],
        dataset_id=dataset_id,
        revision=revision,
    )


def describe_datasets(
    dataset: Any, count_tokens: Callable[[Sequence[str]], Sequence[int]], *, name: str | None = None
) -> list[DatasetFacts]:
    """Facts of a Dataset or an IterableDataset of the package datasets, or of each in a dict of them, by its name.

    Any other rows that are mappings do as well. Only the first rows are read, and none where they can be had once
    only. The id and the revision on the hub come from where the files were downloaded; a streamed dataset's size is
    what its origin states, if anything.
    """
    if isinstance(dataset, Mapping):
        return [facts for key, inner in dataset.items() for facts in describe_datasets(inner, count_tokens, name=key)]
    dataset_id, revision = _origin(getattr(dataset, "download_checksums", None) or {})
    size = len(dataset) if hasattr(dataset, "__len__") else _stated_size(dataset)
    shown = name or getattr(getattr(dataset, "info", None), "dataset_name", None) or dataset_id or "Unnamed dataset"
    rows = () if iter(dataset) is dataset else dataset
    return [describe_dataset(rows, size, count_tokens, name=shown, dataset_id=dataset_id, revision=revision)]


def _origin(checksums: Iterable[str]) -> tuple[str | None, str | None]:
    """The hub id and the revision that a dataset's files were downloaded from."""
    for source in checksums:
        if match := _HUB_FILE.match(source):
            return match["id"], match["revision"]
    return None, None


def _stated_size(dataset: Any) -> int | None:
    splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
    split = splits.get(str(getattr(dataset, "split", None)))
    return None if split is None else split.num_examples


def _describe(values: Sequence[Any], count_tokens: Callable[[Sequence[str]], Sequence[int]]) -> tuple[str, list[str]]:
    """The kind of a column and its statistics in words."""
    if all(isinstance(value, str) for value in values):
        return "string", _spread(count_tokens(values), "tokens", 0)
    if all(isinstance(value, bool | int) for value in values):
        shares = Counter(values)
        return "int", [f"{value}: {shares[value] / len(values):.2%}" for value in sorted(shares)]
    if all(isinstance(value, bool | int | float) for value in values):
        return "float", _spread(values, "", 2)
    if all(isinstance(value, list | tuple) for value in values):
        return "list", _spread([len(value) for value in values], "elements", 0)
    return "mixed", []


def _spread(numbers: Sequence[float], unit: str, num_digits: int) -> list[str]:
    found = {"min": min(numbers), "mean": statistics.fmean(numbers), "max": max(numbers)}
    digits = {"min": num_digits, "mean": 2, "max": num_digits}
    return [f"{name}: {value:.{digits[name]}f} {unit}".rstrip() for name, value in found.items()]
