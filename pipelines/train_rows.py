"""Rows of labelled data as documents with labels, in one form for all layouts and files; bad ones told apart.

Works on batches in memory: reads no file, tokenises nothing. A refused row or document gets a reason code of
schemas.REASONS and its place, so that every one stays accounted for.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.lines import MAX_LINE_BYTES, parse_json
from pipelines.rows import Checked, check_text, own_texts, stored_texts
from pipelines.texts import MAX_ID_BYTES, Text, TextStore, id_bytes
from pipelines.train_files import Lines
from pipelines.train_layout import LabelledColumns, kind_of

_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input. `key` is equal in rows of one query.

    `documents` are texts, or None and what is wrong; the first `num_positives` are positives by the layout.
    A label is None where it is absent. `problem` is a reason to refuse the row, and after ": " a detail.
    """

    row: int
    key: Hashable
    query: Checked
    documents: Sequence[Checked]
    labels: Sequence[float | None]
    num_positives: int
    weight: float | None
    problem: str | None
    query_id: str | None = None
    doc_ids: Sequence[str | None] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row (`item` is None) or a document of one that is left out."""

    row: int
    item: int | None
    reason: str
    detail: str | None
    query_id: str | None
    doc_id: str | None


@dataclass(frozen=True, slots=True)
class Texts:
    """What texts are taken from, and how long they may be."""

    queries: TextStore | None
    corpus: TextStore | None
    max_text_bytes: int


def judge(row: Row, columns: LabelledColumns) -> tuple[list[int], list[Refusal]]:
    """The documents of a row that can be used, by number, and what is refused; the row itself is last if it is."""

    def refusal(item: int | None, problem: str) -> Refusal:
        reason, _, detail = problem.partition(": ")
        doc_id = row.doc_ids[item or 0] if row.doc_ids and (item is not None or columns.is_single) else None
        return Refusal(row.row, item, reason, detail or None, row.query_id, doc_id)

    problem = row.problem or row.query[1]
    if problem is None and not row.documents:
        problem = "list_empty"
    if problem is None and len(row.labels) != len(row.documents):
        problem = f"list_length_mismatch: {len(row.documents)} documents, {len(row.labels)} labels"
    if problem is None and not (row.weight is not None and 0 <= row.weight <= _FLOAT32_MAX):
        problem = "weight_not_finite"
    if problem is not None:
        return [], [refusal(None, problem)]
    problems = [
        problem or (None if _is_finite(label) else "label_not_finite")
        for (_, problem), label in zip(row.documents, row.labels, strict=True)
    ]
    kept = [item for item, problem in enumerate(problems) if problem is None]
    if columns.is_single:
        return kept, [refusal(None, problem) for problem in problems if problem is not None]
    refused = [refusal(item, problem) for item, problem in enumerate(problems) if problem is not None]
    if not kept or (columns.negatives and (kept[0] != 0 or len(kept) == 1)):
        return [], [*refused, refusal(None, "documents_refused")]
    return kept, refused


def _is_finite(label: float | None) -> bool:
    return label is not None and abs(label) <= _FLOAT32_MAX


def from_arrow(batch: pa.RecordBatch, first_row: int, columns: LabelledColumns, texts: Texts) -> list[Row]:
    """The rows of an Arrow batch whose first row is row `first_row` of its file."""
    values = {}
    for role, name in columns.names.items():
        if role != "title":
            title = columns.names.get("title") if role == "document" else None
            values[role] = _arrow_values(batch, role, name, title, texts.max_text_bytes)
    numbers = range(first_row, first_row + batch.num_rows)
    return _rows(list(numbers), values, [None] * batch.num_rows, columns, texts)


def _arrow_values(batch: pa.RecordBatch, role: str, name: str, title: str | None, limit: int) -> list[Any]:
    column, kind = batch.column(name), kind_of(role)
    if pa.types.is_null(column.type):
        return [(None, f"{_noun(role)}_missing")] * len(column) if kind == "text" else [None] * len(column)
    if kind == "text":
        return own_texts(column, batch.column(title) if title else None, _noun(role), limit)
    if kind == "id":
        return id_bytes(column)
    if kind == "number":
        numbers: list[Any] = column.cast(pa.float64(), safe=False).to_pylist()
        return numbers
    flat = pc.list_flatten(column)
    if kind == "texts":
        items: list[Any] = own_texts(flat, None, _noun(role), limit) if len(flat) else []
    else:
        items = flat.cast(pa.float64(), safe=False).to_pylist()
    ends, at = [], 0
    for length in pc.fill_null(pc.list_value_length(column), 0).to_pylist():
        ends.append(items[at : at + length])
        at += length
    return ends


def from_lines(batch: Lines, is_json: bool, columns: LabelledColumns, texts: Texts) -> list[Row]:
    """The rows of lines: JSON objects, or fields with tabs between."""
    values: dict[str, list[Any]] = {role: [] for role in columns.names if role != "title"}
    problems: list[str | None] = []
    for line in batch.lines:
        row, problem = (_json_row if is_json else _fields_row)(line)
        if len(line) > MAX_LINE_BYTES:
            row, problem = None, "line_too_large"
        try:
            found = {role: _line_value(row or {}, role, columns, texts.max_text_bytes) for role in values}
        except _NotAListError as error:
            problem, row = f"line_broken: {error}", None
            found = {role: _line_value({}, role, columns, texts.max_text_bytes) for role in values}
        problems.append(problem)
        for role, value in found.items():
            values[role].append(value)
    return _rows(batch.numbers, values, problems, columns, texts)


class _NotAListError(Exception):
    """A value is no list where the layout has one."""


def _json_row(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    row, problem = parse_json(line)
    return row, f"line_broken: {problem}" if row is None else None


def _fields_row(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != 3:
        return None, f"line_broken: {len(fields)} fields"
    return {str(place): field for place, field in enumerate(fields)}, None


def _line_value(row: Mapping[str, Any], role: str, columns: LabelledColumns, limit: int) -> Any:
    value, kind = row.get(columns.names[role]), kind_of(role)
    if kind in ("texts", "numbers"):
        if not isinstance(value, list | None):
            raise _NotAListError(f"{columns.names[role]} is no list")
        items = value or []
        return [_number(item) if kind == "numbers" else _text(item, None, role, limit) for item in items]
    if kind == "number":
        return _number(value)
    if kind == "id":
        return _id(value)
    title = row.get(columns.names["title"]) if role == "document" and "title" in columns.names else None
    return _text(value, title, role, limit)


def _text(value: Any, title: Any, role: str, limit: int) -> Checked:
    noun = _noun(role)
    if value is not None and not isinstance(value, str | bytes):
        return None, f"{noun}_not_text: {type(value).__name__}"
    if isinstance(value, str):
        if isinstance(title, str) and title:
            value = f"{title} {value}"
        value = value.encode(errors="surrogatepass")  # a lone surrogate is then no UTF-8
    return check_text(len(value) if value is not None and len(value) > limit else value, noun)


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf


def _id(value: Any) -> Text:
    if isinstance(value, int):
        value = str(value)
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    if not isinstance(value, bytes):
        return None
    return value if len(value) <= MAX_ID_BYTES else len(value)


def _noun(role: str) -> str:
    return "query" if role.startswith("query") else "document"


def _rows(
    numbers: Sequence[int],
    values: Mapping[str, list[Any]],
    problems: Sequence[str | None],
    columns: LabelledColumns,
    texts: Texts,
) -> list[Row]:
    """Row objects out of values by role."""
    ids = {role: [_checked_id(id_, role) for id_ in column] for role, column in values.items() if kind_of(role) == "id"}
    found = dict(values)
    for role, column in ids.items():
        noun = _noun(role)
        stored = stored_texts(texts.queries if noun == "query" else texts.corpus, [id_ for id_, _ in column], noun)
        found[_role_of_text(role)] = [
            text if problem is None else (None, problem) for (_, problem), text in zip(column, stored, strict=True)
        ]
    rows = []
    for place, number in enumerate(numbers):
        row = {role: column[place] for role, column in found.items()}
        documents, labels, num_positives = _documents(row, columns)
        doc_roles = [role for role in ids if role != "query_id"]
        rows.append(
            Row(
                row=number,
                key=row["query_id"] if columns.has_ids else row["query"],
                query=row["query"],
                documents=documents if problems[place] is None else (),
                labels=labels,
                num_positives=num_positives,
                weight=row.get("weight") if "weight" in row else 1.0,
                problem=problems[place],
                query_id=ids["query_id"][place][0] if ids else None,
                doc_ids=[ids[role][place][0] for role in doc_roles],
            )
        )
    return rows


def _role_of_text(id_role: str) -> str:
    return "document" if id_role == "doc_id" else id_role.removesuffix("_id")


def _documents(row: Mapping[str, Any], columns: LabelledColumns) -> tuple[list[Checked], list[float | None], int]:
    """A row's documents, their labels, and how many of them the layout calls positives."""
    if columns.is_single:
        return [row["document"]], [row["label"]], 0
    if columns.layout == "lists":
        return row["docs"], row["labels"], 0
    if columns.layout == "flagembedding":
        documents = [*row["pos"], *row["neg"]]
        num_positives = len(row["pos"])
        if "pos_scores" in row:
            if (len(row["pos_scores"]), len(row["neg_scores"])) != (num_positives, len(row["neg"])):
                return documents, [], num_positives
            return documents, [*row["pos_scores"], *row["neg_scores"]], num_positives
    else:
        documents = [row["positive"], *(row[role.removesuffix("_id")] for role in columns.negatives)]
        num_positives = 1
        if "labels" in row:
            return documents, row["labels"], 1
    return documents, [float(place < num_positives) for place in range(len(documents))], num_positives


def _checked_id(id_: Text, role: str) -> Checked:
    if isinstance(id_, int):
        return None, f"id_too_large: {id_:,} bytes"
    try:
        return (id_.decode(), None) if id_ else (None, "query_id_missing" if role == "query_id" else "doc_id_missing")
    except UnicodeDecodeError:
        return None, "id_not_utf8"
