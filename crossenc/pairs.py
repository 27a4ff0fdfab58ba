"""Pairs of texts, and labels, out of what users pass: lists, tuples, arrays, generators; or one bare pair."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossenc.errors import InputError

Pair = tuple[str, str] | list[str]


def is_one_pair(inputs: object) -> bool:
    """Whether `inputs` is one bare (query, document) pair rather than several inputs."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist() if inputs.ndim == 1 else None
    return isinstance(inputs, tuple | list) and len(inputs) == 2 and all(isinstance(text, str) for text in inputs)


def split_pairs(inputs: Pair | Iterable[Pair] | NDArray[Any]) -> tuple[list[str], list[str]]:
    """Queries and documents. Raises InputError naming the first input that is not a pair."""
    pairs = _listed(inputs)
    for position, pair in enumerate(pairs):
        _check_pair(pair, position)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def split_texts(inputs: Iterable[Any]) -> tuple[list[Pair], list[int], list[str], list[int]]:
    """Pairs with their places among `inputs`, and texts that stand alone behind the first with theirs.

    Raises InputError naming the first input that is neither.
    """
    items = _listed(inputs)
    texts = [place for place, item in enumerate(items) if place > 0 and isinstance(item, str)]
    alone = set(texts)
    pairs = [place for place in range(len(items)) if place not in alone]
    for place in pairs:
        _check_pair(items[place], place)
    return [items[place] for place in pairs], pairs, [items[place] for place in texts], texts


def label_tensors(labels: Sequence[Any], device: torch.device | None = None) -> Tensor | list[Tensor]:
    """The labels of B examples as a tensor [B], or as a list of B tensors where each label is a list."""
    if all(isinstance(label, list | tuple) or getattr(label, "ndim", 0) > 0 for label in labels):
        return [torch.as_tensor(label, device=device) for label in labels]
    return torch.tensor(labels, device=device)


def _listed(inputs: Any) -> list[Any]:
    """The inputs as a list, of one where a bare pair was given."""
    if isinstance(inputs, str | Mapping) or hasattr(inputs, "columns"):
        raise InputError(
            f"give a (query, document) pair or several of them, not a {type(inputs).__name__}: of a table pass the"
            " rows, such as frame[['query', 'document']].values"
        )
    items = list(inputs)
    return [items] if is_one_pair(inputs) else items


def _check_pair(pair: Any, position: int) -> None:
    if not isinstance(pair, tuple | list | np.ndarray) or len(pair) != 2:
        raise InputError(f"input {position} is not a (query, document) pair: give two texts")
