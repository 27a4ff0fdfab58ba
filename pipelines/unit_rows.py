"""Candidates of whole queries with their texts, and with the scores of rerank runs: what jobs that write training data
read.

A unit is a shard, or a bucket of queries where queries are spread over shards. It knows nothing of which units there
are, of what is made of their candidates, nor of what is done.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import InputError, RunConflictError
from crossenc.mining import text_key
from pipelines import ledger
from pipelines import plan as plans
from pipelines.commit import RESULTS_FOLDER
from pipelines.inputs import hash_ids, naming_damage
from pipelines.plan import RUN_FOLDER, Plan, Shard, bucket_id
from pipelines.prepare import ReadSettings, read_shard, thin_columns
from pipelines.rank import first_stage_ranks, group_by_query, quarantine_rows, refuse_duplicates, stage_columns
from pipelines.records import SUCCESS_FILE
from pipelines.rows import CheckedRows
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo, Location, exists, info, locate, open_input, put_new
from pipelines.texts import TextStore, open_store

#: Candidates with their texts, sorted by bucket of queries; only while a run with spread queries is at work.
GATHERED_FOLDER = f"{RUN_FOLDER}/gathered"
#: Texts that the candidates hold themselves, whether they are equal, and the score that is looked at.
_TEXT_FIELDS = (
    pa.field("query", pa.large_string()),
    pa.field("document", pa.large_string()),
    pa.field("text_key", pa.binary(16)),
    pa.field("score", pa.float64()),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowContext:
    """What reading any unit needs to know. `results` are the parts of rerank runs by unit, a mapping for each run."""

    output: Location
    plan: Plan
    read: ReadSettings
    results: tuple[Mapping[str, FileInfo], ...]

    def uses_texts(self, query_id: str | None) -> bool:
        """Whether anything will be made of a query's documents; texts of others are not kept."""
        return True

    def corpus(self) -> TextStore | None:
        read = self.read
        return open_store(read.corpus, read.cache, read.max_text_bytes) if read.corpus else None


def finished_rerank(setting: str, folder: Location, has_queries: bool) -> tuple[Plan, dict[str, FileInfo]]:
    """The plan and the parts of the results of the finished rerank run in `folder`, which `setting` names.

    Raises InputError where it is none, or not whole, or where `has_queries` does not go with its layout.
    """
    plan = plans.load(folder)
    if plan is None or plan.parts.get("job"):
        raise InputError(f"{setting}: {folder} is not the output of a rerank run; give the folder that has results/")
    if not exists(folder / SUCCESS_FILE):
        raise InputError(f"{setting}: the run in {folder} is not finished; let it finish, or run its command again")
    if plan.columns.layout == "ids" and not has_queries:
        raise InputError(f"the candidates of {folder} are ids: name the tables with the texts as queries and corpus")
    if plan.columns.layout != "ids" and has_queries:
        raise InputError(f"the candidates of {folder} hold their own queries; leave queries out")
    units = [bucket_id(b) for b in range(plan.num_buckets)] or [shard.shard_id for shard in plan.shards]
    stored = ledger.read(folder, RESULTS_FOLDER, units, plan.fingerprint)
    missing = [unit for unit in units if unit not in stored.parts]
    if missing:
        raise InputError(f"{folder} lacks the part {missing[0]}, or it is damaged; run its rerank command again")
    return plan, {unit: file for unit, (file, _) in stored.parts.items()}


def planned_files(plan: Plan, options: Mapping[str, Any]) -> list[FileInfo]:
    """The candidates files of a run."""
    return [FileInfo(locate(entry.uri, options), entry.num_bytes, entry.version) for entry in plan.inputs]


def shard_rows(shard: Shard, context: RowContext) -> pa.Table:
    """A shard's candidates: the thin rows and _TEXT_FIELDS, the score being the first stage's.

    Texts that lie in a table are left there, and those of queries of which nothing will be used are left out.
    """
    has_own_texts = context.plan.columns.text is not None
    keys: dict[str, bytes] = {}  # a document comes up for many queries

    def to_table(checked: CheckedRows) -> pa.Table:
        columns = thin_columns(checked, shard.file)
        is_used = [context.uses_texts(query_id) for query_id in checked.query_ids]
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


def gather(shard: Shard, context: RowContext) -> None:
    """Stores a shard's candidates for `bucket_rows`, one row group for each bucket, unless they are stored."""
    place = _gathered(shard, context)
    if info(place) is None:
        rows, num_buckets = shard_rows(shard, context), context.plan.num_buckets
        buckets = (hash_ids(rows.column("query_id").combine_chunks()) % np.uint64(num_buckets)).astype(np.int64)
        by = pa.array(np.argsort(buckets, kind="stable"))
        lengths = np.bincount(buckets, minlength=num_buckets).tolist()
        put_new(place, to_parquet(rows.take(by), row_group_rows=lengths))


def bucket_rows(bucket: int, context: RowContext) -> pa.Table:
    """A bucket's candidates, gathered from all shards, as `shard_rows` gives them."""

    def read_part(shard: Shard) -> pa.Table:
        file = info(_gathered(shard, context))
        if file is None:
            raise RunConflictError(f"{_gathered(shard, context)} was removed meanwhile; run the same command again")
        with open_input(file) as source:
            return pq.ParquetFile(source, page_checksum_verification=True).read_row_group(bucket)

    with ThreadPoolExecutor(16) as pool:
        rows = pa.concat_tables(pool.map(read_part, context.plan.shards)).replace_schema_metadata(None)
    return rows.combine_chunks().sort_by([("file", "ascending"), ("row", "ascending"), ("item", "ascending")])


