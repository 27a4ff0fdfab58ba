"""Ranks scored candidates: the last computation of a run, from thin rows to the three tables that are written.

Works on Arrow tables in memory. The order itself is decided in crossenc.ranking; here candidates are grouped by
query, duplicates refused, scores interpolated and everything counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crossenc.interpolation import interpolate
from crossenc.ranking import order
from pipelines.schemas import QUARANTINE_SCHEMA, completeness_schema, results_schema

_NO_RANK = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class RankSettings:
    """How to rank, the same for all shards of a run. `weight` is the interpolation weight, None for none."""

    top_k: int | None
    weight: float | None
    query_id_type: str
    doc_id_type: str
    files: tuple[str, ...]  # the input files' URIs, for the quarantine
    trec_run: bool = False


@dataclass(frozen=True, slots=True)
class Ranked:
    """The tables of one shard or bucket, and its counts."""

    results: pa.Table
    completeness: pa.Table
    quarantine: pa.Table
    num_queries: int
    num_candidates: int
    num_scored: int
    refused: dict[str, int]


def rank_rows(rows: pa.Table, settings: RankSettings) -> Ranked:
    """Ranks the candidates in `rows` (schemas.thin_schema), whose queries are complete.

    Queries come in the order of their first candidate in the input; a query's candidates must all be in `rows`.
    """
    groups = group_by_query(rows)
    stage = first_stage_ranks(groups, *stage_columns(rows))
    rows = refuse_duplicates(rows, groups, stage)
    refused = pc.is_valid(rows.column("reason")).to_numpy()
    scored = rows.filter(pa.array(~refused))
    results = _results(scored, groups[~refused], stage[~refused], settings)
    reasons = Counter(rows.column("reason").filter(pa.array(refused)).to_pylist())
    has_query = groups >= 0
    num_queries = int(groups.max(initial=-1)) + 1
    counts = [np.bincount(g, minlength=num_queries) for g in (groups[has_query], groups[~refused])]
    kept = counts[1] if settings.top_k is None else np.minimum(counts[1], settings.top_k)
    first = np.full(num_queries, len(groups), dtype=np.int64)
    np.minimum.at(first, groups[has_query], np.flatnonzero(has_query))
    query_type = pa.type_for_alias(settings.query_id_type)
    completeness = pa.table(
        [
            rows.column("query_id").take(pa.array(first)).cast(query_type),
            *(pa.array(c, pa.int64()) for c in (counts[0], counts[1], counts[0] - counts[1], kept)),
        ],
        schema=completeness_schema(query_type),
    )
    return Ranked(
        results=results,
        completeness=completeness,
        quarantine=quarantine_rows(rows.filter(pa.array(refused)), settings.files),
        num_queries=num_queries,
        num_candidates=rows.num_rows,
        num_scored=scored.num_rows,
        refused=dict(sorted(reasons.items())),
    )


def group_by_query(rows: pa.Table) -> NDArray[np.int64]:
    """A number per row, equal for equal query ids, rising in order of first appearance; -1 for a null id."""
    encoded = rows.column("query_id").combine_chunks().dictionary_encode()
    indices = encoded.indices.fill_null(-1)
    return np.asarray(indices.to_numpy(zero_copy_only=False), dtype=np.int64)


def first_stage_ranks(
    groups: NDArray[np.int64], ranks: NDArray[np.int64], scores: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Ranks from 1 within each group, in first-stage order.

    By the given rank; where that is absent (the largest int64), by score, the best first; then by position.
    """
    by = np.lexsort((np.where(np.isnan(scores), np.inf, -scores), ranks, groups))
    sorted_groups = groups[by]
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]]) if len(by) else by
    lengths = np.diff(np.r_[starts, len(by)])
    result = np.empty(len(by), dtype=np.int64)
    result[by] = np.arange(len(by)) - np.repeat(starts, lengths) + 1
    return result


def stage_columns(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """First-stage ranks and scores; an absent rank is the largest int64, an absent score NaN."""
    ranks = rows.column("stage_rank").fill_null(_NO_RANK).to_numpy()
    scores = rows.column("stage_score").fill_null(float("nan")).to_numpy()
    return ranks, scores


def refuse_duplicates(rows: pa.Table, groups: NDArray[np.int64], stage: NDArray[np.int64]) -> pa.Table:
    """Gives a reason to all but the best-ranked of the good candidates with one query and document id."""
    good = np.flatnonzero(pc.is_null(rows.column("reason")).to_numpy())
    docs = rows.column("doc_id").combine_chunks().dictionary_encode().indices.fill_null(-1)
    docs = docs.to_numpy(zero_copy_only=False)
    by = good[np.lexsort((stage[good], docs[good], groups[good]))]
    repeats = by[1:][(docs[by][1:] == docs[by][:-1]) & (groups[by][1:] == groups[by][:-1])]
    if not len(repeats):
        return rows
    is_repeat = np.zeros(rows.num_rows, dtype=bool)
    is_repeat[repeats] = True
    for name, value in (("reason", "duplicate_document"), ("model_score", None)):
        field = rows.schema.field(name)
        column = pc.if_else(pa.array(is_repeat), pa.scalar(value, field.type), rows.column(name))
        rows = rows.set_column(rows.schema.get_field_index(name), field, column)
    return rows


def _results(scored: pa.Table, groups: NDArray[np.int64], stage: NDArray[np.int64], settings: RankSettings) -> pa.Table:
    stage_scores = stage_columns(scored)[1]
    model_scores = scored.column("model_score").to_numpy().astype(np.float32)
    final: NDArray[np.float32] | NDArray[np.float64] = model_scores
    if settings.weight is not None:
        in_order = np.lexsort((stage, groups))  # sums over a query then do not depend on how its rows lay in the input
        mixed = interpolate(model_scores[in_order], stage_scores[in_order], groups[in_order], settings.weight)
        final = np.empty(len(mixed))
        final[in_order] = mixed
    by = order(final, stage, scored.column("doc_id").to_pylist(), groups)
    new_ranks = first_stage_ranks(groups[by], np.zeros(len(by), np.int64), np.zeros(len(by)))  # by position
    if settings.top_k is not None:
        by, new_ranks = by[new_ranks <= settings.top_k], new_ranks[new_ranks <= settings.top_k]
    passed = [field for field in scored.schema if field.name.startswith("pass:")]
    schema = results_schema(
        pa.type_for_alias(settings.query_id_type),
        pa.type_for_alias(settings.doc_id_type),
        [field.with_name(field.name.removeprefix("pass:")) for field in passed],
        settings.weight is not None,
    )
    taken = scored.take(pa.array(by))
    columns = {
        "query_id": taken.column("query_id"),
        "doc_id": taken.column("doc_id"),
        "rank": pa.array(new_ranks, pa.int32()),
        "score": pa.array(final[by]),
        "model_score": pa.array(model_scores[by]),
        "first_stage_rank": pa.array(stage[by]),
        "first_stage_score": taken.column("stage_score"),
        **{field.name.removeprefix("pass:"): taken.column(field.name) for field in passed},
    }
    return pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)


def quarantine_rows(refused: pa.Table, file_uris: Sequence[str]) -> pa.Table:
    """The refused candidates as the quarantine shows them; `file_uris` are the input files that rows name by number."""
    files = pa.array(file_uris, pa.string()).take(refused.column("file").combine_chunks())
    columns = {name: refused.column(name) for name in ("query_id", "doc_id", "reason", "detail", "row", "item")}
    columns["file"] = files
    return pa.table([columns[f.name].cast(f.type) for f in QUARANTINE_SCHEMA], schema=QUARANTINE_SCHEMA)
