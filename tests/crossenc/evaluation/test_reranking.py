"""Reranking: values by hand, ties, what is missing, the CSV file, the card, errors."""

import csv
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc import CrossEncoder
from crossenc.errors import InputError, ScoreError
from crossenc.evaluation import CrossEncoderRerankingEvaluator
from crossenc.testing import tiny_checkpoint
from tests.support.evaluators import GivenScores

#: nDCG of one relevant document at the second place.
SECOND = 1 / math.log2(3)


def by_number(query: str, document: str) -> float:
    """A document is a number, and its score."""
    return float(document or 0)


def evaluate(samples: list[dict], **options) -> dict[str, float]:
    return CrossEncoderRerankingEvaluator(samples, **options)(GivenScores(by_number))


def test_values_of_lists_with_negatives_by_hand():
    samples = [
        {"query": "a", "positive": ["9"], "negative": ["1", "2"]},  # first
        {"query": "b", "positive": "5", "negative": ["6", "1"]},  # second
        {"query": "c", "positive": ["3", "7"], "negative": ["5"]},  # first and third
    ]
    ideal = 1 + SECOND
    assert evaluate(samples) == {
        "map": pytest.approx((1 + 1 / 2 + (1 + 2 / 3) / 2) / 3),
        "mrr@10": pytest.approx((1 + 1 / 2 + 1) / 3),
        "ndcg@10": pytest.approx((1 + SECOND + (1 + 1 / 2) / ideal) / 3),
    }


def test_beyond_the_cutoff_only_map_counts():
    samples = [{"query": "a", "positive": ["1"], "negative": ["2", "3"]}]
    assert evaluate(samples, at_k=2) == {"map": pytest.approx(1 / 3), "mrr@2": 0, "ndcg@2": 0}


def test_a_first_stage_is_measured_too():
    samples = [{"query": "a", "positive": ["9"], "documents": ["1", "9", "2"]}]
    assert evaluate(samples, name="dev") == {
        "dev_map": 1,
        "dev_mrr@10": 1,
        "dev_ndcg@10": 1,
        "dev_base_map": 1 / 2,
        "dev_base_mrr@10": 1 / 2,
        "dev_base_ndcg@10": pytest.approx(SECOND),
    }


def test_positives_that_the_first_stage_missed_are_reranked_but_not_credited_to_it():
    samples = [{"query": "a", "positive": ["9", "5"], "documents": ["5", "1"]}]
    found = evaluate(samples)
    assert found["ndcg@10"] == 1 and found["map"] == 1
    assert found["base_map"] == 1 / 2 and found["base_ndcg@10"] == pytest.approx(1 / (1 + SECOND))


def test_without_them_the_ideal_still_counts_all_positives():
    samples = [{"query": "a", "positive": ["9", "5"], "documents": ["1", "5"]}]
    found = evaluate(samples, always_rerank_positives=False)
    assert found["ndcg@10"] == pytest.approx(1 / (1 + SECOND)) and found["map"] == 1 / 2


@given(seed=st.integers(0, 99))
def test_a_model_that_keeps_the_first_stages_order_gains_nothing(seed: int):
    rng = np.random.default_rng(seed)
    documents = [str(-place) for place in range(rng.integers(1, 15))]
    samples = [{"query": "a", "positive": [*rng.choice(documents, 2), "-99"], "documents": documents}]
    found = evaluate(samples, at_k=5, always_rerank_positives=False)
    assert all(found[name] == found[f"base_{name}"] for name in ("map", "mrr@5", "ndcg@5"))


def test_a_query_without_positives_or_finds_counts_0_and_is_not_scored():
    model = GivenScores(by_number)
    samples = [
        {"query": "none", "positive": [], "negative": ["1"]},
        {"query": "missed", "positive": ["9"], "documents": ["1", "2"]},
        {"query": "nothing", "positive": ["9"], "documents": []},
        {"query": "found", "positive": ["9"], "documents": ["9"]},
    ]
    found = CrossEncoderRerankingEvaluator(samples, always_rerank_positives=False)(model)
    assert found["ndcg@10"] == 1 / 4 and found["base_ndcg@10"] == 1 / 3
    assert model.calls[0]["pairs"] == [("found", "9")]


