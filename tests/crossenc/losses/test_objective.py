"""A loss by name: the two sums of its parts, its parameters, and what cannot work."""

import inspect
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossenc import losses
from crossenc.errors import ConfigError, InputError
from crossenc.losses import LOSSES, LossSum, Objective, objective, objective_problems
from tests.support.losses import GivenLogits

# Name, parameters, and the public function that computes the same from scores that the activation has been over.
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    **{name: (name, {}, function) for name, function in LOSSES.items() if name != "multiple_negatives_ranking"},
    "adr_mse alpha": ("adr_mse", {"alpha": 3}, partial(losses.adr_mse, alpha=3.0)),
    "binary_cross_entropy pos_weight": (
        "binary_cross_entropy",
        {"pos_weight": 4},
        partial(losses.binary_cross_entropy, pos_weight=4.0),
    ),
    "cross_entropy weight": (
        "cross_entropy",
        {"weight": [1, 2.5, 0]},
        partial(losses.cross_entropy, weight=torch.tensor([1, 2.5, 0])),
    ),
    "cross_entropy smoothed": (
        "cross_entropy",
        {"weight": [1.0, 3.0, 0.5], "label_smoothing": 0.2, "ignore_index": 1},
        partial(losses.cross_entropy, weight=torch.tensor([1.0, 3.0, 0.5]), label_smoothing=0.2, ignore_index=1),
    ),
    "kl_distillation temperature": (
        "kl_distillation",
        {"temperature": 2.5},
        partial(losses.kl_distillation, temperature=2.5),
    ),
    "lambda mu": (
        "lambda",
        {"weighting_scheme": "ndcg_loss2pp", "mu": 2.5, "sigma": 0.7},
        partial(losses.lambda_loss, weighting_scheme=losses.NDCGLoss2PPScheme(mu=2.5), sigma=0.7),
    ),
    "lambda at 2": ("lambda", {"k": 2, "eps": 1e-6}, partial(losses.lambda_loss, k=2, eps=1e-6)),
    "lambda none": ("lambda", {"weighting_scheme": "none"}, partial(losses.lambda_loss, weighting_scheme=None)),
    "lambda 1 natural": (
        "lambda",
        {"weighting_scheme": "ndcg_loss1", "reduction_log": "natural"},
        partial(losses.lambda_loss, weighting_scheme=losses.NDCGLoss1Scheme(), reduction_log="natural"),
    ),
    "lambda 2": (
        "lambda",
        {"weighting_scheme": "ndcg_loss2"},
        partial(losses.lambda_loss, weighting_scheme=losses.NDCGLoss2Scheme()),
    ),
    "lambda rank": (
        "lambda",
        {"weighting_scheme": "lambda_rank"},
        partial(losses.lambda_loss, weighting_scheme=losses.LambdaRankScheme()),
    ),
    "list_mle in order": (
        "list_mle",
        {"respect_input_order": True},
        partial(losses.list_mle, respect_input_order=True),
    ),
    "mse sigmoid": ("mse", {"activation": "sigmoid"}, losses.mse),
    "multiple_negatives_ranking": (
        "multiple_negatives_ranking",
        {},
        partial(losses.multiple_negatives_ranking, activation_fn=torch.nn.Identity()),
    ),
    "multiple_negatives_ranking plain": (
        "multiple_negatives_ranking",
        {"activation": "identity", "scale": 1},
        partial(losses.multiple_negatives_ranking, activation_fn=torch.nn.Identity(), scale=1.0),
    ),
    "plist_mle alike": ("plist_mle", {"lambda_weight": "none"}, losses.list_mle),
    "rank_net at 1": (
        "rank_net",
        {"k": 1, "sigma": 2.0, "reduction_log": "natural"},
        partial(losses.rank_net, k=1, sigma=2.0, reduction_log="natural"),
    ),
}
every_case = pytest.mark.parametrize(("name", "parameters", "function"), CASES.values(), ids=CASES.keys())
both_precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])


