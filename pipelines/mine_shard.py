"""One unit of a mining job: candidates of whole queries in, training data and an account of every candidate out.

A unit is a shard, or a bucket of queries where queries are spread over shards. It reads a unit's candidates with
their texts, applies the rules of crossenc.mining to each query, and stores what comes out. It knows nothing of which
units there are, nor of which are done.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from crossenc.errors import CrossEncError, RunConflictError
from crossenc.mining import Mined, MineQuery, MineSettings, Others, mine, text_key
from crossenc.records import Qrels
from pipelines.inputs import hash_ids, naming_damage
from pipelines.mine_formats import Document, Format, MinedQuery, encode
from pipelines.plan import RUN_FOLDER, Plan, Shard
from pipelines.prepare import ReadSettings, read_shard, thin_columns
from pipelines.rank import first_stage_ranks, group_by_query, quarantine_rows, refuse_duplicates, stage_columns
from pipelines.rows import CheckedRows
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo, Location, info, open_input, put_new
from pipelines.texts import TextStore, open_store

DATA_FOLDER = "data"
#: Candidates with their texts, sorted by bucket of queries; only while a run with spread queries is at work.
GATHERED_FOLDER = f"{RUN_FOLDER}/gathered"
#: Texts that the candidates hold themselves, whether they are equal, and the score that the rules look at.
_TEXT_FIELDS = (
    pa.field("query", pa.large_string()),
    pa.field("document", pa.large_string()),
    pa.field("text_key", pa.binary(16)),
    pa.field("score", pa.float64()),
)
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


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the output. `path` is relative to the output folder."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """What a unit came to: storing it makes the unit done."""

    unit_id: str
    fingerprint: str
    counts: MineCounts
    files: tuple[StoredFile, ...]


_NOTHING = np.empty(0, dtype=np.int64)
RECORD = TypeAdapter(UnitRecord)
_BY_REASON = ("left_out", "refused", "excluded", "dropped_positives")
_NUMBERS = tuple(field.name for field in fields(MineCounts) if field.name not in _BY_REASON)


@dataclass(frozen=True, slots=True)
class MineContext:
    """What every unit needs to know. `results` are a rerank run's parts by unit, None where candidates have scores."""

    output: Location
    plan: Plan
    read: ReadSettings
    qrels: Qrels
    settings: MineSettings
    shape: Format
    from_others: bool
    results: Mapping[str, FileInfo] | None

    def corpus(self) -> TextStore | None:
        read = self.read
        return open_store(read.corpus, read.cache, read.max_text_bytes) if read.corpus else None


def add_counts(counts: Iterable[MineCounts]) -> MineCounts:
    """The sum over units."""
    numbers: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {name: Counter() for name in _BY_REASON}
    for one in counts:
        numbers.update({name: getattr(one, name) for name in _NUMBERS})
        for name in _BY_REASON:
            reasons[name].update(getattr(one, name))
    sums: dict[str, Any] = {**numbers, **{name: dict(sorted(total.items())) for name, total in reasons.items()}}
    return MineCounts(**sums)


def mine_shard(shard: Shard, context: MineContext) -> UnitRecord:
    """Mines the queries of a shard, which are complete in it, and stores the result."""
    return _mine_unit(shard.shard_id, _read(shard, context), context)


def mine_bucket(unit_id: str, bucket: int, results_id: str, context: MineContext) -> UnitRecord:
    """Mines a bucket of queries whose candidates were gathered from all shards, and stores the result.

    `results_id` is the rerank run's part with the scores of these queries, if there is such a run.
    """

    def read_part(shard: Shard) -> pa.Table:
        file = info(_gathered(shard, context))
        if file is None:
            raise RunConflictError(f"{_gathered(shard, context)} was removed meanwhile; run the same command again")
        with open_input(file) as source:
            return pq.ParquetFile(source, page_checksum_verification=True).read_row_group(bucket)

    with ThreadPoolExecutor(16) as pool:
        rows = pa.concat_tables(pool.map(read_part, context.plan.shards)).replace_schema_metadata(None)
    rows = rows.combine_chunks().sort_by([("file", "ascending"), ("row", "ascending"), ("item", "ascending")])
    return _mine_unit(unit_id, rows, context, results_id)


