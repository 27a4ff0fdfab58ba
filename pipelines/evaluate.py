"""Compares the reranked order with the first stage's on judged queries: what a run's report shows as before and after.

Reads the id columns of the candidates again for the first-stage order, and the results for the new one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossenc.errors import InputError
from crossenc.evaluation.metrics import display_name, per_query
from crossenc.evaluation.significance import paired_comparison
from crossenc.records import Qrels
from pipelines.inputs import read_footer
from pipelines.layout import Columns
from pipelines.plan import Plan
from pipelines.rank import first_stage_ranks
from pipelines.records import MeasureComparison
from pipelines.rows import flatten
from pipelines.storage import FileInfo, Location, expand, list_files, locate, open_input, read_bytes
from pipelines.texts import as_binary

_RELEVANCE_NAMES = ("relevance", "label", "grade", "score", "rel")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Comparisons by measure, over the judged queries that the run has candidates for."""

    comparisons: tuple[MeasureComparison, ...]
    note: str


def read_qrels(uri: str, storage_options: Mapping[str, object]) -> Qrels:
    """Relevance judgements from Parquet (query_id, doc_id, relevance) or a TREC qrels text file.

    Raises InputError naming the file and line where one cannot be understood.
    """
    qrels: dict[str, dict[str, int]] = {}
    location = locate(uri, dict(storage_options))
    files = expand(location, ".parquet")
    for file in files:
        rows = _parquet_qrels(file) if file.location.name.endswith(".parquet") else _trec_qrels(file)
        for query_id, doc_id, grade in rows:
            qrels.setdefault(query_id, {})[doc_id] = grade
    if not qrels:
        raise InputError(f"{location} has no judgements")
    return qrels


def _parquet_qrels(file: FileInfo) -> Iterable[tuple[str, str, int]]:
    from pipelines.layout import Finder

    schema = read_footer(file).schema.to_arrow_schema()
    finder = Finder(schema, {}, str(file.location))
    names = [finder.required("query_id"), finder.required("doc_id")]
    relevance = next((name for name in _RELEVANCE_NAMES if name in schema.names), None)
    if relevance is None:
        raise InputError(
            f"{file.location} has no column for the relevance (looked for {', '.join(_RELEVANCE_NAMES)}); it has"
            f" {', '.join(schema.names)}"
        )
    with open_input(file) as source:
        table = pq.read_table(source, columns=[*names, relevance])
    ids = [pc.cast(as_binary(table.column(name).combine_chunks()), pa.string()).to_pylist() for name in names]
    grades = table.column(relevance).to_pylist()
    for row, (query_id, doc_id, grade) in enumerate(zip(*ids, grades, strict=True)):
        if query_id is None or doc_id is None or grade is None or int(grade) != grade:
            raise InputError(f"{file.location}, row {row}: a judgement needs two ids and a whole number")
        yield query_id, doc_id, int(grade)


def _trec_qrels(file: FileInfo) -> Iterable[tuple[str, str, int]]:
    for number, line in enumerate(read_bytes(file.location).decode().splitlines(), start=1):
        fields = line.split()
        if not fields or (number == 1 and not fields[-1].lstrip("-").isdigit()):
            continue  # an empty line, or a heading
        if len(fields) not in (3, 4) or not fields[-1].lstrip("-").isdigit():
            raise InputError(f"{file.location}, line {number}: write `query-id 0 doc-id relevance`")
        yield fields[0], fields[-2], int(fields[-1])


def compare(
    plan: Plan, output: Location, qrels: Qrels, top_k: int | None, storage_options: Mapping[str, object]
) -> Evaluation:
    """Measures before and after, with paired tests, over every judged query that is among the candidates."""
    before = first_stage_runs(plan, qrels, storage_options)
    present = {query_id: qrels[query_id] for query_id in qrels if query_id in before}
    absent = len(qrels) - len(present)
    if not present:
        return Evaluation((), f"none of the {len(qrels):,} judged queries is among the candidates")
    after = reranked_runs(output, present)
    depths = [10] if top_k is not None and top_k < 100 else [10, 100]
    measures = [
        "nDCG@10",
        "RR@10",
        *(f"R@{depth}" for depth in depths if top_k is None or depth <= max(top_k, 10)),
    ]
    values_before, values_after = per_query(measures, present, before), per_query(measures, present, after)
    comparisons = tuple(_comparison(measure, values_before[measure], values_after[measure]) for measure in measures)
    note = f"{len(present):,} judged queries compared"
    if absent:
        note += f"; {absent:,} judged queries have no candidates in this run and are left out"
    return Evaluation(comparisons, note)


