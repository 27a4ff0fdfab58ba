"""What a cross-encoder is trained to do, as functions of (scores, labels, mask) and as modules for texts.

The functions know tensors only: `pointwise` judges each document, `pairwise` two of one query, `contrastive` the
positive among others, `listwise` the whole list, `distillation` a teacher's scores. The classes bear the names that
the field knows, take columns of texts, score them with a model and call the functions. None of them knows files,
optimizers or processes. `objective` gives a function by its name in job files, split into the two sums that a training
loop needs.

Letters in shapes: Q queries, N documents of a query with padding, P pairs, L labels a document.

Which one? Start with `binary_cross_entropy` on mined hard negatives. For graded lists `lambda_loss`; for a teacher's
scores `kl_distillation` on lists and `margin_mse` on triplets; for the order that a large language model gave
`rank_net` or `adr_mse`.
"""

from collections.abc import Callable

from torch import Tensor

from crossenc.losses._texts import TextLoss
from crossenc.losses.contrastive import localized_contrastive, multiple_negatives_ranking
from crossenc.losses.distillation import kl_distillation, margin_mse
from crossenc.losses.list_losses import (
    ADRMSELoss,
    KLDistillationLoss,
    LambdaLoss,
    ListMLELoss,
    ListNetLoss,
    LocalizedContrastiveLoss,
    PListMLELambdaWeight,
    PListMLELoss,
    RankNetLoss,
)
from crossenc.losses.listwise import adr_mse, approximate_ranks, list_mle, list_net, plist_mle, position_weights
from crossenc.losses.objective import LossSum, Objective, objective, objective_problems
from crossenc.losses.pair_losses import BinaryCrossEntropyLoss, CrossEntropyLoss, MSELoss
from crossenc.losses.pairwise import lambda_loss, rank_net
from crossenc.losses.pointwise import binary_cross_entropy, cross_entropy, mse
from crossenc.losses.tuple_losses import (
    CachedMultipleNegativesRankingLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from crossenc.losses.weighting import (
    BaseWeightingScheme,
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2PPScheme,
    NDCGLoss2Scheme,
    NoWeightingScheme,
)

#: The functions by the names that job files use, those of the classes in snake case. Each takes (scores, labels, mask)
#: and its own keyword arguments.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "adr_mse": adr_mse,
    "binary_cross_entropy": binary_cross_entropy,
    "cross_entropy": cross_entropy,
    "kl_distillation": kl_distillation,
    "lambda": lambda_loss,
    "list_mle": list_mle,
    "list_net": list_net,
    "localized_contrastive": localized_contrastive,
    "margin_mse": margin_mse,
    "mse": mse,
    "multiple_negatives_ranking": multiple_negatives_ranking,
    "plist_mle": plist_mle,
    "rank_net": rank_net,
}

__all__ = [
    "LOSSES",
    "ADRMSELoss",
    "BaseWeightingScheme",
    "BinaryCrossEntropyLoss",
    "CachedMultipleNegativesRankingLoss",
    "CrossEntropyLoss",
    "KLDistillationLoss",
    "LambdaLoss",
    "LambdaRankScheme",
    "ListMLELoss",
    "ListNetLoss",
    "LocalizedContrastiveLoss",
    "LossSum",
    "MSELoss",
    "MarginMSELoss",
    "MultipleNegativesRankingLoss",
    "NDCGLoss1Scheme",
    "NDCGLoss2PPScheme",
    "NDCGLoss2Scheme",
    "NoWeightingScheme",
    "Objective",
    "PListMLELambdaWeight",
    "PListMLELoss",
    "RankNetLoss",
    "TextLoss",
    "adr_mse",
    "approximate_ranks",
    "binary_cross_entropy",
    "cross_entropy",
    "kl_distillation",
    "lambda_loss",
    "list_mle",
    "list_net",
    "localized_contrastive",
    "margin_mse",
    "mse",
    "multiple_negatives_ranking",
    "objective",
    "objective_problems",
    "plist_mle",
    "position_weights",
    "rank_net",
]