@dataclass(frozen=True)
class Lists:
    """Rows of (score, label) and the weight of each row."""

    rows: list[list[tuple[float, float]]]
    weights: list[float]

    def some(self, numbers: Iterable[int]) -> "Lists":
        chosen = list(numbers)
        return Lists([self.rows[number] for number in chosen], [self.weights[number] for number in chosen])

    def tensors(self, dtype: torch.dtype, padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, labels, mask and weights, with NaN where there is no document."""
        width = max(map(len, self.rows)) + padding
        table = torch.full((2, len(self.rows), width), float("nan"), dtype=dtype)
        for number, row in enumerate(self.rows):
            table[:, number, : len(row)] = torch.tensor(row, dtype=dtype).T
        mask = torch.tensor([len(row) for row in self.rows])[:, None] > torch.arange(width)
        return table[0], table[1], mask, torch.tensor(self.weights, dtype=dtype)


def for_loss(name: str, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and labels as the loss takes them: logits of three classes made of one score, and class numbers."""
    if name != "cross_entropy":
        return scores, labels
    return torch.stack([torch.zeros_like(scores), scores, -0.5 * scores], dim=-1), (labels > 0) + (labels > 0.6) * 1.0


def sums_and_gradient(
    loss: Objective, lists: Lists, dtype: torch.dtype, padding: int = 0
) -> tuple[LossSum, list[list[float]]]:
    """The loss's sums, and the gradient of each row's documents."""
    leaf, labels, mask, weights = lists.tensors(dtype, padding)
    leaf.requires_grad_()
    scores, labels = for_loss(loss.name, leaf, labels)
    result = loss(scores, labels, mask, weights)
    (gradient,) = torch.autograd.grad(result.value, leaf)
    assert not gradient[~mask].any() and torch.isfinite(gradient).all()
    return result, [values[: len(row)].tolist() for values, row in zip(gradient, lists.rows, strict=True)]


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance * max(1.0, torch.as_tensor(expected).abs().max().item()),
    )


def flat(rows: Iterable[Iterable[float]]) -> list[float]:
    return [value for row in rows for value in row]


finite = st.floats(-6, 6, width=32)
label = st.sampled_from([0.0, 0.0, 1.0, 0.5, 0.25])
rows_of = st.lists(st.tuples(finite, label), min_size=1, max_size=5)
weight_of = st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.0])
any_lists = st.lists(st.tuples(rows_of, weight_of), min_size=1, max_size=6).map(
    lambda pairs: Lists([row for row, _ in pairs], [weight for _, weight in pairs])
)

FIXED = Lists(
    [
        [(0.3, 1.0), (-1.2, 0.0), (2.0, 0.5), (0.7, 0.0)],
        [(1.5, 1.0)],
        [(-0.4, 0.0), (0.1, 0.0), (3.0, 1.0)],
        [(0.2, 0.5), (0.9, 0.0), (0.8, 1.0), (-2.0, 1.0), (0.25, 0.25)],
    ],
    [1.0, 1.0, 1.0, 1.0],
)


# Sums


@every_case
@both_precisions
def test_value_by_weight_is_the_function_on_the_whole_batch(
    name: str, parameters: dict, function: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
):
    loss = objective(name, parameters)
    result, gradient = sums_and_gradient(loss, FIXED, dtype)
    leaf, labels, mask, _ = FIXED.tensors(dtype)
    leaf = leaf.nan_to_num().requires_grad_()
    scores, labels = for_loss(name, leaf, labels.nan_to_num())
    scores = scores.sigmoid() if loss.parameters["activation"] == "sigmoid" else scores
    expected = function(scores, labels.long() if name == "cross_entropy" else labels, mask)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert result.value.shape == result.weight.shape == () and not result.weight.requires_grad
    assert result.value.dtype == result.weight.dtype == dtype
    assert expected.item() > 0
    assert_close((result.value / result.weight).item(), expected.item(), tolerance)
    assert_close(torch.tensor(flat(gradient)) / result.weight, expected_gradient[mask], max(tolerance, 1e-7))


@every_case
@both_precisions
@settings(deadline=None, max_examples=12)
@given(lists=any_lists, data=st.data())
def test_any_split_of_a_batch_gives_the_same_sums_and_gradients(
    name: str,
    parameters: dict,
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    tolerance: float,
    lists: Lists,
    data: st.DataObject,
):
    loss = objective(name, parameters)
    whole, whole_gradient = sums_and_gradient(loss, lists, dtype)
    places = data.draw(st.lists(st.integers(0, 2), min_size=len(lists.rows), max_size=len(lists.rows)))
    value, weight, gradient = 0.0, 0.0, {}
    for place in set(places):
        numbers = [number for number, its_place in enumerate(places) if its_place == place]
        part, part_gradient = sums_and_gradient(loss, lists.some(numbers), dtype, data.draw(st.integers(0, 3)))
        value, weight = value + part.value.item(), weight + part.weight.item()
        gradient.update(zip(numbers, part_gradient, strict=True))
    assert_close([value, weight], [whole.value.item(), whole.weight.item()], tolerance)
    assert_close(flat(gradient[number] for number in range(len(places))), flat(whole_gradient), tolerance)


