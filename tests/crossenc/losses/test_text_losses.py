"""The loss classes on a tiny model: texts become the right pairs, errors are explained, training lowers the loss."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from crossenc import losses
from crossenc.errors import ConfigError, CrossEncError
from crossenc.testing import tiny_checkpoint
from tests.support.losses import GivenLogits, numbered_lists

QUERIES = ["what is water", "which city", "how to bake bread"]
POSITIVES = ["the river water", "a city of stone", "bread and winter"]
NEGATIVES = ["music", "the doctor", "paper bridge"]
LISTS = [[POSITIVES[0], NEGATIVES[0], "stone"], [POSITIVES[1]], [POSITIVES[2], NEGATIVES[2]]]
LIST_LABELS = [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0]), torch.tensor([1.0, 0.0])]


class TinyModel(torch.nn.Module):
    """A real model of two layers, with what losses ask for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).float()
        self.num_labels = self.model.config.num_labels
        self.device = torch.device("cpu")

    def logits(self, pairs: Sequence[tuple[str, str]], *, prompt: str | None = None) -> Tensor:
        queries = [(prompt or "") + query for query, _ in pairs]
        features = self.tokenizer(queries, [document for _, document in pairs], padding=True, return_tensors="pt")
        return self.model(**features).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {count: tiny_checkpoint(folder / str(count), num_labels=count) for count in (1, 3)}


@pytest.fixture
def model(folders: dict[int, Path]) -> TinyModel:
    return TinyModel(folders[1]).train()


