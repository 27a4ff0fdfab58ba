"""Systems compared on judged queries: figures equal to ir_measures', depths, segments, and Holm's correction."""

from itertools import pairwise

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.errors import ConfigError, InputError
from crossenc.evaluation.comparison import Collection, System, evaluate, values_of
from crossenc.evaluation.depths import rerank_top, useful_depths
from crossenc.evaluation.metrics import per_query
from crossenc.evaluation.results import CollectionResult, Evaluation
from crossenc.evaluation.significance import holm, mean_intervals, paired_comparison, paired_comparisons

MEASURES = ("nDCG@10", "RR@10", "AP", "R@5", "P@5", "Judged@10")


def made_up(num_queries: int = 12, depth: int = 30, seed: int = 0) -> tuple[dict, dict, dict]:
    """Judgements, a first stage and a better order of it; the last query has no candidates."""
    rng = np.random.default_rng(seed)
    qrels, first, better = {}, {}, {}
    for q in range(num_queries):
        docs = [f"d{d}" for d in rng.permutation(60)[:depth]]
        judged = rng.choice(60, 12, replace=False)
        qrels[f"q{q}"] = {f"d{d}": int(grade) for d, grade in zip(judged, rng.integers(-1, 3, 12), strict=True)}
        first[f"q{q}"] = docs
        noise = rng.normal(0, 1, depth)
        grades = np.array([qrels[f"q{q}"].get(doc, 0) for doc in docs])
        better[f"q{q}"] = [docs[i] for i in np.argsort(-grades - noise)]
    del first[f"q{num_queries - 1}"], better[f"q{num_queries - 1}"]
    return qrels, first, better


def collection(qrels, first, *systems: System, segments=None, name="made-up") -> Collection:
    return Collection(
        name=name, qrels=qrels, first_stage=first, systems=systems, segments=segments or {}, digests={"qrels": "0"}
    )


def model(run, name="model", **more) -> System:
    return System(name=name, kind="model", source="m", run=run, **more)


def judge(one: Collection, measures=MEASURES, depths=(5, 10, 100), **options) -> Evaluation:
    return evaluate([one], {one.name: values_of(one, measures)}, depths=depths, **options)


def only(evaluation: Evaluation) -> CollectionResult:
    return evaluation.collections[0]


def test_every_figure_equals_that_of_ir_measures_to_the_last_digit():
    qrels, first, better = made_up()
    found = only(judge(collection(qrels, first, model(better))))
    judged = {q: {d: max(g, 0) for d, g in grades.items()} for q, grades in qrels.items()}
    for system, run in (("first_stage", first), ("model", better)):
        scores = {q: {d: -float(i) for i, d in enumerate(docs)} for q, docs in run.items()}
        for name in MEASURES:
            measure = ir_measures.parse_measure(name)
            expected = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], judged, scores)}
            values = per_query([name], qrels, run)[name]
            assert values == {q: expected.get(q, 0.0) for q in qrels}
            mean = ir_measures.calc_aggregate([measure], judged, scores)[measure]
            assert found.system(system).figure(name).value.mean == mean
    assert found.system("model").num_without_ranking == 1


def test_the_share_of_judged_documents_of_an_empty_ranking_is_zero():
    assert per_query(["Judged@10", "P@5"], {"q": {"a": 1}}, {"q": []}) == {"Judged@10": {"q": 0.0}, "P@5": {"q": 0.0}}


def test_differences_and_intervals_are_those_of_a_paired_comparison():
    qrels, first, better = made_up()
    found = only(judge(collection(qrels, first, model(better)), seed=3)).system("model")
    before, after = (np.array(list(per_query(["AP"], qrels, run)["AP"].values())) for run in (first, better))
    test, figure = paired_comparison(before, after, seed=3), found.figure("AP")
    assert figure.difference is not None
    assert figure.difference.mean == pytest.approx(test.mean_difference, rel=1e-12)
    assert figure.difference.p_randomisation == test.p_randomisation
    assert (figure.difference.low, figure.difference.high) == pytest.approx((test.low, test.high), rel=1e-9)
    assert (figure.difference.num_better, figure.difference.num_worse) == (test.num_better, test.num_worse)
    assert figure.value.low is not None and figure.value.low < figure.value.mean


def test_judged_documents_are_counted_and_not_tested():
    qrels, first, better = made_up()
    evaluation = judge(collection(qrels, first, model(better)))
    assert only(evaluation).system("model").figure("Judged@10").difference is None
    assert evaluation.num_compared == len(MEASURES) - 1
    with pytest.raises(ConfigError, match="cannot be the main measure"):
        judge(collection(qrels, first), measures=("Judged@10", "AP"))


def test_holm_corrects_over_all_systems_measures_and_collections():
    qrels, first, better = made_up()
    ones = [
        collection(qrels, first, model(better), model(first, name="copy"), name=name) for name in ("first", "second")
    ]
    found = evaluate(ones, {one.name: values_of(one, ("nDCG@10", "AP")) for one in ones}, depths=())
    differences = [
        figure.difference
        for result in found.collections
        for name in ("model", "copy")
        for figure in result.system(name).figures
    ]
    assert found.num_compared == 8
    assert [d.p_holm for d in differences] == holm([d.p_randomisation for d in differences])
    assert all(d.p_holm == 1 and d.p_randomisation == 1 for d in differences[2:4])


def test_holm_matches_a_computation_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, float("nan"), 0.6])[::2] == [1.0, 1.0] and np.isnan(holm([0.5, float("nan")])[1])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, p * len(p_values)) for p, a in zip(p_values, adjusted, strict=True))
    by = np.argsort(p_values, kind="stable")
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(by))


