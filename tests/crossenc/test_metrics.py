from math import log2

import ir_measures
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import ConfigError, InputError
from crossenc.evaluation.metrics import display_name, per_query

MEASURES = ["nDCG@10", "RR@10", "R@10", "R@100"]


def test_values_match_a_computation_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "c": 0}}
    values = per_query(["nDCG@10", "RR@10", "R@1", "P@2"], qrels, {"q": ["c", "b", "a"]})
    dcg, ideal = 1 / log2(3) + 2 / log2(4), 2 / log2(2) + 1 / log2(3)
    assert values["nDCG@10"]["q"] == pytest.approx(dcg / ideal, abs=1e-15)
    assert values["RR@10"]["q"] == 1 / 2
    assert values["R@1"]["q"] == 0
    assert values["P@2"]["q"] == 1 / 2


def test_what_lies_beyond_the_cutoff_does_not_count():
    values = per_query(["RR@2", "R@2", "nDCG@2"], {"q": {"a": 1}}, {"q": ["x", "y", "a"]})
    assert values == {"RR@2": {"q": 0.0}, "R@2": {"q": 0.0}, "nDCG@2": {"q": 0.0}}


def test_a_judged_query_without_a_ranking_counts_as_zero_and_an_unjudged_one_not_at_all():
    qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"a": 1}, "judged without documents": {}}
    run = {"found": ["a"], "empty": [], "judged without documents": ["a"], "unjudged": ["a"]}
    values = per_query(["nDCG@10", "RR@10"], qrels, run)
    expected = {"found": 1.0, "missing": 0.0, "empty": 0.0, "judged without documents": 0.0}
    assert values == {"nDCG@10": expected, "RR@10": expected}
    assert list(values["RR@10"]) == list(qrels)


def test_no_judgements_give_no_values():
    assert per_query(["nDCG@10"], {}, {"q": ["a"]}) == {"nDCG@10": {}}


def test_a_negative_grade_counts_as_zero():
    spam, plain = ({"q": {"a": grade, "b": 1}} for grade in (-2, 0))
    run = {"q": ["a", "b"]}
    assert per_query(MEASURES, spam, run) == per_query(MEASURES, plain, run)
    assert per_query(["nDCG@10"], spam, run)["nDCG@10"]["q"] == pytest.approx(1 / log2(3), abs=1e-15)


def test_two_names_of_one_measure_both_get_values():
    values = per_query(["RR@10", "MRR@10"], {"q": {"a": 1}}, {"q": ["x", "a"]})
    assert values == {"RR@10": {"q": 0.5}, "MRR@10": {"q": 0.5}}


@pytest.mark.parametrize("odd", ["a\0b", "\ud800", "", " ", "näïve-文", "x" * 10_000])
def test_ids_may_be_any_string(odd):
    qrels = {odd: {odd: 1, "a\0c": 1}, "a\0c": {"a": 1}}
    values = per_query(["nDCG@10", "R@10"], qrels, {odd: ["a", odd], "a\0c": ["a"]})
    ideal = 1 + 1 / log2(3)
    assert values["nDCG@10"][odd] == pytest.approx(1 / log2(3) / ideal, abs=1e-15)
    assert values["R@10"] == {odd: 0.5, "a\0c": 1.0}


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("pqrstu"),
        st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(-1, 3)),
        min_size=1,
    ),
    st.dictionaries(st.sampled_from("pqrstuvw"), st.permutations("abcdefghijkl").map(lambda ids: ids[:9])),
)
def test_values_equal_ir_measures_to_the_last_digit(qrels, run):
    values = per_query(MEASURES, qrels, run)
    clipped = {q: {d: max(grade, 0) for d, grade in docs.items()} for q, docs in qrels.items()}
    scores = {q: {d: -float(rank) for rank, d in enumerate(docs)} for q, docs in run.items()}
    measures = [ir_measures.parse_measure(name) for name in MEASURES]
    reference: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for metric in ir_measures.iter_calc(measures, clipped, scores):
        reference[str(metric.measure)][metric.query_id] = metric.value
    assert values == reference


def test_the_first_stage_of_scifact_mini_has_its_published_values(shared_data):
    folder = shared_data / "data" / "scifact_mini"
    qrels: dict[str, dict[str, int]] = {}
    for row in pq.read_table(folder / "qrels.parquet").to_pylist():
        qrels.setdefault(row["query_id"], {})[row["doc_id"]] = row["relevance"]
    run: dict[str, list[str]] = {}
    for row in sorted(pq.read_table(folder / "candidates.parquet").to_pylist(), key=lambda row: row["rank"]):
        run.setdefault(row["query_id"], []).append(row["doc_id"])
    values = per_query(MEASURES, qrels, run)
    means = [round(float(np.mean(list(values[name].values()))), 4) for name in MEASURES]
    assert means == [0.7315, 0.689, 0.8583, 0.875]


@pytest.mark.parametrize("name", ["foo", "nDCG@", "nDCG@0", "nDCG@-1", "nDCG@1.5", "Rprec@3", "ERR@10", ""])
def test_a_measure_that_cannot_be_computed_is_refused_with_an_example(name):
    with pytest.raises(ConfigError, match=r"(?s)measure .*(use for example nDCG@10|a cutoff is at least 1)"):
        per_query([name], {"q": {"a": 1}}, {"q": ["a"]})


def test_a_ranking_that_names_a_document_twice_is_refused():
    with pytest.raises(InputError, match="query 'q' names a document twice"):
        per_query(["nDCG@10"], {"q": {"a": 1}}, {"q": ["a", "b", "a"]})


def test_a_grade_that_trec_eval_would_overflow_on_is_refused():
    with pytest.raises(InputError, match="query 'q' has a grade above 1000000"):
        per_query(["nDCG@10"], {"q": {"a": 2**40}}, {"q": ["a"]})


def test_the_reciprocal_rank_is_shown_under_its_usual_name():
    assert [display_name(name) for name in ["RR@10", "RR", "RR(rel=2)@5", "nDCG@10", "R@10", "MRR@10"]] == [
        "MRR@10",
        "MRR",
        "MRR(rel=2)@5",
        "nDCG@10",
        "R@10",
        "MRR@10",
    ]
