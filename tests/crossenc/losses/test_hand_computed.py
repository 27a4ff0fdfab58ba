"""Each loss on numbers that were worked out by hand, or by a plain loop over its formula."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from crossenc import losses
from crossenc.errors import ConfigError, InputError
from crossenc.losses import (
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2PPScheme,
    NDCGLoss2Scheme,
    NoWeightingScheme,
)

LOG_2 = math.log(2)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(*values: float) -> Tensor:
    return t(*values)[None]


def close(actual: Tensor, expected: float) -> None:
    assert actual.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Pointwise


def test_binary_cross_entropy_of_undecided_logits_is_log_2_and_pos_weight_multiplies_positives():
    close(losses.binary_cross_entropy(t(0, 0), t(1, 0)), LOG_2)
    close(losses.binary_cross_entropy(t(0, 0), t(1, 0), pos_weight=3), 2 * LOG_2)
    close(losses.binary_cross_entropy(t(0, 0), t(1, 0), pos_weight=torch.tensor(3)), 2 * LOG_2)
    close(losses.binary_cross_entropy(t(0, 0), t(1, 0), weight=t(1, 3)), 2 * LOG_2)
    close(losses.binary_cross_entropy(t(0, 0), t(1, 0), reduction="sum"), 2 * LOG_2)


def test_binary_cross_entropy_of_a_confident_error_is_the_logit():
    close(losses.binary_cross_entropy(t(1000.0), t(0)), 1000)


def test_cross_entropy_is_the_surprise_at_the_right_class():
    scores = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64))
    close(losses.cross_entropy(scores, torch.tensor([0, 2])), (math.log(2) + math.log(1.25)) / 2)
    close(losses.cross_entropy(scores, torch.tensor([0, -100])), math.log(2))
    close(losses.cross_entropy(scores, torch.tensor([[0.0, 1, 0], [0, 1, 0]])), (math.log(4) + math.log(10)) / 2)
    weighted = losses.cross_entropy(scores, torch.tensor([0, 2]), weight=torch.tensor([3.0, 0, 1]))
    close(weighted, (3 * math.log(2) + math.log(1.25)) / 4)


def test_cross_entropy_refuses_labels_that_fit_neither_documents_nor_scores():
    with pytest.raises(InputError, match=r"\(2, 2\) do not fit scores \(2, 3\)"):
        losses.cross_entropy(torch.zeros(2, 3), torch.zeros(2, 2))


def test_mse_is_the_mean_squared_error():
    close(losses.mse(t(1, 2, -1), t(0, 2, 1)), 5 / 3)
    assert losses.mse(t(1, 2, -1), t(0, 2, 1), reduction="none").tolist() == [1, 0, 4]


# Contrastive


def test_localized_contrastive_compares_a_positive_with_the_negatives_of_its_query_alone():
    scores, labels = row(math.log(3), math.log(1), math.log(2), math.log(5)), row(1, 0, 0, 1)
    expected = (-math.log(3 / (3 + 1 + 2)) - math.log(5 / (5 + 1 + 2))) / 2
    close(losses.localized_contrastive(scores, labels), expected)


def test_localized_contrastive_with_one_positive_is_cross_entropy():
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.eye(6, dtype=torch.float64)[[0, 3, 5, 3]]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 3, 5, 3]))
    close(losses.localized_contrastive(scores, labels), expected.item())


def test_a_query_without_positives_adds_nothing_and_one_without_negatives_adds_0():
    both = torch.tensor([[1.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    close(losses.localized_contrastive(both, torch.tensor([[1, 0], [0, 0]])), LOG_2)
    close(losses.localized_contrastive(both, torch.tensor([[1, 0], [1, 1]])), LOG_2 / 3)


def test_multiple_negatives_ranking_takes_a_sharpened_sigmoid():
    probabilities = [math.exp(10 / (1 + math.exp(-score))) for score in (2.0, 0.0, -1.0)]
    expected = -math.log(probabilities[0] / sum(probabilities))
    close(losses.multiple_negatives_ranking(row(2, 0, -1), row(1, 0, 0)), expected)
    identity = losses.multiple_negatives_ranking(
        row(2, 0, -1), row(1, 0, 0), scale=1, activation_fn=torch.nn.Identity()
    )
    close(identity, losses.localized_contrastive(row(2, 0, -1), row(1, 0, 0)).item())


# Pairwise

SCORES = [0.4, -1.0, 2.5, 0.3, 0.0]
LABELS = [2.0, -1.0, 0.0, 3.0, 1.0]


def lambda_by_loops(scheme: str, k: int | None = None, sigma: float = 1.0, mu: float = 10.0) -> float:
    """The formula of the paper, pair by pair, in bits."""
    ranked = sorted(zip(SCORES, LABELS, strict=True), reverse=True)
    grades = [2 ** max(label, 0) - 1 for _, label in ranked]
    best = sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(grades, reverse=True)[:k]))
    gain = [grade / best for grade in grades]
    terms = []
    for i, (score_i, label_i) in enumerate(ranked):
        for j, (score_j, label_j) in enumerate(ranked):
            if k is not None and i >= k and j >= k:
                continue
            if scheme != "ndcg1" and not label_i > label_j:
                continue
            swap = abs(1 / math.log2(i + 2) - 1 / math.log2(j + 2)) * abs(gain[i] - gain[j])
            apart = abs(i - j)
            step = abs(1 / math.log2(apart + 1) - 1 / math.log2(apart + 2)) * abs(gain[i] - gain[j]) if apart else 0.0
            weight = {"none": 1.0, "ndcg1": gain[i] / math.log2(i + 2), "rank": swap, "ndcg2": step}
            weight["ndcg2pp"] = mu * step + swap
            terms.append(weight[scheme] * math.log2(1 + math.exp(-sigma * (score_i - score_j))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("k", [None, 1, 2, 5, 9])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("none", None),
        ("none", NoWeightingScheme()),
        ("ndcg1", NDCGLoss1Scheme()),
        ("ndcg2", NDCGLoss2Scheme()),
        ("rank", LambdaRankScheme()),
        ("ndcg2pp", NDCGLoss2PPScheme()),
    ],
)
def test_lambda_loss_is_the_formula_of_the_paper(name: str, scheme: losses.BaseWeightingScheme | None, k: int | None):
    close(losses.lambda_loss(row(*SCORES), row(*LABELS), weighting_scheme=scheme, k=k), lambda_by_loops(name, k))


def test_lambda_loss_takes_ndcg_loss2pp_unless_told_otherwise():
    close(losses.lambda_loss(row(*SCORES), row(*LABELS)), lambda_by_loops("ndcg2pp"))
    scheme = NDCGLoss2PPScheme(mu=3)
    close(losses.lambda_loss(row(*SCORES), row(*LABELS), weighting_scheme=scheme), lambda_by_loops("ndcg2pp", mu=3))


def test_sigma_sharpens_and_the_natural_logarithm_scales():
    scores, labels = row(*SCORES), row(*LABELS)
    close(losses.rank_net(scores, labels, sigma=2.5), lambda_by_loops("none", sigma=2.5))
    natural = losses.rank_net(scores, labels, reduction_log="natural")
    close(natural, lambda_by_loops("none") * LOG_2)


def test_rank_net_of_a_tie_is_one_bit_and_of_a_large_error_the_margin():
    close(losses.rank_net(row(1, 1), row(1, 0)), 1.0)
    close(losses.rank_net(row(-500, 500), row(1, 0), reduction_log="natural"), 1000)


def test_high_grades_do_not_overflow():
    scores = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    value = losses.lambda_loss(scores, torch.tensor([[1000.0, 999.0, 0.0]]))
    value.backward()
    # Gains are 1, 1/2 and 0 of the highest there; the best DCG is 1 + 1/2 / log2(3).
    best = 1 + 0.5 / math.log2(3)
    gain, step = [0.0, 0.5 / best, 1 / best], {1: 1 - 1 / math.log2(3), 2: 1 / math.log2(3) - 0.5}
    inverse = [1.0, 1 / math.log2(3), 0.5]
    expected = sum(
        (10 * step[i - j] + abs(inverse[i] - inverse[j])) * (gain[i] - gain[j]) * math.log2(1 + math.exp(i - j))
        for i, j in ((1, 0), (2, 0), (2, 1))
    )
    assert value.item() == pytest.approx(expected / 3, rel=1e-6) and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("options", [{"k": 0}, {"k": -1}, {"reduction_log": "decimal"}])
def test_lambda_loss_refuses_options_it_does_not_have(options: dict):
    with pytest.raises(ConfigError, match=next(iter(options))):
        losses.lambda_loss(row(1, 2), row(0, 1), **options)


def test_a_weighting_scheme_of_ones_own_gets_sorted_gains_discounts_and_labels():
    seen = {}

    class Doubled(losses.BaseWeightingScheme):
        def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
            seen.update(gain=gain, discount=discount, labels=true_sorted)
            return torch.tensor(2.0)

    doubled = losses.lambda_loss(row(*SCORES), row(*LABELS), weighting_scheme=Doubled())
    close(doubled, 2 * lambda_by_loops("none"))
    assert seen["labels"].tolist() == [[0.0, 2.0, 3.0, 1.0, 0.0]]
    assert seen["discount"].tolist() == [[math.log2(rank + 1) for rank in range(1, 6)]]
    best = 7 + 3 / math.log2(3) + 1 / 2
    assert seen["gain"].tolist()[0] == pytest.approx([0.0, 3 / best, 7 / best, 1 / best, 0.0])


def test_a_weighting_scheme_without_weights_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="forward"):
        losses.lambda_loss(row(1, 2), row(0, 1), weighting_scheme=losses.BaseWeightingScheme())


# Listwise


def test_list_net_is_the_cross_entropy_between_two_softmaxes():
    scores, labels = row(math.log(1), math.log(3)), row(math.log(4), math.log(1))
    close(losses.list_net(scores, labels), -(0.8 * math.log(0.25) + 0.2 * math.log(0.75)))


def test_list_mle_multiplies_the_chances_of_each_draw():
    scores = row(math.log(1), math.log(2), math.log(5))
    close(losses.list_mle(scores, row(1, 2, 3)), -math.log(5 / 8 * 2 / 3))
    close(losses.list_mle(scores, row(1, 2, 3), respect_input_order=True), -math.log(1 / 8 * 2 / 7))


def test_list_mle_keeps_the_order_of_equal_labels():
    scores = row(math.log(1), math.log(2), math.log(5))
    close(losses.list_mle(scores, row(0, 0, 1)), -math.log(5 / 8 * 1 / 3))


def test_plist_mle_weighs_the_first_places_most():
    scores = row(math.log(1), math.log(2), math.log(5))
    expected = -(3 * math.log(5 / 8) + 1 * math.log(2 / 3) + 0 * math.log(1)) / 4  # weights 2^2 - 1, 2^1 - 1, 2^0 - 1
    assert losses.plist_mle(scores, row(1, 2, 3)).item() == pytest.approx(expected, rel=1e-7)


def test_plist_mle_takes_weights_of_ones_own_and_divides_by_their_sum():
    scores = row(math.log(1), math.log(2), math.log(5))
    loss = losses.plist_mle(scores, row(1, 2, 3), lambda_weight=lambda mask: 3.0 * mask)
    assert loss.item() == pytest.approx(-math.log(5 / 8 * 2 / 3) / 3, rel=1e-7)


def test_position_weights_halve_from_place_to_place_and_never_overflow():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert losses.position_weights(mask).tolist() == [[7, 3, 1, 0], [1, 0, 0, 0]]
    long = losses.position_weights(torch.ones(1, 1000, dtype=torch.bool))
    assert torch.isfinite(long.sum()) and torch.isfinite(long).all()
    assert (long[0, :100] / long[0, 1:101]).tolist() == pytest.approx([2.0] * 100, rel=1e-6)


def test_approximate_ranks_of_scores_far_apart_are_their_ranks():
    mask = torch.tensor([[True, True, True, False]])
    ranks = losses.approximate_ranks(row(100, -100, 0, float("nan")), mask)
    assert ranks[0, :3].tolist() == pytest.approx([1, 3, 2])
    assert losses.approximate_ranks(row(1, 1, 1), mask[:, :3]).tolist() == [[2, 2, 2]]


def test_adr_mse_discounts_errors_of_rank():
    # Ranks by label are 2, 1, 3; smooth ranks of equal scores are 2, 2, 2.
    expected = (0 + 1 / math.log2(2) + 1 / math.log2(4)) / 3
    close(losses.adr_mse(row(0.5, 0.5, 0.5), row(1, 2, 0)), expected)


def test_adr_mse_gives_equal_labels_the_mean_of_their_ranks():
    # Ranks are 1.5, 1.5, 3, and with scores that far apart so are the smooth ones.
    close(losses.adr_mse(row(200, 200, -200), row(1, 1, 0)), 0.0)


def test_alpha_sharpens_smooth_ranks():
    soft, sharp = (losses.adr_mse(row(1, 0), row(1, 0), alpha=alpha).item() for alpha in (1.0, 100.0))
    error = 1 / (1 + math.e)
    assert soft == pytest.approx((error**2 + error**2 / math.log2(3)) / 2) and sharp < 1e-9


# Distillation


def test_margin_mse_compares_leads_of_the_first_document():
    # Leads are 3 and 1 where the teacher has 1 and 2.
    close(losses.margin_mse(row(2, -1, 1), row(5, 4, 3)), (2**2 + 1) / 2)


def test_margin_mse_leaves_the_student_its_own_offset():
    scores = row(2, -1, 1)
    close(losses.margin_mse(scores + 40, scores - 3), 0.0)


def test_kl_distillation_is_the_divergence_of_the_student_from_the_teacher():
    scores, labels = row(math.log(1), math.log(3)), row(math.log(4), math.log(1))
    close(losses.kl_distillation(scores, labels), 0.8 * math.log(0.8 / 0.25) + 0.2 * math.log(0.2 / 0.75))
    close(losses.kl_distillation(labels + 7, labels), 0.0)


def test_a_temperature_softens_both_and_keeps_the_size_of_the_gradient():
    scores, labels = row(0, 2 * math.log(3)), row(2 * math.log(4), 0)
    expected = 4 * (0.8 * math.log(0.8 / 0.25) + 0.2 * math.log(0.2 / 0.75))
    close(losses.kl_distillation(scores, labels, temperature=2), expected)
    with pytest.raises(ConfigError, match="temperature is 0"):
        losses.kl_distillation(scores, labels, temperature=0)


def test_kl_distillation_has_the_gradient_of_list_net():
    generator = np.random.default_rng(0)
    scores = torch.tensor(generator.normal(size=(3, 5)), requires_grad=True)
    labels = torch.tensor(generator.normal(size=(3, 5)))
    (kl,) = torch.autograd.grad(losses.kl_distillation(scores, labels), scores)
    (list_net,) = torch.autograd.grad(losses.list_net(scores, labels), scores)
    torch.testing.assert_close(kl, list_net)
