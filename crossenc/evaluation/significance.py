"""Whether two rankings of the same queries differ by more than chance. Knows numbers only, no measure."""

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
    differences = after.astype(np.float64) - before.astype(np.float64)
    if not np.isfinite(differences).all():
        raise InputError("a paired comparison needs finite values; leave out the queries that have none")
    num_queries = len(differences)
    low = high = p_t = p_randomisation = float("nan")
    if num_queries > 1:
        rng = np.random.default_rng(seed)
        low, high = _bootstrap_interval(differences, rng)
        p_t = _t_test(differences)
        p_randomisation = _randomisation_test(differences, rng)
    return PairedTest(
        num_queries=num_queries,
        mean_difference=float(differences.mean()) if num_queries else float("nan"),
        low=low,
        high=high,
        p_t=p_t,
        p_randomisation=p_randomisation,
        num_better=int((differences > 0).sum()),
        num_worse=int((differences < 0).sum()),
    )


def _bootstrap_interval(differences: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean over queries drawn with replacement."""
    num_queries = len(differences)
    means = [
        differences[rng.integers(0, num_queries, size=(rows, num_queries))].mean(axis=1)
        for rows in _chunks(num_queries)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _t_test(differences: NDArray[np.float64]) -> float:
    from scipy import stats  # takes a second to import, and only comparisons need it

    deviation = float(differences.std(ddof=1))
    mean = float(differences.mean())
    if deviation == 0:  # every query changed by the same amount: certain, unless that amount is nothing
        return 1.0 if mean == 0 else 0.0
    t = mean / (deviation / np.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), df=len(differences) - 1))


def _randomisation_test(differences: NDArray[np.float64], rng: np.random.Generator) -> float:
    """How often the sum is at least as far from 0 when each query's difference gets a random sign.

    Every combination of signs is tried when there are at most `_NUM_RESAMPLES` of them. Otherwise signs are
    random, and the observed combination counts as one more (Phipson and Smyth 2010), so that p is never 0.
    """
    changed = differences[differences != 0]  # the sign of nothing changes nothing
    # Sums of the same numbers in another order differ in their last bits; such a difference must count as a
    # tie.
    threshold = abs(changed.sum()) - 1e-12 * np.abs(changed).sum()
    if 2 ** len(changed) <= _NUM_RESAMPLES:
        combinations = np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed)) & 1
        return float((np.abs((1 - 2 * combinations) @ changed) >= threshold).mean())
    extreme = 0
    for rows in _chunks(len(changed)):
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(rows, len(changed)))
        extreme += int((np.abs(signs @ changed) >= threshold).sum())
    return (extreme + 1) / (_NUM_RESAMPLES + 1)


def _chunks(num_values: int) -> list[int]:
    """`_NUM_RESAMPLES` split into numbers of rows of `num_values` that fit in `_CHUNK_VALUES`."""
    rows = max(1, _CHUNK_VALUES // num_values)
    return [min(rows, _NUM_RESAMPLES - start) for start in range(0, _NUM_RESAMPLES, rows)]
