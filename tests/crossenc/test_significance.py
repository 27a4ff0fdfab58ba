from dataclasses import astuple
from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crossenc.errors import InputError
from crossenc.evaluation import significance
from crossenc.evaluation.significance import paired_comparison


def column(*values):
    return np.array(values, dtype=np.float64)


def scipy_randomisation(before, after, num_resamples=np.inf, seed=0):
    return stats.permutation_test(
        (after - before,),
        np.mean,
        permutation_type="samples",
        n_resamples=num_resamples,
        rng=np.random.default_rng(seed),
    ).pvalue


def test_a_small_comparison_matches_a_computation_by_hand():
    result = paired_comparison(column(0, 0, 0, 0.5), column(1, 2, 3, 0.5))
    # differences 1, 2, 3, 0: mean 1.5, sample deviation sqrt(5/3); of the 8 sign patterns of 1, 2, 3 only the
    # observed one and its mirror image reach 6
    assert result.num_queries == 4
    assert result.mean_difference == 1.5
    assert (result.num_better, result.num_worse) == (3, 0)
    assert result.p_randomisation == 2 / 8
    t = 1.5 / (sqrt(5 / 3) / 2)
    assert result.p_t == pytest.approx(2 * stats.t.sf(t, df=3), rel=1e-12)
    assert 0 <= result.low < 1.5 < result.high <= 3


def test_equal_columns_give_no_difference_and_p_one():
    values = np.random.default_rng(0).random(50)
    result = paired_comparison(values, values.copy())
    assert (result.mean_difference, result.low, result.high) == (0, 0, 0)
    assert (result.p_t, result.p_randomisation) == (1, 1)
    assert (result.num_better, result.num_worse) == (0, 0)


def test_fewer_than_two_queries_prove_nothing():
    one = paired_comparison(column(0.25), column(0.5))
    assert one.mean_difference == 0.25 and one.num_better == 1
    assert all(isnan(value) for value in (one.low, one.high, one.p_t, one.p_randomisation))
    none = paired_comparison(column(), column())
    assert none.num_queries == 0 and isnan(none.mean_difference) and isnan(none.p_t)


def test_every_query_better_by_the_same_amount_is_certain_for_the_t_test():
    result = paired_comparison(np.zeros(20), np.full(20, 0.5))
    assert result.p_t == 0 and (result.low, result.high) == (0.5, 0.5)
    assert result.p_randomisation == 1 / 10_001  # none of the random patterns, and the observed one


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=12))
@settings(deadline=None, max_examples=30)
def test_the_exact_test_agrees_with_scipy(pairs):
    before, after = (np.array(values) / 8 for values in zip(*pairs, strict=True))
    assert paired_comparison(before, after).p_randomisation == pytest.approx(
        scipy_randomisation(before, after), rel=1e-12
    )


def test_sums_that_differ_only_by_rounding_count_as_ties():
    # 0.1 + 0.2 - 0.3 is 5.6e-17, not 0, so a plain comparison would miss patterns that sum to exactly 0
    result = paired_comparison(column(0, 0, 0.3), column(0.1, 0.2, 0))
    assert result.p_randomisation == 1


def test_the_random_test_agrees_with_scipy_within_its_standard_error():
    rng = np.random.default_rng(1)
    before = rng.random(200)
    after = before + rng.normal(0.01, 0.1, 200)
    ours = paired_comparison(before, after).p_randomisation
    theirs = scipy_randomisation(before, after, num_resamples=50_000)
    assert 0.02 < theirs < 0.9  # a p value that means something
    assert ours == pytest.approx(theirs, abs=4 * sqrt(theirs * (1 - theirs) / 10_000))


def test_the_t_test_agrees_with_scipy():
    rng = np.random.default_rng(2)
    for num_queries in (2, 3, 30, 1000):
        before, after = rng.random(num_queries), rng.random(num_queries)
        assert paired_comparison(before, after).p_t == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-9)


def test_the_interval_is_the_percentile_bootstrap_of_the_mean():
    differences = np.random.default_rng(3).normal(0.1, 1, 400)
    result = paired_comparison(np.zeros(400), differences)
    # for 400 normal values the percentile interval is mean +- 1.96 standard errors, up to sampling noise
    half = 1.96 * differences.std() / 20
    assert result.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_swapping_the_columns_mirrors_the_result():
    rng = np.random.default_rng(4)
    before, after = rng.random(40), rng.random(40)
    forward, backward = paired_comparison(before, after), paired_comparison(after, before)
    assert (forward.num_better, forward.num_worse) == (backward.num_worse, backward.num_better)
    assert forward.mean_difference == -backward.mean_difference
    assert forward.p_t == backward.p_t
    assert forward.p_randomisation == backward.p_randomisation
    # both intervals use the same samples, so they mirror each other except in rounding
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low), abs=1e-12)


def test_the_same_seed_gives_the_same_result_and_the_chunk_size_does_not_matter(monkeypatch):
    rng = np.random.default_rng(5)
    before, after = rng.random(100), rng.random(100)
    result = paired_comparison(before, after, seed=7)
    assert astuple(paired_comparison(before, after, seed=7)) == astuple(result)
    assert paired_comparison(before, after, seed=8).low != result.low
    monkeypatch.setattr(significance, "_CHUNK_VALUES", 12_345)
    assert astuple(paired_comparison(before, after, seed=7)) == pytest.approx(astuple(result), rel=1e-12)


def test_columns_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match=r"equal length, got \(2,\) and \(3,\)"):
        paired_comparison(column(1, 2), column(1, 2, 3))
    with pytest.raises(InputError, match="finite values"):
        paired_comparison(column(1, np.nan), column(1, 2))