def gather(shard: Shard, context: MineContext) -> None:
    """Stores a shard's candidates for `mine_bucket`, one row group for each bucket, unless they are stored."""
    place = _gathered(shard, context)
    if info(place) is None:
        rows, num_buckets = _read(shard, context), context.plan.num_buckets
        buckets = (hash_ids(rows.column("query_id").combine_chunks()) % np.uint64(num_buckets)).astype(np.int64)
        by = pa.array(np.argsort(buckets, kind="stable"))
        lengths = np.bincount(buckets, minlength=num_buckets).tolist()
        put_new(place, to_parquet(rows.take(by), row_group_rows=lengths))


def _gathered(shard: Shard, context: MineContext) -> Location:
    return context.output / f"{GATHERED_FOLDER}/part-{shard.shard_id}.parquet"


def _read(shard: Shard, context: MineContext) -> pa.Table:
    """A shard's candidates: the thin rows and _TEXT_FIELDS.

    Texts that lie in a table are left there, and those of queries without judgements, of which nothing will be used,
    are left out.
    """
    has_own_texts = context.plan.columns.text is not None
    keys: dict[str, bytes] = {}  # a document comes up for many queries

    def to_table(checked: CheckedRows) -> pa.Table:
        columns = thin_columns(checked, shard.file)
        is_used = [context.from_others or query_id in context.qrels for query_id in checked.query_ids]
        documents = [text if used else None for text, used in zip(checked.documents, is_used, strict=True)]
        for text in documents:
            if text is not None and text not in keys:
                keys[text] = text_key(text)
        own_texts = documents if has_own_texts else [None] * len(documents)
        return pa.table(
            columns
            | {
                "query": pa.array(checked.queries, pa.large_string()),
                "document": pa.array(own_texts, pa.large_string()),
                "text_key": pa.array([text if text is None else keys[text] for text in documents], pa.binary(16)),
                "score": columns["stage_score"],
            }
        )

    return read_shard(shard, context.plan.inputs[shard.file], context.read, to_table, _TEXT_FIELDS)


def _with_results(rows: pa.Table, results: FileInfo) -> pa.Table:
    """`rows` with the scores of a rerank run's part; a candidate that is not in its results has none."""
    with naming_damage(f"{results.location}, a part of the rerank run, cannot be read"), open_input(results) as source:
        part = pq.ParquetFile(source, page_checksum_verification=True)
        name = "model_score" if "model_score" in part.schema_arrow.names else "score"
        table = part.read(columns=["query_id", "doc_id", name])
    ids = (table.column(column).cast(pa.large_string()).to_pylist() for column in ("query_id", "doc_id"))
    scores = dict(zip(zip(*ids, strict=True), table.column(name).to_pylist(), strict=True))
    pairs = zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist(), strict=True)
    found = pa.array([scores.get(pair) for pair in pairs], pa.float64())
    return rows.set_column(rows.schema.get_field_index("score"), _TEXT_FIELDS[-1], found)


@dataclass(frozen=True, slots=True)
class _Unit:
    """The good candidates of a unit's Q queries, those of query q in [bounds[q], bounds[q + 1])."""

    query_ids: list[str]
    bounds: NDArray[np.int64]
    queries: pa.ChunkedArray
    documents: pa.ChunkedArray
    doc_ids: list[str]
    keys: list[bytes]  # None where nothing judged makes use of it
    ranks: NDArray[np.int64]
    scores: NDArray[np.float64]

    def span(self, q: int) -> slice:
        return slice(int(self.bounds[q]), int(self.bounds[q + 1]))

    def others(self) -> tuple[Others, list[int]]:
        """Every document once, by id, and where it stands."""
        first: dict[tuple[str, bytes], int] = {}
        for at, document in enumerate(zip(self.doc_ids, self.keys, strict=True)):
            first.setdefault(document, at)
        ordered = sorted(first)
        return Others([d for d, _ in ordered], [key for _, key in ordered]), [first[d] for d in ordered]


@dataclass(frozen=True, slots=True)
class _Query:
    """What became of a query: the places of its positives in the unit (None where only the corpus has the text), what
    the rules made of its candidates, and how many positives are left out by reason."""

    positives: dict[str, int | None]
    mined: Mined
    dropped: Mapping[str, int]