CASES: dict[str, tuple[list[Any], Any]] = {
    "BinaryCrossEntropyLoss": ([QUERIES, POSITIVES], torch.tensor([1, 0, 1])),
    "MSELoss": ([QUERIES, POSITIVES], torch.tensor([0.3, -0.5, 2.0])),
    "MarginMSELoss": ([QUERIES, POSITIVES, NEGATIVES], torch.tensor([0.3, -0.5, 2.0])),
    "MultipleNegativesRankingLoss": ([QUERIES, POSITIVES, NEGATIVES], None),
    "CachedMultipleNegativesRankingLoss": ([QUERIES, POSITIVES, NEGATIVES], None),
    "LocalizedContrastiveLoss": ([QUERIES, POSITIVES, NEGATIVES], None),
    **{
        name: ([QUERIES, LISTS], LIST_LABELS)
        for name in ("LambdaLoss", "RankNetLoss", "ListNetLoss", "PListMLELoss", "ListMLELoss", "ADRMSELoss")
    },
    "KLDistillationLoss": ([QUERIES, LISTS], LIST_LABELS),
}


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", CASES)
def test_some_steps_of_training_lower_the_loss(name: str, model: TinyModel):
    inputs, labels = CASES[name]
    loss = getattr(losses, name)(model)
    model.eval()  # no dropout, so that values compare
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    values = []
    for _ in range(6):
        torch.manual_seed(0)
        value = loss(inputs, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(later < earlier for earlier, later in pairwise(values)), values


def test_cross_entropy_trains_a_model_of_several_labels(folders: dict[int, Path]):
    model = TinyModel(folders[3]).train()
    loss = losses.CrossEntropyLoss(model, label_smoothing=0.1)
    value = loss([QUERIES, POSITIVES], torch.tensor([0, 1, 2]))
    value.backward()
    assert value.item() > 0 and gradients(model).abs().sum() > 0
    assert loss.get_config_dict() == {"activation_fn": "torch.nn.modules.linear.Identity"}


def test_every_class_but_cross_entropy_is_in_these_cases():
    assert {name for name in losses.__all__ if name.endswith("Loss")} - {"CrossEntropyLoss", "TextLoss"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_class_gives_the_value_of_its_function_on_the_models_logits(name: str, model: TinyModel):
    inputs, labels = CASES[name]
    loss = getattr(losses, name)(model.eval())
    if "MultipleNegatives" in name:
        loss.num_negatives = 0
    columns = inputs[1:]
    if isinstance(columns[0][0], list):
        lists = columns[0]
    else:
        lists = [list(documents) for documents in zip(*columns, strict=True)]
    width = max(map(len, lists))
    scores, targets, mask = torch.zeros(3, width), torch.zeros(3, width), torch.zeros(3, width, dtype=torch.bool)
    for row, (query, documents) in enumerate(zip(QUERIES, lists, strict=True)):
        scores[row, : len(documents)] = model.logits([(query, document) for document in documents]).squeeze(1).detach()
        mask[row, : len(documents)] = True
        if isinstance(labels, list):
            targets[row, : len(documents)] = labels[row]
        elif name == "MarginMSELoss":
            targets[row] = torch.stack([labels[row], torch.tensor(0.0)])
        elif labels is None:
            targets[row, 0] = 1
        else:
            targets[row] = labels[row]
    expected = loss.compute(scores, targets, mask)
    torch.testing.assert_close(loss(inputs, labels).detach(), expected, rtol=1e-5, atol=1e-6)  # padding differs


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_reaches_the_model(name: str):
    given = GivenLogits(torch.randn(9, 1, requires_grad=True))
    inputs, labels = CASES[name]
    numbers = numbered_lists([len(item) for item in inputs[1]]) if isinstance(inputs[1][0], list) else None
    columns = [numbers] if numbers else numbered_lists([3] * len(inputs[1:]))
    getattr(losses, name)(given)([QUERIES, *columns], labels, prompt="find: ")
    assert set(given.prompts) == {"find: "}


# Pairs


def test_lists_go_through_the_model_in_mini_batches():
    labels = [torch.rand(length) for length in (4, 1, 2)]
    for size, calls in ((None, [3, 3, 1]), (0, [3, 3, 1]), (2, [2, 2, 2, 1]), (-1, [7]), (100, [7])):
        given = GivenLogits(torch.randn(7, 1))
        losses.ListNetLoss(given, mini_batch_size=size)([QUERIES, numbered_lists([4, 1, 2])], labels)
        assert given.calls == calls


def test_in_batch_negatives_are_of_other_queries_and_different():
    loss = losses.MultipleNegativesRankingLoss(GivenLogits(torch.zeros(1, 1)), num_negatives=5)
    queries, columns = list("abcd"), numbered_lists([4, 4, 4])
    torch.manual_seed(0)
    drawn = loss._pairs([queries, *columns])
    for query in queries:
        documents = [int(document) for other, document in drawn if other == query]
        own = {queries.index(query) + 4 * column for column in range(3)}
        assert len(documents) == len(set(documents)) == 3 + 5 and own <= set(documents)
    torch.manual_seed(1)
    assert loss._pairs([queries, *columns]) != drawn


@pytest.mark.parametrize("num_negatives", [0, 3, None])
def test_a_single_query_has_no_in_batch_negatives(num_negatives: int | None):
    given = GivenLogits(torch.tensor([[1.0], [0.5]], requires_grad=True))
    loss = losses.MultipleNegativesRankingLoss(given, num_negatives, scale=1.0, activation_fn=None)
    value = loss([["q"], ["0"], ["1"]])
    assert given.calls == [2]
    assert value.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-0.5)).item())


def test_localized_contrastive_takes_labelled_lists_as_well_as_columns():
    given = GivenLogits(torch.tensor([[1.0], [0.5], [-1.0], [2.0]]))
    loss = losses.LocalizedContrastiveLoss(given)
    columns = loss([["a", "b"], ["0", "1"], ["2", "3"]], None)
    lists = loss([["a", "b"], [["2", "0"], ["1", "3"]]], [torch.tensor([0, 1]), torch.tensor([1, 0])])
    torch.testing.assert_close(columns, lists)


# GradCache


