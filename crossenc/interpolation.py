"""Mixing the cross-encoder's scores with the first stage's. Knows arrays only: no model, no file format.

The two scores live on different scales, so each is z-normalised within its query first. A mix can beat both
of its parts where the model is weak, and `fit_weight` finds how much of each on judged queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import ConfigError, InputError, ScoreError
from crossenc.evaluation.metrics import per_query
from crossenc.ranking import order
from crossenc.records import Qrels

#: The weights that `fit_weight` tries: 0, 0.05 ... 1.
WEIGHTS: tuple[float, ...] = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedWeight:
    """The weight that gave `value`, the best mean of `measure`, over `num_queries` judged queries.

    `values_by_weight` holds (weight, mean value) for every weight that was tried, in the order given.
    """

    weight: float
    measure: str
    value: float
    num_queries: int
    values_by_weight: tuple[tuple[float, float], ...]


def z_normalise(scores: NDArray[np.floating], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores [P] minus their group's mean, over their group's population standard deviation: float64 [P].

    `groups` [P] says which query a score belongs to. A group whose scores are all equal becomes zeros. Raises
    ScoreError for a NaN or infinite score.
    """
    _, group = np.unique(groups, return_inverse=True)
    values = scores.astype(np.float64)
    low = np.full(group.max(initial=-1) + 1, np.inf)
    high = -low
    with np.errstate(over="ignore", invalid="ignore"):  # the check below finds these, and says more
        np.minimum.at(low, group, values)
        np.maximum.at(high, group, values)
        span = high - low
    if not np.isfinite(span).all():
        raise ScoreError("scores must be finite to be normalised; leave out candidates that have no score")
    # Equal scores are recognised by their span: their mean can differ from them by a rounding error, which a
    # standard deviation of the same size would blow up to 1. Within [0, 1] no square overflows or vanishes.
    unit = (values - low[group]) / np.where(span > 0, span, 1)[group]
    sizes = np.bincount(group)
    centred = unit - (np.bincount(group, unit) / sizes)[group]
    deviation = np.sqrt(np.bincount(group, centred**2) / sizes)
    return centred / np.where(span > 0, deviation, 1)[group]


def interpolate(
    model_scores: NDArray[np.floating],
    first_stage_scores: NDArray[np.floating],
    groups: NDArray[np.int64],
    weight: float,
) -> NDArray[np.float64]:
    """`weight` parts of the normalised model score and `1 - weight` of the first stage's, float64 [P].

    Raises ConfigError for a weight outside 0 to 1, ScoreError for a NaN or infinite score.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"an interpolation weight is from 0 (first stage) to 1 (model), got {weight}")
    return weight * z_normalise(model_scores, groups) + (1 - weight) * z_normalise(first_stage_scores, groups)


def fit_weight(
    model_scores: NDArray[np.floating],
    first_stage_scores: NDArray[np.floating],
    first_stage_ranks: NDArray[np.int64],
    doc_ids: Sequence[str],
    query_ids: Sequence[str],
    qrels: Qrels,
    measure: str = "nDCG@10",
    grid: Sequence[float] = WEIGHTS,
) -> FittedWeight:
    """The weight of `grid` whose order has the best mean `measure`; of equals, the highest weight.

    The five sequences [P] describe the same candidates. Rows of queries outside `qrels` are ignored; every
    query of `qrels` counts, as 0 where it has no candidates. Raises InputError when no candidate's query is
    judged.
    """
    rows = [row for row, query_id in enumerate(query_ids) if query_id in qrels]
    if not rows:
        raise InputError(
            f"an interpolation weight cannot be fitted: none of the {len(query_ids)} candidates belongs to "
            f"one of the {len(qrels)} judged queries; check that qrels and candidates use the same query ids"
        )
    judged_ids = [query_ids[row] for row in rows]
    ranked_ids = [doc_ids[row] for row in rows]
    numbers = {query_id: number for number, query_id in enumerate(dict.fromkeys(judged_ids))}
    groups = np.fromiter((numbers[query_id] for query_id in judged_ids), np.int64, len(rows))
    values = []
    for weight in grid:
        scores = interpolate(model_scores[rows], first_stage_scores[rows], groups, weight)
        run: dict[str, list[str]] = {query_id: [] for query_id in numbers}
        for row in order(scores, first_stage_ranks[rows], ranked_ids, groups):
            run[judged_ids[row]].append(ranked_ids[row])
        by_query = per_query([measure], qrels, run)[measure]
        values.append(fsum(by_query.values()) / len(by_query))  # exact sums, so that equal orders are true ties
    best_value, best_weight = max(zip(values, grid, strict=True))
    return FittedWeight(
        weight=best_weight,
        measure=measure,
        value=best_value,
        num_queries=len(qrels),
        values_by_weight=tuple(zip(grid, values, strict=True)),
    )
