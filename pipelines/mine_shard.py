"""One unit of a mining job: candidates of whole queries in, training data and an account of every candidate out.

It applies the rules of crossenc.mining to each query. It knows nothing of which units there are, nor of how their
candidates are read and what comes out is stored.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from crossenc.errors import CrossEncError
from crossenc.mining import Mined, MineQuery, MineSettings, Others, mine, text_key
from crossenc.records import Qrels
from pipelines.mine_formats import Document, Format, MinedQuery, encode
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo
from pipelines.unit_rows import Unit, decoded, results_scores, to_unit, with_scores
from pipelines.units import DATA_FOLDER, Kind, UnitContext, UnitRecord

_COMPLETENESS_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string()),
        pa.field("num_candidates", pa.int64(), nullable=False),
        pa.field("num_refused", pa.int64(), nullable=False),
        pa.field("num_positives", pa.int64(), nullable=False),
        pa.field("num_negatives", pa.int64(), nullable=False),
        pa.field("left_out", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MineCounts:
    """An account of a unit, or of a whole run.

    The conservation laws: `num_queries == num_mined + sum(left_out.values())`, and
    `num_candidates == num_negatives + sum(excluded.values()) + sum(refused.values())`.
    `num_short` of the mined queries have fewer negatives than asked for; `num_others` negatives came from other
    queries; `dropped_positives` are positives that are not in the data, by reason.
    """

    num_queries: int = 0
    num_mined: int = 0
    num_short: int = 0
    num_candidates: int = 0
    num_negatives: int = 0
    num_others: int = 0
    num_positives: int = 0
    num_rows: int = 0
    left_out: Mapping[str, int]
    refused: Mapping[str, int]
    excluded: Mapping[str, int]
    dropped_positives: Mapping[str, int]

    def check(self) -> None:
        """Raises CrossEncError where something came from nowhere or went missing."""
        queries = self.num_mined + sum(self.left_out.values())
        candidates = self.num_negatives + sum(self.excluded.values()) + sum(self.refused.values())
        if (queries, candidates) != (self.num_queries, self.num_candidates):
            raise CrossEncError(
                f"{self.num_queries:,} queries and {self.num_candidates:,} candidates went in, {queries:,} and"
                f" {candidates:,} are accounted for; report this as a bug"
            )

    def shown(self) -> dict[str, int]:
        """What progress shows."""
        return {"queries": self.num_queries, "negatives": self.num_negatives + self.num_others}


_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class MineContext(UnitContext):
    """What every unit needs to know. Without results the candidates have scores of their own, or none.

    `known` are more judgements of the queries of `qrels`: their positives are no negatives.
    """

    qrels: Qrels
    known: Qrels
    settings: MineSettings
    shape: Format
    from_others: bool

    @property
    def kind(self) -> Kind[MineCounts]:
        return KIND

    def uses_texts(self, query_id: str | None) -> bool:
        return self.from_others or query_id in self.qrels


@dataclass(frozen=True, slots=True)
class _Query:
    """What became of a query: the places of its positives in the unit (None where only the corpus has the text), what
    the rules made of its candidates, and how many positives are left out by reason."""

    positives: dict[str, int | None]
    mined: Mined
    dropped: Mapping[str, int]


def _make(
    unit_id: str, rows: pa.Table, results: Sequence[FileInfo], context: MineContext
) -> tuple[MineCounts, dict[str, bytes | None]]:
    """Mines the queries of a unit: its account, and its files by path."""
    unit = to_unit(with_scores(rows, results_scores(rows, results[0])) if results else rows)
    relevant = [positives_of(context.qrels, query_id) for query_id in unit.query_ids]
    known = [positives_of(context.known, query_id) for query_id in unit.query_ids]
    absent = _absent_texts(unit, [one | more for one, more in zip(relevant, known, strict=True)], context)
    others, places = _others(unit) if context.from_others else (None, [])
    mined = [
        _mine_query(unit, q, relevant[q], known[q], absent, others, context.settings) for q in range(len(relevant))
    ]
    data, num_rows = encode(_training(unit, mined, absent, places, context), context.shape)
    completeness = _completeness(unit, mined)
    return _counts(unit, mined, rows.num_rows, num_rows, context.settings), {
        f"{DATA_FOLDER}/part-{unit_id}{context.shape.suffix}": data if num_rows else None,
        f"completeness/part-{unit_id}.parquet": to_parquet(completeness) if completeness.num_rows else None,
        f"quarantine/part-{unit_id}.parquet": unit.quarantine(context),
    }


KIND = Kind(_make, MineCounts, TypeAdapter(UnitRecord[MineCounts]))


def _others(unit: Unit) -> tuple[Others, list[int]]:
    """Every document of a unit once, by id, and where it stands."""
    first: dict[tuple[str, bytes], int] = {}
    for at, document in enumerate(zip(unit.doc_ids, unit.keys, strict=True)):
        first.setdefault(document, at)
    ordered = sorted(first)
    return Others([d for d, _ in ordered], [key for _, key in ordered]), [first[d] for d in ordered]


def positives_of(qrels: Qrels, query_id: str) -> dict[str, int]:
    """A query's relevant documents with their grades, the best first."""
    grades = qrels.get(query_id, {})
    return dict(sorted(((d, g) for d, g in grades.items() if g > 0), key=lambda item: (-item[1], item[0])))