def _comparison(measure: str, before: Mapping[str, float], after: Mapping[str, float]) -> MeasureComparison:
    queries = list(before)
    left, right = (np.array([values[query] for query in queries]) for values in (before, after))
    test = paired_comparison(left, right)
    return MeasureComparison(
        measure=display_name(measure),
        num_queries=test.num_queries,
        before=float(left.mean()),
        after=float(right.mean()),
        low=test.low,
        high=test.high,
        p_t=test.p_t,
        p_randomisation=test.p_randomisation,
        num_better=test.num_better,
        num_worse=test.num_worse,
    )


def first_stage_runs(plan: Plan, qrels: Qrels, storage_options: Mapping[str, object]) -> dict[str, list[str]]:
    """Judged query id -> its candidates in first-stage order, from the input files."""
    tables = []
    for entry in plan.inputs:
        file = FileInfo(locate(entry.uri, dict(storage_options)), entry.num_bytes, entry.version)
        tables += list(_judged_candidates(file, plan.columns, qrels))
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    query_ids, doc_ids = table.column("query_id").to_pylist(), table.column("doc_id").to_pylist()
    numbers = {query_id: number for number, query_id in enumerate(dict.fromkeys(query_ids))}
    groups = np.array([numbers[query_id] for query_id in query_ids], dtype=np.int64)
    ranks = table.column("rank").fill_null(np.iinfo(np.int64).max).to_numpy()
    stage = first_stage_ranks(groups, ranks, table.column("score").fill_null(float("nan")).to_numpy())
    runs: dict[str, dict[str, None]] = {query_id: {} for query_id in numbers}
    for row in np.lexsort((stage, groups)).tolist():
        runs[query_ids[row]].setdefault(doc_ids[row])  # a repeated document counts at its best rank
    return {query_id: list(docs) for query_id, docs in runs.items()}


def _judged_candidates(file: FileInfo, columns: Columns, qrels: Qrels) -> Iterable[pa.Table]:
    from dataclasses import replace

    ids_only = columns
    if columns.struct is None:
        ids_only = replace(columns, query=None, text=None, title=None, pass_through=())
    wanted = pa.array(list(qrels), pa.string())
    with open_input(file) as source:
        table = pq.ParquetFile(source)
        for batch in table.iter_batches(batch_size=1 << 15, columns=ids_only.to_read()):
            query_ids = _as_text(as_binary(batch.column(columns.query_id)))
            chosen = batch.filter(pc.is_in(query_ids, wanted))
            if chosen.num_rows == 0:
                continue
            raw = flatten(chosen, ids_only, 0)
            num_rows = len(raw.row)
            rank = pa.nulls(num_rows, pa.int64()) if raw.rank is None else raw.rank.cast(pa.int64())
            score = pa.nulls(num_rows, pa.float64()) if raw.score is None else raw.score.cast(pa.float64())
            ids = {"query_id": _as_text(raw.query_id), "doc_id": _as_text(raw.doc_id)}
            rows = pa.table({**ids, "rank": rank, "score": score})
            yield rows.filter(pc.is_valid(rows.column("doc_id")))


def _as_text(ids: pa.Array) -> pa.Array:
    """Ids as strings; what is not UTF-8 becomes null, as in the run it is refused."""
    try:
        return ids.cast(pa.large_string()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decode(value) for value in ids.to_pylist()], pa.string())


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def reranked_runs(output: Location, qrels: Qrels) -> dict[str, list[str]]:
    """Judged query id -> its documents in the results' order."""
    wanted = pa.array(list(qrels), pa.string())
    runs: dict[str, list[tuple[int, str]]] = {}
    for file in list_files(output / "results"):
        if not file.location.name.endswith(".parquet"):
            continue
        with open_input(file) as source:
            table = pq.ParquetFile(source, page_checksum_verification=True)
            for batch in table.iter_batches(columns=["query_id", "doc_id", "rank"]):
                query_ids = batch.column("query_id").cast(pa.string())
                mask = pc.is_in(query_ids, wanted)
                doc_ids = batch.column("doc_id").cast(pa.string()).filter(mask)
                rows: Sequence[tuple[str, str, int]] = list(
                    zip(
                        query_ids.filter(mask).to_pylist(),
                        doc_ids.to_pylist(),
                        batch.column("rank").filter(mask).to_pylist(),
                        strict=True,
                    )
                )
                for query_id, doc_id, rank in rows:
                    runs.setdefault(query_id, []).append((rank, doc_id))
    return {query_id: [doc_id for _, doc_id in sorted(docs)] for query_id, docs in runs.items()}
