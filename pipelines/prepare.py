"""The CPU stage of a run: reads a shard, refuses its bad candidates and tokenises the good ones.

Texts never leave this stage: what it hands on are ids, token ids and reasons. It knows nothing of scores.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import InputError, StorageError
from crossenc.records import TokenizedPairs
from pipelines import rows as candidate_rows
from pipelines.inputs import first_line
from pipelines.layout import Columns, is_list
from pipelines.plan import InputFile, Shard
from pipelines.rows import CheckedRows
from pipelines.schemas import TOKEN_FIELDS, thin_schema
from pipelines.storage import FileInfo, info, locate, open_input, redact
from pipelines.texts import TextTable, open_store

_FLAT_BATCH_ROWS = 4096
_NESTED_BATCH_ROWS = 64


class Tokenizer(Protocol):
    """Turns pairs of texts into token ids."""

    def encode(self, queries: list[str], documents: list[str]) -> TokenizedPairs: ...


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What reading a shard needs to know, the same for all shards of a run."""

    columns: Columns
    pass_through: tuple[pa.Field, ...]
    storage_options: dict[str, object]
    max_text_bytes: int
    needs_score: bool
    queries: TextTable | None
    corpus: TextTable | None
    cache: Path


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """A shard's candidates: the thin rows plus TOKEN_FIELDS, and where the time went."""

    rows: pa.Table
    read_seconds: float
    tokenise_seconds: float


def prepare(shard: Shard, file: InputFile, settings: ReadSettings, tokenizer: Tokenizer) -> PreparedShard:
    """Reads and tokenises one shard.

    Raises InputError when the file is no longer the one that was planned, StorageError when the store does not
    answer. Damage inside the file is no error: every row of the shard is then refused as unreadable.
    """
    started = time.perf_counter()
    source = FileInfo(locate(file.uri, settings.storage_options), file.num_bytes, file.version)
    _check_unchanged(source)
    tokenise_seconds = 0.0
    parts: list[pa.Table] = []
    try:
        for checked in _checked_batches(source, shard, settings):
            before = time.perf_counter()
            parts.append(_to_table(checked, shard.file, tokenizer, settings.pass_through))
            tokenise_seconds += time.perf_counter() - before
    except (pa.ArrowException, UnicodeDecodeError) as error:
        parts = [_unreadable(shard, redact(first_line(error)))]
    except OSError as error:
        # Arrow reports a bad page checksum as a bare OSError; what a store or a disk says has a class or a number.
        if isinstance(error, StorageError | FileNotFoundError | PermissionError) or error.errno is not None:
            raise
        parts = [_unreadable(shard, redact(first_line(error)))]
    _check_unchanged(source)
    rows = _concat(parts, settings.pass_through)
    elapsed = time.perf_counter() - started
    return PreparedShard(rows, elapsed - tokenise_seconds, tokenise_seconds)


def _check_unchanged(planned: FileInfo) -> None:
    now = info(planned.location)
    if now is None or (now.num_bytes, now.version) != (planned.num_bytes, planned.version):
        state = "is gone" if now is None else "has changed"
        raise InputError(
            f"{planned.location} {state} since the run was planned; restore it and run the same command again,"
            " or start over with --new-run"
        )


def _checked_batches(source: FileInfo, shard: Shard, settings: ReadSettings) -> Iterator[CheckedRows]:
    queries = open_store(settings.queries, settings.cache) if settings.queries else None
    corpus = open_store(settings.corpus, settings.cache) if settings.corpus else None
    for first_row, batch in _read_rows(source, shard, settings.columns):
        raw = candidate_rows.flatten(batch, settings.columns, first_row)
        yield candidate_rows.check(
            raw,
            queries=queries,
            corpus=corpus,
            max_text_bytes=settings.max_text_bytes,
            needs_score=settings.needs_score,
        )


