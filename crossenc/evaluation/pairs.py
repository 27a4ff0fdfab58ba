"""Evaluators of pairs with a label each: classes, or scores to correlate with. Knows a model by `predict` alone."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from crossenc.errors import InputError
from crossenc.evaluation import binary
from crossenc.evaluation.evaluator import (
    BaseEvaluator,
    append_csv,
    csv_name,
    log_start,
    predict,
    single_scores,
    wants_progress,
)

logger = logging.getLogger(__name__)


class _PairEvaluator(BaseEvaluator):
    """Pairs, what they should get, and how to score them."""

    def __init__(
        self,
        sentence_pairs: Sequence[Sequence[str]],
        targets: Sequence[float],
        name: str,
        prompt_name: str | None,
        batch_size: int,
        show_progress_bar: bool | None,
        write_csv: bool,
    ) -> None:
        super().__init__()
        if len(sentence_pairs) != len(targets):
            raise InputError(f"{len(sentence_pairs)} pairs have {len(targets)} labels: give one to each")
        self.sentence_pairs = sentence_pairs
        self.name = name
        self.prompt_name = prompt_name
        self.batch_size = batch_size
        self.show_progress_bar = wants_progress(show_progress_bar)
        self.write_csv = write_csv
        self.csv_file = csv_name(type(self)._csv_class, name, "results.csv")
        self.csv_headers: list[str] = []

    #: The class that CSV files are named after; those of deprecated names bear the new one.
    _csv_class = ""

    @classmethod
    def from_input_examples(cls, examples: Sequence[Any], **options: Any) -> Self:
        """An evaluator of examples with `texts` and `label`."""
        return cls([example.texts for example in examples], [example.label for example in examples], **options)

    def _predict(self, model: Any) -> Any:
        return predict(model, self.sentence_pairs, self.prompt_name, self.batch_size, self.show_progress_bar)

    def _report(
        self, model: Any, metrics: dict[str, float], output_path: str | Path | None, epoch: int, steps: int
    ) -> dict[str, float]:
        """Log, write the CSV row, tell the card; return the metrics under their full names."""
        logger.info("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if self.write_csv:
            append_csv(output_path, self.csv_file, self.csv_headers, [epoch, steps, *metrics.values()])
        named = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, named, epoch, steps)
        return named


class CrossEncoderClassificationEvaluator(_PairEvaluator):
    """How well a model tells classes apart.

    With one output label: accuracy and F1 at the thresholds that are best for these pairs, the precision and recall
    of that F1, and average precision (primary); label 1 is yes. With several: macro F1 (primary), micro F1 and
    weighted F1 of the class with the highest score; labels are class numbers.
    """

    _csv_class = "CrossEncoderClassificationEvaluator"

    def __init__(
        self,
        sentence_pairs: Sequence[Sequence[str]],
        labels: Sequence[int],
        *,
        name: str = "",
        prompt_name: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        write_csv: bool = True,
    ) -> None:
        super().__init__(sentence_pairs, labels, name, prompt_name, batch_size, show_progress_bar, write_csv)
        self.labels = np.asarray(labels)

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        log_start(self, self.name, epoch, steps)
        scores = self._predict(model)
        if scores.ndim == 1:
            odd = ~np.isin(self.labels, (0, 1))
            if odd.any():
                raise InputError(
                    f"label {int(odd.argmax())} is {self.labels[odd][0]}, but the model tells one class from the rest:"
                    " give 0 or 1, or a model with a label for each class"
                )
            accuracy, f1 = binary.best_accuracy(scores, self.labels), binary.best_f1(scores, self.labels)
            metrics = {
                "accuracy": accuracy.accuracy,
                "accuracy_threshold": accuracy.threshold,
                "f1": f1.f1,
                "f1_threshold": f1.threshold,
                "precision": f1.precision,
                "recall": f1.recall,
                "average_precision": binary.average_precision(scores, self.labels),
            }
            self.primary_metric = "average_precision"
        else:
            by_class = binary.class_f1(scores.argmax(axis=1), self.labels)
            metrics = {"f1_macro": by_class.macro, "f1_micro": by_class.micro, "f1_weighted": by_class.weighted}
            self.primary_metric = "f1_macro"
        columns = {"f1_macro": "Macro_F1", "f1_micro": "Micro_F1", "f1_weighted": "Weighted_F1"}
        self.csv_headers = ["epoch", "steps", *(columns.get(name, name.title()) for name in metrics)]
        return self._report(model, metrics, output_path, epoch, steps)


class CrossEncoderCorrelationEvaluator(_PairEvaluator):
    """How well a model's scores follow given ones: Pearson, and Spearman (primary).

    Both are NaN where all scores, or all given ones, are equal.
    """

    _csv_class = "CrossEncoderCorrelationEvaluator"

    def __init__(
        self,
        sentence_pairs: Sequence[Sequence[str]],
        scores: Sequence[float],
        name: str = "",
        prompt_name: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        write_csv: bool = True,
    ) -> None:
        super().__init__(sentence_pairs, scores, name, prompt_name, batch_size, show_progress_bar, write_csv)
        self.scores = scores
        self.csv_headers = ["epoch", "steps", "Pearson_Correlation", "Spearman_Correlation"]
        self.primary_metric = "spearman"

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        log_start(self, self.name, epoch, steps)
        predicted = single_scores(self._predict(model), self)
        given = np.asarray(self.scores, dtype=np.float64)
        metrics = {"pearson": binary.pearson(given, predicted), "spearman": binary.spearman(given, predicted)}
        if np.isnan(metrics["spearman"]):
            logger.warning("the correlation is not defined: all scores of the model, or all given ones, are equal")
        return self._report(model, metrics, output_path, epoch, steps)