@pytest.mark.parametrize("mini_batch_size", [1, 4, 100])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_cached_gradients_are_those_of_the_plain_loss(model: TinyModel, mini_batch_size: int, factor: float):
    model.eval()  # no dropout: the masks would depend on the size of the batch
    found = []
    for make in (
        losses.MultipleNegativesRankingLoss,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size),
    ):
        torch.manual_seed(0)
        model.zero_grad()
        value = make(model)([QUERIES, POSITIVES, NEGATIVES])
        (value * factor).backward()
        found.append((value.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    # Padding to the longest of another batch moves float32 logits in their seventh digit; so does the order of sums.
    size = found[0][1].abs().max().item()
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=2e-5 * size)


def test_the_second_pass_has_the_dropout_of_the_first_and_leaves_no_trace(model: TinyModel):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    seen: list[Tensor] = []
    plain_logits = model.logits

    class Noted(TinyModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_labels, self.device = 1, model.device

        def logits(self, pairs: Sequence[tuple[str, str]], *, prompt: str | None = None) -> Tensor:
            seen.append(plain_logits(pairs, prompt=prompt))
            return seen[-1]

    loss = losses.CachedMultipleNegativesRankingLoss(Noted(), num_negatives=1, mini_batch_size=2)
    value = loss([QUERIES, POSITIVES])
    first = torch.cat([logits.detach() for logits in seen])
    torch.rand(3)  # random numbers that somebody draws between the passes
    state = torch.get_rng_state()
    value.backward()
    second = torch.cat([logits.detach() for logits in seen])[len(first) :]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        first, torch.cat([model.logits([pair]) for pair in zip(QUERIES, POSITIVES, strict=True)] * 2)
    )


def test_only_one_mini_batch_has_a_graph_at_a_time(model: TinyModel):
    alive: list[int] = []

    class Counted(GivenLogits):
        def logits(self, pairs: Sequence[tuple[str, str]], *, prompt: str | None = None) -> Tensor:
            alive.append(len(pairs) if torch.is_grad_enabled() else 0)
            return super().logits(pairs, prompt=prompt)

    given = Counted(torch.randn(6, 1, requires_grad=True))
    value = losses.CachedMultipleNegativesRankingLoss(given, num_negatives=None, mini_batch_size=4)(
        [QUERIES, *numbered_lists([3, 3])]
    )
    assert alive == [0] * 5  # 3 positives, 3 x 4 negatives of others, 3 hard negatives: 18 pairs
    value.backward()
    assert alive[5:] == [4, 4, 4, 4, 2]


def test_two_cached_losses_before_their_backward_passes_do_not_mix():
    given = GivenLogits(torch.randn(6, 1, requires_grad=True))
    loss = losses.CachedMultipleNegativesRankingLoss(given, num_negatives=None)
    plain = losses.MultipleNegativesRankingLoss(given, num_negatives=None)
    batches = [[["a", "b"], ["0", "1"]], [["c", "d", "e"], ["3", "4", "5"]]]
    (expected,) = torch.autograd.grad(sum(plain(batch) for batch in batches), given.table)
    first, second = (loss(batch) for batch in batches)
    second.backward()
    first.backward()
    torch.testing.assert_close(given.table.grad, expected)


def test_without_gradients_a_cached_loss_scores_once():
    given = GivenLogits(torch.randn(6, 1, requires_grad=True))
    with torch.no_grad():
        value = losses.CachedMultipleNegativesRankingLoss(given)([["a", "b"], ["0", "1"], ["2", "3"]])
    assert given.calls == [8] and not value.requires_grad


@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_cached_loss_keeps_the_autocast_of_its_forward_pass(model: TinyModel, backward_inside: bool):
    model.eval()
    found = []
    for make in (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = make(model)([QUERIES, POSITIVES, NEGATIVES])
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        found.append(gradients(model))
    assert found[0].abs().sum() > 0
    # bfloat16 has 8 bits, and the cached loss adds up its mini-batches in another order: 1 % of the whole gradient.
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_a_frozen_model_gives_a_cached_loss_without_complaint(model: TinyModel):
    model.requires_grad_(False)
    value = losses.CachedMultipleNegativesRankingLoss(model)([QUERIES, POSITIVES])
    value.backward()
    assert torch.isfinite(value)


def test_a_cached_loss_shows_its_progress_when_told_to(capsys: pytest.CaptureFixture[str]):
    given = GivenLogits(torch.randn(6, 1))
    losses.CachedMultipleNegativesRankingLoss(given, show_progress_bar=True)([["a", "b"], ["0", "1"]])
    assert "mini-batches" in capsys.readouterr().out
    losses.CachedMultipleNegativesRankingLoss(given)([["a", "b"], ["0", "1"]])
    assert capsys.readouterr().out == ""


# Cards


def test_losses_with_a_paper_cite_it():
    given = GivenLogits(torch.zeros(1, 1))
    keys = {
        "ADRMSELoss": "schlatt2025",
        "CachedMultipleNegativesRankingLoss": "gao2021scaling",
        "KLDistillationLoss": "hinton2015",
        "LambdaLoss": "wang2018",
        "ListMLELoss": "xia2008",
        "ListNetLoss": "cao2007",
        "LocalizedContrastiveLoss": "gao2021rethink",
        "MSELoss": "hofstatter2020",
        "MarginMSELoss": "hofstatter2020",
        "MultipleNegativesRankingLoss": "henderson2017",
        "PListMLELoss": "lan2014",
        "RankNetLoss": "burges2005",
    }
    for name, key in keys.items():
        citation = getattr(losses, name)(given).citation
        assert citation.startswith("@") and f"{{{key}" in citation and citation.count("{") == citation.count("}")
    assert not hasattr(losses.BinaryCrossEntropyLoss(given), "citation")


def test_settings_of_the_losses_that_only_we_have_are_shown():
    given = GivenLogits(torch.zeros(1, 1))
    assert losses.KLDistillationLoss(given, temperature=2.0).get_config_dict() == {
        "temperature": 2.0,
        "activation_fn": "torch.nn.modules.linear.Identity",
        "mini_batch_size": None,
    }
    assert list(losses.LocalizedContrastiveLoss(given).get_config_dict()) == ["activation_fn", "mini_batch_size"]
    assert losses.BinaryCrossEntropyLoss(given, pos_weight=3).get_config_dict()["pos_weight"] == 3


# Errors: all are ValueErrors, as programs written for the namesakes expect


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_several_labels_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} needs a model with 1 output label, and this one has 3"):
        getattr(losses, name)(GivenLogits(torch.zeros(1, 3)))


@pytest.mark.parametrize("name", [*CASES, "CrossEntropyLoss"])
def test_something_that_is_no_cross_encoder_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} trains a CrossEncoder, not a Linear"):
        getattr(losses, name)(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "CrossEntropyLoss", "MSELoss"])