def _mine_unit(unit_id: str, rows: pa.Table, context: MineContext, results_id: str | None = None) -> UnitRecord:
    if context.results is not None:
        rows = _with_results(rows, context.results[results_id or unit_id])
    groups = group_by_query(rows)
    stage = first_stage_ranks(groups, *stage_columns(rows))
    rows = refuse_duplicates(rows, groups, stage)
    is_good = pc.is_null(rows.column("reason")).to_numpy()
    unit = _unit(rows, groups, stage, is_good)
    relevant = [_positives(context.qrels.get(query_id, {})) for query_id in unit.query_ids]
    absent = _absent_texts(unit, relevant, context)
    others, places = unit.others() if context.from_others else (None, [])
    mined = [_mine_query(unit, q, relevant[q], absent, others, context.settings) for q in range(len(relevant))]
    training = _training(unit, mined, absent, places, context)
    refused = rows.filter(pa.array(~is_good))
    quarantine = quarantine_rows(refused, [file.uri for file in context.plan.inputs])
    data, num_rows = encode(training, context.shape)
    num_candidates = np.bincount(groups[groups >= 0], minlength=len(unit.query_ids))
    completeness = _completeness(unit, mined, num_candidates)
    counts = _counts(mined, refused, rows.num_rows, num_rows, context.settings)
    counts.check()
    files = {
        f"{DATA_FOLDER}/part-{unit_id}{context.shape.suffix}": data if num_rows else None,
        f"completeness/part-{unit_id}.parquet": to_parquet(completeness) if completeness.num_rows else None,
        f"quarantine/part-{unit_id}.parquet": to_parquet(quarantine) if refused.num_rows else None,
    }
    stored = [store(path, body, context.output) for path, body in files.items() if body is not None]
    return UnitRecord(unit_id, context.plan.fingerprint, counts, tuple(stored))


def _unit(rows: pa.Table, groups: NDArray[np.int64], stage: NDArray[np.int64], is_good: NDArray[np.bool_]) -> _Unit:
    num_queries = int(groups.max(initial=-1)) + 1
    good = np.flatnonzero(is_good)
    by = good[np.argsort(groups[good], kind="stable")]
    chosen = rows.take(pa.array(by))
    _, first = np.unique(groups[groups >= 0], return_index=True)
    first = np.flatnonzero(groups >= 0)[first]
    return _Unit(
        query_ids=rows.column("query_id").take(pa.array(first)).to_pylist(),
        bounds=np.searchsorted(groups[by], np.arange(num_queries + 1)),
        queries=chosen.column("query"),
        documents=chosen.column("document"),
        doc_ids=chosen.column("doc_id").to_pylist(),
        keys=chosen.column("text_key").to_pylist(),
        ranks=stage[by],
        scores=chosen.column("score").fill_null(float("nan")).to_numpy(),
    )


def _positives(grades: Mapping[str, int]) -> dict[str, int]:
    """A query's relevant documents with their grades, the best first."""
    return dict(sorted(((d, g) for d, g in grades.items() if g > 0), key=lambda item: (-item[1], item[0])))


def _absent_texts(unit: _Unit, relevant: Sequence[Mapping[str, int]], context: MineContext) -> dict[str, str]:
    """Texts, from the corpus, of positives that are not among their query's candidates."""
    absent: dict[str, None] = {}
    for q, grades in enumerate(relevant):
        among = set(unit.doc_ids[unit.span(q)]) if grades else set()
        absent |= dict.fromkeys(doc_id for doc_id in grades if doc_id not in among)
    corpus = context.corpus()
    if corpus is None or not absent:
        return {}
    texts = {doc_id: _decoded(text) for doc_id, (text, _) in zip(absent, corpus.lookup(list(absent)), strict=True)}
    return {doc_id: text for doc_id, text in texts.items() if text and not text.isspace()}


def _decoded(text: object) -> str | None:
    """A text of a store; None where it is missing, too large or not UTF-8."""
    try:
        return text.decode() if isinstance(text, bytes) else None
    except UnicodeDecodeError:
        return None


