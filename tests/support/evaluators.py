"""A stand-in for a model whose scores are given, with a card that remembers. For tests of evaluators."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Card:
    """What evaluators tell a model card."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, dict[str, Any], int, int]] = []

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        self.told.append((evaluator, metrics, epoch, step))


class GivenScores:
    """Scores a pair by `score_of(query, document)`, a number or a list of numbers; notes each call's options."""

    def __init__(self, score_of: Callable[[str, str], Any], dtype: Any = np.float32) -> None:
        self.score_of = score_of
        self.dtype = dtype
        self.model_card_data = Card()
        self.calls: list[dict[str, Any]] = []

    @property
    def num_labels(self) -> int:
        return np.size(self.score_of("", ""))

    def predict(self, pairs: Sequence[Sequence[str]], **options: Any) -> np.ndarray:
        self.calls.append({"pairs": [tuple(pair) for pair in pairs], **options})
        return np.array([self.score_of(*pair) for pair in pairs], dtype=self.dtype)
