"""How good a ranking is, and whether a difference between two rankings is more than chance.

`metrics` turns rankings and judgements into a value per query; `significance` compares columns of such values.
`comparison` does so for many systems at once, with depths and segments, into the figures of `results`; by them `gate`
decides whether a model may replace another.

The evaluators score pairs with a model and return named values: `CrossEncoderRerankingEvaluator` for lists of
documents, `CrossEncoderNanoBEIREvaluator` for whole collections, `CrossEncoderClassificationEvaluator` and
`CrossEncoderCorrelationEvaluator` for labelled pairs. They know a model by its `predict` alone; nothing here knows a
framework or a cluster.
"""

from crossenc.evaluation.deprecated import (
    CEBinaryAccuracyEvaluator,
    CEBinaryClassificationEvaluator,
    CECorrelationEvaluator,
    CEF1Evaluator,
    CERerankingEvaluator,
    CESoftmaxAccuracyEvaluator,
)
from crossenc.evaluation.evaluator import BaseEvaluator, SequentialEvaluator
from crossenc.evaluation.nano_beir import CrossEncoderNanoBEIREvaluator
from crossenc.evaluation.pairs import CrossEncoderClassificationEvaluator, CrossEncoderCorrelationEvaluator
from crossenc.evaluation.reranking import CrossEncoderRerankingEvaluator

__all__ = [
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
