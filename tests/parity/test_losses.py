"""Loss values and gradients equal those of sentence-transformers, on random lists of random lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses as reference
from torch import Tensor

from crossenc import losses
from tests.support.losses import GivenLogits, numbered_lists

# float32 sums in another order. A small entry of a gradient may be the difference of large ones: their size counts.
TOLERANCE = 2e-6
SEEDS = range(8)


class ReferenceModel(CrossEncoder):
    """Passes for a model of sentence-transformers, and has the logits of `table`, as GivenLogits does."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.table = table
        self.num_labels = table.shape[1]

    def preprocess(self, pairs: list[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        return {"rows": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.table[features["rows"]]}


def both(make: Callable[[Any, Any], Any], inputs: list, labels: Any, table: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient of each logit, theirs and ours."""
    results = []
    for module, model_class in ((reference, ReferenceModel), (losses, GivenLogits)):
        leaf = table.clone().requires_grad_()
        loss = make(module, model_class(leaf))
        torch.manual_seed(5)  # for those that draw negatives
        value = loss(inputs, labels)
        value.backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad))
    return results


def assert_same(make: Callable[[Any, Any], Any], inputs: list, labels: Any, table: Tensor) -> None:
    theirs, ours = both(make, inputs, labels, table)
    torch.testing.assert_close(ours[0], theirs[0], rtol=TOLERANCE, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=TOLERANCE, atol=TOLERANCE * theirs[1].abs().max().item() + 1e-9)


def random_lists(seed: int, kind: str) -> tuple[list, list[Tensor], Tensor]:
    """Queries, lists of 1 to 9 documents, labels of `kind`, logits."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (5,), generator=generator).tolist()
    table = 3 * torch.randn(sum(lengths), 1, generator=generator)
    labels = []
    for length in lengths:
        if kind == "binary":
            labels.append(torch.randint(0, 2, (length,), generator=generator))
        elif kind == "graded":
            labels.append(torch.randint(-1, 5, (length,), generator=generator).float())
        else:
            labels.append(5 * torch.randn(length, generator=generator))
    return [["a", "b", "c", "d", "e"], numbered_lists(lengths)], labels, table


LISTWISE: dict[str, Callable[[Any, Any], Any]] = {
    "LambdaLoss": lambda m, model: m.LambdaLoss(model),
    "LambdaLoss k": lambda m, model: m.LambdaLoss(model, k=3, sigma=0.7, reduction_log="natural"),
    "LambdaLoss None": lambda m, model: m.LambdaLoss(model, weighting_scheme=None),
    "LambdaLoss No": lambda m, model: m.LambdaLoss(model, m.NoWeightingScheme(), k=2),
    "LambdaLoss 1": lambda m, model: m.LambdaLoss(model, m.NDCGLoss1Scheme()),
    "LambdaLoss 1 k": lambda m, model: m.LambdaLoss(model, m.NDCGLoss1Scheme(), k=2),
    "LambdaLoss 2": lambda m, model: m.LambdaLoss(model, m.NDCGLoss2Scheme()),
    "LambdaLoss 2 k": lambda m, model: m.LambdaLoss(model, m.NDCGLoss2Scheme(), k=1),
    "LambdaLoss Rank": lambda m, model: m.LambdaLoss(model, m.LambdaRankScheme(), mini_batch_size=2),
    "LambdaLoss 2PP": lambda m, model: m.LambdaLoss(model, m.NDCGLoss2PPScheme(mu=2.5), mini_batch_size=-1),
    "LambdaLoss tanh": lambda m, model: m.LambdaLoss(model, activation_fn=torch.nn.Tanh()),
    "RankNetLoss": lambda m, model: m.RankNetLoss(model),
    "RankNetLoss k": lambda m, model: m.RankNetLoss(model, k=2, sigma=2.0, reduction_log="natural"),
    "ListNetLoss": lambda m, model: m.ListNetLoss(model),
    "ListNetLoss sigmoid": lambda m, model: m.ListNetLoss(model, activation_fn=torch.nn.Sigmoid(), mini_batch_size=3),
    "ListMLELoss": lambda m, model: m.ListMLELoss(model),
    "ListMLELoss by label": lambda m, model: m.ListMLELoss(model, respect_input_order=False),
    "PListMLELoss": lambda m, model: m.PListMLELoss(model),
    "PListMLELoss by label": lambda m, model: m.PListMLELoss(model, respect_input_order=False),
    "PListMLELoss None": lambda m, model: m.PListMLELoss(model, lambda_weight=None),
    "PListMLELoss own": lambda m, model: m.PListMLELoss(model, m.PListMLELambdaWeight(lambda mask: 2.0 * mask)),
    "ADRMSELoss": lambda m, model: m.ADRMSELoss(model),
    "ADRMSELoss alpha": lambda m, model: m.ADRMSELoss(model, alpha=4.0, activation_fn=torch.nn.Tanh()),
}


@pytest.mark.parametrize("kind", ["binary", "graded", "continuous"])
@pytest.mark.parametrize("make", LISTWISE.values(), ids=LISTWISE.keys())
def test_losses_of_lists_equal_theirs(make: Callable[[Any, Any], Any], kind: str):
    for seed in SEEDS:
        inputs, labels, table = random_lists(seed, kind)
        assert_same(make, inputs, labels, table)


def test_position_weights_equal_theirs_also_for_long_lists():
    mask = torch.arange(300)[None] < torch.tensor([300, 128, 127, 3, 1])[:, None]
    torch.testing.assert_close(
        losses.PListMLELambdaWeight()(mask), reference.PListMLELambdaWeight()(mask), rtol=1e-6, atol=0
    )


def test_losses_of_one_long_list_equal_theirs():
    generator = torch.Generator().manual_seed(0)
    table, labels = 4 * torch.randn(200, 1, generator=generator), [torch.rand(200, generator=generator)]
    for name, make in LISTWISE.items():
        # There tanh makes equal scores of different logits, whose order is input order with us and none with them.
        if name != "LambdaLoss tanh":
            assert_same(make, [["q"], numbered_lists([200])], labels, table)


POINTWISE: dict[str, Callable[[Any, Any], Any]] = {
    "BinaryCrossEntropyLoss": lambda m, model: m.BinaryCrossEntropyLoss(model),
    "BinaryCrossEntropyLoss tanh": lambda m, model: m.BinaryCrossEntropyLoss(model, torch.nn.Tanh()),
    "BinaryCrossEntropyLoss weight": lambda m, model: m.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(4.0)),
    "BinaryCrossEntropyLoss sum": lambda m, model: m.BinaryCrossEntropyLoss(model, reduction="sum"),
    "MSELoss": lambda m, model: m.MSELoss(model),
    "MSELoss sigmoid": lambda m, model: m.MSELoss(model, activation_fn=torch.nn.Sigmoid(), reduction="sum"),
}


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize("make", POINTWISE.values(), ids=POINTWISE.keys())
def test_losses_of_pairs_equal_theirs(make: Callable[[Any, Any], Any], shape: tuple[int, ...]):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        table = 3 * torch.randn(12, 1, generator=generator)
        inputs = [["q"] * 12, numbered_lists([12])[0]]
        for labels in (torch.rand(shape, generator=generator), torch.randint(0, 2, shape, generator=generator)):
            assert_same(make, inputs, labels, table)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 0.5])}, {"ignore_index": 1}]
)
def test_cross_entropy_equals_theirs(options: dict):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        table = 3 * torch.randn(12, 3, generator=generator)
        inputs = [["q"] * 12, numbered_lists([12])[0]]
        classes = torch.randint(0, 3, (12,), generator=generator)
        targets = [classes, classes[:, None]]
        if "ignore_index" not in options:
            targets.append(torch.rand(12, 3, generator=generator).softmax(dim=1))
        for labels in targets:
            assert_same(lambda m, model: m.CrossEntropyLoss(model, **options), inputs, labels, table)


