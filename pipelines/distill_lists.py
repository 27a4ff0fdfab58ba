"""From the teachers' scores of all candidates to lists for a student: a job of units on their rerank runs.

It reads candidates with texts and scores, draws each query's list by crossenc.distillation and writes it with the
teachers' logits as labels. It knows nothing of models.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from crossenc.distillation import Sample, SampleQuery, SampleSettings, Scale, ensemble, merge_scales, sample, scale_of
from crossenc.errors import CrossEncError, RunConflictError
from crossenc.records import Qrels
from pipelines import plan as plans
from pipelines import units
from pipelines.distill_config import DistillConfig
from pipelines.evaluate import read_qrels
from pipelines.mine_shard import positives_of
from pipelines.plan import Plan
from pipelines.prepare import ReadSettings
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo, Location, expand, locate
from pipelines.texts import default_cache, find_tables
from pipelines.unit_rows import (
    Unit,
    all_scores,
    finished_rerank,
    planned_files,
    results_scores,
    to_unit,
    with_scores,
)
from pipelines.units import DATA_FOLDER, Kind, UnitContext, UnitJob, UnitRecord

#: What training reads as the layout `lists`; labels are logits.
_LIST_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("docs", pa.list_(pa.string()), nullable=False),
        pa.field("labels", pa.list_(pa.float32()), nullable=False),
    ]
)
_COMPLETENESS_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string()),
        pa.field("num_candidates", pa.int64(), nullable=False),
        pa.field("num_refused", pa.int64(), nullable=False),
        pa.field("num_documents", pa.int64(), nullable=False),
        pa.field("left_out", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListCounts:
    """An account of a unit, or of a whole run.

    The conservation laws: `num_queries == num_lists + sum(left_out.values())`, and
    `num_candidates == num_documents + sum(excluded.values()) + sum(refused.values())`.
    `num_short` lists have fewer documents than asked for; `num_positives` of the documents are judged relevant, and
    `num_lost_positives` judged positives of queries with lists are not in them.
    """

    num_queries: int = 0
    num_lists: int = 0
    num_short: int = 0
    num_candidates: int = 0
    num_documents: int = 0
    num_positives: int = 0
    num_lost_positives: int = 0
    left_out: Mapping[str, int]
    refused: Mapping[str, int]
    excluded: Mapping[str, int]

    def check(self) -> None:
        """Raises CrossEncError where something came from nowhere or went missing."""
        queries = self.num_lists + sum(self.left_out.values())
        candidates = self.num_documents + sum(self.excluded.values()) + sum(self.refused.values())
        if (queries, candidates) != (self.num_queries, self.num_candidates):
            raise CrossEncError(
                f"{self.num_queries:,} queries and {self.num_candidates:,} candidates went in, {queries:,} and"
                f" {candidates:,} are accounted for; report this as a bug"
            )

    def shown(self) -> dict[str, int]:
        """What progress shows."""
        return {"queries": self.num_queries, "documents": self.num_documents}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListContext(UnitContext):
    """What every unit needs to know. `scales` are the teachers', in the order of `results`."""

    qrels: Qrels
    settings: SampleSettings
    scales: tuple[Scale, ...]

    @property
    def kind(self) -> Kind[ListCounts]:
        return KIND


def list_job(config: DistillConfig, output: Location, teachers: Sequence[Location]) -> UnitJob[ListCounts]:
    """The job that makes the lists in `output` out of the finished rerank runs of the teachers.

    Raises InputError where one of them is not finished or whole, RunConflictError where they are not of the same
    candidates.
    """
    options = config.storage_options
    runs = [finished_rerank("teachers", folder, config.queries is not None) for folder in teachers]
    source, results = runs[0][0], tuple(parts for _, parts in runs)
    for folder, (plan, _) in zip(teachers, runs, strict=True):
        if (plan.shards, plan.inputs, plan.num_buckets) != (source.shards, source.inputs, source.num_buckets):
            raise RunConflictError(f"{folder} scored other candidates than {teachers[0]}; start over with --new-run")
    judgements = expand(locate(config.qrels, options), ".parquet") if config.qrels else []
    files = [*planned_files(source, options), *judgements, *(file for parts in results for file in parts.values())]
    parts = plans.describe_parts(files, {}, config.list_options()) | {"job": "distill"}
    return UnitJob(
        output=output,
        parts=parts,
        kind=KIND,
        make_plan=lambda: units.with_small_buckets(units.plan_of_rerank(source, parts)),
        make_context=lambda plan: _context(config, output, plan, results),
        workers=config.workers,
        storage_options=options,
    )


