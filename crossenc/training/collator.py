"""Rows to a batch: columns of texts as lists, labels as tensors. Knows no model; losses tokenise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossenc.errors import ConfigError, InputError
from crossenc.pairs import label_tensors
from crossenc.training.samplers import DATASET_NAME, LABEL_COLUMNS


@dataclass
class CrossEncoderDataCollator:
    """Makes a batch of rows, which are dicts with the same keys.

    The first of `valid_label_columns` that a row has becomes "label": a tensor [B], or a list of B tensors where a
    label is a list. The other columns keep their names and their order, which is what losses go by. `prompts` and
    `router_mapping` are a text for all datasets or a dict with one for each by name; what holds for the batch goes in
    as "prompt" and "task". `preprocess_fn` is taken for compatibility and not called.
    """

    preprocess_fn: Callable[..., Any] | None = None
    valid_label_columns: list[str] = field(default_factory=lambda: list(LABEL_COLUMNS))
    router_mapping: str | Mapping[str, str] | None = field(default=None, repr=False)
    prompts: str | Mapping[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("prompts", "router_mapping"):
            given = getattr(self, name)
            if isinstance(given, Mapping) and any(isinstance(value, Mapping) for value in given.values()):
                raise ConfigError(
                    f"CrossEncoder {name} cannot be per-column: all columns of a row are read together. "
                    f"Give one text, or a dict from the names of datasets to texts"
                )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of rows; raises InputError for a column whose name the batch needs itself."""
        names = list(features[0])
        batch: dict[str, Any] = {}
        if DATASET_NAME in names:
            names.remove(DATASET_NAME)
            batch[DATASET_NAME] = features[0][DATASET_NAME]
        label = next((name for name in self.valid_label_columns if name in names), None)
        if label is not None:
            names.remove(label)
            batch["label"] = label_tensors([row[label] for row in features])
        for key, given in (("prompt", self.prompts), ("task", self.router_mapping)):
            value = _for_dataset(given, batch.get(DATASET_NAME))
            if value is not None:  # an empty prompt says that there is none, not even the default one
                batch[key] = value
        for name in names:
            if name in batch:
                raise InputError(f"a column is called {name!r}, as the batch's own {name} is: rename the column")
            batch[name] = [row[name] for row in features]
        return batch


def _for_dataset(given: str | Mapping[str, str] | None, dataset_name: str | None) -> str | None:
    if isinstance(given, Mapping):
        return None if dataset_name is None else given.get(dataset_name)
    return given
