"""Classification, correlation and several evaluators in a row: values, files, cards, deprecated names."""

import csv
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from crossenc import evaluation
from crossenc.errors import InputError, ScoreError
from crossenc.evaluation import (
    BaseEvaluator,
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    SequentialEvaluator,
)
from tests.support.evaluators import GivenScores

PAIRS = [("a", "4"), ("b", "3"), ("c", "2"), ("d", "1")]


def by_number(query: str, document: str) -> float:
    return float(document or 0)


def by_class(query: str, document: str) -> list[float]:
    """Three labels; the document names the best one."""
    return [float(str(label) == document) for label in range(3)]


def test_the_public_names_are_these():
    assert evaluation.__all__ == sorted(evaluation.__all__)
    assert evaluation.__all__ == [
        "BaseEvaluator",
        "CEBinaryAccuracyEvaluator",
        "CEBinaryClassificationEvaluator",
        "CECorrelationEvaluator",
        "CEF1Evaluator",
        "CERerankingEvaluator",
        "CESoftmaxAccuracyEvaluator",
        "CrossEncoderClassificationEvaluator",
        "CrossEncoderCorrelationEvaluator",
        "CrossEncoderNanoBEIREvaluator",
        "CrossEncoderRerankingEvaluator",
        "SequentialEvaluator",
    ]
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)


# Classification


def test_a_model_of_one_label_is_measured_at_its_best_thresholds(tmp_path: Path):
    model = GivenScores(by_number)
    evaluator = CrossEncoderClassificationEvaluator(PAIRS, [1, 0, 1, 0], name="dev")
    found = evaluator(model, tmp_path, epoch=1)
    assert found == {
        "dev_accuracy": 0.75,
        "dev_accuracy_threshold": 3.5,
        "dev_f1": pytest.approx(0.8),
        "dev_f1_threshold": 1.5,
        "dev_precision": pytest.approx(2 / 3),
        "dev_recall": 1.0,
        "dev_average_precision": pytest.approx(5 / 6),
    }
    assert evaluator.primary_metric == "dev_average_precision"
    assert model.model_card_data.told == [(evaluator, found, 1, -1)]
    with (tmp_path / "CrossEncoderClassificationEvaluator_dev_results.csv").open(newline="") as lines:
        headers, row = csv.reader(lines)
    assert headers[:6] == ["epoch", "steps", "Accuracy", "Accuracy_Threshold", "F1", "F1_Threshold"]
    assert headers[6:] == ["Precision", "Recall", "Average_Precision"]
    assert [float(value) for value in row] == [1, -1, *found.values()]


def test_a_model_of_several_labels_is_measured_by_its_best_class(tmp_path: Path):
    pairs = [("q", "0"), ("q", "1"), ("q", "1"), ("q", "2")]
    evaluator = CrossEncoderClassificationEvaluator(pairs, [0, 0, 1, 1])
    found = evaluator(GivenScores(by_class), tmp_path)
    assert found == {
        "f1_macro": pytest.approx((2 / 3 + 1 / 2) / 3),
        "f1_micro": 0.5,
        "f1_weighted": pytest.approx((2 * 2 / 3 + 2 * 1 / 2) / 4),
    }
    assert evaluator.primary_metric == "f1_macro"
    written = (tmp_path / "CrossEncoderClassificationEvaluator_results.csv").read_text()
    assert written.startswith("epoch,steps,Macro_F1,Micro_F1,Weighted_F1\n")


@pytest.mark.parametrize("name", ["", "f1", "average_precision"])
def test_the_primary_metric_is_always_one_of_the_metrics(name: str):
    evaluator = CrossEncoderClassificationEvaluator(PAIRS, [1, 0, 1, 0], name=name)
    for model in (GivenScores(by_number), GivenScores(lambda query, document: [1.0, 0.0]), GivenScores(by_number)):
        found = evaluator(model)
        assert evaluator.primary_metric in found


def test_pairs_and_labels_of_different_number_are_refused():
    with pytest.raises(ValueError, match="4 pairs have 3 labels"):
        CrossEncoderClassificationEvaluator(PAIRS, [1, 0, 1])


def test_no_pairs_are_refused_when_evaluated():
    with pytest.raises(InputError, match="at least one pair"):
        CrossEncoderClassificationEvaluator([], [])(GivenScores(by_number))


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ScoreError, match="4 of 4"):
        CrossEncoderClassificationEvaluator(PAIRS, [1, 0, 1, 0])(GivenScores(lambda query, document: math.inf))


# Correlation


def test_correlations_with_given_scores(tmp_path: Path):
    model = GivenScores(by_number)
    evaluator = CrossEncoderCorrelationEvaluator(PAIRS, [1.0, 0.5, 0.7, 0.0], name="sts")
    found = evaluator(model, tmp_path)
    assert found == {"sts_pearson": pytest.approx(1.4 / math.sqrt(5 * 0.53)), "sts_spearman": pytest.approx(0.8)}
    assert evaluator.primary_metric == "sts_spearman" and model.model_card_data.told[0][1] == found
    written = (tmp_path / "CrossEncoderCorrelationEvaluator_sts_results.csv").read_text()
    assert written.startswith("epoch,steps,Pearson_Correlation,Spearman_Correlation\n-1,-1,0.860")
    assert model.calls[0]["batch_size"] == 32 and "prompt_name" not in model.calls[0]


