"""A loss by name, as the two sums that a training loop needs whose batch is split over workers and micro-batches.

The loss of a whole batch is the sum of the parts' `value` divided by the sum of their `weight`, however the batch was
split and padded, and its gradient likewise. Names and parameters are those of job files. Knows tensors and what the
labels of a training set are like; knows neither texts nor models.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from crossenc.errors import ConfigError, InputError
from crossenc.losses import _citations as papers
from crossenc.losses import contrastive, distillation, list_losses, listwise, pair_losses, pairwise, pointwise
from crossenc.losses._shared import Terms, at_least_float32
from crossenc.losses._texts import TextLoss
from crossenc.losses.tuple_losses import MarginMSELoss, MultipleNegativesRankingLoss
from crossenc.losses.weighting import (
    BaseWeightingScheme,
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2PPScheme,
    NDCGLoss2Scheme,
    NoWeightingScheme,
)

#: The weighting schemes of `lambda` by the names that job files use.
WEIGHTING_SCHEMES: dict[str, type[BaseWeightingScheme]] = {
    "lambda_rank": LambdaRankScheme,
    "ndcg_loss1": NDCGLoss1Scheme,
    "ndcg_loss2": NDCGLoss2Scheme,
    "ndcg_loss2pp": NDCGLoss2PPScheme,
    "none": NoWeightingScheme,
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": torch.nn.Identity(), "sigmoid": torch.sigmoid}
_POSITION_WEIGHTS: dict[str, Callable[[Tensor], Tensor] | None] = {"none": None, "position": listwise.position_weights}

#: Lists that teach nothing are a problem when they are more than this share of all.
_MOST = 0.5


class LabelFigures(Protocol):
    """What `objective_problems` asks about the labels of a training set."""

    @property
    def minimum(self) -> float: ...

    @property
    def maximum(self) -> float: ...

    @property
    def num_distinct(self) -> int:
        """Different values, counted up to some number that is at least 2."""
        ...

    @property
    def num_positive(self) -> int:
        """Labels above 0."""
        ...

    @property
    def num_lists(self) -> int: ...

    @property
    def num_single_label_lists(self) -> int:
        """Lists whose labels are all equal, such as those of one document."""
        ...


@dataclass(frozen=True, slots=True)
class LossSum:
    """A part's share in the loss of a batch: the sums over all parts, divided by each other, are the loss.

    `value` is a scalar with its graph; `weight`, a scalar without one, is what the loss is a mean over: documents,
    queries, pairs of documents or class weights, times the weights of the lists. Both are 0 where nothing counts.
    """

    value: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with its parameters; made by `objective`, which checks them. Equal ones compare equal, and pickle.

    `parameters` are all that are in force, those that were not given included, as a job file would write them.
    """

    name: str
    parameters: Mapping[str, Any]

    def __call__(
        self, scores: Tensor, labels: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> LossSum:
        """The sums over a part of a batch, computed in float32 at least.

        Scores (raw logits) [Q, N], for `cross_entropy` [Q, N, L]; labels [Q, N], for `cross_entropy` class numbers of
        any dtype; `mask` [Q, N], True where there is a document, and everywhere when None; `weights` [Q] from 0, one
        for each list, 1 when None. A list of weight 2 counts as one that is there twice; one of weight 0 is not looked
        at, whatever stands in it. Raises InputError for shapes that do not fit.
        """
        mask, weights = self._checked(scores, labels, mask, weights)
        mask = mask & (weights > 0)[:, None]
        absent = ~mask if self.needs_num_labels_one else ~mask[:, :, None]
        # Emptied first: an activation's gradient at a NaN is NaN, even when nothing flows in from above.
        scores = self._activation(at_least_float32(scores).masked_fill(absent, 0.0))
        values, nums = self._terms(scores, labels.detach(), mask).sums()
        weights = weights.detach().to(values.dtype)
        return LossSum((values * weights).sum(), (nums * weights).sum().detach())

    @property
    def card_name(self) -> str:
        """The name on model cards, such as BinaryCrossEntropyLoss."""
        return self._kind.text_loss.__name__

    @property
    def citation(self) -> str:
        """The paper as BibTeX, or nothing."""
        return self._kind.citation

    @property
    def is_pointwise(self) -> bool:
        """Whether each document is judged alone, so that a list may hold a single one."""
        return self._kind.family == "pointwise"

    @property
    def needs_num_labels_one(self) -> bool:
        """Whether the model must have one output label, and scores come without a dimension for it."""
        return self._kind.text_loss.required_num_labels == 1

    @property
    def _kind(self) -> "_Kind":
        return _KINDS[self.name]

    @property
    def _activation(self) -> Callable[[Tensor], Tensor]:
        return _ACTIVATIONS[self.parameters["activation"]]

    def _terms(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Terms:
        """The loss's terms, its parameters made into what its function takes."""
        arguments = {name: value for name, value in self.parameters.items() if name != "activation"}
        if "weighting_scheme" in arguments:
            mu = {"mu": arguments.pop("mu")} if "mu" in arguments else {}
            arguments["weighting_scheme"] = WEIGHTING_SCHEMES[arguments["weighting_scheme"]](**mu)
        if "lambda_weight" in arguments:
            arguments["lambda_weight"] = _POSITION_WEIGHTS[arguments["lambda_weight"]]
        if arguments.get("weight") is not None:
            arguments["weight"] = torch.tensor(arguments["weight"], dtype=scores.dtype, device=scores.device)
        return self._kind.terms(scores, labels, mask, **arguments)

    def _checked(
        self, scores: Tensor, labels: Tensor, mask: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The mask and the weights; raises InputError unless all shapes fit."""
        wanted = "[queries, documents]" if self.needs_num_labels_one else "[queries, documents, labels]"
        if scores.ndim != wanted.count(",") + 1:
            raise InputError(f"{self.name} got scores of shape {tuple(scores.shape)}; give {wanted}, padded")
        shape = scores.shape[:2]
        mask = torch.ones(shape, dtype=torch.bool, device=scores.device) if mask is None else mask
        weights = torch.ones(shape[0], device=scores.device) if weights is None else weights
        if labels.shape != shape or mask.shape != shape or weights.shape != shape[:1]:
            raise InputError(
                f"{self.name} got scores {tuple(scores.shape)}, labels {tuple(labels.shape)}, mask {tuple(mask.shape)} "
                f"and weights {tuple(weights.shape)}: give labels and mask {tuple(shape)}, and a weight for each list"
            )
        if mask.dtype != torch.bool:
            raise InputError(f"the mask has dtype {mask.dtype}; give a bool tensor, True where there is a document")
        return mask, weights


def objective(name: str, parameters: Mapping[str, Any] | None = None) -> Objective:
    """The loss of that name of `LOSSES`, with parameters as YAML has them: numbers, texts, truth values, lists.

    Beside the keyword arguments of its function every loss takes an `activation` that goes over the scores first,
    `identity` or `sigmoid`; `weighting_scheme` is a name of `WEIGHTING_SCHEMES`, with `mu` for `ndcg_loss2pp`;
    `lambda_weight` is `position` or `none`. Raises ConfigError for a name or parameter that is unknown, naming the
    nearest, and for a value that does not fit.
    """
    if name not in _KINDS:
        raise ConfigError(f"there is no loss {name!r}: {_hint(name, _KINDS)}")
    known = {"activation": _choice("identity", _ACTIVATIONS), **_KINDS[name].parameters}
    given = dict(parameters or {})
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"the loss {name} has no parameter {key!r}: {_hint(key, known)}")
        if not known[key].fits(value):
            raise ConfigError(f"{key} of the loss {name} is {value!r}: give {known[key].wanted}")
    in_force = {key: given.get(key, parameter.default) for key, parameter in known.items()}
    if in_force.get("weighting_scheme", "ndcg_loss2pp") != "ndcg_loss2pp":
        if "mu" in given:
            raise ConfigError(
                f"mu is a parameter of the weighting scheme ndcg_loss2pp, and {in_force['weighting_scheme']} was "
                "chosen: leave out one of them"
            )
        del in_force["mu"]
    return Objective(name, in_force)


def objective_problems(objective: Objective, statistics: LabelFigures, num_labels: int) -> list[str]:
    """Sentences, none as a rule, on what cannot work when these labels train a model with `num_labels` outputs.

    Each names the remedy. Raises ConfigError where the loss and the model's number of labels exclude each other, or
    labels are no classes of the model.
    """
    check_num_labels(objective, num_labels)
    _check_classes(objective, statistics, num_labels)
    problems = [_activation_problem(objective, statistics)]
    if not objective.parameters.get("respect_input_order"):  # or else labels are not looked at
        problems += [_range_problem(objective, statistics), _spread_problem(objective, statistics)]
    return [problem for problem in problems if problem]


def check_num_labels(objective: Objective, num_labels: int) -> None:
    """Raise ConfigError when the loss takes another number of output labels."""
    name = objective.name
    if objective.needs_num_labels_one and num_labels != 1:
        raise ConfigError(
            f"the loss {name} trains a model with one output label, and this one has {num_labels}: load it with "
            "num_labels: 1, or take the loss cross_entropy"
        )
    if not objective.needs_num_labels_one and num_labels < 2:
        raise ConfigError(
            f"the loss {name} chooses among classes, and the model has {num_labels} output label: load it with one "
            "label for each class, or take the loss binary_cross_entropy"
        )
    weight = objective.parameters.get("weight")
    if weight is not None and len(weight) != num_labels:
        raise ConfigError(
            f"weight of the loss {name} has {len(weight)} numbers for {num_labels} classes: give one for each"
        )


def _check_classes(objective: Objective, statistics: LabelFigures, num_labels: int) -> None:
    """Raise ConfigError where labels are to be classes and the figures tell that some are none."""
    name, low, high = objective.name, statistics.minimum, statistics.maximum
    if not objective.needs_num_labels_one and not _are_classes(
        statistics, num_labels, objective.parameters["ignore_index"]
    ):
        raise ConfigError(
            f"the labels go from {low:g} to {high:g}, and {name} takes the numbers of classes, whole numbers from 0 to "
            f"{num_labels - 1}: renumber the classes, load the model with a label for each, or for degrees take the "
            "loss binary_cross_entropy or mse"
        )


def _activation_problem(objective: Objective, statistics: LabelFigures) -> str:
    """What an activation over the scores makes impossible."""
    name, activation = objective.name, objective.parameters["activation"]
    if activation == "identity":
        return ""
    remedy = "leave out activation, which is identity then"
    if objective._kind.family == "distillation":
        return f"{activation} flattens the differences between scores that {name} is to copy from the teacher: {remedy}"
    if name == "binary_cross_entropy":
        return f"{name} takes logits and has its own sigmoid, so that a second one keeps it from learning: {remedy}"
    if name == "mse" and (statistics.minimum < 0 or statistics.maximum > 1):
        return (
            f"no score after a {activation} reaches labels from {statistics.minimum:g} to {statistics.maximum:g}: "
            f"{remedy}, or bring the labels between 0 and 1"
        )
    return ""


def _range_problem(objective: Objective, statistics: LabelFigures) -> str:
    """What the values of the labels make impossible."""
    name, low, high = objective.name, statistics.minimum, statistics.maximum
    labels = f"the labels go from {low:g} to {high:g}"
    if name == "binary_cross_entropy" and (low < 0 or high > 1):
        if low >= 0 and _is_whole(high):
            return (
                f"{labels}, like grades, and {name} takes labels from 0 to 1: divide them by the highest grade, or "
                "take the loss lambda or list_net"
            )
        return (
            f"{labels}, like a teacher's logits, and {name} takes labels from 0 to 1: take the loss mse, margin_mse or "
            "kl_distillation, or put the labels through a sigmoid"
        )
    return ""


def _are_classes(statistics: LabelFigures, num_labels: int, ignore_index: int) -> bool:
    """Whether labels, as far as the figures tell, are whole numbers from 0 to `num_labels` - 1, or ignored."""
    low, high, num_distinct = statistics.minimum, statistics.maximum, statistics.num_distinct
    if low == ignore_index:
        low, num_distinct = 0, num_distinct - 1
    if high == ignore_index:  # which hides the highest class
        high, num_distinct = num_labels - 1, num_distinct - 1
    # With more values than there are whole numbers in their range, some lie between.
    return low >= 0 and high < num_labels and _is_whole(low) and _is_whole(high) and num_distinct <= high - low + 1


def _spread_problem(objective: Objective, statistics: LabelFigures) -> str:
    """What is not to be learned from labels that hardly differ."""
    name = objective.name
    if statistics.num_distinct < 2:
        return (
            f"every label is {statistics.minimum:g}, and there is nothing to learn from one value: add documents with "
            "another label, such as mined negatives"
        )
    gains = name == "lambda" and objective.parameters["weighting_scheme"] != "none"
    if not statistics.num_positive and (gains or objective._kind.family == "contrastive"):
        return (
            f"no label is above 0, and {name} looks for documents whose label is: take the loss kl_distillation for a "
            "teacher's scores, rank_net for an order, or change the labels"
        )
    if not objective.is_pointwise and statistics.num_single_label_lists > _MOST * statistics.num_lists:
        return (
            f"{statistics.num_single_label_lists} of {statistics.num_lists} lists hold one document or one label "
            f"value, and {name} compares documents of one list: give each query documents of different labels, or "
            "take the loss binary_cross_entropy or mse"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What a parameter is unless given, what to give in words, and whether a value is that."""

    default: Any
    wanted: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A loss: its terms from (scores, labels, mask), where it stands in the library, and its own parameters."""

    family: Literal["pointwise", "pairwise", "listwise", "contrastive", "distillation"]
    terms: Callable[..., Terms]
    text_loss: type[TextLoss]
    citation: str
    parameters: Mapping[str, _Parameter] = field(default_factory=dict)


def _is_whole(value: float) -> bool:
    return float(value).is_integer()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_class_weights(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value)) and min(value, default=-1) >= 0 < max(value)


def _positive(default: float) -> _Parameter:
    return _Parameter(default, "a number above 0, such as 1.5 or 1.0e-10", _is_positive)


def _choice(default: str, known: Mapping[str, Any]) -> _Parameter:
    return _Parameter(default, " or ".join(known), lambda value: isinstance(value, str) and value in known)


def _optional(wanted: str, fits: Callable[[Any], bool]) -> _Parameter:
    return _Parameter(None, f"{wanted}, or leave it out", lambda value: value is None or fits(value))


def _hint(given: object, known: Iterable[str]) -> str:
    """The nearest of the known names, or all of them."""
    plain = {_plain(name): name for name in known}
    nearest = get_close_matches(_plain(given), plain, n=1)
    return f"did you mean {plain[nearest[0]]!r}?" if nearest else f"choose {', '.join(plain.values())}"


def _plain(name: object) -> str:
    """A name without what differs between a function's and a class's."""
    return str(name).lower().replace("_", "").removesuffix("loss")


def _multiple_negatives_terms(scores: Tensor, labels: Tensor, mask: Tensor, *, scale: float) -> Terms:
    """What `multiple_negatives_ranking` is the mean of, once its activation has been over the scores."""
    return contrastive.localized_contrastive_terms(scale * scores, labels, mask)


_PAIRS_OF_DOCUMENTS = {
    "k": _optional("a number of documents from 1", lambda value: _is_int(value) and value > 0),
    "sigma": _positive(1.0),
    "reduction_log": _choice("binary", {"binary": 2, "natural": math.e}),
}
_INPUT_ORDER = {"respect_input_order": _Parameter(False, "true or false", lambda value: isinstance(value, bool))}

_KINDS: dict[str, _Kind] = {
    "adr_mse": _Kind(
        "listwise", listwise.adr_mse_terms, list_losses.ADRMSELoss, papers.SCHLATT_2025, {"alpha": _positive(1.0)}
    ),
    "binary_cross_entropy": _Kind(
        "pointwise",
        pointwise.binary_cross_entropy_terms,
        pair_losses.BinaryCrossEntropyLoss,
        "",
        {"pos_weight": _optional("a number above 0", _is_positive)},
    ),
    "cross_entropy": _Kind(
        "pointwise",
        pointwise.cross_entropy_terms,
        pair_losses.CrossEntropyLoss,
        "",
        {
            "weight": _optional("a list of numbers from 0, one for each class", _are_class_weights),
            "ignore_index": _Parameter(-100, "a whole number", _is_int),
            "label_smoothing": _Parameter(
                0.0, "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
            ),
        },
    ),
    "kl_distillation": _Kind(
        "distillation",
        distillation.kl_distillation_terms,
        list_losses.KLDistillationLoss,
        papers.HINTON_2015,
        {"temperature": _positive(1.0)},
    ),
    "lambda": _Kind(
        "pairwise",
        pairwise.lambda_terms,
        list_losses.LambdaLoss,
        papers.WANG_2018,
        {
            "weighting_scheme": _choice("ndcg_loss2pp", WEIGHTING_SCHEMES),
            "mu": _positive(10.0),
            **_PAIRS_OF_DOCUMENTS,
            "eps": _positive(1e-10),
        },
    ),
    "list_mle": _Kind(
        "listwise",
        partial(listwise.plist_mle_terms, lambda_weight=None),
        list_losses.ListMLELoss,
        papers.XIA_2008,
        _INPUT_ORDER,
    ),
    "list_net": _Kind("listwise", listwise.list_net_terms, list_losses.ListNetLoss, papers.CAO_2007),
    "localized_contrastive": _Kind(
        "contrastive",
        contrastive.localized_contrastive_terms,
        list_losses.LocalizedContrastiveLoss,
        papers.GAO_2021_RERANKERS,
    ),
    "margin_mse": _Kind("distillation", distillation.margin_mse_terms, MarginMSELoss, papers.HOFSTATTER_2020),
    "mse": _Kind("pointwise", pointwise.mse_terms, pair_losses.MSELoss, papers.HOFSTATTER_2020),
    "multiple_negatives_ranking": _Kind(
        "contrastive",
        _multiple_negatives_terms,
        MultipleNegativesRankingLoss,
        papers.HENDERSON_2017,
        {"activation": _choice("sigmoid", _ACTIVATIONS), "scale": _positive(10.0)},
    ),
    "plist_mle": _Kind(
        "listwise",
        listwise.plist_mle_terms,
        list_losses.PListMLELoss,
        papers.LAN_2014,
        {"lambda_weight": _choice("position", _POSITION_WEIGHTS), **_INPUT_ORDER},
    ),
    "rank_net": _Kind(
        "pairwise",
        partial(pairwise.lambda_terms, weighting_scheme=None),
        list_losses.RankNetLoss,
        papers.BURGES_2005,
        _PAIRS_OF_DOCUMENTS,
    ),
}