@pytest.mark.parametrize("num_negatives", [1, 3])
@pytest.mark.parametrize("activation_fn", [torch.nn.Identity(), torch.nn.Sigmoid()])
def test_margin_mse_equals_theirs_for_every_form_of_labels(num_negatives: int, activation_fn: torch.nn.Module):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        columns = numbered_lists([4] * (num_negatives + 1))
        table = 3 * torch.randn(4 * (num_negatives + 1), 1, generator=generator)
        scores = torch.randn(4, num_negatives + 1, generator=generator)
        forms: list[Any] = [scores, list(scores), scores[:, 1:], list(scores[:, 1:])]
        if num_negatives == 1:
            forms.append(scores[:, 0])
        for labels in forms:
            inputs = [["a", "b", "c", "d"], *columns]
            assert_same(lambda m, model: m.MarginMSELoss(model, activation_fn), inputs, labels, table)


NEGATIVES: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda m, model: m.MultipleNegativesRankingLoss(model),
    "all": lambda m, model: m.MultipleNegativesRankingLoss(model, num_negatives=None),
    "many": lambda m, model: m.MultipleNegativesRankingLoss(model, num_negatives=99),
    "one": lambda m, model: m.MultipleNegativesRankingLoss(model, num_negatives=1, scale=3.0, activation_fn=None),
    "cached": lambda m, model: m.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "cached all": lambda m, model: m.CachedMultipleNegativesRankingLoss(
        model, num_negatives=None, activation_fn=torch.nn.Tanh()
    ),
}


@pytest.mark.parametrize("num_columns", [1, 2, 4])
@pytest.mark.parametrize("make", NEGATIVES.values(), ids=NEGATIVES.keys())
def test_multiple_negatives_ranking_equals_theirs(make: Callable[[Any, Any], Any], num_columns: int):
    for seed in SEEDS:
        table = 3 * torch.randn(6 * num_columns, 1, generator=torch.Generator().manual_seed(seed))
        inputs = [list("abcdef"), *numbered_lists([6] * num_columns)]
        assert_same(make, inputs, None, table)


@pytest.mark.parametrize(
    "make", [*LISTWISE.values(), *POINTWISE.values(), *NEGATIVES.values()], ids=[*LISTWISE, *POINTWISE, *NEGATIVES]
)
def test_the_settings_shown_on_cards_are_theirs(make: Callable[[Any, Any], Any]):
    table = torch.zeros(1, 1)
    theirs = make(reference, ReferenceModel(table)).get_config_dict()
    ours = make(losses, GivenLogits(table)).get_config_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, str) and value.startswith("sentence_transformers."):
            assert ours[name].startswith("crossenc.losses.") and ours[name].split(".")[-1] == value.split(".")[-1]
        elif value == "NoneType":  # no activation; ours says what is applied then
            assert ours[name] == "torch.nn.modules.linear.Identity"
        else:
            assert ours[name] == value
