"""What mined queries look like on disk: the shapes in which training programs read them.

Functions of data in memory: it chooses nothing and stores nothing. Equal queries give equal bytes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipelines.mine_config import FormatName
from pipelines.schemas import to_parquet

_SUFFIXES = {"flagembedding": ".jsonl", "triples": ".tsv"}
#: What ends a field or a line of triples, and therefore cannot stand in a text.
_TO_SPACES = str.maketrans("\t\n\r", "   ")


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a training example. `grade` is 0 for a negative; `score` is NaN where there is none."""

    doc_id: str
    text: str
    grade: int
    score: float


@dataclass(frozen=True, slots=True)
class MinedQuery:
    """A query with its positives (at least one) and its negatives, in the order in which they are written."""

    query_id: str
    query: str
    positives: tuple[Document, ...]
    negatives: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Format:
    """A shape, and what it holds."""

    name: FormatName
    num_negatives: int
    scores: bool
    labels: Literal["binary", "grades"]

    @property
    def suffix(self) -> str:
        return _SUFFIXES.get(self.name, ".parquet")

    @property
    def schema(self) -> pa.Schema:
        """The columns of a Parquet format, in the order in which sentence-transformers reads them."""
        text, label, score = pa.string(), pa.float32(), pa.float64()
        label_fields = [("label", label)] + [("score", score)] * self.scores
        many_scores = [("scores", pa.list_(score))] * self.scores
        negatives = [(f"negative_{n}", text) for n in range(1, self.num_negatives + 1)]
        fields: dict[FormatName, list[tuple[str, pa.DataType]]] = {
            "pairs": [("query", text), ("document", text), *label_fields],
            "triplets": [("query", text), ("positive", text), ("negative", text), *many_scores],
            "tuples": [("query", text), ("positive", text), *negatives, *many_scores],
            "lists": [("query", text), ("docs", pa.list_(text)), ("labels", pa.list_(label)), *many_scores],
            "ids": [("query_id", text), ("doc_id", text), *label_fields],
        }
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields[self.name]])


def encode(queries: Sequence[MinedQuery], shape: Format) -> tuple[bytes, int]:
    """The file with these queries, and its number of rows.

    pairs, ids: a row for each positive and negative. triplets, triples: one for each positive with each negative.
    tuples: one for each positive with all negatives. lists, flagembedding: one for each query. `scores` stand in the
    order of the documents, the positive's first. Triples are lines of query, positive and negative as MS MARCO has
    them, with spaces for tabs and line ends in a text.
    """
    rows = [row for query in queries for row in _rows(query, shape)]
    if shape.name == "flagembedding":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), len(rows)
    if shape.name == "triples":
        lines = (
            "\t".join(row[name].translate(_TO_SPACES) for name in ("query", "positive", "negative")) for row in rows
        )
        return "".join(f"{line}\n" for line in lines).encode(), len(rows)
    return to_parquet(pa.Table.from_pylist(rows, schema=shape.schema)), len(rows)


def _rows(query: MinedQuery, shape: Format) -> Iterator[dict[str, Any]]:
    everything = [*query.positives, *query.negatives]
    if shape.name in ("pairs", "ids"):
        for document in everything:
            row: dict[str, Any] = {"query": query.query, "document": document.text}
            if shape.name == "ids":
                row = {"query_id": query.query_id, "doc_id": document.doc_id}
            row["label"] = _label(document, shape)
            yield row | {"score": document.score}
    elif shape.name in ("triplets", "triples", "tuples"):
        sets = [query.negatives] if shape.name == "tuples" else [(negative,) for negative in query.negatives]
        for positive in query.positives:
            for negatives in sets:
                texts = {f"negative_{n}": negative.text for n, negative in enumerate(negatives, start=1)}
                row = {"query": query.query, "positive": positive.text, "negative": negatives[0].text, **texts}
                yield row | {"scores": _scores([positive, *negatives])}
    elif shape.name == "lists":
        row = {"query": query.query, "docs": _texts(everything), "scores": _scores(everything)}
        yield row | {"labels": [_label(document, shape) for document in everything]}
    else:
        row = {"query": query.query, "pos": _texts(query.positives), "neg": _texts(query.negatives)}
        if shape.scores:
            row |= {"pos_scores": _scores(query.positives), "neg_scores": _scores(query.negatives)}
        yield row


def _label(document: Document, shape: Format) -> int:
    return document.grade if shape.labels == "grades" else int(document.grade > 0)


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]


def _scores(documents: Sequence[Document]) -> list[float]:
    return [document.score for document in documents]
