"""Texts by id on each node: the tables `queries` and `corpus` copied once per node, memory-mapped, looked up by id.

A table is Parquet, JSON lines as BEIR has them, or lines with id and text as MS MARCO has them, the last two also
gzipped.

A store is a folder: the ids and texts laid end to end in one file, and beside it where each one is, in the order of
the ids' hashes. Building one streams the source, so a table larger than memory works; looking up touches only the
pages that are needed. It knows nothing of shards or models.
"""

import hashlib
import json
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from crossenc.errors import InputError
from pipelines import layout as layouts
from pipelines.inputs import check_unchanged, hash_ids, naming_damage, read_batches, read_footer
from pipelines.lines import json_lines, numbered_lines
from pipelines.storage import FileInfo, expand, locate, open_input

#: Part of a store's name: a store of another format is another store.
_FORMAT = 1
#: An id of more bytes is no id; without a limit a small file could hold gigabytes of them.
MAX_ID_BYTES = 2**16
_BATCH_ROWS = 4096
_BATCH_BYTES = 64 * 2**20
_NULL = -1
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz")
#: What BEIR and others call the id in JSON lines.
JSON_IDS = ("_id", "id")
#: Lines that tell the names of the other columns.
_SCHEMA_LINES = 100

#: A text as UTF-8 bytes; its number of bytes where they are too many to hold; or None for null.
Text = bytes | int | None


@dataclass(frozen=True, slots=True)
class TextTable:
    """Where the texts of one kind of id come from: files, and the columns in them (of lines without names, numbers)."""

    kind: str  # "query" or "document", for messages
    files: tuple[FileInfo, ...]
    id_column: str
    text_column: str
    title_column: str | None

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        return [self.id_column, self.text_column, *([self.title_column] if self.title_column else [])]

    @property
    def digest(self) -> str:
        """Identifies the content: names, sizes and versions of the files, and the columns."""
        state: list[Any] = [_FORMAT, *([str(f.location), f.num_bytes, f.version] for f in self.files)]
        state += [self.id_column, self.text_column, self.title_column]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]


def find_table(
    kind: str, uri: str, id_role: str, names: Mapping[str, str], storage_options: Mapping[str, Any]
) -> TextTable:
    """The table at `uri`, with its columns found by their usual names. Raises InputError naming what is missing.

    `names` are those of the job, which name columns of the candidates too: an id role that fits no column here is
    taken to be about those.
    """
    files = tuple(expand(locate(uri, storage_options), _SUFFIXES))
    for file in files:
        if _format_of(file) != _format_of(files[0]):
            raise InputError(f"{files[0].location} and {file.location} are of different kinds: name files of one kind")
    found = [_find_columns(kind, file, id_role, names) for file in files]
    for file, columns in zip(files, found, strict=True):
        if columns != found[0]:
            raise InputError(f"{files[0].location} and {file.location} have different columns: make them alike")
    return TextTable(kind, files, *found[0])


def find_tables(
    queries: str | None, corpus: str | None, names: Mapping[str, str], storage_options: Mapping[str, Any]
) -> tuple[TextTable | None, TextTable | None]:
    """The tables of queries and documents, None for one that is not given. Errors as find_table's."""
    return (
        find_table("query", queries, "query_id", names, storage_options) if queries else None,
        find_table("document", corpus, "doc_id", names, storage_options) if corpus else None,
    )


def _format_of(file: FileInfo) -> Literal["parquet", "jsonl", "tsv"]:
    """What kind of file it is, by its name: Parquet, unless that says otherwise."""
    name = file.location.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return "jsonl"
    return "tsv" if name.endswith(".tsv") else "parquet"


def _find_columns(kind: str, file: FileInfo, id_role: str, names: Mapping[str, str]) -> tuple[str, str, str | None]:
    if _format_of(file) == "tsv":
        return "0", "1", None
    is_json, aliases = _format_of(file) == "jsonl", dict(layouts.ALIASES)
    if is_json:
        schema = _json_schema(file)
        aliases[id_role] = (*JSON_IDS, *aliases[id_role])
    else:
        schema = read_footer(file).schema.to_arrow_schema()
        layouts.check_schema(schema, str(file.location))
    own_roles = ("query",) if kind == "query" else ("text", "title")
    names = {role: name for role, name in names.items() if role in own_roles or name in schema.names}
    finder = layouts.Finder(schema, names, str(file.location), aliases)
    id_column = finder.required(id_role)
    if kind == "query":
        text, title = finder.optional("query") or finder.required("text"), None
    else:
        text, title = finder.required("text"), finder.optional("title")
    if is_json:
        return id_column, text, "title" if kind == "document" and title is None else title
    for name, is_id in ((id_column, True), (text, False), (title, False)):
        column_type = schema.field(name).type if name else pa.string()
        if not layouts.is_text(column_type) and not (is_id and pa.types.is_integer(column_type)):
            raise InputError(f"{file.location}: column {name!r} is {column_type}, but must be text; cast it first")
    return id_column, text, title


