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
    pairs, is_single = _listed(inputs)
    for position, pair in enumerate(pairs):
        _check_pair(pair, position)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], is_single


def split_texts(inputs: Iterable[Any]) -> tuple[list[Pair], list[int], list[str], list[int]]:
    """Pairs with their places among `inputs`, and texts that stand alone behind the first with theirs.

    Raises InputError naming the first input that is neither.
    """
    items, _ = _listed(inputs)
    texts = [place for place, item in enumerate(items) if place > 0 and isinstance(item, str)]
    alone = set(texts)
    pairs = [place for place in range(len(items)) if place not in alone]
    for place in pairs:
        _check_pair(items[place], place)
    return [items[place] for place in pairs], pairs, [items[place] for place in texts], texts


def _listed(inputs: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether it is one bare pair that was given."""
    if isinstance(inputs, str | Mapping) or hasattr(inputs, "columns"):
        raise InputError(
            f"give a (query, document) pair or several of them, not a {type(inputs).__name__}: of a table pass the"
            " rows, such as frame[['query', 'document']].values"
        )
    items = list(inputs)
    return ([items], True) if is_one_pair(inputs) else (items, False)


def _check_pair(pair: Any, position: int) -> None:
    if not isinstance(pair, tuple | list | np.ndarray) or len(pair) != 2:
        raise InputError(f"input {position} is not a (query, document) pair: give two texts")