def _gathered(shard: Shard, context: RowContext) -> Location:
    return context.output / f"{GATHERED_FOLDER}/part-{shard.shard_id}.parquet"


def results_scores(rows: pa.Table, results: FileInfo) -> NDArray[np.float64]:
    """The model's score of each row in a rerank run's part, float64 [rows]; NaN where it is not in the results."""
    table = _read_results(results, ["query_id", "doc_id"])
    ids = (table.column(column).cast(pa.large_string()).to_pylist() for column in ("query_id", "doc_id"))
    scores = dict(zip(zip(*ids, strict=True), table.column("score").to_pylist(), strict=True))
    pairs = zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist(), strict=True)
    return np.array([scores.get(pair, np.nan) for pair in pairs], dtype=np.float64)


def all_scores(results: FileInfo) -> NDArray[np.float32]:
    """The model's scores in a rerank run's part, float32."""
    scores: NDArray[np.float32] = _read_results(results, []).column("score").to_numpy()
    return scores


def _read_results(results: FileInfo, names: Sequence[str]) -> pa.Table:
    """Columns of a part, and the model's own score as `score`."""
    with naming_damage(f"{results.location}, a part of the rerank run, cannot be read"), open_input(results) as source:
        part = pq.ParquetFile(source, page_checksum_verification=True)
        score = "model_score" if "model_score" in part.schema_arrow.names else "score"
        return part.read(columns=[*names, score]).rename_columns([*names, "score"])


def with_scores(rows: pa.Table, scores: NDArray[np.float64]) -> pa.Table:
    """`rows` with these scores, NaN for none, in place of the first stage's."""
    column = pa.array(scores, mask=np.isnan(scores))
    return rows.set_column(rows.schema.get_field_index("score"), _TEXT_FIELDS[-1], column)


@dataclass(frozen=True, slots=True)
class Unit:
    """The good candidates of a unit's Q queries, those of query q in [bounds[q], bounds[q + 1]), and the others.

    `scores` is NaN for none. `num_candidates` int64 [Q] counts each query's candidates, the refused ones included.
    """

    query_ids: list[str]
    bounds: NDArray[np.int64]
    queries: pa.ChunkedArray
    documents: pa.ChunkedArray
    doc_ids: list[str]
    keys: list[bytes]  # None where no use is made of the text
    ranks: NDArray[np.int64]
    scores: NDArray[np.float64]
    num_candidates: NDArray[np.int64]
    refused: pa.Table

    def span(self, q: int) -> slice:
        return slice(int(self.bounds[q]), int(self.bounds[q + 1]))

    def query_texts(self, chosen: Sequence[int]) -> list[str]:
        """The texts of these queries, each of which has good candidates."""
        texts: list[str] = self.queries.take(pa.array([int(self.bounds[q]) for q in chosen], pa.int64())).to_pylist()
        return texts

    def texts(self, places: Sequence[int], context: RowContext) -> dict[int, str]:
        """The texts of these candidates: from the candidates themselves or from the corpus."""
        if context.plan.columns.text is not None:
            return dict(zip(places, self.documents.take(pa.array(places, pa.int64())).to_pylist(), strict=True))
        corpus = context.corpus()
        assert corpus is not None, "candidates without texts were resolved without a corpus"
        found = corpus.lookup([self.doc_ids[at] for at in places])
        return {at: decoded(text) or "" for at, (text, _) in zip(places, found, strict=True)}

    def num_refused(self) -> dict[str, int]:
        """The refused candidates by reason."""
        return dict(sorted(Counter(self.refused.column("reason").to_pylist()).items()))

    def quarantine(self, context: RowContext) -> bytes | None:
        """The file that shows the refused candidates, if there are any."""
        if not self.refused.num_rows:
            return None
        return to_parquet(quarantine_rows(self.refused, [file.uri for file in context.plan.inputs]))


def to_unit(rows: pa.Table) -> Unit:
    """The unit with these candidates, of which repeated documents are refused."""
    groups = group_by_query(rows)
    stage = first_stage_ranks(groups, *stage_columns(rows))
    rows = refuse_duplicates(rows, groups, stage)
    is_good = pc.is_null(rows.column("reason")).to_numpy()
    num_queries = int(groups.max(initial=-1)) + 1
    good = np.flatnonzero(is_good)
    by = good[np.argsort(groups[good], kind="stable")]
    chosen = rows.take(pa.array(by))
    _, first = np.unique(groups[groups >= 0], return_index=True)
    first = np.flatnonzero(groups >= 0)[first]
    return Unit(
        query_ids=rows.column("query_id").take(pa.array(first)).to_pylist(),
        bounds=np.searchsorted(groups[by], np.arange(num_queries + 1)),
        queries=chosen.column("query"),
        documents=chosen.column("document"),
        doc_ids=chosen.column("doc_id").to_pylist(),
        keys=chosen.column("text_key").to_pylist(),
        ranks=stage[by],
        scores=chosen.column("score").fill_null(float("nan")).to_numpy(),
        num_candidates=np.bincount(groups[groups >= 0], minlength=num_queries),
        refused=rows.filter(pa.array(~is_good)),
    )


def decoded(text: object) -> str | None:
    """A text of a store; None where it is missing, too large or not UTF-8."""
    try:
        return text.decode() if isinstance(text, bytes) else None
    except UnicodeDecodeError:
        return None
