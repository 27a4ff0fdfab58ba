"""Tokenised lists read again by number: whole parts, decoded, checked and kept as long as there is room for them.

It knows what preparing has stored, and nothing of batches; it needs no Ray.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import StorageError
from crossenc.loop.lists import TokenizedLists, concatenate, offsets_of
from crossenc.loop.order import Parts
from crossenc.records import TokenizedPairs
from pipelines.storage import Location, read_bytes
from pipelines.train_data import PreparedData, PreparedPart

#: Bytes of decoded parts that a process keeps, but for the newest one; and parts that it keeps however large they are:
#: one counts as so small a share of the bytes at most.
_KEPT_BYTES, _KEPT_PARTS = 512 * 2**20, 8
#: Parts that are read at once.
_READERS = 4
#: Decoded bytes of a token, a pair and a list, about: id and type; offset, label and truncated; the rest.
_TOKEN_BYTES, _PAIR_BYTES, _LIST_BYTES = 5, 13, 200


class _KeptParts:
    """The parts that were asked for last, decoded or on their way. Shared by the threads of a process."""

    def __init__(self) -> None:
        self._parts: OrderedDict[str, Future[TokenizedLists]] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="parts")

    def begin(self, place: Location, part: PreparedPart) -> Future[TokenizedLists]:
        """A part's lists, whose reading begins now where they are not kept."""
        key = f"{place.uri} {part.sha256}"
        with self._lock:
            found = self._parts.get(key)
            if found is None or (found.done() and found.exception() is not None):
                self._drop()
                found = self._parts[key] = self._readers.submit(_read_part, place, part)
            self._parts.move_to_end(key)
            return found

    def _drop(self) -> None:
        """Drops what was not asked for the longest, until what is left may be kept."""
        read = {key: found.result() for key, found in self._parts.items() if found.done() and not found.exception()}
        loads = {key: float(_loads(len(one), len(one.pairs), one.pairs.num_tokens)) for key, one in read.items()}
        total = sum(loads.values())
        for key, load in loads.items():
            if total <= 1:
                break
            total -= load
            del self._parts[key]


_kept_parts = _KeptParts()


def read_lists(prepared: PreparedData, indices: NDArray[np.int64]) -> TokenizedLists:
    """The lists with these numbers, in that order; a number may come twice.

    Only the parts that hold them are read, several at a time, and kept as `parts_of` says. Raises IndexError for a
    number out of [0, N), StorageError where a part is damaged or gone.
    """
    indices = np.asarray(indices, np.int64)
    wanted = list(_parts_with(prepared, indices))
    parts = [_begin(prepared, number) for number, _, _ in wanted]
    found = [part.result().take(rows) for part, (_, _, rows) in zip(parts, wanted, strict=True)]
    if len(found) == 1:
        return found[0]
    places = np.empty(len(indices), np.int64)
    places[np.concatenate([np.empty(0, np.int64), *(mine for _, mine, _ in wanted)])] = np.arange(len(indices))
    return concatenate(found).take(places)


def expect_lists(prepared: PreparedData, indices: NDArray[np.int64]) -> None:
    """Begins to read the parts with these lists, which will be asked for soon. Raises IndexError as `read_lists`."""
    for number, _, _ in _parts_with(prepared, indices):
        _begin(prepared, number)


def parts_of(prepared: PreparedData, num_pairs: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> Parts:
    """The parts, from the pairs and tokens of each list, int64 [N] both.

    A process keeps about 512 MiB of decoded parts, those asked for last, and eight of them however large they are.
    """
    num_lists = np.array([part.num_lists for part in prepared.parts], np.int64)
    starts = offsets_of(num_lists)[:-1]  # no part is without lists
    return Parts(num_lists, _loads(num_lists, np.add.reduceat(num_pairs, starts), np.add.reduceat(num_tokens, starts)))


def _parts_with(
    prepared: PreparedData, indices: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """The number of each part with some of these lists; their places in `indices`; their rows in the part."""
    starts = offsets_of(np.array([part.num_lists for part in prepared.parts], np.int64))
    if len(indices) and not (indices.min() >= 0 and indices.max() < starts[-1]):
        raise IndexError(f"lists are numbered from 0 to {starts[-1] - 1}, not {indices.min()} to {indices.max()}")
    of_part = np.searchsorted(starts, indices, side="right") - 1
    for number in np.unique(of_part).tolist():
        mine = np.flatnonzero(of_part == number)
        yield number, mine, indices[mine] - starts[number]


def _begin(prepared: PreparedData, number: int) -> Future[TokenizedLists]:
    part = prepared.parts[number]
    return _kept_parts.begin(prepared.folder / part.path, part)


def _loads(num_lists: Any, num_pairs: Any, num_tokens: Any) -> Any:
    """The share of what is kept that parts take, from their sizes."""
    num_bytes = _TOKEN_BYTES * num_tokens + _PAIR_BYTES * num_pairs + _LIST_BYTES * num_lists
    return np.minimum(num_bytes / _KEPT_BYTES, 1 / _KEPT_PARTS)


def _read_part(place: Location, part: PreparedPart) -> TokenizedLists:
    try:
        body = read_bytes(place)
    except FileNotFoundError:
        raise StorageError(f"{place} is gone: prepare the training data again") from None
    if hashlib.sha256(body).hexdigest() != part.sha256:
        raise StorageError(f"{place} is damaged: delete it and prepare the training data again")
    table = pq.read_table(io.BytesIO(body)).combine_chunks()

    def values(name: str) -> NDArray[Any]:
        flat: NDArray[Any] = pc.list_flatten(table.column(name)).combine_chunks().to_numpy(zero_copy_only=False)
        return flat

    types = None if table.column("token_type_ids").null_count else values("token_type_ids")
    return TokenizedLists(
        pairs=TokenizedPairs(values("input_ids"), offsets_of(values("lengths")), types, values("truncated")),
        sizes=table.column("num_pairs").to_numpy(),
        labels=values("labels"),
        weights=table.column("weight").to_numpy(),
        origins=tuple(f"{part.file}, row {row}" for row in table.column("row").to_pylist()),
    )
