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
from pipelines.texts import Text, TextStore, as_binary, distinct_texts, id_bytes

#: Of larger first-stage scores the range could be no finite number, and then they cannot be normalised.
_LARGEST_SCORE = 1e300


@dataclass(frozen=True, slots=True)
class RawRows:
    """Candidates as they stand in the file, C of them. Texts and ids are unchecked bytes; absent columns are None.

    Ids, as bytes, and texts may be dictionary-coded.

    `mismatched` marks nested rows whose lists differ in length; such a row counts its longest list. `childless` marks
    nested rows without documents; such a row counts as one candidate, so that it is accounted for.
    """

    query_id: pa.Array
    query: pa.Array | None
    doc_id: pa.Array
    text: pa.Array | None
    title: pa.Array | None
    row: NDArray[np.int64]
    item: NDArray[np.int32] | None
    rank: pa.Array | None
    score: pa.Array | None
    pass_through: tuple[pa.Array, ...]
    mismatched: NDArray[np.bool_]
    childless: NDArray[np.bool_]


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

    def column(name: str | None) -> pa.Array | None:
        return batch.column(name) if name is not None else None

    return RawRows(
        query_id=as_binary(batch.column(columns.query_id)),
        query=column(columns.query),
        doc_id=as_binary(batch.column(columns.doc_id)),
        text=column(columns.text),
        title=column(columns.title),
        row=np.arange(first_row, first_row + batch.num_rows),
        item=None,
        rank=column(columns.rank),
        score=column(columns.score),
        pass_through=tuple(batch.column(name) for name in columns.pass_through),
        mismatched=np.zeros(batch.num_rows, dtype=bool),
        childless=np.zeros(batch.num_rows, dtype=bool),
    )


def _flatten_nested(batch: pa.RecordBatch, columns: Columns, first_row: int) -> RawRows:
    lists = _document_lists(batch, columns)
    lists |= {f"pass {name}": batch.column(name) for name in columns.pass_through if is_list(batch.column(name).type)}
    lengths = {role: pc.fill_null(pc.list_value_length(array), 0).to_numpy() for role, array in lists.items()}
    counts = np.max(np.stack(list(lengths.values())), axis=0).astype(np.int64)
    bad_row = np.any(np.stack([length != counts for length in lengths.values()]), axis=0)
    childless = counts == 0
    counts = np.maximum(counts, 1)
    parents = np.repeat(np.arange(batch.num_rows), counts)
    items = (np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
    owner = pa.array(parents)

    def spread(role: str) -> pa.Array:
        """The lists' items laid end to end; a shorter list is filled up with nulls."""
        values, length = pc.list_flatten(lists[role]), lengths[role]
        if len(values) == len(parents):  # no list is shorter than its row's count, so none is to be filled up
            return values
        at = (np.cumsum(length) - length)[parents] + items
        return values.take(pa.array(at, mask=items >= length[parents]))

    flat = {role: spread(role) for role in lists}
    return RawRows(
        query_id=_of_owner(as_binary(batch.column(columns.query_id)), owner),
        query=_of_owner(batch.column(columns.query), owner) if columns.query else None,
        doc_id=as_binary(flat["doc_id"]),
        text=flat.get("text"),
        title=flat.get("title"),
        row=first_row + parents.astype(np.int64),
        item=items,
        rank=flat.get("rank"),
        score=flat.get("score"),
        pass_through=tuple(
            flat[f"pass {name}"] if f"pass {name}" in flat else batch.column(name).take(owner)
            for name in columns.pass_through
        ),
        mismatched=bad_row[parents],
        childless=childless[parents],
    )


def _of_owner(column: pa.Array, owner: pa.Array) -> pa.Array:
    """Each candidate's value of its row; texts are shared, not copied."""
    return (column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)).take(owner)


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
    reasons: list[str | None] = [None] * num_rows
    for reason, marked in (("list_empty", raw.childless), ("list_length_mismatch", raw.mismatched)):
        for i in np.flatnonzero(marked).tolist():
            reasons[i] = reason
    details: list[str | None] = [None] * num_rows
    query_ids = _ids(raw.query_id, "query_id_missing", reasons, details)
    doc_ids = _ids(raw.doc_id, "doc_id_missing", reasons, details)
    if raw.query is not None:
        query_texts = own_texts(raw.query, None, "query", max_text_bytes)
    else:
        query_texts = stored_texts(queries, query_ids, "query")
    if raw.text is not None:
        documents = own_texts(raw.text, raw.title, "document", max_text_bytes)
    else:
        documents = stored_texts(corpus, doc_ids, "document")
    for texts in (query_texts, documents):
        for i, (_, problem) in enumerate(texts):
            if problem is not None and reasons[i] is None:
                reason, _, detail = problem.partition(": ")
                reasons[i], details[i] = reason, detail or None
    if needs_score:
        scores = raw.score.cast(pa.float64(), safe=False) if raw.score is not None else pa.nulls(num_rows, pa.float64())
        is_usable = pc.fill_null(pc.less_equal(pc.abs(scores), _LARGEST_SCORE), False)  # false for NaN, too
        for i in np.flatnonzero(~is_usable.to_numpy(zero_copy_only=False)).tolist():
            reasons[i] = reasons[i] or "first_stage_score_missing"
    return CheckedRows(
        raw, query_ids, doc_ids, [text for text, _ in query_texts], [text for text, _ in documents], reasons, details
    )


def _ids(column: pa.Array, missing: str, reasons: list[str | None], details: list[str | None]) -> list[str | None]:
    """Each row's id; where there is no good one None, and why in `reasons`, unless a reason stands there already."""
    ids: list[str | None] = []
    for i, value in enumerate(id_bytes(column)):
        id_, reason, detail = None, missing, None
        if isinstance(value, int):
            reason, detail = "id_too_large", f"{value:,} bytes"
        elif value:
            try:
                id_ = value.decode()
            except UnicodeDecodeError:
                reason = "id_not_utf8"
        if id_ is None and reasons[i] is None:
            reasons[i], details[i] = reason, detail
        ids.append(id_)
    return ids


#: A text that can be scored, or None and why not: a reason, and after ": " a detail.
Checked = tuple[str | None, str | None]


def own_texts(column: pa.Array, titles: pa.Array | None, kind: str, max_text_bytes: int) -> list[Checked]:
    """Each row's text from a column of the file. Equal texts share one string."""
    distinct, rows = distinct_texts(column, titles, max_text_bytes)
    checked = [check_text(text, kind) for text in distinct]
    return [checked[row] for row in rows]


def stored_texts(store: TextStore | None, ids: Sequence[str | None], kind: str) -> list[Checked]:
    """Each row's text from a store, by its id. Equal ids share one string."""
    if store is None:
        raise ValueError(f"no column and no table for the {kind} texts")
    distinct = list(dict.fromkeys(id_ for id_ in ids if id_ is not None))
    checked: dict[str | None, Checked] = {None: (None, None)}  # the missing id is the reason
    for id_, (text, problem) in zip(distinct, store.lookup(distinct), strict=True):
        checked[id_] = check_text(text, kind) if problem is None else (None, f"{kind}_{problem}")
    return [checked[id_] for id_ in ids]


def check_text(text: Text, kind: str) -> Checked:
    """A text that can be scored, or None and why not; `kind` is query or document."""
    if text is None:
        return None, f"{kind}_missing"
    if isinstance(text, int):
        return None, f"{kind}_too_large: {text:,} bytes"
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        return None, f"{kind}_not_utf8: byte {error.start}"
    return (None, f"{kind}_empty") if not decoded or decoded.isspace() else (decoded, None)