def _read_rows(source: FileInfo, shard: Shard, columns: Columns) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches that cover exactly the shard's rows, each with the number of its first row in the file."""
    if shard.row_start == shard.row_end:
        return
    as_dictionary = [name for name in (columns.query, columns.text) if name and columns.struct is None]
    if columns.layout == "nested":
        as_dictionary = []
    with open_input(source) as stream:
        file = pq.ParquetFile(stream, read_dictionary=as_dictionary, page_checksum_verification=True)
        starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
        groups = [g for g in range(len(starts) - 1) if starts[g] < shard.row_end and starts[g + 1] > shard.row_start]
        at = int(starts[groups[0]])
        size = _NESTED_BATCH_ROWS if columns.layout == "nested" else _FLAT_BATCH_ROWS
        for batch in file.iter_batches(batch_size=size, row_groups=groups, columns=columns.to_read()):
            low, high = max(at, shard.row_start), min(at + batch.num_rows, shard.row_end)
            if low < high:
                yield low, batch.slice(low - at, high - low)
            at += batch.num_rows
            if at >= shard.row_end:
                return


def _to_table(checked: CheckedRows, file: int, tokenizer: Tokenizer, pass_through: tuple[pa.Field, ...]) -> pa.Table:
    raw = checked.raw
    good = [i for i, reason in enumerate(checked.reasons) if reason is None]
    # check() leaves no good row without texts
    pairs = tokenizer.encode([checked.queries[i] or "" for i in good], [checked.documents[i] or "" for i in good])
    is_good = np.zeros(len(checked.reasons), dtype=bool)
    is_good[good] = True
    num_rows = len(checked.reasons)
    lengths = np.zeros(num_rows, dtype=np.int64)
    lengths[is_good] = pairs.lengths
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    truncated = np.zeros(num_rows, dtype=bool)
    truncated[is_good] = pairs.truncated
    if pairs.token_type_ids is None:
        token_types = pa.nulls(num_rows, pa.large_list(pa.uint8()))
    else:
        token_types = pa.LargeListArray.from_arrays(offsets, pa.array(pairs.token_type_ids, pa.uint8()))
    columns = {
        "query_id": pa.array(checked.query_ids, pa.large_string()),
        "doc_id": pa.array(checked.doc_ids, pa.large_string()),
        "file": pa.array(np.full(num_rows, file, dtype=np.int32)),
        "row": pa.array(raw.row, pa.int64()),
        "item": pa.nulls(num_rows, pa.int32()) if raw.item is None else pa.array(raw.item, pa.int32()),
        "stage_rank": _cast_or_null(raw.rank, num_rows, pa.int64()),
        "stage_score": _cast_or_null(raw.score, num_rows, pa.float64()),
        "reason": pa.array(checked.reasons, pa.string()),
        "detail": pa.array(checked.details, pa.string()),
        **{field.name: array for field, array in zip(pass_through, raw.pass_through, strict=True)},
        "model_score": pa.nulls(num_rows, pa.float32()),
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(pairs.input_ids, pa.int32())),
        "token_type_ids": token_types,
        "truncated": pa.array(truncated),
    }
    return pa.table(columns)


def _cast_or_null(values: pa.Array | None, num_rows: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(num_rows, kind) if values is None else values.cast(kind)


def _unreadable(shard: Shard, detail: str) -> pa.Table:
    num_rows = shard.row_end - shard.row_start
    return pa.table(
        {
            "file": pa.array(np.full(num_rows, shard.file, dtype=np.int32)),
            "row": pa.array(np.arange(shard.row_start, shard.row_end), pa.int64()),
            "reason": pa.array(["unreadable"] * num_rows, pa.string()),
            "detail": pa.array([detail] * num_rows, pa.string()),
        }
    )


def _concat(parts: list[pa.Table], pass_through: tuple[pa.Field, ...]) -> pa.Table:
    """All rows of the shard in one table of the stage's schema; what a part lacks is null."""
    schema = pa.schema([*thin_schema(pass_through), *TOKEN_FIELDS])
    tables = [schema.empty_table()]
    for part in parts:
        columns = [
            part.column(field.name).cast(field.type)
            if field.name in part.column_names
            else pa.nulls(part.num_rows, field.type)
            for field in schema
        ]
        tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables).combine_chunks()


def pass_through_fields(file_schema: pa.Schema, columns: Columns) -> tuple[pa.Field, ...]:
    """The pass-through columns as fields of the rows between stages, named `pass:<column>`.

    A list column of the nested layout holds one value per document, so its items are passed.
    """
    fields = []
    for name in columns.pass_through:
        kind = file_schema.field(name).type
        per_document = columns.layout == "nested" and is_list(kind)
        fields.append(pa.field(f"pass:{name}", kind.value_type if per_document else kind))
    return tuple(fields)
