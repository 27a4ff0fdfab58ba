"""The CPU stage of a run: reads a shard, refuses its bad candidates and tokenises the good ones.

Texts never leave this stage: what `prepare` hands on are ids, token ids and reasons. It knows nothing of scores.
`read_shard` is the reading alone, for jobs that do something else with the texts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import InputError
from crossenc.records import TokenizedPairs
from pipelines import rows as candidate_rows
from pipelines.inputs import check_unchanged, first_line, is_damage, read_batches
from pipelines.layout import Columns, is_list
from pipelines.plan import InputFile, Shard
from pipelines.rows import CheckedRows
from pipelines.schemas import TOKEN_FIELDS, thin_schema
from pipelines.storage import FileInfo, locate, open_input, redact
from pipelines.texts import TextTable, open_store

_BATCH_CANDIDATES = 4096


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

    Raises InputError when the file is no longer the one that was planned or holds what no run can use, StorageError
    when the store does not answer. Damage inside the file is no error: every row of the shard is then refused as
    unreadable, after a second look, because bytes can also be damaged on their way.
    """
    started = time.perf_counter()
    tokenise_seconds = 0.0

    def tokenise(checked: CheckedRows) -> pa.Table:
        nonlocal tokenise_seconds
        before = time.perf_counter()
        table = _to_table(checked, shard.file, tokenizer, settings.pass_through)
        tokenise_seconds += time.perf_counter() - before
        return table

    rows = read_shard(shard, file, settings, tokenise, TOKEN_FIELDS)
    elapsed = time.perf_counter() - started
    return PreparedShard(rows, elapsed - tokenise_seconds, tokenise_seconds)


def read_shard(
    shard: Shard,
    file: InputFile,
    settings: ReadSettings,
    to_table: Callable[[CheckedRows], pa.Table],
    own_fields: Sequence[pa.Field],
) -> pa.Table:
    """All candidates of a shard: the thin rows plus `own_fields`, as `to_table` makes them of each batch.

    Raises as `prepare` does, and treats damage as it does.
    """
    source = FileInfo(locate(file.uri, settings.storage_options), file.num_bytes, file.version)
    check_unchanged(source)
    try:
        for _ in range(2):
            try:
                parts = [to_table(checked) for checked in _checked_batches(source, shard, settings)]
                break
            except _DamagedError as damage:
                parts = [_unreadable(shard, str(damage))]
    except FileNotFoundError:
        check_unchanged(source)  # says what is wrong, unless the file has come back
        raise
    check_unchanged(source)
    return _concat(parts, pa.schema([*thin_schema(settings.pass_through), *own_fields]))


class _DamagedError(Exception):
    """The file is damaged where it was read."""


def _checked_batches(source: FileInfo, shard: Shard, settings: ReadSettings) -> Iterator[CheckedRows]:
    limit = settings.max_text_bytes
    queries = open_store(settings.queries, settings.cache, limit) if settings.queries else None
    corpus = open_store(settings.corpus, settings.cache, limit) if settings.corpus else None
    for first_row, batch in _read_rows(source, shard, settings.columns):
        try:
            yield candidate_rows.check(
                candidate_rows.flatten(batch, settings.columns, first_row),
                queries=queries,
                corpus=corpus,
                max_text_bytes=limit,
                needs_score=settings.needs_score,
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            last_row = first_row + batch.num_rows - 1
            raise InputError(f"{source.location}, rows {first_row} to {last_row}: {first_line(error)}") from None


def _read_rows(source: FileInfo, shard: Shard, columns: Columns) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches that cover exactly the shard's rows, each with the number of its first row in the file."""
    num_rows = shard.row_end - shard.row_start
    if num_rows == 0:
        return
    max_rows = max(1, _BATCH_CANDIDATES * num_rows // max(num_rows, shard.num_candidates))
    names = columns.to_read()
    texts = [name for name in names if name not in columns.pass_through]
    try:
        with open_input(source) as stream:
            footer = pq.read_metadata(stream)
            starts = np.cumsum([0, *(footer.row_group(g).num_rows for g in range(footer.num_row_groups))])
            groups = np.flatnonzero((starts[:-1] < shard.row_end) & (starts[1:] > shard.row_start)).tolist()
            at = int(starts[groups[0]])
            for batch in read_batches(stream, footer, names, texts, max_rows=max_rows, row_groups=groups):
                low, high = max(at, shard.row_start), min(at + batch.num_rows, shard.row_end)
                if low < high:
                    yield low, batch.slice(low - at, high - low)
                at += batch.num_rows
                if at >= shard.row_end:
                    return
    except Exception as error:
        if not is_damage(error):
            raise
        raise _DamagedError(redact(first_line(error))) from None


def _to_table(checked: CheckedRows, file: int, tokenizer: Tokenizer, pass_through: tuple[pa.Field, ...]) -> pa.Table:
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
    columns = thin_columns(checked, file, pass_through) | {
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(pairs.input_ids, pa.int32())),
        "token_type_ids": token_types,
        "truncated": pa.array(truncated),
    }
    return pa.table(columns)


def thin_columns(checked: CheckedRows, file: int, pass_through: tuple[pa.Field, ...] = ()) -> dict[str, pa.Array]:
    """The columns of schemas.thin_schema for one batch; nothing is scored yet."""
    raw, num_rows = checked.raw, len(checked.reasons)
    return {
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
    }


def _cast_or_null(values: pa.Array | None, num_rows: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(num_rows, kind) if values is None else values.cast(kind, safe=False)


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


def _concat(parts: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows of the shard in one table of the stage's schema; what a part lacks is null."""
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

    A list column of the nested layout holds one value per document, so its items are passed. Dictionary-coded columns
    pass their values: dictionaries of several files may not fit the few bits of one file's indices.
    """
    fields = []
    for name in columns.pass_through:
        kind = file_schema.field(name).type
        if columns.layout == "nested" and is_list(kind):
            kind = kind.value_type
        fields.append(pa.field(f"pass:{name}", kind.value_type if pa.types.is_dictionary(kind) else kind))
    return tuple(fields)