def _json_schema(file: FileInfo) -> pa.Schema:
    """The names in the first lines. What kind of values they have is for each line to say."""
    names = dict.fromkeys(name for _, body in islice(json_lines(file), _SCHEMA_LINES) for name in body)
    if not names:
        raise InputError(f"{file.location} has no JSON object, one a line")
    return pa.schema([(name, pa.null()) for name in names])


def default_cache() -> Path:
    """The node's cache folder: $CROSSENC_CACHE, or ~/.cache/crossenc."""
    return Path(os.environ.get("CROSSENC_CACHE") or Path.home() / ".cache" / "crossenc")


class TextStore:
    """Read access to a built store."""

    def __init__(self, folder: Path) -> None:
        self._hashes: NDArray[np.uint64] = np.asarray(np.load(folder / "hashes.npy", mmap_mode="r"))
        self._places: NDArray[np.int64] = np.asarray(np.load(folder / "places.npy", mmap_mode="r"))
        with (folder / "texts").open("rb") as file:  # never empty, because an empty file cannot be mapped
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._hashes)

    def lookup(self, ids: Sequence[str]) -> list[tuple[Text, str | None]]:
        """For each id its text, or None and why there is none: "unknown" or "ambiguous" (two texts)."""
        hashes = hash_ids(pa.array(ids, pa.large_string()))
        first = np.searchsorted(self._hashes, hashes, side="left").tolist()
        last = np.searchsorted(self._hashes, hashes, side="right").tolist()
        return [self._find(id_.encode(), *span) for id_, *span in zip(ids, first, last, strict=True)]

    def _find(self, key: bytes, first: int, last: int) -> tuple[Text, str | None]:
        found: set[Text] = set()
        for start, num_id_bytes, num_text_bytes in self._places[first:last].tolist():
            text_start = start + num_id_bytes
            if self._data[start:text_start] == key:
                if num_text_bytes >= 0:
                    found.add(self._data[text_start : text_start + num_text_bytes])
                else:
                    found.add(None if num_text_bytes == _NULL else -num_text_bytes)
        if len(found) == 1:
            return found.pop(), None
        return None, "ambiguous" if found else "unknown"


@lru_cache(maxsize=4)
def open_store(table: TextTable, cache: Path, max_text_bytes: int) -> TextStore:
    """The store of `table` on this node, built first where it is absent; other processes wait for the builder.

    Of a text of more than `max_text_bytes` only the length is stored.
    """
    folder = cache / "texts" / f"{table.digest}-{max_text_bytes}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            for remains in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a builder that was killed
                shutil.rmtree(remains)
            building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
            _build(table, building, max_text_bytes)
            os.replace(building, folder)
    return TextStore(folder)


def _build(table: TextTable, folder: Path, max_text_bytes: int) -> None:
    folder.mkdir()
    hashes = [np.empty(0, np.uint64)]
    places = [np.empty((0, 3), np.int64)]
    with (folder / "texts").open("wb") as out:
        out.write(b"\n")
        for batch in _read(table):
            ids = id_bytes(batch.column(table.id_column))
            titles = batch.column(table.title_column) if table.title_column else None
            distinct, rows = distinct_texts(batch.column(table.text_column), titles, max_text_bytes)
            hashes.append(hash_ids(batch.column(table.id_column)))
            places.append(_append(out, [_table_id(id_, table) for id_ in ids], [distinct[row] for row in rows]))
        _make_durable(out)
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    for name, array in (("hashes.npy", joined[order]), ("places.npy", np.concatenate(places)[order])):
        with (folder / name).open("wb") as out:
            np.save(out, array)
            _make_durable(out)


def _table_id(id_: Text, table: TextTable) -> bytes:
    if isinstance(id_, int):
        raise InputError(
            f"an id of the {table.kind} table has {id_:,} bytes, but may have at most {MAX_ID_BYTES:,};"
            " give shorter ids"
        )
    return id_ or b""


def _read(table: TextTable) -> Iterator[pa.RecordBatch]:
    columns = table.columns
    for file in table.files:
        if _format_of(file) == "parquet":
            with naming_damage(f"{file.location}, the {table.kind} table, cannot be read"), open_input(file) as source:
                yield from read_batches(source, pq.read_metadata(source), columns, columns, max_rows=_BATCH_ROWS)
        else:
            yield from _in_batches(_json_rows(file, table) if _format_of(file) == "jsonl" else _tsv_rows(file), columns)
        check_unchanged(file)  # or another content would bear the name of the planned one


