"""Texts by id on each node: the tables `queries` and `corpus` copied once per node, memory-mapped, looked up by id.

A store is a folder with the texts as an Arrow IPC file and a sorted array of id hashes. Building one streams the
source, so a table larger than memory works; looking up touches only the pages that are needed. It knows nothing of
shards or models.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from crossenc.errors import InputError
from pipelines import layout as layouts
from pipelines.inputs import hash_ids, read_footer
from pipelines.storage import FileInfo, expand, locate, open_input

_BATCH_ROWS = 4096
_SCHEMA = pa.schema([("id", pa.large_binary()), ("text", pa.large_binary())])


@dataclass(frozen=True, slots=True)
class TextTable:
    """Where the texts of one kind of id come from: files, and the columns in them."""

    kind: str  # "query" or "document", for messages
    files: tuple[FileInfo, ...]
    id_column: str
    text_column: str
    title_column: str | None

    @property
    def digest(self) -> str:
        """Identifies the content: names, sizes and versions of the files, and the columns."""
        state: list[Any] = [[str(f.location), f.num_bytes, f.version] for f in self.files]
        state += [self.id_column, self.text_column, self.title_column]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]


def find_table(
    kind: str, uri: str, id_role: str, names: Mapping[str, str], storage_options: Mapping[str, Any]
) -> TextTable:
    """The table at `uri`, with its columns found by their usual names. Raises InputError naming what is missing."""
    files = tuple(expand(locate(uri, storage_options), ".parquet"))
    schemas = [read_footer(file).schema.to_arrow_schema() for file in files]
    text_role = "text" if kind == "document" else "query"
    found = []
    for file, schema in zip(files, schemas, strict=True):
        layouts.check_schema(schema, str(file.location))
        finder = layouts.Finder(schema, {k: v for k, v in names.items() if v in schema.names}, str(file.location))
        text = finder.optional(text_role) or finder.required("text")
        found.append((finder.required(id_role), text, finder.optional("title") if kind == "document" else None))
    if len(set(found)) > 1:
        raise InputError(f"the files of {uri} have different columns ({found[0]} and {found[1]}): make them alike")
    for name in found[0][:2]:
        if not layouts.is_text(schemas[0].field(name).type) and not pa.types.is_integer(schemas[0].field(name).type):
            raise InputError(f"{files[0].location}: column {name!r} is {schemas[0].field(name).type}, not text")
    return TextTable(kind, files, *found[0])


def default_cache() -> Path:
    """The node's cache folder: $CROSSENC_CACHE, or ~/.cache/crossenc."""
    return Path(os.environ.get("CROSSENC_CACHE") or Path.home() / ".cache" / "crossenc")


class TextStore:
    """Read access to a built store."""

    def __init__(self, folder: Path) -> None:
        self._hashes: NDArray[np.uint64] = np.load(folder / "hashes.npy", mmap_mode="r")
        self._rows: NDArray[np.int64] = np.load(folder / "rows.npy", mmap_mode="r")
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / "texts.arrow")))

    def __len__(self) -> int:
        return len(self._hashes)

    def lookup(self, ids: Sequence[str]) -> tuple[list[bytes | None], list[str | None]]:
        """For each id its text as UTF-8 bytes, or None and why: "unknown", "null" or "ambiguous" (two texts)."""
        hashes = hash_ids(pa.array(ids, pa.large_string()))
        first = np.searchsorted(self._hashes, hashes, side="left")
        last = np.searchsorted(self._hashes, hashes, side="right")
        spans = [range(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        rows = np.unique(self._rows[[at for span in spans for at in span]]) if spans else np.empty(0, np.int64)
        stored = self._take(rows)
        texts: list[bytes | None] = []
        problems: list[str | None] = []
        for id_, span in zip(ids, spans, strict=True):
            key = id_.encode()
            found = {stored[row][1] for row in self._rows[span.start : span.stop].tolist() if stored[row][0] == key}
            text = next(iter(found)) if len(found) == 1 else None
            texts.append(text)
            problems.append(
                "unknown" if not found else "ambiguous" if len(found) > 1 else "null" if text is None else None
            )
        return texts, problems

    def _take(self, rows: NDArray[np.int64]) -> dict[int, tuple[bytes, bytes | None]]:
        taken: dict[int, tuple[bytes, bytes | None]] = {}
        batches = rows // _BATCH_ROWS
        for batch_index in np.unique(batches).tolist():
            chosen = rows[batches == batch_index]
            batch = self._reader.get_batch(batch_index).take(pa.array(chosen - batch_index * _BATCH_ROWS))
            ids, texts = batch.column(0).to_pylist(), batch.column(1).to_pylist()
            taken.update(zip(chosen.tolist(), zip(ids, texts, strict=True), strict=True))
        return taken


@lru_cache(maxsize=4)
def open_store(table: TextTable, cache: Path) -> TextStore:
    """The store of `table` on this node, built first where it is absent; other processes wait for the builder."""
    folder = cache / "texts" / table.digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                _build(table, building)
                os.replace(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return TextStore(folder)


def _build(table: TextTable, folder: Path) -> None:
    folder.mkdir()
    hashes: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    pending: list[pa.RecordBatch] = []
    with pa.OSFile(str(folder / "texts.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        # Batches are re-cut to exactly _BATCH_ROWS rows, so that a row's batch is a division.
        for file in table.files:
            for batch in _read(table, file):
                hashes.append(hash_ids(batch.column(0)))
                pending.append(batch)
                if sum(b.num_rows for b in pending) >= _BATCH_ROWS:
                    pending = _flush(writer, pending)
        if any(b.num_rows for b in pending):
            writer.write_batch(pa.concat_batches(pending))
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    np.save(folder / "hashes.npy", joined[order])
    np.save(folder / "rows.npy", order.astype(np.int64))


def _flush(writer: pa.ipc.RecordBatchFileWriter, pending: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    joined = pa.concat_batches(pending)
    whole = joined.num_rows - joined.num_rows % _BATCH_ROWS
    for start in range(0, whole, _BATCH_ROWS):
        writer.write_batch(joined.slice(start, _BATCH_ROWS))
    return [joined.slice(whole)]


def _read(table: TextTable, file: FileInfo) -> list[pa.RecordBatch] | Any:
    columns = [table.id_column, table.text_column, *([table.title_column] if table.title_column else [])]
    try:
        with open_input(file) as source:
            for batch in pq.ParquetFile(source).iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                text = as_binary(batch.column(table.text_column))
                if table.title_column:
                    text = join_title(as_binary(batch.column(table.title_column)), text)
                yield pa.record_batch([as_binary(batch.column(table.id_column)), text], schema=_SCHEMA)
    except pa.ArrowException as error:
        raise InputError(f"{file.location} cannot be read ({error}); restore the {table.kind} table") from None


def as_binary(column: pa.Array) -> pa.Array:
    """Text, or integers as their digits, as large_binary; null stays null. Nothing is checked to be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())


def join_title(titles: pa.Array, texts: pa.Array) -> pa.Array:
    """`title text` where there is a title, the text alone where it is null or empty."""
    joined = pc.binary_join_element_wise(titles, texts, pa.scalar(b" ", pa.large_binary()))
    has_title = pc.greater(pc.fill_null(pc.binary_length(titles), 0), 0)
    return pc.if_else(has_title, joined, texts)
