"""Whether other scores of the same candidates rank as well: the figures, and the limits that they must keep.

Pure numpy: knows no model, no file and no precision.

Shape letters: P pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from crossenc.errors import InputError
from crossenc.evaluation.metrics import per_query
from crossenc.ranking import order
from crossenc.records import Qrels

_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Quality:
    """Scores beside the reference's, query by query.

    `ndcg` and `reference_ndcg` are nDCG@10 over the judged queries, None without any. `ndcg_drop_error` is the standard
    error of their difference, None for fewer than two queries. With 200 queries of one relevant document each it can be
    as large as a limit of 0.002: a relevant document that falls from the first place to the second costs 0.37 / 200.
    More queries make it smaller. The other differences are those of raw scores, before the activation. `top10_changed`
    is the share of queries whose first ten differ in documents or order, `top10_swapped` that of documents of the
    reference's first ten that are not among the others'. `kendall_tau` is the mean over the queries with two candidates
    or more.
    """

    num_queries: int
    num_pairs: int
    num_judged_queries: int
    reference_ndcg: float | None
    ndcg: float | None
    ndcg_drop_error: float | None
    top10_changed: float
    top10_swapped: float
    kendall_tau: float
    max_difference: float
    mean_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What must hold for scores to be good enough; None for what may be anything."""

    ndcg_drop: float | None = None
    max_difference: float | None = None
    kendall_tau: float | None = None


def compare(
    reference: NDArray[np.float32],
    scores: NDArray[np.float32],
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    qrels: Qrels | None = None,
) -> Quality:
    """Compare `scores` with `reference`, both raw scores [P] of the pairs that `query_ids` and `doc_ids` name.

    A query's pairs stand in first-stage order. Judged queries without pairs here are left out. Raises InputError where
    there are no pairs or an nDCG cannot be taken.
    """
    if len(reference) == 0:
        raise InputError("there are no pairs to compare scores on: give candidates")
    rows: dict[str, list[int]] = {}
    for row, query_id in enumerate(query_ids):
        rows.setdefault(query_id, []).append(row)
    runs, other_runs = ({q: _ranked(values, r, doc_ids) for q, r in rows.items()} for values in (reference, scores))
    judged = {query_id: qrels[query_id] for query_id in rows if query_id in qrels} if qrels else {}
    tops = [(runs[q][:_DEPTH], other_runs[q][:_DEPTH]) for q in rows]
    reference_ndcgs, ndcgs = (_ndcgs(judged, values) for values in (runs, other_runs))
    differences = np.abs(scores.astype(np.float64) - reference)
    taus = [_tau(reference[r], scores[r]) for r in rows.values() if len(r) > 1]
    return Quality(
        num_queries=len(rows),
        num_pairs=len(reference),
        num_judged_queries=len(judged),
        reference_ndcg=float(reference_ndcgs.mean()) if judged else None,
        ndcg=float(ndcgs.mean()) if judged else None,
        ndcg_drop_error=_standard_error(reference_ndcgs - ndcgs),
        top10_changed=float(np.mean([a != b for a, b in tops])),
        top10_swapped=float(np.mean([len(set(a) - set(b)) / len(a) for a, b in tops])),
        kendall_tau=float(np.mean(taus)) if taus else 1.0,
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
    )


def broken(quality: Quality, limits: Limits) -> list[str]:
    """What breaks which limit, in words; empty where all hold. A figure that is NaN holds no limit."""
    problems = []
    if limits.ndcg_drop is not None and quality.ndcg is not None and quality.reference_ndcg is not None:
        drop = quality.reference_ndcg - quality.ndcg
        if not drop <= limits.ndcg_drop:
            error = "unknown" if quality.ndcg_drop_error is None else f"{quality.ndcg_drop_error:.4f}"
            problems.append(
                f"nDCG@10 falls by {drop:.4f}, {limits.ndcg_drop:g} is allowed (standard error over"
                f" {quality.num_judged_queries:,} queries: {error})"
            )
    if limits.max_difference is not None and not quality.max_difference <= limits.max_difference:
        problems.append(f"scores differ by up to {quality.max_difference:.2g}, {limits.max_difference:g} is allowed")
    if limits.kendall_tau is not None and not quality.kendall_tau >= limits.kendall_tau:
        problems.append(f"Kendall's tau is {quality.kendall_tau:.4f}, at least {limits.kendall_tau:g} is asked for")
    return problems


def _ranked(scores: NDArray[np.float32], rows: Sequence[int], doc_ids: Sequence[str]) -> list[str]:
    docs = [doc_ids[row] for row in rows]
    return [docs[i] for i in order(scores[rows], np.arange(len(rows)), docs).tolist()]


def _tau(reference: NDArray[np.float32], scores: NDArray[np.float32]) -> float:
    """Kendall's tau; where all scores of one side are equal it is not defined, and counts as 0, or 1 if so on both."""
    constant = [bool((values == values[0]).all()) for values in (reference, scores)]
    if any(constant):
        return float(all(constant))
    return float(kendalltau(reference, scores).statistic)


def _ndcgs(judged: Qrels, runs: Mapping[str, Sequence[str]]) -> NDArray[np.float64]:
    """nDCG@10 of every judged query, in the order of `judged`."""
    found = per_query(["nDCG@10"], judged, runs)["nDCG@10"] if judged else {}
    return np.array([found[query_id] for query_id in judged])


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