def _context(
    config: DistillConfig, output: Location, plan: Plan, results: tuple[Mapping[str, FileInfo], ...]
) -> ListContext:
    options = config.storage_options
    queries, corpus = find_tables(config.queries, config.corpus, config.columns, options)
    return ListContext(
        output=output,
        plan=plan,
        read=ReadSettings(
            columns=plan.columns,
            pass_through=(),
            storage_options=dict(options),
            max_text_bytes=config.max_text_bytes,
            needs_score=False,
            queries=queries,
            corpus=corpus,
            cache=default_cache(),
        ),
        results=results,
        qrels=read_qrels(config.qrels, options) if config.qrels else {},
        settings=config.sampling(),
        scales=_scales(results),
    )


def _scales(results: Sequence[Mapping[str, FileInfo]]) -> tuple[Scale, ...]:
    """The scale of each teacher's scores, summed up in the order of the parts."""
    if len(results) == 1:
        return (Scale(),)  # one teacher keeps its own
    with ThreadPoolExecutor(8) as pool:
        return tuple(
            merge_scales(pool.map(lambda file: scale_of(all_scores(file)), [parts[unit] for unit in sorted(parts)]))
            for parts in results
        )


def _make(
    unit_id: str, rows: pa.Table, results: Sequence[FileInfo], context: ListContext
) -> tuple[ListCounts, dict[str, bytes | None]]:
    """Draws the lists of a unit: its account, and its files by path."""
    scores = np.stack([results_scores(rows, part) for part in results])
    unit = to_unit(with_scores(rows, ensemble(scores, context.scales)))
    relevant = [positives_of(context.qrels, query_id) for query_id in unit.query_ids]
    samples = [_sample(unit, q, positives, context.settings) for q, positives in enumerate(relevant)]
    lists = _lists(unit, samples, context)
    completeness = _completeness(unit, samples)
    return _counts(unit, samples, relevant, rows.num_rows, context.settings), {
        f"{DATA_FOLDER}/part-{unit_id}.parquet": to_parquet(lists) if lists.num_rows else None,
        f"completeness/part-{unit_id}.parquet": to_parquet(completeness) if completeness.num_rows else None,
        f"quarantine/part-{unit_id}.parquet": unit.quarantine(context),
    }


KIND = Kind(_make, ListCounts, TypeAdapter(UnitRecord[ListCounts]))


def _sample(unit: Unit, q: int, positives: Mapping[str, int], settings: SampleSettings) -> Sample:
    span = unit.span(q)
    query = SampleQuery(
        query_id=unit.query_ids[q],
        doc_ids=unit.doc_ids[span],
        text_keys=unit.keys[span],
        ranks=unit.ranks[span],
        scores=unit.scores[span],
        positive_ids=positives.keys(),
    )
    return sample(query, settings)


def _lists(unit: Unit, samples: Sequence[Sample], context: ListContext) -> pa.Table:
    """The lists with their texts, in the order of the queries."""
    places = {q: (one.chosen + unit.bounds[q]).tolist() for q, one in enumerate(samples) if one.left_out is None}
    texts = unit.texts(sorted(at for chosen in places.values() for at in chosen), context)
    columns = [
        pa.array(unit.query_texts(list(places)), pa.string()),
        pa.array([[texts[at] for at in chosen] for chosen in places.values()], pa.list_(pa.string())),
        pa.array([unit.scores[chosen].tolist() for chosen in places.values()], pa.list_(pa.float32())),
    ]
    return pa.table(columns, schema=_LIST_SCHEMA)


def _completeness(unit: Unit, samples: Sequence[Sample]) -> pa.Table:
    columns = [
        pa.array(unit.query_ids, pa.string()),
        pa.array(unit.num_candidates, pa.int64()),
        pa.array(unit.num_candidates - np.diff(unit.bounds), pa.int64()),
        pa.array([len(one.chosen) for one in samples], pa.int64()),
        pa.array([one.left_out for one in samples], pa.string()),
    ]
    return pa.table(columns, schema=_COMPLETENESS_SCHEMA)


def _counts(
    unit: Unit,
    samples: Sequence[Sample],
    relevant: Sequence[Mapping[str, int]],
    num_candidates: int,
    settings: SampleSettings,
) -> ListCounts:
    excluded = Counter[str]()
    for one in samples:
        excluded.update(one.excluded)
    sizes = [len(one.chosen) for one in samples if one.left_out is None]
    wanted = kept = 0
    for q, (one, positives) in enumerate(zip(samples, relevant, strict=True)):
        if one.left_out is None:
            wanted += len(positives)
            kept += sum(unit.doc_ids[int(unit.bounds[q]) + at] in positives for at in one.chosen.tolist())
    return ListCounts(
        num_queries=len(samples),
        num_lists=len(sizes),
        num_short=sum(size < settings.documents for size in sizes),
        num_candidates=num_candidates,
        num_documents=sum(sizes),
        num_positives=kept,
        num_lost_positives=wanted - kept,
        left_out=dict(sorted(Counter(one.left_out for one in samples if one.left_out is not None).items())),
        refused=unit.num_refused(),
        excluded=dict(sorted(excluded.items())),
    )
