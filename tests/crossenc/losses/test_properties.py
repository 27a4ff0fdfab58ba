"""What holds for every loss function: padding and order of queries change nothing, extremes stay finite."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossenc.errors import InputError
from crossenc.losses import (
    LOSSES,
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2Scheme,
    cross_entropy,
    kl_distillation,
    lambda_loss,
    list_mle,
    plist_mle,
    rank_net,
)
from tests.support.losses import matrix

Loss = Callable[..., Tensor]


def two_classes(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy on a matrix of scores: the second of two classes has the score, the first has 0."""
    return cross_entropy(torch.stack([torch.zeros_like(scores), scores], dim=-1), (labels > 0).long(), mask)


LOSS_FUNCTIONS: dict[str, Loss] = {
    **LOSSES,
    "cross_entropy": two_classes,
    "kl_distillation at 0.5": partial(kl_distillation, temperature=0.5),
    "lambda at 2": partial(lambda_loss, k=2),
    "lambda, LambdaRank": partial(lambda_loss, weighting_scheme=LambdaRankScheme()),
    "lambda, NDCGLoss1": partial(lambda_loss, weighting_scheme=NDCGLoss1Scheme()),
    "lambda, NDCGLoss2": partial(lambda_loss, weighting_scheme=NDCGLoss2Scheme()),
    "list_mle in order": partial(list_mle, respect_input_order=True),
    "plist_mle in order": partial(plist_mle, respect_input_order=True),
    "rank_net at 1": partial(rank_net, k=1, reduction_log="natural"),
}
every_loss = pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS.keys())

# Sums in float64 of some dozens of terms of size 1, in another order.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

finite = st.floats(-8, 8, width=32)
labels_of = st.sampled_from([0.0, 0.0, 1.0, 0.5, 0.25])
ragged = st.lists(st.lists(st.tuples(finite, labels_of), min_size=1, max_size=5), min_size=1, max_size=4)


def value_and_gradient(loss: Loss, scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    value = loss(leaf, labels, mask)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def split(rows: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    scores, mask = matrix([[score for score, _ in row] for row in rows], torch.float64)
    labels, _ = matrix([[label for _, label in row] for row in rows], torch.float64)
    return scores, labels, mask


@every_loss
@settings(deadline=None, max_examples=30)
@given(rows=ragged)
def test_padding_of_any_content_changes_neither_value_nor_gradient(loss: Loss, rows: list):
    scores, labels, mask = split(rows)
    value, gradient = value_and_gradient(loss, scores, labels, mask)
    more = torch.full((1, scores.shape[1]), float("inf"), dtype=torch.float64)  # a query without documents
    wider = torch.full((len(scores) + 1, 2), -1e30, dtype=torch.float64)
    padded = [torch.cat([torch.cat([values, more]), wider], dim=1) for values in (scores, labels)]
    padded_mask = torch.zeros(padded[0].shape, dtype=torch.bool)
    padded_mask[: len(scores), : scores.shape[1]] = mask
    padded_value, padded_gradient = value_and_gradient(loss, padded[0], padded[1], padded_mask)
    torch.testing.assert_close(padded_value, value, **TOLERANCE)
    torch.testing.assert_close(padded_gradient[: len(scores), : scores.shape[1]], gradient, **TOLERANCE)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert torch.isfinite(padded_gradient).all() and torch.isfinite(value)


@every_loss
@settings(deadline=None, max_examples=20)
@given(rows=ragged, seed=st.integers(0, 99))
def test_the_order_of_queries_does_not_matter(loss: Loss, rows: list, seed: int):
    scores, labels, mask = split(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    value, gradient = value_and_gradient(loss, scores, labels, mask)
    other_value, other_gradient = value_and_gradient(loss, scores[order], labels[order], mask[order])
    torch.testing.assert_close(other_value, value, **TOLERANCE)
    torch.testing.assert_close(other_gradient, gradient[order], **TOLERANCE)


@every_loss
def test_gradients_are_those_of_finite_differences(loss: Loss):
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.7], [1.5, 0.1, -0.4, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert torch.autograd.gradcheck(lambda values: loss(values, labels, mask), (scores,))


@every_loss
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_scores_give_finite_values_and_gradients(loss: Loss, sign: float):
    scores = sign * torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, 1e4, 1e4, float("nan")]])
    labels = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, float("nan")]])
    value, gradient = value_and_gradient(loss, scores, labels, torch.isfinite(scores))
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_on_in_float32(loss: Loss, dtype: torch.dtype):
    scores = torch.tensor([[0.5, -1.25, 2.0], [3.0, 0.25, -0.75]])  # exact in both
    labels = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    value, gradient = value_and_gradient(loss, scores.to(dtype), labels.to(dtype), None)
    expected, expected_gradient = value_and_gradient(loss, scores, labels, None)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@every_loss
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_equal_labels_give_finite_values_and_gradients(loss: Loss, label: float):
    scores = torch.tensor([[0.5, -1.25, 2.0], [3.0, 0.25, -0.75]])
    value, gradient = value_and_gradient(loss, scores, torch.full_like(scores, label), None)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["adr_mse", "kl_distillation", "lambda", "rank_net", "list_net"])
def test_equal_labels_and_equal_scores_leave_nothing_to_learn(name: str):
    _, gradient = value_and_gradient(LOSSES[name], torch.full((2, 4), 0.7), torch.ones(2, 4), None)
    torch.testing.assert_close(gradient, torch.zeros(2, 4), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    sorted(set(LOSSES) - {"binary_cross_entropy", "cross_entropy", "mse"}),
)
def test_a_single_document_has_no_place_to_learn(name: str):
    value, gradient = value_and_gradient(LOSSES[name], torch.tensor([[3.0], [-1.0]]), torch.ones(2, 1), None)
    torch.testing.assert_close(value, torch.tensor(0.0))
    torch.testing.assert_close(gradient, torch.zeros(2, 1))


@every_loss
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_a_batch_without_documents_is_0_with_a_gradient_of_0(loss: Loss, shape: tuple[int, int]):
    mask = torch.zeros(shape, dtype=torch.bool)
    value, gradient = value_and_gradient(loss, torch.ones(shape), torch.ones(shape), mask)
    assert value == 0 and torch.equal(gradient, torch.zeros(shape))


@every_loss
def test_the_arguments_are_not_changed(loss: Loss):
    scores, labels = torch.tensor([[0.5, -1.25, 2.0]]), torch.tensor([[1.0, -1.0, 0.5]])
    mask = torch.tensor([[True, True, False]])
    before = [values.clone() for values in (scores, labels, mask)]
    loss(scores, labels, mask)
    assert all(torch.equal(was, now) for was, now in zip(before, (scores, labels, mask), strict=True))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cross_entropy"}))
def test_shapes_that_do_not_fit_and_masks_that_are_not_bool_are_refused(name: str):
    loss, scores = LOSSES[name], torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"\(2, 3\), labels \(2, 4\)"):
        loss(scores, torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"mask \(2,\)"):
        loss(scores, scores, torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="bool"):
        loss(scores, scores, torch.ones(2, 3))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"binary_cross_entropy", "cross_entropy", "mse"}))
def test_losses_over_lists_need_a_matrix(name: str):
    with pytest.raises(InputError, match="padded"):
        LOSSES[name](torch.zeros(3), torch.zeros(3))
