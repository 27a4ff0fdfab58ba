"""Looks at the input files of a run before any work starts: footers, columns, and where queries begin.

It reads footers and one id column, never a text. Damage, and files that do not fit together, are found here and
named, so that a run starts only on input that it can read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import InputError
from pipelines import layout as layouts
from pipelines.layout import Columns
from pipelines.storage import FileInfo, expand, info, locate, open_input, redact

T = TypeVar("T")

#: Hash that stands for a null id.
NULL_HASH = np.uint64(0)
_MAX_ROW_GROUPS = 1_000_000
_BUFFER_BYTES = 8 * 2**20
_BATCH_BYTES = 64 * 2**20
_REMEDY = "restore the file"


class CandidatesConfig(Protocol):
    """The settings of any job that reads candidates."""

    @property
    def candidate_uris(self) -> tuple[str, ...]: ...
    @property
    def layout(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def pass_through(self) -> Sequence[str]: ...
    @property
    def queries(self) -> str | None: ...
    @property
    def skip_bad_files(self) -> bool: ...
    @property
    def storage_options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class FileScan:
    """One candidates file: its row groups, and the runs of equal query ids in it.

    `row_group_starts` int64 [G + 1]; `run_starts` int64 [R], the first row of each run; `run_hashes` uint64 [R],
    a hash of its query id (NULL_HASH for null); `num_candidates_before` int64 [R + 1], candidates before each run
    and in all, estimated from the footer in the nested layout and exact otherwise.
    """

    file: FileInfo
    schema: pa.Schema
    row_group_starts: NDArray[np.int64]
    run_starts: NDArray[np.int64]
    run_hashes: NDArray[np.uint64]
    num_candidates_before: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return int(self.row_group_starts[-1])

    @property
    def num_candidates(self) -> int:
        return int(self.num_candidates_before[-1])


@dataclass(frozen=True, slots=True)
class Inputs:
    """The candidates of a run, scanned. `skipped` names unreadable files and why, where skipping is allowed."""

    columns: Columns
    scans: tuple[FileScan, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def is_clustered(self) -> bool:
        """Whether every query lies in one unbroken run of rows of one file."""
        hashes = np.concatenate([scan.run_hashes for scan in self.scans] or [np.empty(0, np.uint64)])
        hashes = hashes[hashes != NULL_HASH]
        return len(np.unique(hashes)) == len(hashes)


def list_candidates(config: CandidatesConfig) -> list[FileInfo]:
    """Every candidates file of the job, once each, in a stable order."""
    found: dict[str, FileInfo] = {}
    for uri in config.candidate_uris:
        for file in expand(locate(uri, config.storage_options), ".parquet"):
            found.setdefault(file.location.uri, file)
    return list(found.values())


def scan(config: CandidatesConfig, files: Sequence[FileInfo]) -> Inputs:
    """Reads the footers and query ids of `files`. Raises InputError naming the file and what to do.

    Where the job skips bad files, those that cannot be read now are left out and named.
    """
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(lambda file: _attempt(lambda: read_footer(file)), files))
    readable = _keep(config, files, footers, skipped)
    first, first_footer = readable[0]
    first_schema = first_footer.schema.to_arrow_schema()
    columns = _resolve(config, first_schema, first)
    for file, footer in readable[1:]:
        schema = footer.schema.to_arrow_schema()
        layouts.check_schema(schema, str(file.location))
        layouts.check_same(first_schema, schema, columns, str(first.location), str(file.location))
        other = _resolve(config, schema, file)
        if other != columns:
            lacking = sorted(set(other.to_read()) - set(columns.to_read()))
            raise InputError(f"{first.location} has no column {lacking[0]!r}, but {file.location} has: make them alike")
    with ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(lambda entry: _attempt(lambda: _scan_file(entry[0], entry[1], columns)), readable))
    kept = _keep(config, [file for file, _ in readable], scans, skipped)
    return Inputs(columns, tuple(scan for _, scan in kept), tuple(skipped))


def _resolve(config: CandidatesConfig, schema: pa.Schema, file: FileInfo) -> Columns:
    return layouts.resolve(
        schema,
        layout=config.layout,
        names=config.columns,
        pass_through=config.pass_through,
        has_texts=config.queries is not None,
        file=str(file.location),
    )


def _attempt(read: Callable[[], T]) -> T | InputError:
    try:
        return read()
    except InputError as error:
        return error


def _keep(
    config: CandidatesConfig,
    files: Sequence[FileInfo],
    results: Sequence[T | InputError],
    skipped: list[tuple[str, str]],
) -> list[tuple[FileInfo, T]]:
    """The files with a result. The others are added to `skipped`, or the first of their errors is raised."""
    kept: list[tuple[FileInfo, T]] = []
    for file, result in zip(files, results, strict=True):
        if not isinstance(result, InputError):
            kept.append((file, result))
        elif config.skip_bad_files:
            skipped.append((file.location.uri, str(result)))
        else:
            raise InputError(f"{result} (skip_bad_files: true goes on without bad candidates files)")
    if not kept:
        raise InputError("none of the candidates files can be read; see the first error: " + skipped[0][1])
    return kept


def read_footer(file: FileInfo) -> pq.FileMetaData:
    """The Parquet footer of `file`. Raises InputError where there is no sound one."""
    if file.num_bytes == 0:
        raise InputError(f"{file.location} is empty (0 bytes), not a Parquet file; {_REMEDY}")
    with naming_damage(f"{file.location} is not a sound Parquet file"), open_input(file) as source:
        footer = pq.read_metadata(source)
        footer.schema.to_arrow_schema()  # raises where the schema is damaged
    if footer.num_row_groups > _MAX_ROW_GROUPS:
        raise InputError(f"{file.location} has {footer.num_row_groups:,} row groups; rewrite it with larger ones")
    return footer


@contextmanager
def naming_damage(problem: str) -> Iterator[None]:
    """Turns an error that means damage inside a file into an InputError that starts with `problem`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise InputError(f"{problem}: {redact(first_line(error))}; check its rights and run again") from None
        if not is_damage(error):
            raise
        raise InputError(f"{problem} ({redact(first_line(error))}); {_REMEDY}") from None