def _in_batches(rows: Iterator[tuple[bytes | None, ...]], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    held: list[tuple[bytes | None, ...]] = []
    num_bytes = 0
    for row in chain(rows, [None]):
        if held and (row is None or len(held) == _BATCH_ROWS or num_bytes > _BATCH_BYTES):
            arrays = [pa.array(values, pa.large_binary()) for values in zip(*held, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
            held, num_bytes = [], 0
        if row is not None:
            held.append(row)
            num_bytes += sum(len(value) for value in row if value)


def _json_rows(file: FileInfo, table: TextTable) -> Iterator[tuple[bytes | None, ...]]:
    """Id, text and title of each line; a text or title may be null, or absent."""
    for number, body in json_lines(file):
        id_, *texts = (body.get(name) for name in table.columns)
        if not isinstance(id_, str | int) or isinstance(id_, bool):
            raise InputError(f"{file.location}, line {number}: no {table.id_column}; a line has an id and a text")
        if not all(isinstance(text, str | None) for text in texts):
            wanted = " and ".join(table.columns[1:])
            raise InputError(f"{file.location}, line {number}: {wanted} must be text, or null")
        # A lone surrogate is no UTF-8 then, which whoever reads the text finds out.
        encoded = (None if text is None else text.encode(errors="surrogatepass") for text in texts)
        yield str(id_).encode(errors="surrogatepass"), *encoded


def _tsv_rows(file: FileInfo) -> Iterator[tuple[bytes | None, ...]]:
    for number, line in numbered_lines(file):
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != 2:
            raise InputError(f"{file.location}, line {number}: {len(fields)} fields; a line is an id, a tab and a text")
        yield tuple(fields)


def _append(out: BinaryIO, ids: Sequence[bytes], texts: Sequence[Text]) -> NDArray[np.int64]:
    """Writes rows to `out`; returns start, bytes of the id and bytes of the text (or what is wrong), int64 [n, 3]."""
    stored = [text if isinstance(text, bytes) else b"" for text in texts]
    sizes = [_NULL if text is None else -text if isinstance(text, int) else len(text) for text in texts]
    lengths = [len(id_) + len(text) for id_, text in zip(ids, stored, strict=True)]
    starts = out.tell() + np.cumsum([0, *lengths])[:-1]
    out.write(b"".join(part for row in zip(ids, stored, strict=True) for part in row))
    return np.stack([starts, np.array([len(id_) for id_ in ids], np.int64), np.array(sizes, np.int64)], axis=1)


def _make_durable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def distinct_texts(texts: pa.Array, titles: pa.Array | None, max_text_bytes: int) -> tuple[list[Text], list[int]]:
    """The distinct texts of a column, and for each row which of them is its own.

    With a title a text is `title text`; null stays null. A value of more than `max_text_bytes` never becomes a
    Python object: a small file can hold gigabytes of them.
    """
    values, rows = _distinct(texts, max_text_bytes)
    if titles is None:
        return values, rows.tolist()
    title_values, title_rows = _distinct(titles, max_text_bytes)
    pairs, rows = np.unique(title_rows * len(values) + rows, return_inverse=True)
    joined = [
        _join(title_values[title], values[text], max_text_bytes)
        for title, text in (divmod(pair, len(values)) for pair in pairs.tolist())
    ]
    return joined, rows.tolist()


def _distinct(column: pa.Array, max_bytes: int) -> tuple[list[Text], NDArray[np.int64]]:
    if not pa.types.is_dictionary(column.type):
        values = _texts(as_binary(column), pa.array(np.arange(len(column))), max_bytes)
        positions: dict[Text, int] = {}
        rows = np.array([positions.setdefault(value, len(positions)) for value in values], np.int64)
        return list(positions), rows
    null = len(column.dictionary)
    used, rows = np.unique(column.indices.cast(pa.int64()).fill_null(null).to_numpy(), return_inverse=True)
    return _texts(column.dictionary, pa.array(used, mask=used == null), max_bytes), rows


def _texts(values: pa.Array, chosen: pa.Array, max_bytes: int) -> list[Text]:
    lengths = pc.binary_length(values).take(chosen)
    short = pc.if_else(pc.less_equal(lengths, max_bytes), chosen, pa.scalar(None, chosen.type))
    texts = values.take(short).cast(pa.large_binary()).to_pylist()
    return [length if text is None else text for text, length in zip(texts, lengths.to_pylist(), strict=True)]


def _join(title: Text, text: Text, max_bytes: int) -> Text:
    if text is None or not title:
        return text
    num_bytes = sum(part if isinstance(part, int) else len(part) for part in (title, b" ", text))
    if isinstance(title, bytes) and isinstance(text, bytes) and num_bytes <= max_bytes:
        return title + b" " + text
    return num_bytes


def id_bytes(column: pa.Array) -> list[Text]:
    """Each row's id as bytes, an integer as its digits; of an id with more than MAX_ID_BYTES only their number."""
    distinct, rows = _distinct(column, MAX_ID_BYTES)
    return [distinct[row] for row in rows.tolist()]


def as_binary(column: pa.Array) -> pa.Array:
    """Text, or integers as their digits, as large_binary; null stays null. Nothing is checked to be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())
