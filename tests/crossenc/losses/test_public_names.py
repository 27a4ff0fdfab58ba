import re
import subprocess
import sys

import torch

from crossenc import losses
from crossenc.losses import LOSSES


def test_the_public_names_are_these():
    assert losses.__all__ == [
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
    assert all(hasattr(losses, name) for name in losses.__all__)


def test_jobs_find_each_function_by_the_snake_case_name_of_its_class():
    plain = {name.removesuffix("Loss").lower() for name in losses.__all__ if name.endswith("Loss")}
    assert {name.replace("_", "") for name in LOSSES} == plain - {"cachedmultiplenegativesranking", "text"}
    for name, function in LOSSES.items():
        assert function.__name__ in (name, f"{name}_loss") and function.__name__ in losses.__all__


def test_every_loss_function_says_what_it_computes_on_what_from_whom_and_when_to_prefer_it():
    for name, function in LOSSES.items():
        for part in ("Formula", "Shapes:", "Prefer it", "Paper"):
            assert re.search(part, function.__doc__ or ""), (name, part)


def test_every_loss_class_says_what_it_is():
    for name in losses.__all__:
        thing = getattr(losses, name)
        if isinstance(thing, type):
            assert issubclass(thing, torch.nn.Module) == (name not in ("LossSum", "Objective"))
            assert thing.__doc__ and thing.__doc__ != torch.nn.Module.__doc__


def test_losses_need_torch_alone():
    code = "import sys, crossenc.losses; assert not {'transformers', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
