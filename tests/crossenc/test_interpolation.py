from itertools import pairwise
from math import log2, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import ConfigError, InputError, ScoreError
from crossenc.evaluation.metrics import per_query
from crossenc.interpolation import WEIGHTS, fit_weight, interpolate, z_normalise


def column(*values):
    return np.array(values, dtype=np.float64)


def groups(*values):
    return np.array(values, dtype=np.int64)


def test_each_group_is_normalised_on_its_own():
    # group 7 holds 1, 2, 3: mean 2, population deviation sqrt(2/3); group 4 10, 30: mean 20, deviation 10
    z = z_normalise(column(10, 1, 2, 30, 3), groups(4, 7, 7, 4, 7))
    assert z == pytest.approx([-1, -sqrt(3 / 2), 0, 1, sqrt(3 / 2)], abs=1e-12)
    assert z.dtype == np.float64


def test_equal_scores_become_zeros_even_where_their_mean_is_rounded():
    scores = column(0.1, 0.1, 0.1, 5)  # the mean of three 0.1 in floating point is not 0.1
    assert scores[:3].sum() / 3 != 0.1
    assert z_normalise(scores, groups(1, 1, 1, 2)).tolist() == [0, 0, 0, 0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1e30, 1e30, allow_subnormal=True)), min_size=1, max_size=40))
def test_a_normalised_group_has_mean_zero_and_deviation_one_or_is_all_zeros(rows):
    group, scores = groups(*(row[0] for row in rows)), column(*(row[1] for row in rows))
    z = z_normalise(scores, group)
    for number in np.unique(group):
        part = z[group == number]
        assert part.mean() == pytest.approx(0, abs=1e-12)
        assert part.std() == pytest.approx(0 if len(set(scores[group == number])) == 1 else 1, abs=1e-12)
    order = np.lexsort([scores, group])
    assert all(z[a] <= z[b] for a, b in pairwise(order) if group[a] == group[b])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    with pytest.raises(ScoreError, match="must be finite"):
        z_normalise(column(1, bad, 2), groups(0, 0, 0))


def test_nothing_to_normalise_gives_nothing():
    assert z_normalise(column(), groups()).shape == (0,)


def test_interpolation_mixes_normalised_scores():
    mixed = interpolate(column(0, 4), column(300, 100), groups(1, 1), 0.75)
    assert mixed == pytest.approx([0.75 * -1 + 0.25 * 1, 0.75 * 1 + 0.25 * -1])
    assert interpolate(column(0, 4), column(300, 100), groups(1, 1), 1).tolist() == [-1, 1]
    assert interpolate(column(0, 4), column(300, 100), groups(1, 1), 0).tolist() == [1, -1]


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_zero_to_one_is_refused(weight):
    with pytest.raises(ConfigError, match="from 0"):
        interpolate(column(1), column(1), groups(1), weight)


#: The model misses q1's relevant document b, the first stage q2's: only a mix has both at rank 1.
MIXED = {
    "model_scores": column(0.9, 0.8, 0.0, 0.0, 1.0, 0.1),
    "first_stage_scores": column(5.0, 9.0, 0.0, 9.0, 8.0, 0.0),
    "first_stage_ranks": groups(2, 1, 3, 1, 2, 3),
    "doc_ids": ["a", "b", "c", "a", "b", "c"],
    "query_ids": ["q1", "q1", "q1", "q2", "q2", "q2"],
}
MIXED_QRELS = {"q1": {"b": 1}, "q2": {"b": 1}}


def test_the_fitted_weight_is_the_best_of_the_grid():
    fitted = fit_weight(**MIXED, qrels=MIXED_QRELS)
    values = dict(fitted.values_by_weight)
    assert tuple(values) == WEIGHTS
    assert values[0.0] == values[1.0] == pytest.approx((1 + 1 / log2(3)) / 2)  # each alone has one query right
    assert fitted.value == 1.0 and 0 < fitted.weight < 1
    # q1 turns where weight times the model's gap, (0.9 - 0.8) / std(0.9, 0.8, 0), is no longer below
    # (1 - weight) times the first stage's, (9 - 5) / std(5, 9, 0)
    model_gap, first_gap = 0.1 / np.std([0.9, 0.8, 0]), 4 / np.std([5, 9, 0])
    assert fitted.weight == max(w for w in WEIGHTS if w * model_gap < (1 - w) * first_gap)
    assert (fitted.measure, fitted.num_queries) == ("nDCG@10", 2)


def test_among_equal_weights_the_one_closest_to_the_model_wins():
    agreeing = MIXED | {"model_scores": MIXED["first_stage_scores"]}
    assert fit_weight(**agreeing, qrels=MIXED_QRELS).weight == 1.0
    assert fit_weight(**MIXED, qrels=MIXED_QRELS, measure="R@3").weight == 1.0


def test_a_judged_query_without_candidates_counts_as_zero_and_an_unjudged_one_not_at_all():
    qrels = {"q1": {"b": 1}, "elsewhere": {"b": 1}}
    fitted = fit_weight(**MIXED, qrels=qrels)
    assert (fitted.value, fitted.num_queries) == (0.5, 2)
    first_query = {name: values[:3] for name, values in MIXED.items()}
    assert fit_weight(**first_query, qrels=qrels) == fitted


def test_ties_are_ordered_like_everywhere_else():
    equal = MIXED | {"model_scores": np.zeros(6)}
    fitted = fit_weight(**equal, qrels=MIXED_QRELS, grid=[1.0])
    by_rank = per_query(["nDCG@10"], MIXED_QRELS, {"q1": ["b", "a", "c"], "q2": ["a", "b", "c"]})["nDCG@10"]
    assert fitted.value == pytest.approx((by_rank["q1"] + by_rank["q2"]) / 2)


def test_the_order_of_the_rows_does_not_matter():
    shuffle = np.random.default_rng(0).permutation(6)
    shuffled = {
        name: values[shuffle] if isinstance(values, np.ndarray) else [values[row] for row in shuffle]
        for name, values in MIXED.items()
    }
    assert fit_weight(**shuffled, qrels=MIXED_QRELS) == fit_weight(**MIXED, qrels=MIXED_QRELS)


def test_judgements_of_other_queries_are_refused():
    with pytest.raises(InputError, match="none of the 6 candidates belongs to one of the 1 judged queries"):
        fit_weight(**MIXED, qrels={"other": {"b": 1}})