def _absent_texts(unit: Unit, relevant: Sequence[Mapping[str, int]], context: MineContext) -> dict[str, str]:
    """Texts, from the corpus, of positives that are not among their query's candidates."""
    absent: dict[str, None] = {}
    for q, grades in enumerate(relevant):
        among = set(unit.doc_ids[unit.span(q)]) if grades else set()
        absent |= dict.fromkeys(doc_id for doc_id in grades if doc_id not in among)
    corpus = context.corpus()
    if corpus is None or not absent:
        return {}
    texts = {doc_id: decoded(text) for doc_id, (text, _) in zip(absent, corpus.lookup(list(absent)), strict=True)}
    return {doc_id: text for doc_id, text in texts.items() if text and not text.isspace()}


def _mine_query(
    unit: Unit,
    q: int,
    grades: Mapping[str, int],
    known: Collection[str],
    absent: Mapping[str, str],
    others: Others | None,
    settings: MineSettings,
) -> _Query:
    span = unit.span(q)
    doc_ids = unit.doc_ids[span]
    place = {doc_id: at for at, doc_id in enumerate(doc_ids, start=span.start)}
    keys = {doc_id: unit.keys[place[doc_id]] for doc_id in (*grades, *known) if doc_id in place}
    keys |= {
        doc_id: text_key(absent[doc_id]) for doc_id in (*grades, *known) if doc_id not in place and doc_id in absent
    }
    query = MineQuery(
        query_id=unit.query_ids[q],
        doc_ids=doc_ids,
        text_keys=unit.keys[span],
        ranks=unit.ranks[span],
        scores=unit.scores[span],
        positive_ids=grades.keys(),
        positive_keys={keys[doc_id] for doc_id in grades if doc_id in keys},
        known_ids=known,
        known_keys={keys[doc_id] for doc_id in known if doc_id in keys},
    )
    mined = mine(query, settings, others) if doc_ids else Mined(_NOTHING, _NOTHING, {}, "no_candidates")
    positives, dropped, seen = {}, Counter[str](), set[bytes]()
    for doc_id in grades if mined.left_out is None else ():
        if doc_id not in keys:
            dropped["without_text"] += 1
        elif settings.require_scores and not (doc_id in place and np.isfinite(unit.scores[place[doc_id]])):
            dropped["without_score"] += 1
        elif keys[doc_id] in seen:
            dropped["repeated_text"] += 1
        else:
            seen.add(keys[doc_id])
            positives[doc_id] = place.get(doc_id)
    return _Query(positives, mined, dropped)


def _training(
    unit: Unit, mined: Sequence[_Query], absent: Mapping[str, str], places: Sequence[int], context: MineContext
) -> list[MinedQuery]:
    """The mined queries with their texts. `places` says where in the unit each of the others stands."""
    chosen: dict[int, list[int]] = {}  # query -> where its negatives stand
    for q, query in enumerate(mined):
        if query.mined.left_out is None:
            own = (query.mined.negatives + unit.bounds[q]).tolist()
            chosen[q] = [*own, *(places[other] for other in query.mined.others.tolist())]
    used = {at for q in chosen for at in (*chosen[q], *mined[q].positives.values()) if at is not None}
    texts = unit.texts(sorted(used), context)

    def document(doc_id: str, grade: int, at: int | None) -> Document:
        if at is None:
            return Document(doc_id, absent[doc_id], grade, float("nan"))
        return Document(doc_id, texts[at], grade, float(unit.scores[at]))

    return [
        MinedQuery(
            query_id=unit.query_ids[q],
            query=text,
            positives=tuple(
                document(doc_id, context.qrels[unit.query_ids[q]][doc_id], at)
                for doc_id, at in mined[q].positives.items()
            ),
            negatives=tuple(document(unit.doc_ids[at], 0, at) for at in negatives),
        )
        for text, (q, negatives) in zip(unit.query_texts(list(chosen)), chosen.items(), strict=True)
    ]


def _counts(
    unit: Unit, mined: Sequence[_Query], num_candidates: int, num_rows: int, settings: MineSettings
) -> MineCounts:
    used = [query.mined for query in mined if query.mined.left_out is None]
    sizes = [len(one.negatives) + len(one.others) for one in used]
    excluded, dropped = Counter[str](), Counter[str]()
    for query in mined:
        excluded.update(query.mined.excluded)
        dropped.update(query.dropped)
    left_out = Counter(query.mined.left_out for query in mined if query.mined.left_out is not None)
    return MineCounts(
        num_queries=len(mined),
        num_mined=len(used),
        num_short=sum(size < settings.num_negatives for size in sizes),
        num_candidates=num_candidates,
        num_negatives=sum(len(one.negatives) for one in used),
        num_others=sum(len(one.others) for one in used),
        num_positives=sum(len(query.positives) for query in mined),
        num_rows=num_rows,
        left_out=dict(sorted(left_out.items())),
        refused=unit.num_refused(),
        excluded=dict(sorted(excluded.items())),
        dropped_positives=dict(sorted(dropped.items())),
    )


def _completeness(unit: Unit, mined: Sequence[_Query]) -> pa.Table:
    columns = [
        pa.array(unit.query_ids, pa.string()),
        pa.array(unit.num_candidates, pa.int64()),
        pa.array(unit.num_candidates - np.diff(unit.bounds), pa.int64()),
        pa.array([len(query.positives) for query in mined], pa.int64()),
        pa.array([len(query.mined.negatives) + len(query.mined.others) for query in mined], pa.int64()),
        pa.array([query.mined.left_out for query in mined], pa.string()),
    ]
    return pa.table(columns, schema=_COMPLETENESS_SCHEMA)
