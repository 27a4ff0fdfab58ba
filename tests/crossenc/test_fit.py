"""Training in one process: what is learned, kept, refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel

from crossenc import CrossEncoder, InputExample, losses
from crossenc.errors import CheckpointError, ConfigError, InputError, ScoreError
from crossenc.evaluation import CrossEncoderClassificationEvaluator
from crossenc.quiet import quiet_transformers
from crossenc.testing import WORDS, tiny_checkpoint


def examples(num: int = 64) -> list[InputExample]:
    """A document is right when its word is one of the first four."""
    rng = np.random.default_rng(0)
    return [
        InputExample(texts=[rng.choice(WORDS[8:]), WORDS[word]], label=float(word < 4))
        for word in rng.integers(0, 8, num)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "start")


def backbone(folder: Path) -> Path:
    """The checkpoint without its head, as pre-trained models come."""
    with quiet_transformers():
        AutoModel.from_pretrained(folder).save_pretrained(folder)
    path = folder / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if "label" not in name}
    path.write_text(json.dumps(config))
    return folder


def loader(data: list[InputExample], batch_size: int = 16) -> DataLoader:
    return DataLoader(data, shuffle=True, batch_size=batch_size, generator=torch.Generator().manual_seed(0))


QUICK: dict[str, Any] = {"warmup_steps": 0, "optimizer_params": {"lr": 3e-3}, "show_progress_bar": False}


class Accuracy:
    """An evaluator that counts right guesses, and remembers when it was asked."""

    primary_metric = "accuracy"

    def __init__(self, data: list[InputExample]) -> None:
        self._data = data
        self.asked: list[tuple[int, int]] = []

    def __call__(self, model: CrossEncoder, output_path: str | None = None, epoch: int = -1, steps: int = -1):
        assert not model.training
        self.asked.append((epoch, steps))
        scores = model.predict([tuple(example.texts) for example in self._data])
        return {"accuracy": float(np.mean((scores > 0.5) == [example.label for example in self._data]))}


def test_training_teaches_and_keeps_the_best_model(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = CrossEncoder(folder, device="cpu"), examples()
    evaluator, told = Accuracy(data), []
    before = evaluator(model)["accuracy"]
    evaluator.asked.clear()
    model.fit(
        loader(data),
        evaluator,
        epochs=12,
        evaluation_steps=3,
        output_path=str(tmp_path / "best"),
        callback=lambda value, epoch, step: told.append((value, epoch, step)),
        **QUICK,
    )
    assert evaluator.asked[:3] == [(0, 3), (0, 4), (1, 6)]
    assert [(epoch, step) for _, epoch, step in told] == evaluator.asked
    assert not model.training
    best = max(value for value, _, _ in told)
    assert best > max(before, 0.9)
    kept = CrossEncoder(tmp_path / "best", device="cpu")
    assert Accuracy(data)(kept)["accuracy"] == best


class Errors(Accuracy):
    """The fewer the better."""

    primary_metric = "errors"
    greater_is_better = False

    def __call__(self, *args: Any, **settings: Any):
        return {"errors": 1 - super().__call__(*args, **settings)["accuracy"]}


class Nothing:
    def __call__(self, *_: Any, **__: Any) -> float:
        return float("nan")


def test_the_best_model_may_be_the_one_with_the_least(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, data, told = CrossEncoder(folder, device="cpu"), examples(), []
    settings = {"epochs": 6, "evaluation_steps": 2, "output_path": str(tmp_path / "best"), **QUICK}
    model.fit(loader(data), Errors(data), callback=lambda value, *_: told.append(value), **settings)
    assert min(told) < max(told)
    assert Errors(data)(CrossEncoder(tmp_path / "best", device="cpu"))["errors"] == min(told)
    with caplog.at_level("WARNING", "crossenc"):
        model.fit(loader(data[:16]), Nothing(), output_path=str(tmp_path / "none"), **QUICK)
    assert "no model was saved: no evaluation gave a number" in caplog.text
    assert not (tmp_path / "none" / "config.json").exists()


def test_without_an_evaluator_the_last_model_is_saved(folder: Path, tmp_path: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    model.fit(loader(examples(16)), output_path=str(tmp_path / "last"), **QUICK)
    pair = ("water", "river")
    assert CrossEncoder(tmp_path / "last", device="cpu").predict(pair) == pytest.approx(model.predict(pair), abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "activation"),
    [(torch.nn.MSELoss(), torch.nn.Sigmoid()), (torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), None)],
)
def test_any_torch_loss_of_scores_and_labels_trains(folder: Path, loss: torch.nn.Module, activation: Any) -> None:
    model = CrossEncoder(folder, device="cpu")
    before = model.predict([("water", "river")])
    model.fit(loader(examples(32)), loss_fct=loss, activation_fct=activation, use_amp=True, **QUICK)
    assert abs(model.predict([("water", "river")]) - before).max() > 1e-4


def test_several_labels_are_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CrossEncoder(tiny_checkpoint(tmp_path, num_labels=3), device="cpu")
    data = [InputExample(texts=[word, word], label=i % 3) for i, word in enumerate(WORDS[:12])]
    model.fit(loader(data, 6), epochs=30, **QUICK)
    guesses = model.predict([(word, word) for word in WORDS[:12]]).argmax(axis=1)
    assert (guesses == [example.label for example in data]).mean() > 0.9


@pytest.mark.parametrize(
    "name", ["ConstantLR", "WarmupConstant", "WarmupLinear", "WarmupCosine", "WarmupCosineWithHardRestarts"]
)
def test_every_schedule_is_known_by_name(folder: Path, name: str) -> None:
    CrossEncoder(folder, device="cpu").fit(loader(examples(16)), scheduler=name, **QUICK)


def test_what_cannot_be_trained_is_refused_with_a_reason(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    with pytest.raises(InputError, match="3 texts: this loss needs a query and a document"):
        model.fit(loader([InputExample(texts=["a", "b", "c"], label=1.0)]), **QUICK)
    with pytest.raises(InputError, match="nothing to train on"):
        model.fit(DataLoader([], batch_size=2), **QUICK)
    with pytest.raises(ConfigError, match="no scheduler 'Warmup': choose from constantlr"):
        model.fit(loader(examples(8)), scheduler="Warmup", **QUICK)
    with pytest.raises(ScoreError, match="the loss is nan at step 1: lower the learning rate"):
        model.fit(loader([InputExample(texts=["a", "b"], label=float("nan"))]), **QUICK)


def test_a_new_head_gives_no_scores_until_it_is_trained(folder: Path, tmp_path: Path) -> None:
    model = CrossEncoder(backbone(folder), device="cpu")
    assert model.num_labels == 1
    for refused in (
        lambda: model.predict([("a", "b")]),
        lambda: model.rank("a", ["b"]),
        lambda: model.save_pretrained(tmp_path / "never"),
    ):
        with pytest.raises(CheckpointError, match=r"the head of .* is new and random.*train it first"):
            refused()
    assert not (tmp_path / "never").exists()
    model.fit(loader(examples(16)), **QUICK)
    assert np.isfinite(model.predict([("a", "b")])).all()


LISTS = [
    InputExample(texts=["the water", ["the river", "the stone", "paper"]], label=[1.0, 0.0, 2.0]),
    InputExample(texts=["the bread", ["music", "the city", "winter"]], label=[0.0, 1.0, 0.0]),
]


@pytest.mark.parametrize(
    "name",
    [
        *("LambdaLoss", "RankNetLoss", "ListNetLoss", "PListMLELoss", "ListMLELoss", "ADRMSELoss"),
        *("KLDistillationLoss", "LocalizedContrastiveLoss"),
    ],
)
@pytest.mark.parametrize("last", [3, 2])
def test_every_loss_of_lists_trains_on_lists_of_equal_and_of_different_lengths(
    name: str, last: int, folder: Path
) -> None:
    model = CrossEncoder(folder, device="cpu")
    data = [LISTS[0], InputExample(texts=["the bread", LISTS[1].texts[1][:last]], label=LISTS[1].label[:last])]
    before = model.model.classifier.weight.detach().clone()
    model.fit(loader(data, 2), loss_fct=getattr(losses, name)(model), **QUICK)
    assert not torch.equal(model.model.classifier.weight, before)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "LocalizedContrastiveLoss"])
def test_losses_without_labels_train_on_examples_without_one(name: str, folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu")
    data = [InputExample(texts=["the water", "the river", word], label=None) for word in WORDS[:4]]
    model.fit(loader(data, 2), loss_fct=getattr(losses, name)(model), **QUICK)


def test_rows_of_the_cards_log_stand_at_the_share_of_the_epoch_and_no_step_is_evaluated_twice(folder: Path) -> None:
    model, data, told = CrossEncoder(folder, device="cpu"), examples(48), []
    model.fit(
        loader(data, 16),
        CrossEncoderClassificationEvaluator([e.texts for e in data], [int(e.label) for e in data], write_csv=False),
        epochs=2,
        evaluation_steps=2,
        callback=lambda value, epoch, step: told.append(step),
        **QUICK,
    )
    assert told == [2, 3, 4, 6]
    assert {row.step: round(row.epoch, 4) for row in model.model_card_data.logs} == {
        2: 0.6667,
        3: 1.0,
        4: 1.3333,
        6: 2.0,
    }


def test_an_evaluator_measures_a_new_head_before_training_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(backbone(folder), device="cpu")
    evaluator = CrossEncoderClassificationEvaluator([["a", "b"], ["c", "d"]], [0, 1], write_csv=False)
    with caplog.at_level("WARNING", "crossenc"):
        assert 0 <= evaluator(model)["average_precision"] <= 1
    assert "is new and random: its scores mean nothing yet" in caplog.text
    with pytest.raises(CheckpointError, match="train it first"):
        model.predict([("a", "b")])


def test_what_is_no_loader_or_no_loss_is_refused_by_name(folder: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(4))

    model = CrossEncoder(folder, device="cpu")
    for batches in ([examples(4)], DataLoader(Stream(), batch_size=2)):
        with pytest.raises(ConfigError, match="fit takes a DataLoader of a dataset with a length"):
            model.fit(batches, **QUICK)
    for loss in (torch.nn.MSELoss, lambda scores, labels: scores.sum()):
        with pytest.raises(ConfigError, match="pass an instance of a loss"):
            model.fit(loader(examples(4)), loss_fct=loss, **QUICK)
