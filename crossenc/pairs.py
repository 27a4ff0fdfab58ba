"""Pairs of texts out of what users pass: lists, tuples, arrays, generators; or one bare pair."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import InputError

Pair = tuple[str, str] | list[str]


def is_one_pair(inputs: object) -> bool:
    """Whether `inputs` is one bare (query, document) pair rather than several inputs."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist() if inputs.ndim == 1 else None
    return isinstance(inputs, tuple | list) and len(inputs) == 2 and all(isinstance(text, str) for text in inputs)


def split_pairs(inputs: Pair | Iterable[Pair] | NDArray[Any]) -> tuple[list[str], list[str], bool]:
    """Queries, documents, and whether `inputs` is one bare pair. Raises InputError naming the first that is none."""
    if isinstance(inputs, str | Mapping) or hasattr(inputs, "columns"):
        raise InputError(
            f"give a (query, document) pair or several of them, not a {type(inputs).__name__}: of a table pass the"
            " rows, such as frame[['query', 'document']].values"
        )
    items = list(inputs)
    is_single = is_one_pair(inputs)
    pairs = [items] if is_single else items
    for position, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list | np.ndarray) or len(pair) != 2:
            raise InputError(f"input {position} is not a (query, document) pair: give two texts")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], is_single