def test_a_constant_model_has_no_correlation_and_the_log_says_why(caplog: pytest.LogCaptureFixture):
    evaluator = CrossEncoderCorrelationEvaluator(PAIRS, [1.0, 0.5, 0.7, 0.0])
    with caplog.at_level(logging.WARNING):
        found = evaluator(GivenScores(lambda query, document: 0.25))
    assert math.isnan(found["spearman"]) and "not defined" in caplog.text


def test_a_correlation_needs_one_score_a_pair():
    with pytest.raises(InputError, match="this one has 3"):
        CrossEncoderCorrelationEvaluator(PAIRS, [1.0, 0.5, 0.7, 0.0])(GivenScores(by_class))


@dataclass
class Example:
    texts: list[str]
    label: float


def test_evaluators_are_made_of_input_examples():
    examples = [Example(["a", "1"], 0.5), Example(["b", "2"], 1.0)]
    evaluator = CrossEncoderCorrelationEvaluator.from_input_examples(examples, name="dev")
    assert evaluator(GivenScores(by_number))["dev_pearson"] == pytest.approx(1)


def test_progress_is_shown_when_the_log_shows_information():
    logging.getLogger("crossenc.evaluation.evaluator").setLevel(logging.INFO)
    try:
        assert CrossEncoderCorrelationEvaluator(PAIRS, [0] * 4).show_progress_bar
    finally:
        logging.getLogger("crossenc.evaluation.evaluator").setLevel(logging.NOTSET)
    assert not CrossEncoderCorrelationEvaluator(PAIRS, [0] * 4, show_progress_bar=False).show_progress_bar


# Several


class Constant(BaseEvaluator):
    """An evaluator of a user's own, without metrics by name."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return 0.5


def test_evaluators_in_a_row_give_all_values_and_the_last_primary_one(tmp_path: Path):
    classification = CrossEncoderClassificationEvaluator(PAIRS, [1, 0, 1, 0], name="dev")
    evaluator = SequentialEvaluator([Constant(), lambda *_: {"own": 0.25}, classification])
    found = evaluator(GivenScores(by_number), tmp_path, 1, 2)
    assert found["evaluator_0"] == 0.5 and found["own"] == 0.25
    assert found[evaluator.primary_metric] == found["dev_average_precision"]
    assert evaluator.primary_metric == "sequential_score" and len(list(tmp_path.iterdir())) == 1
    mean = SequentialEvaluator([Constant(), classification], main_score_function=np.mean)
    assert mean(GivenScores(by_number))["sequential_score"] == pytest.approx((0.5 + 5 / 6) / 2)
    assert SequentialEvaluator([])(GivenScores(by_number)) == {"sequential_score": 0.0}


def test_an_evaluator_without_a_call_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="__call__"):
        BaseEvaluator()(None)
    assert BaseEvaluator().get_config_dict() == {} and BaseEvaluator().primary_metric is None


# Deprecated names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CEBinaryAccuracyEvaluator", "CrossEncoderClassificationEvaluator"),
        ("CEBinaryClassificationEvaluator", "CrossEncoderClassificationEvaluator"),
        ("CEF1Evaluator", "CrossEncoderClassificationEvaluator"),
        ("CESoftmaxAccuracyEvaluator", "CrossEncoderClassificationEvaluator"),
        ("CECorrelationEvaluator", "CrossEncoderCorrelationEvaluator"),
    ],
)
def test_old_names_of_pair_evaluators_work_and_warn(old: str, new: str, tmp_path: Path):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated: write {new}$") as caught:
        evaluator = getattr(evaluation, old)(PAIRS, [1, 0, 1, 0], name="dev")
    assert caught[0].filename == __file__
    expected = getattr(evaluation, new)(PAIRS, [1, 0, 1, 0], name="dev")
    assert evaluator(GivenScores(by_number), tmp_path) == expected(GivenScores(by_number), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{new}_dev_results.csv"]
    assert evaluator.description.startswith("Cross Encoder ")
    with pytest.warns(DeprecationWarning, match=old):
        examples = [Example(["a", "1"], 0), Example(["b", "2"], 1)]
        getattr(evaluation, old).from_input_examples(examples, name="dev")


def test_the_old_name_of_the_reranking_evaluator_works_and_warns():
    with pytest.warns(DeprecationWarning, match="write CrossEncoderRerankingEvaluator"):
        evaluator = evaluation.CERerankingEvaluator([{"query": "a", "positive": ["1"], "negative": ["0"]}], name="x")
    assert evaluator(GivenScores(by_number))["x_map"] == 1


def test_an_old_threshold_is_said_to_have_no_effect():
    with pytest.warns(DeprecationWarning, match="threshold has no effect"):
        evaluation.CEBinaryAccuracyEvaluator(PAIRS, [1, 0, 1, 0], threshold=0.7)


@pytest.mark.parametrize("labels", [[2, 0, 1, 0], [0.7, 0, 1, 0]])
def test_labels_that_are_neither_0_nor_1_are_refused_for_a_model_of_one_class(labels):
    class Model:
        def predict(self, pairs, **settings):
            return np.linspace(0, 1, len(pairs), dtype=np.float32)

    with pytest.raises(InputError, match=r"label 0 is .* give 0 or 1"):
        CrossEncoderClassificationEvaluator([["a", "b"]] * 4, labels, write_csv=False)(Model())
