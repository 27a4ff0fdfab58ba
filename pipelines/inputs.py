"""Looks at the input files of a run before any work starts: footers, columns, and where queries begin.

It reads footers and one id column, never a text. Damage, and files that do not fit together, are found here and
named, so that a run starts only on input that it can read.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import InputError
from pipelines import layout as layouts
from pipelines.config import RerankConfig
from pipelines.layout import Columns
from pipelines.storage import FileInfo, expand, locate, open_input, redact

#: Hash that stands for a null id.
NULL_HASH = np.uint64(0)
_MAX_ROW_GROUPS = 1_000_000


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


def list_candidates(config: RerankConfig) -> list[FileInfo]:
    """Every candidates file of the job, once each, in a stable order."""
    found: dict[str, FileInfo] = {}
    for uri in config.candidate_uris:
        for file in expand(locate(uri, config.storage_options), ".parquet"):
            found.setdefault(file.location.uri, file)
    return list(found.values())


def scan(config: RerankConfig, files: Sequence[FileInfo]) -> Inputs:
    """Reads the footers and query ids of `files`. Raises InputError naming the file and what to do."""
    readable: list[tuple[FileInfo, pq.FileMetaData]] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(16) as pool:
        for file, footer in zip(files, pool.map(_try_footer, files), strict=True):
            if isinstance(footer, InputError):
                if not config.skip_bad_files:
                    raise footer
                skipped.append((file.location.uri, str(footer)))
            else:
                readable.append((file, footer))
    if not readable:
        raise InputError("none of the candidates files can be read; see the first error: " + skipped[0][1])
    first_file, first_footer = readable[0]
    first_schema = first_footer.schema.to_arrow_schema()
    columns = layouts.resolve(
        first_schema,
        layout=config.layout,
        names=config.columns,
        pass_through=config.pass_through,
        has_texts=config.queries is not None,
        file=str(first_file.location),
    )
    for file, footer in readable[1:]:
        schema = footer.schema.to_arrow_schema()
        layouts.check_schema(schema, str(file.location))
        layouts.check_same(first_schema, schema, columns, str(first_file.location), str(file.location))
    with ThreadPoolExecutor(8) as pool:
        scans = tuple(pool.map(lambda entry: _scan_file(entry[0], entry[1], columns), readable))
    return Inputs(columns, scans, tuple(skipped))


def _try_footer(file: FileInfo) -> pq.FileMetaData | InputError:
    try:
        return read_footer(file)
    except InputError as error:
        return error


def read_footer(file: FileInfo) -> pq.FileMetaData:
    """The Parquet footer of `file`. Raises InputError where there is no sound one."""
    remedy = "restore the file, or set skip_bad_files: true to go on without it"
    if file.num_bytes == 0:
        raise InputError(f"{file.location} is empty (0 bytes), not a Parquet file; {remedy}")
    try:
        with open_input(file) as source:
            footer = pq.read_metadata(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ConnectionError | TimeoutError) or error.__class__.__name__ == "StorageError":
            raise
        raise InputError(
            f"{file.location} is not a sound Parquet file ({redact(first_line(error))}); {remedy}"
        ) from None
    if footer.num_row_groups > _MAX_ROW_GROUPS:
        raise InputError(f"{file.location} has {footer.num_row_groups:,} row groups; rewrite it with larger ones")
    return footer


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _scan_file(file: FileInfo, footer: pq.FileMetaData, columns: Columns) -> FileScan:
    group_rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    group_starts = np.concatenate([[0], np.cumsum(group_rows)]).astype(np.int64)
    hashes = _query_hashes(file, columns)
    if len(hashes) != group_starts[-1]:
        raise InputError(f"{file.location}: {len(hashes):,} query ids for {group_starts[-1]:,} rows; restore the file")
    if columns.layout == "nested":
        starts = np.arange(len(hashes), dtype=np.int64)
        before = _estimate_candidates(footer, columns, group_starts)
    else:
        is_start = np.ones(len(hashes), dtype=bool)
        is_start[1:] = hashes[1:] != hashes[:-1]
        starts = np.flatnonzero(is_start).astype(np.int64)
        before = np.append(starts, np.int64(len(hashes)))
    return FileScan(
        file, footer.schema.to_arrow_schema(), group_starts, starts, hashes[starts], before.astype(np.int64)
    )


def _estimate_candidates(
    footer: pq.FileMetaData, columns: Columns, group_starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Candidates before each row, [rows + 1], spreading each row group's number of list items evenly."""
    top = columns.struct or columns.doc_id
    values = []
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        leaves = [group.column(c) for c in range(group.num_columns)]
        values.append(next(leaf.num_values for leaf in leaves if leaf.path_in_schema.split(".")[0] == top))
    totals = np.concatenate([[0], np.cumsum(values)])
    return np.asarray(np.interp(np.arange(group_starts[-1] + 1), group_starts, totals), dtype=np.int64)


def _query_hashes(file: FileInfo, columns: Columns) -> NDArray[np.uint64]:
    parts = [np.empty(0, dtype=np.uint64)]
    try:
        with open_input(file) as source:
            table = pq.ParquetFile(source, read_dictionary=[columns.query_id])
            for batch in table.iter_batches(batch_size=1 << 17, columns=[columns.query_id]):
                parts.append(hash_ids(batch.column(0)))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.location}: column {columns.query_id!r} cannot be read ({first_line(error)})") from None
    return np.concatenate(parts)


def hash_ids(ids: pa.Array) -> NDArray[np.uint64]:
    """A stable 64-bit hash of each id as text, uint64 [n]; NULL_HASH for null. Integers hash as their digits."""
    encoded = ids if pa.types.is_dictionary(ids.type) else pc.dictionary_encode(ids)
    values = encoded.dictionary
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    texts = values.cast(pa.binary()).to_pylist()
    keys = np.array([text.decode("utf-8", "surrogateescape") for text in texts] or [""], dtype=object)
    hashed = pd.util.hash_array(keys, categorize=False)
    hashed[hashed == NULL_HASH] = 1
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.asarray(np.where(indices < 0, NULL_HASH, hashed[indices]), dtype=np.uint64)