def test_nothing_but_hopeless_queries_is_0_without_a_call():
    model = GivenScores(by_number)
    found = CrossEncoderRerankingEvaluator([{"query": "a", "positive": [], "negative": ["1"]}])(model)
    assert found == {"map": 0, "mrr@10": 0, "ndcg@10": 0} and model.calls == []


# Defects of others


def test_a_query_with_a_single_document_is_evaluated():
    assert evaluate([{"query": "a", "positive": ["1"], "negative": []}])["ndcg@10"] == 1
    assert evaluate([{"query": "a", "positive": ["1"], "documents": ["1"]}])["base_ndcg@10"] == 1


def test_equal_scores_keep_the_first_stages_order():
    constant = GivenScores(lambda query, document: 0.5)
    samples = [{"query": "a", "positive": ["y", "new"], "documents": ["x", "y", "z"]}]
    found = CrossEncoderRerankingEvaluator(samples)(constant)
    # x, y, z, and then the positive that the first stage missed: places 2 and 4.
    assert found["mrr@10"] == 1 / 2 and found["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found["base_mrr@10"] == 1 / 2


def test_equal_scores_without_a_first_stage_do_not_favour_positives():
    constant = GivenScores(lambda query, document: 0.5)
    samples = [{"query": "a", "positive": ["m"], "negative": ["z", "a"]}]
    assert CrossEncoderRerankingEvaluator(samples)(constant)["mrr@10"] == 1 / 2  # a, m, z
    swapped = [{"query": "a", "positive": ["m"], "negative": ["a", "z"]}]
    assert CrossEncoderRerankingEvaluator(swapped)(constant)["mrr@10"] == 1 / 2


def test_a_document_that_stands_in_a_list_twice_is_one_document():
    samples = [{"query": "a", "positive": ["5", "5"], "documents": ["9", "9", "5", "5"]}]
    found = evaluate(samples)
    assert found["mrr@10"] == found["base_mrr@10"] == 1 / 2 and found["map"] == 1 / 2


def test_time_grows_with_documents_not_with_their_square():
    positives = [str(number) for number in range(20_000)]
    documents = [str(number) for number in range(10_000, 40_000)]
    start = time.perf_counter()
    evaluate([{"query": "a", "positive": positives, "documents": documents}])
    assert time.perf_counter() - start < 5  # about 0.3 s; 2 s and far more where each of 30,000 is sought in 20,000


# The call


def test_all_pairs_are_scored_by_one_call_with_the_settings():
    model = GivenScores(by_number)
    samples = [{"query": "a", "positive": ["1"], "negative": ["2"]}, {"query": "b", "positive": ["3"], "negative": []}]
    CrossEncoderRerankingEvaluator(samples, batch_size=7, prompt_name="web", show_progress_bar=True)(model)
    (call,) = model.calls
    assert call == {
        "pairs": [("a", "1"), ("a", "2"), ("b", "3")],
        "prompt_name": "web",
        "batch_size": 7,
        "convert_to_numpy": True,
        "show_progress_bar": True,
    }


def test_samples_may_be_the_values_of_a_mapping():
    samples = {"q1": {"query": "a", "positive": ["1"], "negative": ["2"]}}
    assert CrossEncoderRerankingEvaluator(samples)(GivenScores(by_number))["mrr@10"] == 1 / 2


def test_a_row_of_the_csv_file_is_added_with_each_call(tmp_path: Path):
    samples = [{"query": "a", "positive": ["1"], "negative": ["2"]}]
    evaluator = CrossEncoderRerankingEvaluator(samples, name="a/b", at_k=5)
    evaluator(GivenScores(by_number), str(tmp_path / "new"), epoch=1, steps=20)
    evaluator(GivenScores(by_number), tmp_path / "new")
    file = tmp_path / "new" / "CrossEncoderRerankingEvaluator_a_b_results_@5.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        headers, first, second = csv.reader(lines)
    assert headers == ["epoch", "steps", "MAP", "MRR@5", "NDCG@5"]
    assert first[:2] == ["1", "20"] and second[:2] == ["-1", "-1"]
    assert [float(value) for value in first[2:]] == pytest.approx([0.5, 0.5, SECOND])
    assert b"\r\n" in file.read_bytes() and b"\r\r" not in file.read_bytes()


def test_no_csv_file_is_written_when_none_is_wanted(tmp_path: Path):
    samples = [{"query": "a", "positive": ["1"], "negative": ["2"]}]
    CrossEncoderRerankingEvaluator(samples, write_csv=False)(GivenScores(by_number), tmp_path)
    CrossEncoderRerankingEvaluator(samples)(GivenScores(by_number))
    assert list(tmp_path.iterdir()) == []


def test_the_primary_metric_bears_the_name_once_after_any_number_of_calls():
    evaluator = CrossEncoderRerankingEvaluator([{"query": "a", "positive": ["1"], "documents": ["1"]}], name="ndcg@10")
    assert evaluator.primary_metric == "ndcg@10"
    for _ in range(2):
        assert evaluator(GivenScores(by_number))[evaluator.primary_metric] == 1
        assert evaluator.primary_metric == "ndcg@10_ndcg@10"


def test_the_card_is_told_values_and_gains():
    model = GivenScores(by_number)
    evaluator = CrossEncoderRerankingEvaluator(
        [{"query": "a", "positive": ["9"], "documents": ["1", "9"]}], name="dev", at_k=3
    )
    evaluator(model, epoch=2, steps=30)
    told = {"dev_map": "1.0000 (+0.5000)", "dev_mrr@3": "1.0000 (+0.5000)", "dev_ndcg@3": "1.0000 (+0.3691)"}
    assert model.model_card_data.told == [(evaluator, told, 2, 30)]
    assert evaluator.get_config_dict() == {"at_k": 3, "always_rerank_positives": True}
    assert evaluator.description == "Cross Encoder Reranking" and evaluator.greater_is_better

    plain = CrossEncoderRerankingEvaluator([{"query": "a", "positive": ["9"], "negative": ["1"]}])
    assert plain(model) == model.model_card_data.told[-1][1] == {"map": 1, "mrr@10": 1, "ndcg@10": 1}
    assert plain.get_config_dict() == {"at_k": 10}


def test_a_model_without_a_card_is_evaluated_all_the_same():
    model = GivenScores(by_number)
    del model.model_card_data
    assert CrossEncoderRerankingEvaluator([{"query": "a", "positive": ["9"], "negative": []}])(model)["map"] == 1


def test_a_real_model_is_evaluated(tmp_path: Path):
    model = CrossEncoder(tiny_checkpoint(tmp_path))
    samples = [{"query": "what is water", "positive": ["the river"], "documents": ["bread", "the river", "stone"]}]
    found = CrossEncoderRerankingEvaluator(samples)(model)
    best = model.rank("what is water", samples[0]["documents"])
    place = [result["corpus_id"] for result in best].index(1) + 1
    assert found["mrr@10"] == pytest.approx(1 / place) and found["base_mrr@10"] == 1 / 2


# Errors


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"positive": ["1"], "negative": []}, "no 'query'; it has 'positive', 'negative'"),
        ({"query": "a", "negative": []}, "no 'positive'"),
        ({"query": "a", "positive": ["1"]}, "exactly one of 'negative' and 'documents'"),
        ({"query": "a", "positive": ["1"], "negative": [], "documents": []}, "exactly one of"),
    ],
)
def test_an_incomplete_sample_is_explained(sample: dict, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate([sample])


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="at least one sample"):
        evaluate([])


def test_scores_that_are_not_finite_are_refused():
    model = GivenScores(lambda query, document: math.nan if document == "2" else 1.0)
    with pytest.raises(ScoreError, match="1 of 2 pairs a score that is not finite, first pair 1"):
        CrossEncoderRerankingEvaluator([{"query": "a", "positive": ["1"], "negative": ["2"]}])(model)


def test_a_model_of_several_labels_is_refused():
    model = GivenScores(lambda query, document: [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="this one has 3: use CrossEncoderClassificationEvaluator"):
        CrossEncoderRerankingEvaluator([{"query": "a", "positive": ["1"], "negative": ["2"]}])(model)


def test_the_old_name_of_the_cutoff_is_understood_with_a_warning():
    with pytest.warns(DeprecationWarning, match="write at_k"):
        evaluator = CrossEncoderRerankingEvaluator([], mrr_at_k=3)
    assert evaluator.at_k == 3 and evaluator.primary_metric == "ndcg@3"
