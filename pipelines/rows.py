"""Turns a batch of an input file into candidate rows, one per candidate, and finds the bad ones among them.

Works on Arrow arrays in memory: reads nothing, scores nothing. A bad candidate gets a reason code of
schemas.REASONS and goes on as a row, so that every candidate stays accounted for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.layout import Columns, is_list
from pipelines.texts import TextStore, as_binary, join_title


@dataclass(frozen=True, slots=True)
class RawRows:
    """Candidates as they stand in the file, C of them. Texts and ids are unchecked bytes; absent columns are None.

    `mismatched` marks nested rows whose lists differ in length; such a row counts its longest list.
    """

    query_id: pa.Array
    query: pa.Array | None
    doc_id: pa.Array
    text: pa.Array | None
    row: NDArray[np.int64]
    item: NDArray[np.int32] | None
    rank: pa.Array | None
    score: pa.Array | None
    pass_through: tuple[pa.Array, ...]
    mismatched: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Candidates with their reasons: reasons[i] is None for a good one, whose texts are then not None."""

    raw: RawRows
    query_ids: list[str | None]
    doc_ids: list[str | None]
    queries: list[str | None]
    documents: list[str | None]
    reasons: list[str | None]
    details: list[str | None]


def flatten(batch: pa.RecordBatch, columns: Columns, first_row: int) -> RawRows:
    """The candidates in `batch`, whose first row is row `first_row` of its file."""
    if columns.layout == "nested":
        return _flatten_nested(batch, columns, first_row)
    text = None
    if columns.text:
        text = batch.column(columns.text)
        if columns.title:
            text = join_title(as_binary(batch.column(columns.title)), as_binary(text))
    return RawRows(
        query_id=as_binary(batch.column(columns.query_id)),
        query=batch.column(columns.query) if columns.query else None,
        doc_id=as_binary(batch.column(columns.doc_id)),
        text=text,
        row=np.arange(first_row, first_row + batch.num_rows),
        item=None,
        rank=batch.column(columns.rank) if columns.rank else None,
        score=batch.column(columns.score) if columns.score else None,
        pass_through=tuple(batch.column(name) for name in columns.pass_through),
        mismatched=np.zeros(batch.num_rows, dtype=bool),
    )


def _flatten_nested(batch: pa.RecordBatch, columns: Columns, first_row: int) -> RawRows:
    lists = _document_lists(batch, columns)
    pass_lists = {name for name in columns.pass_through if is_list(batch.column(name).type)}
    lengths = {
        name: pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        for name, array in [*lists.items(), *((name, batch.column(name)) for name in pass_lists)]
    }
    counts = np.max(np.stack(list(lengths.values())), axis=0).astype(np.int64)
    bad_row = np.any(np.stack([length != counts for length in lengths.values()]), axis=0)
    parents = np.repeat(np.arange(batch.num_rows), counts)
    items = (np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)

    def spread(array: pa.Array, length: NDArray[np.int64]) -> pa.Array:
        """The lists' items laid end to end; a shorter list is filled up with nulls."""
        starts = np.cumsum(length) - length
        at = starts[parents] + items
        take = pa.array(at, mask=items >= length[parents])
        return pc.list_flatten(array).take(take)

    flat = {name: spread(array, lengths[name]) for name, array in lists.items()}
    text = flat.get("text")
    if text is not None and "title" in flat:
        text = join_title(as_binary(flat["title"]), as_binary(text))
    owner = pa.array(parents)
    return RawRows(
        query_id=as_binary(batch.column(columns.query_id)).take(owner),
        query=batch.column(columns.query).take(owner) if columns.query else None,
        doc_id=as_binary(flat["doc_id"]),
        text=text,
        row=first_row + parents.astype(np.int64),
        item=items,
        rank=flat.get("rank"),
        score=flat.get("score"),
        pass_through=tuple(
            spread(batch.column(name), lengths[name]) if name in pass_lists else batch.column(name).take(owner)
            for name in columns.pass_through
        ),
        mismatched=bad_row[parents],
    )


