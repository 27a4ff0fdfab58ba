"""Files of labelled data: which there are, how they are cut into slices, and the rows of a slice.

Parquet, Arrow streams (a dataset as save_to_disk leaves it), JSON lines and TSV, the last two also gzipped. A slice
can be read without reading what stands before it (but for gzip, which must be decompressed). It knows files and
columns, and nothing of what a row means.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import InputError
from crossenc.loop.lists import offsets_of
from pipelines import train_layout as layouts
from pipelines.inputs import (
    FileScan,
    column_hashes,
    estimate_items,
    first_line,
    hash_ids,
    is_damage,
    naming_damage,
    read_batches,
    read_footer,
)
from pipelines.lines import open_lines, parse_json, read_lines
from pipelines.plan import cut, default_shard_candidates
from pipelines.storage import FileInfo, Location, exists, expand, locate, open_input, read_bytes, redact
from pipelines.train_data_config import LabelledData
from pipelines.train_layout import LabelledColumns

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz")
_BATCH_ROWS = 1024
#: Pairs in a slice, at least: seconds of tokenising, which a look into a file is little beside.
_SLICE_PAIRS = 4_096
_BUFFER_BYTES = 8 * 2**20
#: Lines that tell what the columns of a JSON file are.
_SCHEMA_LINES = 100

Format = Literal["parquet", "arrow", "jsonl", "tsv"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows [row_start, row_end) of an input file: the unit of work. Rows are numbered from 0, lines too.

    Reading starts at the byte `offset` (of the decompressed content), where row `offset_row` begins. `num_rows` is
    less than the range holds where lines are blank; `num_pairs` is an estimate.
    """

    slice_id: str
    file: int
    row_start: int
    row_end: int
    num_rows: int
    num_pairs: int
    offset: int = 0
    offset_row: int = 0


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a file that are not blank, with their numbers. Of one that is too long only the beginning is there."""

    numbers: list[int]
    lines: list[bytes]


class DamagedError(Exception):
    """The file is damaged where it was read."""


def list_files(data: LabelledData, storage_options: dict[str, Any]) -> list[FileInfo]:
    """Every file of `data`, once each, in a stable order. Raises InputError where there is none, or no right one."""
    found: dict[str, FileInfo] = {}
    for uri in data.uris:
        place = locate(uri, storage_options)
        entries = expand(place, SUFFIXES) if has_magic(uri) or exists(place) else _files_in(place)
        for file in entries:
            format_of(file)
            found.setdefault(file.location.uri, file)
    return list(found.values())


def _files_in(folder: Location) -> list[FileInfo]:
    if exists(folder / "dataset_dict.json"):
        raise InputError(f"{folder} holds several datasets (a DatasetDict): name the folder of one of its splits")
    if not exists(folder / "state.json"):
        return expand(folder, SUFFIXES)
    # Left by save_to_disk. Beside the data there may be files of the package's cache.
    names = [entry["filename"] for entry in json.loads(read_bytes(folder / "state.json"))["_data_files"]]
    return [expand(folder / name, ".arrow")[0] for name in names]


def format_of(file: FileInfo) -> Format:
    """What kind of file it is, by its name. Raises InputError for an unknown one."""
    name = file.location.name.lower().removesuffix(".gz")
    formats: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".json": "jsonl"}
    formats[".tsv"] = "tsv"
    for suffix, kind in formats.items():
        if name.endswith(suffix) and (kind in ("jsonl", "tsv") or not file.location.name.lower().endswith(".gz")):
            return kind
    raise InputError(f"{file.location} is of no known kind; labelled data has the suffix {', '.join(SUFFIXES)}")


def has_rows(file: FileInfo) -> bool:
    """Whether there is anything in a file. Raises InputError for a damaged one."""
    kind = format_of(file)
    if file.num_bytes == 0:
        return False
    if kind == "parquet":
        return int(read_footer(file).num_rows) > 0
    if kind == "arrow":
        with _naming_arrow(file), open_input(file) as source:
            return any(batch.num_rows for batch in pa.ipc.open_stream(source))
    with open_lines(file) as stream:
        return any(not line.isspace() for line, _ in read_lines(stream))


def find_columns(data: LabelledData, files: Sequence[FileInfo]) -> LabelledColumns:
    """The columns of all files. Raises InputError for files that are not alike."""
    found = [_columns_of(data, file) for file in files]
    for file, columns in zip(files, found, strict=True):
        if columns != found[0]:
            raise InputError(
                f"{files[0].location} is {_words(found[0])}, but {file.location} is {_words(columns)}; make them alike,"
                " or name them as data of their own"
            )
    return found[0]


def _words(columns: LabelledColumns) -> str:
    return f"{columns.layout} with {', '.join(columns.names.values())}"


def _columns_of(data: LabelledData, file: FileInfo) -> LabelledColumns:
    schema, has_texts = schema_of(file), data.queries is not None
    if schema is None:
        if data.layout not in ("auto", "triples") or data.columns:
            raise InputError(
                f"{file.location} has no column names: it can be read as triples, of texts or of ids, only"
            )
        return layouts.triples(has_texts)
    return layouts.resolve(schema, data.layout, data.columns, has_texts, str(file.location))


def schema_of(file: FileInfo) -> pa.Schema | None:
    """The columns of a file, None for one whose lines are fields without names. Raises InputError for a damaged one."""
    kind = format_of(file)
    if kind == "tsv":
        return None
    if kind == "parquet":
        return read_footer(file).schema.to_arrow_schema()
    if kind == "jsonl":
        return _json_schema(file)
    with _naming_arrow(file), open_input(file) as source:
        schema = pa.ipc.open_stream(source).schema
    if any(pa.types.is_dictionary(kind) for kind in schema.types):
        raise InputError(f"{file.location} has dictionary-coded columns: write it again as Parquet")
    return schema


def _json_schema(file: FileInfo) -> pa.Schema:
    rows = []
    with open_lines(file) as stream:
        for number, (line, _) in enumerate(read_lines(stream)):
            if number == _SCHEMA_LINES:
                break
            row = parse_json(line)[0]
            rows += [row] if row is not None else []
    if not rows:
        raise InputError(f"{file.location} has no JSON object in its first {_SCHEMA_LINES} lines, one a line")
    return layouts.json_schema(rows)


# --- slices


def cut_slices(
    files: Sequence[FileInfo], columns: LabelledColumns, grouped: bool, slice_pairs: int | None
) -> list[Slice]:
    """All rows of the files in slices of about `slice_pairs` pairs; between rows of one query only if not `grouped`."""
    slices: list[Slice] = []
    num_bytes = sum(file.num_bytes for file in files)
    for index, file in enumerate(files):
        kind = format_of(file)
        if kind in ("jsonl", "tsv"):
            key = _line_key(columns) if grouped else None
            per_row = 1 + len(columns.negatives)
            # A pair of tokens is seldom more than 2 KB of text: about as much as slice_pairs pairs elsewhere.
            most = min(64 * 2**20, max(2**20, num_bytes // 256))
            found = _cut_lines(file, key, slice_pairs or 32_768, per_row, most)
        else:
            scan, offsets = (
                _scan_parquet(file, columns, grouped) if kind == "parquet" else _scan_arrow(file, columns, grouped)
            )
            target = slice_pairs or max(_SLICE_PAIRS, default_shard_candidates(num_bytes // 512))
            found = [_within(scan, offsets, *entry) for entry in cut(scan, target, anywhere=False)]
        slices += [_numbered(entry, index, file, len(slices) + place) for place, entry in enumerate(found)]
    return slices


def _numbered(entry: Slice, index: int, file: FileInfo, place: int) -> Slice:
    identity = json.dumps([file.location.uri, file.num_bytes, file.version, entry.row_start, entry.row_end])
    slice_id = f"{place:06d}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return Slice(slice_id, index, *(getattr(entry, name) for name in Slice.__slots__[2:]))


def _within(scan: FileScan, offsets: NDArray[np.int64], start: int, end: int, num_pairs: int) -> Slice:
    block = int(np.searchsorted(scan.row_group_starts, start, side="right")) - 1
    return Slice("", 0, start, end, end - start, num_pairs, int(offsets[block]), int(scan.row_group_starts[block]))


def _scan(
    file: FileInfo,
    schema: pa.Schema,
    starts: NDArray[np.int64],
    hashes: NDArray[np.uint64] | None,
    before: NDArray[np.int64],
) -> FileScan:
    """What plan.cut cuts: at the first rows of `hashes`' runs where there are any, at any row otherwise."""
    run_starts = np.arange(int(starts[-1]), dtype=np.int64)
    if hashes is not None:
        run_starts = np.flatnonzero(np.concatenate([np.ones(1, bool), hashes[1:] != hashes[:-1]])[: len(hashes)])
    runs = np.append(run_starts, starts[-1])
    return FileScan(file, schema, starts, run_starts, np.empty(0, np.uint64), before[runs])


