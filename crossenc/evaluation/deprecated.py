"""Evaluators by the names of sentence-transformers 3: the present ones, with a warning that says what to write."""

import warnings
from typing import Any

from crossenc.evaluation.pairs import CrossEncoderClassificationEvaluator, CrossEncoderCorrelationEvaluator
from crossenc.evaluation.reranking import CrossEncoderRerankingEvaluator


class CEBinaryAccuracyEvaluator(CrossEncoderClassificationEvaluator):
    """Deprecated name of CrossEncoderClassificationEvaluator; a `threshold` has no effect, the best one is found."""

    def __init__(self, *args: Any, threshold: float | None = None, **kwargs: Any) -> None:
        _warn(self, "" if threshold is None else "; threshold has no effect")
        super().__init__(*args, **kwargs)


class CEBinaryClassificationEvaluator(CrossEncoderClassificationEvaluator):
    """Deprecated name of CrossEncoderClassificationEvaluator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn(self)
        super().__init__(*args, **kwargs)


class CEF1Evaluator(CrossEncoderClassificationEvaluator):
    """Deprecated name of CrossEncoderClassificationEvaluator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn(self)
        super().__init__(*args, **kwargs)


class CESoftmaxAccuracyEvaluator(CrossEncoderClassificationEvaluator):
    """Deprecated name of CrossEncoderClassificationEvaluator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn(self)
        super().__init__(*args, **kwargs)


class CECorrelationEvaluator(CrossEncoderCorrelationEvaluator):
    """Deprecated name of CrossEncoderCorrelationEvaluator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn(self)
        super().__init__(*args, **kwargs)


class CERerankingEvaluator(CrossEncoderRerankingEvaluator):
    """Deprecated name of CrossEncoderRerankingEvaluator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn(self)
        super().__init__(*args, **kwargs)


def _warn(evaluator: object, addition: str = "") -> None:
    old, new = type(evaluator).__name__, type(evaluator).__mro__[1].__name__
    warnings.warn(f"{old} is deprecated: write {new}{addition}", DeprecationWarning, stacklevel=3)