def _document_lists(batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
    """Role -> list array of that role's values."""
    roles = {"doc_id": columns.doc_id, "text": columns.text, "title": columns.title}
    roles |= {"rank": columns.rank, "score": columns.score}
    if columns.struct is None:
        return {role: batch.column(name) for role, name in roles.items() if name is not None}
    outer = batch.column(columns.struct)
    lengths = pc.fill_null(pc.list_value_length(outer), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    structs = pc.list_flatten(outer)
    return {
        role: pa.LargeListArray.from_arrays(offsets, pc.struct_field(structs, name))
        for role, name in roles.items()
        if name is not None
    }


def check(
    raw: RawRows,
    *,
    queries: TextStore | None,
    corpus: TextStore | None,
    max_text_bytes: int,
    needs_score: bool,
) -> CheckedRows:
    """Finds the reason, if any, to refuse each candidate. The first reason that applies counts."""
    num_rows = len(raw.row)
    reasons: list[str | None] = ["list_length_mismatch" if bad else None for bad in raw.mismatched]
    query_ids = _ids(raw.query_id, "query_id_missing", reasons)
    doc_ids = _ids(raw.doc_id, "doc_id_missing", reasons)
    details: list[str | None] = [None] * num_rows
    query_texts, query_problems = _texts(raw.query, query_ids, queries, "query", max_text_bytes)
    documents, document_problems = _texts(raw.text, doc_ids, corpus, "document", max_text_bytes)
    for problems in (query_problems, document_problems):
        for i, problem in enumerate(problems):
            if reasons[i] is None and problem is not None:
                reasons[i], _, details[i] = problem.partition(": ")
                details[i] = details[i] or None
    if needs_score:
        scores = raw.score.cast(pa.float64()) if raw.score is not None else pa.nulls(num_rows, pa.float64())
        for i, is_finite in enumerate(pc.fill_null(pc.is_finite(scores), False).to_pylist()):
            if reasons[i] is None and not is_finite:
                reasons[i] = "first_stage_score_missing"
    return CheckedRows(raw, query_ids, doc_ids, query_texts, documents, reasons, details)


def _ids(ids: pa.Array, missing: str, reasons: list[str | None]) -> list[str | None]:
    texts: list[str | None] = []
    for i, value in enumerate(ids.to_pylist()):
        text = None
        if value is None:
            reasons[i] = reasons[i] or missing
        else:
            try:
                text = value.decode()
            except UnicodeDecodeError:
                reasons[i] = reasons[i] or "id_not_utf8"
        texts.append(text)
    return texts


def _texts(
    column: pa.Array | None,
    ids: Sequence[str | None],
    store: TextStore | None,
    kind: str,
    max_text_bytes: int,
) -> tuple[list[str | None], list[str | None]]:
    """Each row's text and problem, from a column of the file or else from a store. Equal texts share one string."""
    if column is None:
        if store is None:
            raise ValueError(f"no column and no table for the {kind} texts")
        distinct_ids = sorted({id_ for id_ in ids if id_ is not None})
        values, problems = store.lookup(distinct_ids)
        names = {None: None, "null": f"{kind}_missing"}
        checked = {
            id_: (None, names.get(problem, f"{kind}_{problem}")) if problem else _check(value, kind, max_text_bytes)
            for id_, value, problem in zip(distinct_ids, values, problems, strict=True)
        }
        pairs = [checked[id_] if id_ is not None else (None, None) for id_ in ids]
    else:
        encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(as_binary(column))
        values = as_binary(encoded.dictionary)
        lengths = pc.binary_length(values)
        # A value over the limit never becomes a Python object: a small file can hold gigabytes of them.
        values = pc.if_else(pc.greater(lengths, max_text_bytes), pa.scalar(None, values.type), values)
        distinct = [
            _too_large(kind, length) if value is None and length is not None else _check(value, kind, max_text_bytes)
            for value, length in zip(values.to_pylist(), lengths.to_pylist(), strict=True)
        ]
        missing = (None, f"{kind}_missing")
        pairs = [distinct[i] if i is not None else missing for i in encoded.indices.to_pylist()]
    return [text for text, _ in pairs], [problem for _, problem in pairs]


def _too_large(kind: str, num_bytes: int) -> tuple[None, str]:
    return None, f"{kind}_too_large: {num_bytes:,} bytes"


def _check(value: bytes | None, kind: str, max_text_bytes: int) -> tuple[str | None, str | None]:
    if value is None:
        return None, f"{kind}_missing"
    if len(value) > max_text_bytes:
        return _too_large(kind, len(value))
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        return None, f"{kind}_not_utf8: byte {error.start}"
    return (text, None) if text.strip() else (None, f"{kind}_empty")