@every_case
def test_a_list_of_weight_2_is_one_that_is_there_twice(name: str, parameters: dict, function: Callable[..., Tensor]):
    loss = objective(name, parameters)
    heavy, heavy_gradient = sums_and_gradient(loss, Lists(FIXED.rows, [1.0, 2.0, 1.0, 2.0]), torch.float64)
    twice, twice_gradient = sums_and_gradient(loss, FIXED.some([0, 1, 2, 3, 1, 3]), torch.float64)
    assert_close([heavy.value.item(), heavy.weight.item()], [twice.value.item(), twice.weight.item()], 1e-12)
    expected = [[scale * value for value in row] for row, scale in zip(twice_gradient, [1, 2, 1, 2], strict=False)]
    assert_close(flat(heavy_gradient), flat(expected), 1e-12)


@every_case
def test_a_list_of_weight_0_is_absent_whatever_stands_in_it(
    name: str, parameters: dict, function: Callable[..., Tensor]
):
    loss, nan = objective(name, parameters), float("nan")
    broken = [FIXED.rows[0], [(nan, nan), (float("inf"), 1.0)], *FIXED.rows[2:]]
    present, gradient = sums_and_gradient(loss, Lists(broken, [1.0, 0.0, 0.5, 1.0]), torch.float64)
    lists = Lists(FIXED.rows, [1.0, 1.0, 0.5, 1.0]).some([0, 2, 3])
    absent, absent_gradient = sums_and_gradient(loss, lists, torch.float64)
    assert_close([present.value.item(), present.weight.item()], [absent.value.item(), absent.weight.item()], 1e-12)
    assert gradient.pop(1) == [0.0, 0.0]
    assert_close(flat(gradient), flat(absent_gradient), 1e-12)


