"""Whether rankings of the same queries differ by more than chance. Knows numbers only, no measure.

Shapes: Q queries, C columns of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import InputError

#: Bootstrap samples, and random sign flips where trying every flip would take more than this many.
_NUM_RESAMPLES = 10_000
#: Values drawn at a time, so that memory stays below about 100 MB for any number of queries.
_CHUNK_VALUES = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """The difference after - before over `num_queries` queries.

    `low` and `high` bound the mean difference (95 % percentile bootstrap over queries); `p_t` and
    `p_randomisation` are the two-sided p values of the paired t test and the sign-flip randomisation test.
    With fewer than two queries the bounds and both p values are NaN; without any query the mean is NaN too.
    """

    num_queries: int
    mean_difference: float
    low: float
    high: float
    p_t: float
    p_randomisation: float
    num_better: int
    num_worse: int


def paired_comparison(before: NDArray[np.floating], after: NDArray[np.floating], seed: int = 0) -> PairedTest:
    """Compare two columns of per-query values [Q], row i of both being the same query.

    Equal columns give p = 1. The same input and seed give the same result. Raises InputError for columns of
    different or wrong shape, and for values that are not finite.
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise InputError(f"a paired comparison needs two columns of equal length, got {before.shape} and {after.shape}")
    return paired_comparisons(before[:, None], after[:, None], seed)[0]


def paired_comparisons(
    before_QC: NDArray[np.floating], after_QC: NDArray[np.floating], seed: int = 0
) -> tuple[PairedTest, ...]:
    """Compare C pairs of columns of the same Q queries, each as `paired_comparison` does, in much less time.

    All comparisons share their random draws, which leaves each of them what it would be alone. Raises InputError as
    `paired_comparison` does.
    """
    if before_QC.ndim != 2 or before_QC.shape != after_QC.shape:
        raise InputError(f"paired comparisons need equal shapes [Q, C], got {before_QC.shape} and {after_QC.shape}")
    differences_QC = after_QC.astype(np.float64) - before_QC.astype(np.float64)
    if not np.isfinite(differences_QC).all():
        raise InputError("a paired comparison needs finite values; leave out the queries that have none")
    num_queries, num_columns = differences_QC.shape
    low = high = p_t = p_randomisation = np.full(num_columns, np.nan)
    if num_queries > 1:
        rng = np.random.default_rng(seed)
        low, high = _bootstrap_intervals(differences_QC, rng)
        p_t = _t_tests(differences_QC)
        p_randomisation = _randomisation_tests(differences_QC, rng)
    return tuple(
        PairedTest(
            num_queries=num_queries,
            mean_difference=float(differences_QC[:, c].mean()) if num_queries else float("nan"),
            low=float(low[c]),
            high=float(high[c]),
            p_t=float(p_t[c]),
            p_randomisation=float(p_randomisation[c]),
            num_better=int((differences_QC[:, c] > 0).sum()),
            num_worse=int((differences_QC[:, c] < 0).sum()),
        )
        for c in range(num_columns)
    )


def mean_intervals(values_QC: NDArray[np.floating], seed: int = 0) -> tuple[tuple[float, float], ...]:
    """The 95 % percentile bootstrap interval of the mean of each of C columns; NaN for fewer than two queries.

    Raises InputError for another shape than [Q, C], and for values that are not finite.
    """
    if values_QC.ndim != 2 or not np.isfinite(values_QC).all():
        raise InputError(f"intervals need finite values of shape [Q, C], got {values_QC.shape}")
    if len(values_QC) < 2:
        return tuple((float("nan"), float("nan")) for _ in range(values_QC.shape[1]))
    low, high = _bootstrap_intervals(values_QC.astype(np.float64), np.random.default_rng(seed))
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given.

    Calling every difference real whose adjusted p is below alpha goes wrong, even once, with a probability below alpha.
    NaN stays NaN and is not counted as a test. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    by = np.argsort(adjusted, kind="stable")[: int((~np.isnan(adjusted)).sum())]
    factors = len(by) - np.arange(len(by))
    adjusted[by] = np.minimum(1.0, np.maximum.accumulate(adjusted[by] * factors))
    return [float(p) for p in adjusted]


def _bootstrap_intervals(
    values_QC: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 2.5 % and 97.5 % quantiles of the means over queries drawn with replacement, each [C]."""
    num_queries = len(values_QC)
    means = []
    for rows in _chunks(num_queries):
        drawn = rng.integers(0, num_queries, size=(rows, num_queries)) + num_queries * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * num_queries).reshape(rows, num_queries)
        means.append(times_drawn.astype(np.float64) @ values_QC / num_queries)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high


def _t_tests(differences_QC: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy import stats  # takes a second to import, and only comparisons need it

    deviations, means = differences_QC.std(axis=0, ddof=1), differences_QC.mean(axis=0)
    # Every query changed by the same amount: certain, unless that amount is nothing.
    p_values = np.where(means == 0, 1.0, 0.0)
    varied = deviations > 0
    t = means[varied] / (deviations[varied] / np.sqrt(len(differences_QC)))
    p_values[varied] = 2 * stats.t.sf(np.abs(t), df=len(differences_QC) - 1)
    return p_values


def _randomisation_tests(differences_QC: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """How often a column's sum is at least as far from 0 when each query's difference gets a random sign.

    Every combination of signs is tried when there are at most `_NUM_RESAMPLES` of them. Otherwise signs are
    random, and the observed combination counts as one more (Phipson and Smyth 2010), so that p is never 0.
    """
    sums = np.abs(differences_QC.sum(axis=0))
    # Sums of the same numbers in another order differ in their last bits; such a difference must count as a
    # tie.
    thresholds = sums - 1e-12 * np.abs(differences_QC).sum(axis=0)
    is_exact = (differences_QC != 0).sum(axis=0) <= np.log2(_NUM_RESAMPLES)
    p_values = np.empty(len(sums))
    for c in np.flatnonzero(is_exact):
        p_values[c] = _exact_test(differences_QC[:, c], thresholds[c])
    if is_exact.all():
        return p_values
    differences_QC, thresholds = differences_QC[:, ~is_exact], thresholds[~is_exact]
    num_extreme = np.zeros(len(thresholds), dtype=np.int64)
    for rows in _chunks(len(differences_QC)):
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(rows, len(differences_QC)))
        num_extreme += (np.abs(signs @ differences_QC) >= thresholds).sum(axis=0)
    p_values[~is_exact] = (num_extreme + 1) / (_NUM_RESAMPLES + 1)
    return p_values


def _exact_test(differences: NDArray[np.float64], threshold: float) -> float:
    changed = differences[differences != 0]  # the sign of nothing changes nothing
    combinations = np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed)) & 1
    return float((np.abs((1 - 2 * combinations) @ changed) >= threshold).mean())


def _chunks(num_values: int) -> list[int]:
    """`_NUM_RESAMPLES` split into numbers of rows of `num_values` that fit in `_CHUNK_VALUES`."""
    rows = max(1, _CHUNK_VALUES // num_values)
    return [min(rows, _NUM_RESAMPLES - start) for start in range(0, _NUM_RESAMPLES, rows)]