def _scan_parquet(file: FileInfo, columns: LabelledColumns, grouped: bool) -> tuple[FileScan, NDArray[np.int64]]:
    footer = read_footer(file)
    starts = offsets_of(np.array([footer.row_group(g).num_rows for g in range(footer.num_row_groups)], np.int64))
    hashes = column_hashes(file, footer, columns.key) if grouped else None
    if columns.lists:
        before = sum((estimate_items(footer, name, starts) for name in columns.lists), np.zeros(1, np.int64))
    else:
        before = np.arange(starts[-1] + 1) * (1 + len(columns.negatives))
    scan = _scan(file, footer.schema.to_arrow_schema(), starts, hashes, np.asarray(before, np.int64))
    return scan, np.zeros(len(starts), np.int64)


def _scan_arrow(file: FileInfo, columns: LabelledColumns, grouped: bool) -> tuple[FileScan, NDArray[np.int64]]:
    num_rows, offsets, items, hashes = [], [], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    with _naming_arrow(file), open_input(file) as source:
        schema = pa.ipc.open_stream(source).schema
        for offset, batch in _read_messages(source, schema):
            offsets.append(offset)
            num_rows.append(batch.num_rows)
            if grouped:
                hashes.append(hash_ids(batch.column(columns.key)))
            lists = [pc.fill_null(pc.list_value_length(batch.column(name)), 0) for name in columns.lists]
            each = sum((lengths.to_numpy() for lengths in lists), np.zeros(batch.num_rows, np.int64))
            items.append(each if lists else each + 1 + len(columns.negatives))
    starts = offsets_of(np.array(num_rows, np.int64))
    before = offsets_of(np.concatenate(items))
    return _scan(file, schema, starts, np.concatenate(hashes) if grouped else None, before), np.array([*offsets, 0])