def _mine_query(
    unit: _Unit,
    q: int,
    grades: Mapping[str, int],
    absent: Mapping[str, str],
    others: Others | None,
    settings: MineSettings,
) -> _Query:
    span = unit.span(q)
    doc_ids = unit.doc_ids[span]
    place = {doc_id: at for at, doc_id in enumerate(doc_ids, start=span.start) if doc_id in grades}
    known = {doc_id: absent[doc_id] for doc_id in grades if doc_id not in place and doc_id in absent}
    query = MineQuery(
        query_id=unit.query_ids[q],
        doc_ids=doc_ids,
        text_keys=unit.keys[span],
        ranks=unit.ranks[span],
        scores=unit.scores[span],
        positive_ids=grades.keys(),
        positive_keys={*(unit.keys[at] for at in place.values()), *map(text_key, known.values())},
    )
    mined = mine(query, settings, others) if doc_ids else Mined(_NOTHING, _NOTHING, {}, "no_candidates")
    positives, dropped = {}, Counter[str]()
    for doc_id in grades if mined.left_out is None else ():
        if doc_id not in place and doc_id not in known:
            dropped["without_text"] += 1
        elif settings.require_scores and not (doc_id in place and np.isfinite(unit.scores[place[doc_id]])):
            dropped["without_score"] += 1
        else:
            positives[doc_id] = place.get(doc_id)
    return _Query(positives, mined, dropped)


def _training(
    unit: _Unit, mined: Sequence[_Query], absent: Mapping[str, str], places: Sequence[int], context: MineContext
) -> list[MinedQuery]:
    """The mined queries with their texts. `places` says where in the unit each of the others stands."""
    chosen: dict[int, list[int]] = {}  # query -> where its negatives stand
    for q, query in enumerate(mined):
        if query.mined.left_out is None:
            own = (query.mined.negatives + unit.bounds[q]).tolist()
            chosen[q] = [*own, *(places[other] for other in query.mined.others.tolist())]
    used = {at for q in chosen for at in (*chosen[q], *mined[q].positives.values()) if at is not None}
    texts = _texts(unit, sorted(used), context)

    def document(doc_id: str, grade: int, at: int | None) -> Document:
        if at is None:
            return Document(doc_id, absent[doc_id], grade, float("nan"))
        return Document(doc_id, texts[at], grade, float(unit.scores[at]))

    queries = unit.queries.take(pa.array([int(unit.bounds[q]) for q in chosen], pa.int64())).to_pylist()
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
        for text, (q, negatives) in zip(queries, chosen.items(), strict=True)
    ]


def _texts(unit: _Unit, places: Sequence[int], context: MineContext) -> dict[int, str]:
    """The texts of these candidates, which are good: from the candidates themselves or from the corpus."""
    if context.plan.columns.text is not None:
        return dict(zip(places, unit.documents.take(pa.array(places, pa.int64())).to_pylist(), strict=True))
    corpus = context.corpus()
    assert corpus is not None, "candidates without texts were resolved without a corpus"
    found = corpus.lookup([unit.doc_ids[at] for at in places])
    return {at: _decoded(text) or "" for at, (text, _) in zip(places, found, strict=True)}


def _counts(
    mined: Sequence[_Query], refused: pa.Table, num_candidates: int, num_rows: int, settings: MineSettings
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
        refused=dict(sorted(Counter(refused.column("reason").to_pylist()).items())),
        excluded=dict(sorted(excluded.items())),
        dropped_positives=dict(sorted(dropped.items())),
    )


def _completeness(unit: _Unit, mined: Sequence[_Query], num_candidates: NDArray[np.int64]) -> pa.Table:
    columns = [
        pa.array(unit.query_ids, pa.string()),
        pa.array(num_candidates, pa.int64()),
        pa.array(num_candidates - np.diff(unit.bounds), pa.int64()),
        pa.array([len(query.positives) for query in mined], pa.int64()),
        pa.array([len(query.mined.negatives) + len(query.mined.others) for query in mined], pa.int64()),
        pa.array([query.mined.left_out for query in mined], pa.string()),
    ]
    return pa.table(columns, schema=_COMPLETENESS_SCHEMA)


def store(path: str, body: bytes, output: Location) -> StoredFile:
    """Creates a file whose bytes depend on the unit alone: one that is there already is this one."""
    stored = put_new(output / path, body)
    if stored != body:
        raise RunConflictError(
            f"{output / path} holds something else than this run makes; choose another output, or start over with"
            " --new-run"
        )
    return StoredFile(path, len(body), hashlib.sha256(body).hexdigest())