@every_case
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_a_part_without_documents_adds_0_with_a_gradient_of_0(
    name: str, parameters: dict, function: Callable[..., Tensor], shape: tuple[int, int]
):
    leaf = torch.ones(shape, requires_grad=True)
    scores, labels = for_loss(name, leaf, torch.ones(shape))
    result = objective(name, parameters)(scores, labels, torch.zeros(shape, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(result.value, leaf)
    assert result.value == 0 and result.weight == 0 and torch.equal(gradient, torch.zeros(shape))


def test_sums_count_what_the_loss_is_a_mean_over():
    scores, labels = torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = {
        "adr_mse": 5,  # documents
        "binary_cross_entropy": 5,
        "mse": 5,
        "kl_distillation": 2,  # queries
        "list_mle": 2,
        "list_net": 2,
        "plist_mle": 2,
        "lambda": 2,  # pairs with a better first
        "rank_net": 2,
        "localized_contrastive": 3,  # positives
        "multiple_negatives_ranking": 3,
        "margin_mse": 3,  # negatives
    }
    for name, count in expected.items():
        assert objective(name)(scores, labels, mask).weight == count, name
    assert expected.keys() | {"cross_entropy"} == LOSSES.keys()
    logits = torch.zeros(2, 3, 2)
    assert objective("cross_entropy")(logits, labels, mask).weight == 5
    assert objective("cross_entropy", {"weight": [1.0, 0.5]})(logits, labels, mask).weight == 3.5
    weighted = objective("mse")(scores, labels, mask, torch.tensor([2.0, 0.5]))
    assert weighted.weight == 7 and weighted.value == 2.0 * 1 + 0.5 * 2


def test_half_precision_scores_are_computed_on_in_float32_and_a_mask_may_be_left_out():
    scores = torch.tensor([[0.5, -1.25, 2.0]])  # exact in both
    labels = torch.tensor([[1.0, 0.0, 0.5]])
    halves, whole = objective("list_net")(scores.bfloat16(), labels.bfloat16()), objective("list_net")(scores, labels)
    assert halves.value.dtype == torch.float32 and torch.equal(halves.value, whole.value)


def test_shapes_that_do_not_fit_are_refused():
    scores, mse = torch.zeros(2, 3), objective("mse")
    with pytest.raises(InputError, match=r"scores \(2, 3\), labels \(2, 4\)"):
        mse(scores, torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"weights \(3,\): .* a weight for each list"):
        mse(scores, scores, None, torch.ones(3))
    with pytest.raises(InputError, match="bool"):
        mse(scores, scores, torch.ones(2, 3))
    with pytest.raises(InputError, match=r"\(2, 3, 1\); give \[queries, documents\]"):
        mse(scores[..., None], scores)
    with pytest.raises(InputError, match=r"\(2, 3\); give \[queries, documents, labels\]"):
        objective("cross_entropy")(scores, scores)


# Names and parameters


def test_every_loss_has_the_defaults_of_its_function_and_the_names_of_its_class():
    tensors_or_objects = {
        "scores",
        "labels",
        "mask",
        "weight",
        "reduction",
        "activation_fn",
        "weighting_scheme",
        "lambda_weight",
    }
    for name, function in LOSSES.items():
        loss = objective(name, {})
        defaults = {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if key not in tensors_or_objects
        }
        assert {key: loss.parameters.get(key, "missing") for key in defaults} == defaults
        text_loss = getattr(losses, loss.card_name)
        text = text_loss(GivenLogits(torch.zeros(1, 1)))
        assert loss.card_name.lower() == name.replace("_", "") + "loss"
        assert loss.citation == getattr(text, "citation", "")
        assert loss.needs_num_labels_one == (name != "cross_entropy")
        assert loss.is_pointwise == (name in ("binary_cross_entropy", "cross_entropy", "mse"))
    assert objective("multiple_negatives_ranking").parameters == {"activation": "sigmoid", "scale": 10.0}


def test_the_parameters_in_force_are_the_given_ones_and_the_defaults():
    assert objective("lambda", {"k": 5}).parameters == {
        "activation": "identity",
        "weighting_scheme": "ndcg_loss2pp",
        "mu": 10.0,
        "k": 5,
        "sigma": 1.0,
        "reduction_log": "binary",
        "eps": 1e-10,
    }
    assert "mu" not in objective("lambda", {"weighting_scheme": "lambda_rank"}).parameters


def test_an_objective_travels_to_another_process():
    loss = objective("lambda", {"k": 5})
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ranknet", {}, "no loss 'ranknet': did you mean 'rank_net'"),
        ("BinaryCrossEntropyLoss", {}, "did you mean 'binary_cross_entropy'"),
        ("zzz", {}, "choose adr_mse, binary_cross_entropy, .*, rank_net$"),
        ("kl_distillation", {"temprature": 2}, "no parameter 'temprature': did you mean 'temperature'"),
        ("mse", {"temperature": 2}, "the loss mse has no parameter 'temperature': choose activation"),
        ("kl_distillation", {"temperature": 0}, "temperature of the loss kl_distillation is 0: give a number above 0"),
        ("kl_distillation", {"temperature": "1e-1"}, "is '1e-1': give a number above 0, such as 1.5 or 1.0e-10"),
        ("kl_distillation", {"temperature": True}, "is True: give a number"),
        ("kl_distillation", {"temperature": float("nan")}, "is nan: give a number"),
        ("kl_distillation", {"temperature": None}, "is None: give a number"),
        ("mse", {"activation": "tanh"}, "activation of the loss mse is 'tanh': give identity or sigmoid"),
        ("mse", {"activation": ["identity"]}, "give identity or sigmoid"),
        ("rank_net", {"k": 0}, "k of the loss rank_net is 0: give a number of documents from 1, or leave it out"),
        ("rank_net", {"k": 2.0}, "is 2.0: give a number of documents"),
        ("rank_net", {"reduction_log": "ten"}, "give binary or natural"),
        ("rank_net", {"weighting_scheme": "none"}, "the loss rank_net has no parameter 'weighting_scheme'"),
        (
            "lambda",
            {"weighting_scheme": "ndcg"},
            "give lambda_rank or ndcg_loss1 or ndcg_loss2 or ndcg_loss2pp or none",
        ),
        ("lambda", {"weighting_scheme": "none", "mu": 5}, "mu is a parameter of .* ndcg_loss2pp, and none was chosen"),
        ("list_mle", {"respect_input_order": 1}, "is 1: give true or false"),
        ("plist_mle", {"lambda_weight": "rank"}, "give none or position"),
        ("cross_entropy", {"weight": [1, -1]}, "give a list of numbers from 0, one for each class"),
        ("cross_entropy", {"weight": [0, 0]}, "give a list of numbers from 0"),
        ("cross_entropy", {"weight": []}, "give a list of numbers from 0"),
        ("cross_entropy", {"label_smoothing": 1.5}, "give a number from 0 to 1"),
        ("cross_entropy", {"ignore_index": 0.5}, "give a whole number"),
        ("binary_cross_entropy", {"pos_weight": -1}, "give a number above 0, or leave it out"),
    ],
)
def test_what_is_unknown_or_does_not_fit_is_refused_by_name(name: str, parameters: Mapping[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        objective(name, parameters)


# Problems


@dataclass(frozen=True)
class Figures:
    """Of 100 lists with labels 0 and 1."""

    minimum: float = 0.0
    maximum: float = 1.0
    mean: float = 0.25
    num_distinct: int = 2
    num_positive: int = 100
    num_lists: int = 100
    num_single_label_lists: int = 0


LOGITS = Figures(-8.5, 9.25, -2.0, num_distinct=10)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_labels_of_0_and_1_in_every_list_are_no_problem_for_any_loss(name: str):
    loss = objective(name)
    assert objective_problems(loss, Figures(), 1 if loss.needs_num_labels_one else 2) == []


@pytest.mark.parametrize(
    ("name", "parameters", "figures", "expected"),
    [
        ("margin_mse", {"activation": "sigmoid"}, LOGITS, "sigmoid flattens .* margin_mse .* leave out activation"),
        ("kl_distillation", {"activation": "sigmoid"}, LOGITS, "sigmoid flattens .* leave out activation"),
        ("binary_cross_entropy", {"activation": "sigmoid"}, Figures(), "has its own sigmoid.*leave out activation"),
        ("mse", {"activation": "sigmoid"}, LOGITS, "no score after a sigmoid reaches labels from -8.5 to 9.25: leave"),
        ("binary_cross_entropy", {}, LOGITS, "from -8.5 to 9.25, like a teacher's logits.*take the loss mse"),
        (
            "binary_cross_entropy",
            {},
            Figures(maximum=3.0),
            "from 0 to 3, like grades.*divide .* or take the loss lambda",
        ),
        ("list_net", {}, Figures(1.0, 1.0, 1.0, 1), "every label is 1, .* nothing to learn.*mined negatives"),
        ("rank_net", {}, Figures(num_single_label_lists=51), "51 of 100 lists hold one document or one label value"),
        ("localized_contrastive", {}, Figures(-3.0, -0.5, -1.0, 9, 0), "no label is above 0.*kl_distillation"),
        ("lambda", {}, Figures(-3.0, -0.5, -1.0, 9, 0), "no label is above 0, and lambda looks"),
    ],
)
def test_each_problem_is_named_with_its_remedy(name: str, parameters: dict, figures: Figures, expected: str):
    loss = objective(name, parameters)
    (problem,) = objective_problems(loss, figures, 1)
    assert re.search(expected, problem), problem


@pytest.mark.parametrize(
    ("name", "parameters", "figures"),
    [
        ("mse", {"activation": "sigmoid"}, Figures()),
        ("mse", {}, LOGITS),
        ("mse", {}, Figures(num_single_label_lists=100)),
        ("rank_net", {}, Figures(num_single_label_lists=50)),
        ("lambda", {"weighting_scheme": "none"}, Figures(-3.0, -0.5, -1.0, 9, 0)),
        ("cross_entropy", {}, Figures(minimum=-100.0, num_distinct=3)),  # some are ignored
        ("cross_entropy", {"ignore_index": 9}, Figures(maximum=9.0, num_distinct=3)),
        ("list_mle", {"respect_input_order": True}, Figures(0.0, 0.0, 0.0, 1, 0, 100, 100)),
    ],
)
def test_what_works_is_not_complained_of(name: str, parameters: dict, figures: Figures):
    loss = objective(name, parameters)
    assert objective_problems(loss, figures, 1 if loss.needs_num_labels_one else 2) == []


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (Figures(maximum=3.0), "from 0 to 3, and cross_entropy .* from 0 to 2: renumber"),
        (Figures(minimum=-1.0), "from -1 to 1, and cross_entropy takes the numbers of classes"),
        (Figures(maximum=0.5), "from 0 to 0.5, and cross_entropy takes the numbers of classes"),
        (Figures(num_distinct=3), "whole numbers from 0 to 2"),
    ],
)
def test_labels_that_are_no_classes_of_the_model_are_refused(figures: Figures, message: str):
    with pytest.raises(ConfigError, match=message):
        objective_problems(objective("cross_entropy"), figures, 3)


def test_several_problems_are_all_told():
    loss = objective("binary_cross_entropy", {"activation": "sigmoid"})
    assert len(objective_problems(loss, Figures(3.0, 3.0, 3.0, 1), 1)) == 3


@pytest.mark.parametrize(
    ("name", "parameters", "num_labels", "message"),
    [
        ("mse", {}, 3, "one output label, and this one has 3: load it with num_labels: 1, or .* cross_entropy"),
        ("cross_entropy", {}, 1, "the model has 1 output label: .* or take the loss binary_cross_entropy"),
        ("cross_entropy", {"weight": [1.0, 2.0]}, 3, "weight of the loss cross_entropy has 2 numbers for 3 classes"),
    ],
)
def test_a_model_with_the_wrong_number_of_labels_is_refused(name: str, parameters: dict, num_labels: int, message: str):
    with pytest.raises(ConfigError, match=message):
        objective_problems(objective(name, parameters), Figures(), num_labels)