def _line_key(columns: LabelledColumns) -> Callable[[bytes], Any]:
    def key(line: bytes) -> Any:
        value = (parse_json(line)[0] or {}).get(columns.key)
        return str(value) if isinstance(value, str | int) else None

    return key


def _cut_lines(
    file: FileInfo, key: Callable[[bytes], Any] | None, slice_pairs: int, pairs_per_row: int, most_bytes: int
) -> list[Slice]:
    """Reads the file once. A slice ends with `slice_pairs` pairs, or `most_bytes`, and where `key` then changes."""
    slices: list[Slice] = []
    at = number = 0
    start, offset, num_rows, last = 0, 0, 0, b""

    def end_slice() -> None:
        if num_rows:
            slices.append(Slice("", 0, start, number, num_rows, num_rows * pairs_per_row, offset, start))

    with open_lines(file) as stream:
        for line, num_bytes in read_lines(stream):
            is_full = num_rows and (num_rows * pairs_per_row >= slice_pairs or at - offset >= most_bytes)
            if is_full and not line.isspace() and (key is None or key(line) != key(last)):
                end_slice()
                start, offset, num_rows = number, at, 0
            if not line.isspace():
                num_rows, last = num_rows + 1, line
            at, number = at + num_bytes, number + 1
    end_slice()
    return slices


# --- rows


def read_slice(
    file: FileInfo, entry: Slice, columns: Sequence[str], texts: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch] | Lines]:
    """The slice's rows in batches: of Arrow with the number of the first row, or of lines.

    `texts` are those of `columns` that may be long. Raises DamagedError where the file is damaged.
    """
    kind = format_of(file)
    if kind in ("jsonl", "tsv"):
        yield from _lines_of(file, entry)
        return
    read = _read_parquet if kind == "parquet" else _read_arrow
    try:
        with open_input(file) as source:
            for first_row, batch in read(source, entry, columns, texts):
                low, high = max(first_row, entry.row_start), min(first_row + batch.num_rows, entry.row_end)
                for start in range(low, high, _BATCH_ROWS):
                    yield start, batch.slice(start - first_row, min(_BATCH_ROWS, high - start))
    except Exception as error:
        if not is_damage(error):
            raise
        raise DamagedError(redact(first_line(error))) from None


def _read_parquet(
    source: pa.NativeFile, entry: Slice, columns: Sequence[str], texts: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    footer = pq.read_metadata(source)
    starts = offsets_of(np.array([footer.row_group(g).num_rows for g in range(footer.num_row_groups)], np.int64))
    groups = np.flatnonzero((starts[:-1] < entry.row_end) & (starts[1:] > entry.row_start)).tolist()
    at = int(starts[groups[0]]) if groups else 0
    for batch in read_batches(source, footer, columns, texts, max_rows=_BATCH_ROWS, row_groups=groups):
        yield at, batch
        at += batch.num_rows
        if at >= entry.row_end:
            return


def _read_arrow(
    source: pa.NativeFile, entry: Slice, columns: Sequence[str], texts: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    schema = pa.ipc.open_stream(source).schema
    source.seek(entry.offset)
    at = entry.offset_row
    for _, batch in _read_messages(source, schema):
        yield at, batch.select(list(columns))
        at += batch.num_rows
        if at >= entry.row_end:
            return


def _read_messages(source: pa.NativeFile, schema: pa.Schema) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches of an Arrow stream from where `source` stands, each with the byte at which it begins."""
    while True:
        offset = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        yield offset, pa.ipc.read_record_batch(message, schema)


@contextmanager
def _naming_arrow(file: FileInfo) -> Iterator[None]:
    with naming_damage(f"{file.location} is not a sound Arrow stream, as save_to_disk of datasets writes it"):
        yield


def _lines_of(file: FileInfo, entry: Slice) -> Iterator[Lines]:
    numbers: list[int] = []
    lines: list[bytes] = []
    num_bytes = 0
    with open_lines(file) as stream:
        stream.seek(entry.offset)  # forward only, so that a gzipped file is decompressed once
        for number, (line, _) in enumerate(read_lines(stream), start=entry.row_start):
            if number == entry.row_end:
                break
            if line.isspace():
                continue
            numbers.append(number)
            lines.append(line)
            num_bytes += len(line)
            if len(lines) == _BATCH_ROWS or num_bytes > _BUFFER_BYTES:
                yield Lines(numbers, lines)
                numbers, lines, num_bytes = [], [], 0
    if lines:
        yield Lines(numbers, lines)
