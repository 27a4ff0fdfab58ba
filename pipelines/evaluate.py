"""Compares the reranked order with the first stage's on judged queries: what a run's report shows as before and after.

Reads the id columns of the candidates again for the first-stage order, and the results for the new one.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossenc.errors import InputError, StorageError
from crossenc.evaluation.metrics import display_name, per_query
from crossenc.evaluation.significance import paired_comparison
from crossenc.records import Qrels
from pipelines.commit import RESULTS_FOLDER
from pipelines.inputs import first_line, read_footer
from pipelines.layout import Columns, Finder, check_id
from pipelines.plan import InputFile, Plan
from pipelines.rank import first_stage_ranks, stage_columns
from pipelines.records import MeasureComparison
from pipelines.rows import flatten
from pipelines.schemas import means_damage
from pipelines.storage import FileInfo, Location, expand, list_files, locate, open_input, read_bytes
from pipelines.texts import as_binary

_RELEVANCE_NAMES = ("relevance", "label", "grade", "score", "rel")
_BATCH_ROWS = 1 << 16
_NESTED_BATCH_ROWS = 256
_CANDIDATE_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("stage_rank", pa.int64()),
        ("stage_score", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Comparisons by measure, over the judged queries that the run has candidates for."""

    comparisons: tuple[MeasureComparison, ...]
    note: str


def read_qrels(
    uris: str | tuple[str, ...], storage_options: Mapping[str, object], queries: Collection[str] | None = None
) -> Qrels:
    """Relevance judgements from Parquet (query_id, doc_id, relevance) or TREC qrels text files; the last one counts.

    Where `queries` are given, those of other queries are not kept, and there may be none. Raises InputError naming the
    file and line where one cannot be understood.
    """
    qrels: dict[str, dict[str, int]] = {}
    places = [locate(uri, dict(storage_options)) for uri in ((uris,) if isinstance(uris, str) else uris)]
    for file in (file for place in places for file in expand(place, ".parquet")):
        rows = _parquet_qrels(file) if file.location.name.endswith(".parquet") else _trec_qrels(file)
        for query_id, doc_id, grade in rows:
            if queries is None or query_id in queries:
                qrels.setdefault(query_id, {})[doc_id] = grade
    if not qrels and queries is None:
        raise InputError(f"{', '.join(map(str, places))} has no judgements; give qrels with a row a judgement")
    return qrels


def _parquet_qrels(file: FileInfo) -> Iterable[tuple[str, str, int]]:
    schema = read_footer(file).schema.to_arrow_schema()
    finder = Finder(schema, {}, str(file.location))
    names = [finder.required("query_id"), finder.required("doc_id")]
    relevance = next((name for name in _RELEVANCE_NAMES if name in schema.names), None)
    if relevance is None:
        raise InputError(
            f"{file.location} has no column for the relevance (looked for {', '.join(_RELEVANCE_NAMES)}); it has"
            f" {', '.join(schema.names)}"
        )
    for name in names:
        check_id(schema, name, str(file.location))
    kind = schema.field(relevance).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{file.location}: column {relevance!r} is {kind}, but must be a number")
    try:
        with open_input(file) as source:
            table = pq.read_table(source, columns=[*names, relevance], page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if not means_damage(error):
            raise
        raise InputError(f"{file.location} cannot be read ({first_line(error)}); restore the file") from None
    ids = [ids_as_text(as_binary(table.column(name).combine_chunks())).to_pylist() for name in names]
    grades = table.column(relevance).to_pylist()
    for row, (query_id, doc_id, grade) in enumerate(zip(*ids, grades, strict=True)):
        if query_id is None or doc_id is None or grade is None or not float(grade).is_integer():
            raise InputError(f"{file.location}, row {row}: a judgement needs two ids in UTF-8 and a whole number")
        yield query_id, doc_id, int(grade)


def _trec_qrels(file: FileInfo) -> Iterable[tuple[str, str, int]]:
    """Lines of three or four fields, the last one a whole number. The first line may be a heading."""
    is_tsv = file.location.name.lower().endswith(".tsv")
    for number, line in enumerate(read_bytes(file.location).split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file.location}, line {number}: not a qrels file in UTF-8 ({error.reason})") from None
        by_tabs = is_tsv and "\t" in text  # an id may hold spaces then
        fields = [field.strip() for field in text.split("\t")] if by_tabs else text.split()
        is_judgement = len(fields) in (3, 4) and all(fields) and re.fullmatch(r"[+-]?[0-9]{1,9}", fields[-1])
        if is_judgement:
            yield fields[0], fields[-2], int(fields[-1])
        elif any(fields) and not (number == 1 and _is_heading(fields)):
            raise InputError(
                f"{file.location}, line {number}: write `query-id 0 doc-id relevance`, a whole number last"
            )


def _is_heading(fields: list[str]) -> bool:
    """Whether the last field is a name and no grade."""
    try:
        float(fields[-1])
    except ValueError:
        return True
    return False


def compare(
    plan: Plan, output: Location, qrels: Qrels, top_k: int | None, storage_options: Mapping[str, object]
) -> Evaluation:
    """Measures before and after, with paired tests, over every judged query that is among the candidates."""
    before, unreadable = first_stage_runs(plan, qrels, storage_options)
    present = {query_id: qrels[query_id] for query_id in qrels if query_id in before}
    absent = len(qrels) - len(present)
    left_out = f"; {len(unreadable)} damaged files are left out, the first is {unreadable[0]}" if unreadable else ""
    if not present:
        return Evaluation((), f"none of the {len(qrels):,} judged queries is among the candidates{left_out}")
    after = reranked_runs(output, present)
    measures = ["nDCG@10", "RR@10", "R@10", *(["R@100"] if top_k is None or top_k >= 100 else [])]
    values_before, values_after = per_query(measures, present, before), per_query(measures, present, after)
    comparisons = tuple(_comparison(measure, values_before[measure], values_after[measure]) for measure in measures)
    note = f"{len(present):,} judged queries compared"
    if absent:
        note += f"; {absent:,} judged queries have no candidates in this run and are left out"
    return Evaluation(comparisons, note + left_out)


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


def first_stage_runs(
    plan: Plan, qrels: Qrels, storage_options: Mapping[str, object]
) -> tuple[dict[str, list[str]], list[str]]:
    """Judged query id -> its candidates in first-stage order, from the input files; and the files that are damaged.

    A run refuses the rows that it cannot read; here a damaged file is left out whole.
    """
    wanted = pa.array(list(qrels), pa.string())

    def read(entry: InputFile) -> pa.Table | None:
        file = FileInfo(locate(entry.uri, dict(storage_options)), entry.num_bytes, entry.version)
        try:
            return pa.concat_tables([_CANDIDATE_SCHEMA.empty_table(), *_judged_candidates(file, plan.columns, wanted)])
        except (pa.ArrowException, OSError) as error:
            if not means_damage(error):
                raise
            return None

    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(read, plan.inputs))
    damaged = [entry.uri for entry, table in zip(plan.inputs, tables, strict=True) if table is None]
    table = pa.concat_tables([_CANDIDATE_SCHEMA.empty_table(), *(table for table in tables if table is not None)])
    query_ids, doc_ids = table.column("query_id").to_pylist(), table.column("doc_id").to_pylist()
    numbers = {query_id: number for number, query_id in enumerate(dict.fromkeys(query_ids))}
    groups = np.array([numbers[query_id] for query_id in query_ids], dtype=np.int64)
    stage = first_stage_ranks(groups, *stage_columns(table))
    runs: dict[str, dict[str, None]] = {query_id: {} for query_id in numbers}
    for row in np.lexsort((stage, groups)).tolist():
        runs[query_ids[row]].setdefault(doc_ids[row])  # a repeated document counts at its best rank
    return {query_id: list(docs) for query_id, docs in runs.items()}, damaged