def test_many_columns_are_compared_as_each_of_them_alone():
    rng = np.random.default_rng(1)
    before, after = rng.random((40, 5)), rng.random((40, 5))
    after[:, 4] = before[:, 4] + np.r_[1, 2, np.zeros(38)]  # few changes: every sign is tried
    for c, together in enumerate(paired_comparisons(before, after, seed=5)):
        alone = paired_comparison(before[:, c], after[:, c], seed=5)
        assert together.p_randomisation == alone.p_randomisation
        assert (together.low, together.high, together.p_t) == pytest.approx((alone.low, alone.high, alone.p_t))
    assert paired_comparisons(before, after)[4].p_randomisation == 0.5
    assert len(paired_comparisons(np.zeros((2000, 1)), np.ones((2000, 1)))) == 1  # 2**2000 is no float
    with pytest.raises(InputError, match=r"equal shapes \[Q, C\], got"):
        paired_comparisons(before, after[:, :2])


def test_the_interval_of_a_mean_is_the_percentile_bootstrap():
    values = np.random.default_rng(2).normal(0.5, 0.1, (400, 1))
    ((low, high),) = mean_intervals(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_intervals(values, seed=4) == mean_intervals(values, seed=4) != mean_intervals(values, seed=5)
    assert np.isnan(mean_intervals(values[:1])[0]).all()
    with pytest.raises(InputError, match="finite values"):
        mean_intervals(np.full((3, 1), np.nan))


def test_reranking_the_top_leaves_the_rest_in_first_stage_order():
    first, reranked = ["a", "b", "c", "d", "e"], ["e", "c", "b", "d"]  # a could not be scored
    assert rerank_top(first, reranked, 3) == ["c", "b", "d", "e"]
    assert rerank_top(first, reranked, 0) == first
    assert rerank_top(first, reranked, 100) == reranked
    assert useful_depths((10, 100, 20, 10, 1000), 50) == (10, 20, 100)
    assert useful_depths((10, 20), 20) == (10, 20) and useful_depths((), 5) == () and useful_depths((5,), 0) == (5,)


@given(st.permutations(range(8)), st.integers(0, 10))
def test_a_depth_only_ever_permutes_the_top(order, depth):
    first = [str(d) for d in range(8)]
    found = rerank_top(first, [str(d) for d in order], depth)
    assert sorted(found[:depth]) == first[:depth] and found[depth:] == first[depth:]


def test_a_model_that_is_right_at_the_top_and_wrong_below_shows_in_its_depths():
    qrels = {f"q{q}": {"a": 1} for q in range(20)}
    first = {query: ["b", "a", "c", "d"] for query in qrels}
    run = {query: ["d", "c", "a", "b"] for query in qrels}  # right about a and b, and fooled by what lies below
    found = only(judge(collection(qrels, first, model(run)), measures=("RR@10",), depths=(2, 3, 10)))
    points = found.system("model").depths
    assert [point.depth for point in points] == [2, 3, 10]
    assert [point.mean for point in points] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [point.difference.mean for point in points] == pytest.approx([0.5, 0.0, -1 / 6])
    assert found.system("first_stage").depths == ()


def test_the_deepest_point_is_the_system_itself_and_can_be_left_out():
    qrels, first, better = made_up()
    systems = (model(better), model(better, name="short", has_depths=False))
    found = only(judge(collection(qrels, first, *systems), depths=(10, 30, 1000)))
    points = found.system("model").depths
    assert [point.depth for point in points] == [10, 30]
    assert points[-1].mean == found.system("model").figures[0].value.mean
    assert found.system("short").depths == ()


def test_segments_are_judged_by_themselves_and_a_query_may_belong_to_none():
    qrels, first, better = made_up()
    kinds = {q: "even" if int(q[1:]) % 2 == 0 else "odd" for q in list(qrels)[:-2]}
    found = only(judge(collection(qrels, first, model(better), segments={"kind": kinds})))
    even, odd = found.system("model").segments
    assert [(s.column, s.value, s.num_queries) for s in (even, odd)] == [("kind", "even", 5), ("kind", "odd", 5)]
    values = per_query(["nDCG@10"], qrels, better)["nDCG@10"]
    assert even.mean == pytest.approx(np.mean([values[q] for q, kind in kinds.items() if kind == "even"]))
    assert even.difference is not None and found.system("first_stage").segments[0].difference is None


def test_any_system_can_be_the_baseline():
    qrels, first, better = made_up()
    found = only(judge(collection(qrels, first, model(better)), baseline="model"))
    assert found.system("model").figures[0].difference is None
    worse = found.system("first_stage").figures[0].difference
    assert worse is not None and worse.mean < 0
    assert found.system("model").depths[0].difference.mean != 0  # depths are against the first stage all the same
    with pytest.raises(ConfigError, match="baseline 'absent' is none of the systems on 'made-up': first_stage, model"):
        judge(collection(qrels, first, model(better)), baseline="absent")


def test_one_query_gives_figures_without_intervals_and_tests():
    found = only(judge(collection({"q": {"a": 1}}, {"q": ["b", "a"]}, model({"q": ["a", "b"]}))))
    figure = found.system("model").figures[0]
    assert figure.value.mean == 1 and figure.value.low is None
    assert figure.difference is not None and figure.difference.p_randomisation is figure.difference.p_holm is None


def test_queries_without_relevant_documents_are_counted():
    found = only(judge(collection({"q": {"a": 0}, "r": {"a": 1, "b": 0}}, {"q": ["a"]})))
    assert (found.num_queries, found.num_judgements, found.num_without_relevant, found.num_candidates) == (2, 3, 1, 1)
    assert found.system("first_stage").num_without_ranking == 1