def test_losses_of_pairs_refuse_another_number_of_columns_or_labels(name: str):
    loss = getattr(losses, name)(GivenLogits(torch.zeros(4, 1)))
    with pytest.raises(ValueError, match="two columns of texts beside the labels, got 3"):
        loss([["a"], ["0"], ["1"]], torch.tensor([1]))
    with pytest.raises(ValueError, match="one label for each of 2 pairs, got labels of shape"):
        loss([["a", "b"], ["0", "1"]], torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="equal lengths, got 2 and 1"):
        loss([["a", "b"], ["0"]], torch.tensor([1, 0]))


@pytest.mark.parametrize("name", [name for name, (_, labels) in CASES.items() if isinstance(labels, list)])
def test_losses_of_lists_refuse_inputs_and_labels_that_do_not_fit(name: str):
    loss = getattr(losses, name)(GivenLogits(torch.zeros(4, 1)))
    with pytest.raises(ValueError, match="queries and lists of documents beside the labels, got 3"):
        loss([["a"], ["0"], ["1"]], [torch.tensor([1.0])])
    with pytest.raises(ValueError, match="one tensor a query; got one tensor"):
        loss([["a"], [["0", "1"]]], torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"lists of \[2, 1\] documents and of \[2, 2\] labels"):
        loss([["a", "b"], [["0", "1"], ["2"]]], [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])])


def test_margin_mse_explains_labels_that_fit_neither_form():
    loss = losses.MarginMSELoss(GivenLogits(torch.zeros(6, 1)))
    with pytest.raises(ValueError, match=r"shape \(2,\) for 2 queries with 2 negatives"):
        loss([["a", "b"], *numbered_lists([2, 2, 2])], torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="query, positive, negative"):
        loss([["a", "b"], ["0", "1"]], torch.tensor([1.0, 2.0]))


def test_settings_that_cannot_be_are_refused_at_once():
    given = GivenLogits(torch.zeros(1, 1))
    for make in (
        lambda: losses.LambdaLoss(given, k=0),
        lambda: losses.RankNetLoss(given, reduction_log="decimal"),  # type: ignore[arg-type]
        lambda: losses.KLDistillationLoss(given, temperature=0),
        lambda: losses.MultipleNegativesRankingLoss(given, num_negatives=-1),
        lambda: losses.CachedMultipleNegativesRankingLoss(given, mini_batch_size=0),
    ):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(CrossEncError, match="query, positive"):
        losses.MultipleNegativesRankingLoss(given)([["a"]])