def is_damage(error: Exception) -> bool:
    """Whether an error in reading says that the file is damaged, and not that a store, a disk or the memory failed."""
    if isinstance(error, OSError):  # Arrow's own ones, for a damaged page, have no number; a disk's have
        return type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException | UnicodeDecodeError) and not isinstance(error, MemoryError)


def check_unchanged(planned: FileInfo) -> None:
    """Raises InputError unless the file is still the one that the plan was made for."""
    now = info(planned.location)
    if now is None or (now.num_bytes, now.version) != (planned.num_bytes, planned.version):
        state = "is gone" if now is None else "has changed"
        raise InputError(
            f"{planned.location} {state} since the run was planned; restore it and run the same command again,"
            " or start over with --new-run"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _scan_file(file: FileInfo, footer: pq.FileMetaData, columns: Columns) -> FileScan:
    group_rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    group_starts = np.concatenate([[0], np.cumsum(group_rows)]).astype(np.int64)
    hashes = column_hashes(file, footer, columns.query_id)
    if len(hashes) != group_starts[-1]:
        raise InputError(f"{file.location}: {len(hashes):,} query ids for {group_starts[-1]:,} rows; restore the file")
    if columns.layout == "nested":
        starts = np.arange(len(hashes), dtype=np.int64)
        before = estimate_items(footer, columns.struct or columns.doc_id, group_starts)
    else:
        is_start = np.ones(len(hashes), dtype=bool)
        is_start[1:] = hashes[1:] != hashes[:-1]
        starts = np.flatnonzero(is_start).astype(np.int64)
        before = np.append(starts, np.int64(len(hashes)))
    return FileScan(
        file, footer.schema.to_arrow_schema(), group_starts, starts, hashes[starts], before.astype(np.int64)
    )


def estimate_items(footer: pq.FileMetaData, top: str, group_starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Items of the list column `top` before each row, [rows + 1], spreading each row group's number of them evenly."""
    values = []
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        leaves = [group.column(c) for c in range(group.num_columns)]
        values.append(next(leaf.num_values for leaf in leaves if leaf.path_in_schema.startswith(f"{top}.")))
    totals = np.concatenate([[0], np.cumsum(values)])
    return np.asarray(np.interp(np.arange(group_starts[-1] + 1), group_starts, totals), dtype=np.int64)


def column_hashes(file: FileInfo, footer: pq.FileMetaData, name: str) -> NDArray[np.uint64]:
    """`hash_ids` of a whole column of ids or texts, uint64 [rows]. Raises InputError where it is damaged."""
    parts = [np.empty(0, dtype=np.uint64)]
    with naming_damage(f"{file.location}: column {name!r} cannot be read"), open_input(file) as source:
        for batch in read_batches(source, footer, [name], [name], max_rows=1 << 17):
            parts.append(hash_ids(batch.column(name)))
    return np.concatenate(parts)


def read_batches(
    source: pa.NativeFile,
    footer: pq.FileMetaData,
    columns: Sequence[str],
    text_columns: Sequence[str],
    *,
    max_rows: int,
    row_groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file in batches that fit in memory, however the file packs them.

    Damage is detected where pages have checksums. Texts may come dictionary-coded: a small file can repeat one long
    text a million times, and then it must be in memory once. Decoded, the texts of a batch of more than one row have
    at most _BATCH_BYTES then.
    """
    leaves = [i for i in range(footer.num_columns) if _is_within(footer.schema.column(i).path, columns)]
    for g in range(footer.num_row_groups) if row_groups is None else row_groups:
        group = footer.row_group(g)
        mean_row_bytes = sum(group.column(i).total_uncompressed_size for i in leaves) // max(1, group.num_rows)
        num_rows = max(1, min(max_rows, _BATCH_BYTES // max(1, mean_row_bytes)))
        repeated = []
        for i in leaves:
            leaf = group.column(i)
            if leaf.physical_type == "BYTE_ARRAY" and _is_within(leaf.path_in_schema, text_columns):
                num_values = num_rows * leaf.num_values // max(1, group.num_rows)
                if _longest_in_dictionary(source, footer, g, leaf.path_in_schema) * num_values > 4 * _BATCH_BYTES:
                    repeated.append(leaf.path_in_schema)
        file = _open(source, footer, repeated)
        for batch in file.iter_batches(batch_size=num_rows, row_groups=[g], columns=list(columns)):
            yield from _halve(batch, text_columns)


def _is_within(leaf: str, columns: Sequence[str]) -> bool:
    return any(f"{leaf}.".startswith(f"{name}.") for name in columns)


def _open(source: pa.NativeFile, footer: pq.FileMetaData, as_dictionary: list[str]) -> pq.ParquetFile:
    return pq.ParquetFile(
        source,
        metadata=footer,
        read_dictionary=as_dictionary,
        page_checksum_verification=True,
        buffer_size=_BUFFER_BYTES,
    )


def _longest_in_dictionary(source: pa.NativeFile, footer: pq.FileMetaData, group: int, leaf: str) -> int:
    """Bytes of the longest value in the dictionary page of a column chunk.

    Only such values can be repeated cheaply: the footer is honest about the size of all others. Reading everything as
    dictionaries instead would take five times as long.
    """
    for batch in _open(source, footer, [leaf]).iter_batches(batch_size=64, row_groups=[group], columns=[leaf]):
        array = batch.column(0)
        while not pa.types.is_dictionary(array.type):
            array = pc.list_flatten(array) if layouts.is_list(array.type) else array.flatten()[0]
        if len(array.dictionary):
            return int(pc.max(pc.binary_length(array.dictionary)).as_py())
    return 0


def _halve(batch: pa.RecordBatch, text_columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if batch.num_rows > 1 and sum(_decoded_bytes(batch.column(name)) for name in text_columns) > _BATCH_BYTES:
        middle = batch.num_rows // 2
        yield from _halve(batch.slice(0, middle), text_columns)
        yield from _halve(batch.slice(middle), text_columns)
    else:
        yield batch


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes of the dictionary-coded texts in `array`, which may be nested, if each row had its own copy."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.cast(pc.binary_length(array.dictionary), pa.int64())
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if layouts.is_list(array.type):
        return _decoded_bytes(pc.list_flatten(array))
    if pa.types.is_struct(array.type):
        return sum(_decoded_bytes(field) for field in array.flatten())
    return 0


def hash_ids(ids: pa.Array) -> NDArray[np.uint64]:
    """A stable 64-bit hash of each id as text, uint64 [n]; NULL_HASH for null. Integers hash as their digits."""
    encoded = ids if pa.types.is_dictionary(ids.type) else pc.dictionary_encode(ids)
    values = encoded.dictionary
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    keys = np.array([*values.cast(pa.large_binary()).to_pylist(), b""], dtype=object)  # never empty, for null ids
    hashed = pd.util.hash_array(keys, categorize=False)
    hashed[hashed == NULL_HASH] = 1
    indices = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    return np.asarray(np.where(indices < 0, NULL_HASH, hashed[indices]), dtype=np.uint64)