def _judged_candidates(file: FileInfo, columns: Columns, wanted: pa.Array) -> Iterator[pa.Table]:
    ids_only = replace(columns, query=None, text=None, title=None, pass_through=())
    with open_input(file) as source:
        stored = pq.ParquetFile(source)
        leaves = _leaves(stored.schema, ids_only)
        size = _NESTED_BATCH_ROWS if columns.layout == "nested" else _BATCH_ROWS
        for batch in stored.iter_batches(batch_size=size, columns=leaves):
            query_ids = ids_as_text(as_binary(batch.column(columns.query_id)))
            chosen = batch.filter(pc.is_in(query_ids, wanted))
            if chosen.num_rows == 0:
                continue
            raw = flatten(chosen, ids_only, 0)
            values = (ids_as_text(raw.query_id), ids_as_text(raw.doc_id), raw.rank, raw.score)
            rows = pa.table(
                [
                    pa.nulls(len(raw.row), field.type) if value is None else value.cast(field.type)
                    for field, value in zip(_CANDIDATE_SCHEMA, values, strict=True)
                ],
                schema=_CANDIDATE_SCHEMA,
            )
            yield rows.filter(pc.is_valid(rows.column("doc_id")))


def _leaves(schema: pq.ParquetSchema, columns: Columns) -> list[str]:
    """The paths to read in a file: of a list of structs the ids, ranks and scores only, not the texts beside them."""
    if columns.struct is None:
        return columns.to_read()
    names = (columns.doc_id, columns.rank, columns.score)
    paths = [schema.column(i).path for i in range(len(schema))]
    inside = [path for path in paths if path.startswith(f"{columns.struct}.") and path.rpartition(".")[2] in names]
    return [columns.query_id, *inside]


def ids_as_text(ids: pa.Array) -> pa.Array:
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
    files = [file for file in list_files(output / RESULTS_FOLDER) if file.location.name.startswith("part-")]
    runs: dict[str, list[tuple[int, str]]] = {}
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(lambda file: _judged_results(file, wanted), files):
            for query_id, doc_id, rank in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                runs.setdefault(query_id, []).append((rank, doc_id))
    return {query_id: [doc_id for _, doc_id in sorted(docs)] for query_id, docs in runs.items()}


def _judged_results(file: FileInfo, wanted: pa.Array) -> pa.Table:
    schema = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("rank", pa.int32())])
    chosen = [schema.empty_table()]
    try:
        with open_input(file) as source:
            part = pq.ParquetFile(source, page_checksum_verification=True)
            for batch in part.iter_batches(batch_size=_BATCH_ROWS, columns=schema.names):
                rows = pa.table([batch.column(field.name).cast(field.type) for field in schema], schema=schema)
                chosen.append(rows.filter(pc.is_in(rows.column("query_id"), wanted)))
    except (pa.ArrowException, OSError) as error:
        if not means_damage(error):
            raise
        raise StorageError(
            f"{file.location} is damaged ({first_line(error)}); delete it and run the same command again"
        ) from None
    return pa.concat_tables(chosen)
