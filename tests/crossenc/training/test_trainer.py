"""The trainer: what is learned, kept, evaluated, resumed, refused."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback

from crossenc import (
    CrossEncoder,
    CrossEncoderDataCollator,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.evaluation import CrossEncoderClassificationEvaluator
from crossenc.losses import BinaryCrossEntropyLoss, CrossEntropyLoss, LambdaLoss, MSELoss
from crossenc.training.bound_losses import WrappedModel
from tests.crossenc.training.support import PAIRS, TWO, arguments, distance, read_card, tiny_model, train

EVALUATOR = CrossEncoderClassificationEvaluator(
    list(zip(PAIRS["query"], PAIRS["document"], strict=True)), [int(label) for label in PAIRS["label"]], name="dev"
)


class CustomLoss(nn.Module):
    """A loss of one's own, without prompts, with a parameter of its own; it remembers its calls."""

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros(1))
        self.calls: list[int] = []

    def forward(self, inputs: Sequence[Sequence[str]], labels: Tensor) -> Tensor:
        self.calls.append(len(inputs[0]))
        features = self.model.preprocess(list(zip(*inputs, strict=True)))
        scores = self.model(features)["scores"].view(-1)
        return nn.functional.mse_loss(scores + self.shift, labels)


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def test_training_teaches_and_the_best_model_is_kept(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    trainer = train(
        model,
        tmp_path,
        datasets.concatenate_datasets([PAIRS] * 4),
        eval_dataset=PAIRS,
        evaluator=EVALUATOR,
        num_train_epochs=8,
        eval_strategy="steps",
        eval_steps=32,
        save_strategy="steps",
        save_steps=32,
        load_best_model_at_end=True,
        metric_for_best_model="eval_dev_accuracy",
        greater_is_better=True,
    )
    found = [entry["eval_dev_accuracy"] for entry in trainer.state.log_history if "eval_dev_accuracy" in entry]
    assert len(found) == 4 and max(found) > 0.9
    assert all("eval_loss" in entry for entry in trainer.state.log_history if "eval_dev_f1" in entry)
    best = CrossEncoder(trainer.state.best_model_checkpoint, device="cpu")
    assert distance(model, best) == 0 and EVALUATOR(model)["dev_accuracy"] == max(found)
    assert model.model_card_data.best_step == 32 * (1 + found.index(max(found)))
    assert (tmp_path / "out" / "eval").is_dir()
    assert not list((tmp_path / "out").rglob("training_args.bin"))


@pytest.mark.filterwarnings("ignore")  # what the other library warns of is its own affair
def test_checkpoints_load_in_sentence_transformers(tmp_path: Path) -> None:
    import sentence_transformers

    model = tiny_model(tmp_path)
    trainer = train(model, tmp_path, max_steps=2)
    trainer.save_model()
    theirs = sentence_transformers.CrossEncoder(str(tmp_path / "out"), device="cpu")
    pair = ("water", "river")
    assert theirs.predict(pair) == pytest.approx(model.predict(pair), abs=1e-6)


@pytest.mark.parametrize("data", [PAIRS, TWO], ids=["one dataset", "two"])
def test_a_training_goes_on_where_another_stopped(data: Any, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 6, "seed": 7}
    whole, rest = tiny_model(tmp_path), tiny_model(tmp_path)
    train(whole, tmp_path, data, **settings)
    trainer = CrossEncoderTrainer(rest, arguments(tmp_path, **settings), data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert distance(whole, rest) == 0
    columns = ("epoch", "step", "values")
    rows = [[[getattr(row, c) for c in columns] for row in m.model_card_data.logs] for m in (whole, rest)]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_an_adapter_of_any_name_is_resumed_and_its_best_weights_come_back(tmp_path: Path) -> None:
    def adapted() -> CrossEncoder:
        model = tiny_model(tmp_path)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), "mine")
        return model

    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 6, "seed": 7, "learning_rate": 3e-2}
    settings |= {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True}
    whole, rest = adapted(), adapted()
    train(whole, tmp_path, eval_dataset=PAIRS, **settings)
    trainer = CrossEncoderTrainer(rest, arguments(tmp_path, **settings), PAIRS, eval_dataset=PAIRS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert distance(whole, rest) == 0
    kept = CrossEncoder(trainer.state.best_model_checkpoint, device="cpu")
    np.testing.assert_allclose(rest.predict([("water", "river")]), kept.predict([("water", "river")]), atol=1e-6)
    assert distance(whole, adapted()) > 0


def test_a_best_checkpoint_that_does_not_load_leaves_the_last_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Damaging(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, *_: Any, **__: Any) -> None:
            for place in Path(args.output_dir).glob("checkpoint-*/config.json"):
                place.write_text("{}")

    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    model = tiny_model(tmp_path)
    train(model, tmp_path, eval_dataset=PAIRS, load_best_model_at_end=True, callbacks=[Damaging()], **settings)
    assert "does not load: the model keeps the weights of the last step" in caplog.text
    assert np.isfinite(model.predict([("water", "river")])).all()


def test_model_init_makes_a_model_anew_for_each_training(tmp_path: Path) -> None:
    made = []

    def make() -> CrossEncoder:
        made.append(tiny_model(tmp_path))
        return made[-1]

    losses: dict[str, Any] = {"first": BinaryCrossEntropyLoss, "second": MSELoss(make())}
    trainer = CrossEncoderTrainer(
        args=arguments(tmp_path, max_steps=3), train_dataset=TWO, loss=losses, model_init=make
    )
    trainer.train()
    first = trainer.model
    assert first is made[-1] and trainer.loss["first"].model is first and trainer.loss["second"].model is first
    assert [name for name, _ in first.model_card_data.losses] == [
        "BinaryCrossEntropyLoss",
        "MSELoss",
    ] and first.model_card_data.training
    trainer.train()
    assert trainer.model is not first and distance(trainer.model, first) == 0
    assert distance(first, made[0]) > 1e-3


# --- losses


def test_the_loss_is_one_a_class_a_function_or_the_one_for_the_labels(tmp_path: Path) -> None:
    model, three = tiny_model(tmp_path), tiny_model(tmp_path / "three", num_labels=3)
    args = arguments(tmp_path)
    assert isinstance(CrossEncoderTrainer(model, args).loss, BinaryCrossEntropyLoss)
    assert isinstance(CrossEncoderTrainer(three, args).loss, CrossEntropyLoss)
    loss = MSELoss(model)
    assert CrossEncoderTrainer(model, args, loss=loss).loss is loss
    assert isinstance(CrossEncoderTrainer(model, args, loss=LambdaLoss).loss, LambdaLoss)
    made = CrossEncoderTrainer(model, args, loss=lambda model: BinaryCrossEntropyLoss(model, pos_weight=2.0)).loss
    assert made.pos_weight == 2.0
    with pytest.raises(ConfigError, match="loss gave a float: pass a loss, or a function of the model"):
        CrossEncoderTrainer(model, args, loss=lambda model: 1.0)  # type: ignore[arg-type,return-value]


def test_a_loss_of_ones_own_is_trained_with_its_parameters(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    loss = CustomLoss(model)
    trainer = train(model, tmp_path, loss=loss, num_train_epochs=1, weight_decay=0.1)
    assert loss.calls == [8] * 4 and loss.shift.item() != 0
    assert not loss.shift.grad  # cleared after the step, as those of the model
    trained = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(list(model.parameters())) + 1
    assert model.model_card_data.losses == [("CustomLoss", {})]


def test_a_type_error_in_a_loss_is_shown_and_not_tried_again(tmp_path: Path) -> None:
    class Broken(CustomLoss):
        def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
            super().forward(inputs, labels)
            return labels + "text"

    model = tiny_model(tmp_path)
    loss = Broken(model)
    with pytest.raises(TypeError, match="unsupported operand"):
        train(model, tmp_path, loss=loss, max_steps=1)
    assert loss.calls == [8]


def test_a_loss_may_give_several_values_that_are_added_up(tmp_path: Path) -> None:
    class Doubled(CustomLoss):
        def forward(self, inputs: Any, labels: Any, **_: Any) -> Any:  # type: ignore[override]
            value = super().forward(inputs, labels)
            return {"one": value, "two": value}

    model = tiny_model(tmp_path)
    trainer = CrossEncoderTrainer(model, arguments(tmp_path), PAIRS, PAIRS, loss=Doubled)
    single = CrossEncoderTrainer(model, arguments(tmp_path), PAIRS, PAIRS, loss=CustomLoss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(2 * single.evaluate()["eval_loss"], rel=1e-5)


def test_each_dataset_has_its_loss(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    losses = {"first": CustomLoss(model), "second": CustomLoss(model)}
    data = {"first": PAIRS, "second": PAIRS.select(range(8))}
    settings: dict[str, Any] = {"num_train_epochs": 1, "eval_strategy": "epoch"}
    trainer = train(model, tmp_path, data, eval_dataset=TWO, loss=losses, **settings)
    assert losses["first"].calls == [8] * 4 + [8] * 2 and losses["second"].calls == [8] + [8] * 2
    evaluated = [entry for entry in trainer.state.log_history if "eval_first_loss" in entry]
    assert evaluated and "eval_second_loss" in trainer.evaluate({"second": PAIRS})
    with pytest.raises(ConfigError, match="no loss for the dataset None: give it one of \\['first', 'second'\\]"):
        trainer.evaluate(PAIRS)
    assert TWO["first"].column_names == ["query", "document", "label"] and "dataset_name" not in TWO["first"][0]


@pytest.mark.parametrize("train_dict", [False, True])
@pytest.mark.parametrize("eval_dict", [False, True])
@pytest.mark.parametrize("prompts", ["find ", {"first": "find ", "second": "seek "}, None], ids=["one", "two", "no"])
def test_prompts_reach_the_losses(prompts: Any, train_dict: bool, eval_dict: bool, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    loss = BinaryCrossEntropyLoss(model)
    told, forward = set(), loss.forward

    def listening(inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        told.add(prompt)
        return forward(inputs, labels, prompt=prompt, task=task)

    loss.forward = listening  # type: ignore[method-assign]
    data, held_out = TWO if train_dict else PAIRS, TWO if eval_dict else PAIRS
    train(
        model,
        tmp_path,
        data,
        eval_dataset=held_out,
        loss=loss,
        prompts=prompts,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=4,
    )
    by_name = {"find ", "seek "} if train_dict or eval_dict else set()
    without = {None} if not (train_dict and eval_dict) else set()
    assert told == ({None} if prompts is None else {"find "} if isinstance(prompts, str) else by_name | without)


def test_a_prompt_for_a_loss_that_takes_none_is_an_error(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="CustomLoss takes no prompt, and the arguments give 'find '"):
        train(model, tmp_path, loss=CustomLoss, prompts="find ")


def test_a_task_is_handed_to_losses_by_dataset(tmp_path: Path) -> None:
    told: set[str | None] = set()

    class Listening(BinaryCrossEntropyLoss):
        def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
            told.add(task)
            return super().forward(inputs, labels, prompt, task)

    train(tiny_model(tmp_path), tmp_path, TWO, loss=Listening, router_mapping={"first": "rerank"}, num_train_epochs=1)
    assert told == {"rerank", None}


# --- data


def test_a_stream_trains_as_its_rows_do(tmp_path: Path) -> None:
    streamed, listed = tiny_model(tmp_path), tiny_model(tmp_path)
    train(listed, tmp_path, PAIRS, batch_sampler=in_order, max_steps=6)
    stream = PAIRS.to_iterable_dataset()
    trainer = train(streamed, tmp_path, stream, eval_dataset=stream, max_steps=6, eval_strategy="steps", eval_steps=6)
    assert distance(streamed, listed) == 0 and distance(streamed, tiny_model(tmp_path)) > 1e-3
    assert trainer.evaluate()["eval_loss"] > 0
    assert "* Size: unknown, as it was streamed\n* Columns" in read_card(streamed, tmp_path)


def test_rows_may_be_plain_dicts_and_labels_lists(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    rows = [
        {"query": "water", "documents": ["river", "bread", "city"][: 2 + i % 2], "labels": [1, 0, 0][: 2 + i % 2]}
        for i in range(8)
    ]
    trainer = train(model, tmp_path, rows, loss=LambdaLoss, num_train_epochs=5, optim="sgd")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_worker_processes_make_batches(tmp_path: Path) -> None:
    here, there = tiny_model(tmp_path), tiny_model(tmp_path)
    train(here, tmp_path, max_steps=2)
    train(there, tmp_path, max_steps=2, dataloader_num_workers=1)
    assert distance(here, there) == 0


def test_batches_come_from_a_sampler_of_ones_own(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def one_by_one(dataset: Any, **settings: Any) -> BatchSampler:
        asked.append((len(dataset), settings["batch_size"], settings["drop_last"], settings["seed"]))
        return in_order(dataset, 1, False)

    def backwards(dataset: Any, batch_samplers: Sequence[BatchSampler], **_: Any) -> Any:
        batches = [[row] for row in reversed(range(len(dataset)))]
        return type("Backwards", (BatchSampler,), {"__iter__": lambda self: iter(batches), "__len__": lambda self: 32})(
            batch_samplers[0].sampler, 1, False
        )

    model = tiny_model(tmp_path)
    loss = CustomLoss(model)
    train(
        model,
        tmp_path,
        TWO,
        loss=loss,
        num_train_epochs=1,
        batch_sampler=one_by_one,
        multi_dataset_batch_sampler=backwards,
    )
    assert asked == [(16, 8, False, 42)] * 2 and loss.calls == [1] * 32


# --- evaluation


class Counting:
    """An evaluator that is no more than a function."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def __call__(
        self, model: CrossEncoder, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> float:
        assert Path(output_path or "").name == "eval"
        self.asked.append((epoch, steps))
        return 0.5


def test_evaluators_run_once_whatever_the_number_of_datasets(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    counting = Counting()
    settings: dict[str, Any] = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(model, tmp_path, eval_dataset=TWO, evaluator=[EVALUATOR, counting], **settings)
    assert [step for _, step in counting.asked] == [1, 2]
    logged = [e for e in trainer.state.log_history if "eval_first_loss" in e]
    assert all("eval_dev_accuracy" in entry and entry["eval_sequential_score"] == 0.5 for entry in logged)
    assert not any("eval_dev_accuracy" in e for e in trainer.state.log_history if "eval_second_loss" in e)
    assert {"eval_first_loss", "eval_second_loss", "eval_first_dev_accuracy"} <= set(trainer.evaluate())
    assert "test_dev_accuracy" in trainer.evaluate(PAIRS, metric_key_prefix="test")


def test_an_evaluator_is_enough_to_evaluate(tmp_path: Path) -> None:
    trainer = train(
        tiny_model(tmp_path), tmp_path, evaluator=Counting(), max_steps=2, eval_strategy="steps", eval_steps=2
    )
    assert trainer.eval_dataset is None
    found = trainer.evaluate()
    assert found["eval_evaluator"] == 0.5 and "eval_loss" not in found


def test_training_stops_early_by_an_evaluators_metric(tmp_path: Path) -> None:
    trainer = train(
        tiny_model(tmp_path),
        tmp_path,
        evaluator=Counting(),
        num_train_epochs=9,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="evaluator",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    assert trainer.state.epoch == 3


# --- the optimizer, precision, wrappers


def test_parameters_may_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    rates = {r"classifier\.": 1e-1, "LayerNorm": 0.0}
    trainer = train(model, tmp_path, learning_rate_mapping=rates, max_steps=3, weight_decay=0.1)
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = {(group["initial_lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found[(1e-1, 0.1)] == 1 and found[(1e-1, 0.0)] == 1 and found[(0.0, 0.0)] == 10
    before = tiny_model(tmp_path).model
    assert torch.equal(before.bert.embeddings.LayerNorm.weight, model.model.bert.embeddings.LayerNorm.weight)
    with pytest.raises(ConfigError, match="learning_rate_mapping has 'head', and no parameter has that in its name"):
        train(model, tmp_path, learning_rate_mapping={"head": 1.0})


def test_a_loss_goes_through_what_wraps_the_model(tmp_path: Path) -> None:
    wrapped, plain = tiny_model(tmp_path), tiny_model(tmp_path)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(trainer.loss.model)

    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    trainer = CrossEncoderTrainer(wrapped, args, PAIRS, PAIRS, callbacks=[Look()])
    trainer.train()
    train(plain, tmp_path, max_steps=2)
    assert all(isinstance(model, WrappedModel) and model.max_length == 128 for model in seen) and len(seen) == 2
    assert distance(wrapped, plain) <= 1e-6
    trainer.save_model(str(tmp_path / "saved"))
    assert distance(CrossEncoder(tmp_path / "saved", device="cpu"), wrapped) == 0


def test_activations_may_be_computed_again(tmp_path: Path) -> None:
    plain, saving = tiny_model(tmp_path), tiny_model(tmp_path)
    train(plain, tmp_path, max_steps=2)
    train(saving, tmp_path, max_steps=2, activation_checkpointing=True)
    assert saving.model.is_activation_checkpointing and not plain.model.is_activation_checkpointing
    assert distance(plain, saving) <= 1e-6


def test_half_precision_leaves_scores_in_float32(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    trainer = train(model, tmp_path, bf16=True, max_steps=2, evaluator=EVALUATOR)
    assert np.isfinite(trainer.evaluate()["eval_dev_accuracy"]) and model.dtype == torch.float32
    assert model.predict([("water", "river")]).dtype == np.float32


# --- checkpoints


def test_a_new_head_gives_scores_once_it_is_trained(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    model.model.base_model.save_pretrained(tmp_path / "backbone")
    model.tokenizer.save_pretrained(tmp_path / "backbone")
    model = CrossEncoder(tmp_path / "backbone", num_labels=1, device="cpu")
    trainer = CrossEncoderTrainer(model, arguments(tmp_path, max_steps=1), PAIRS)
    with pytest.raises(CheckpointError, match="train it first"):
        trainer.save_model()
    trainer.train()
    trainer.save_model()
    assert np.isfinite(model.predict([("a", "b")])).all()


def test_pushing_sends_the_whole_checkpoint_with_our_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            sent.append({path.name for path in Path(folder_path).iterdir()})
            return type(
                "Job", (), {"is_done": lambda self: True, "result": lambda self: None, "done": lambda self: True}
            )()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    model = tiny_model(tmp_path)
    settings = {"push_to_hub": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = train(model, tmp_path, **settings)
    trainer.push_to_hub(language="en", tags="mine", model_name="A reranker")
    assert len(sent) == 3
    assert all({"README.md", "modules.json", "model.safetensors", "tokenizer.json"} <= names for names in sent)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A reranker\n" in card and "language: en" in card and "- mine\n" in card
    assert "loss:BinaryCrossEntropyLoss" in card


# --- refusals


def test_what_cannot_be_trained_is_refused_with_a_reason(tmp_path: Path) -> None:
    model, args = tiny_model(tmp_path), arguments(tmp_path)
    refused: Mapping[str, tuple[dict[str, Any], type[Exception]]] = {
        "there is nothing to train on: give the trainer a train_dataset": ({"train_dataset": None}, ConfigError),
        "train_dataset does not implement __len__.*max_steps": (
            {"train_dataset": PAIRS.to_iterable_dataset()},
            ValueError,
        ),
        "does not support an IterableDataset for the `train_dataset`. Please convert.*interleave_datasets": (
            {"train_dataset": {"first": PAIRS.to_iterable_dataset()}},
            InputError,
        ),
        "has a column 'dataset_name', a name used inside: rename it": (
            {"train_dataset": PAIRS.rename_column("query", "dataset_name")},
            InputError,
        ),
        "args are TrainingArguments: pass CrossEncoderTrainingArguments": (
            {"args": type("TrainingArguments", (), {})()},
            ConfigError,
        ),
        "eval_strategy is 'steps' and there is nothing to evaluate on": (
            {"args": arguments(tmp_path, eval_strategy="steps", eval_steps=1)},
            ConfigError,
        ),
        "BinaryCrossEntropyLoss takes two columns of texts beside the labels, got 1": (
            {"train_dataset": PAIRS.remove_columns("query")},
            InputError,
        ),
    }
    for reason, (settings, kind) in refused.items():
        with pytest.raises(kind, match=reason):
            CrossEncoderTrainer(**{"model": model, "args": args, "train_dataset": PAIRS, **settings}).train()
    with pytest.raises(RuntimeError, match="either a `model` or `model_init`"):
        CrossEncoderTrainer(args=args)
    with pytest.raises(TypeError, match="no argument 'evaluators': did you mean 'evaluator'"):
        CrossEncoderTrainer(model, args, evaluators=[])  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="nothing to evaluate on: give the trainer an eval_dataset or an evaluator"):
        CrossEncoderTrainer(model, args).evaluate()


def test_several_losses_need_a_dataset_each(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    loss = {name: BinaryCrossEntropyLoss(model) for name in ("first", "second")}
    more = datasets.DatasetDict({**TWO, "third": PAIRS})
    most = datasets.DatasetDict({**more, "fourth": PAIRS})
    must_be = "If the provided `loss` is a dict, then the `{}` must be a `DatasetDict`."
    for kind, train_data, eval_data in (("train_dataset", PAIRS, None), ("eval_dataset", TWO, PAIRS)):
        with pytest.raises(ValueError, match=must_be.format(kind)):
            CrossEncoderTrainer(model, arguments(tmp_path), train_data, eval_data, loss)
    must_occur = "then all keys from the `{0}` dictionary must occur in `loss` also. Currently, {1} in `{0}` but not in"
    with pytest.raises(ValueError, match=must_occur.format("train_dataset", r"\['third'\] occurs")):
        CrossEncoderTrainer(model, arguments(tmp_path), more, loss=loss)
    with pytest.raises(ValueError, match=must_occur.format("eval_dataset", r"\['fourth', 'third'\] occur")):
        CrossEncoderTrainer(model, arguments(tmp_path), TWO, most, loss)


def test_arguments_that_have_no_effect_or_an_old_name_warn(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with pytest.warns(UserWarning, match="compute_metrics has no effect"):
        CrossEncoderTrainer(model, arguments(tmp_path), compute_metrics=lambda prediction: {})
    with pytest.warns(UserWarning, match="train_sampling_strategy has no effect: choose a batch_sampler"):
        CrossEncoderTrainer(model, arguments(tmp_path, train_sampling_strategy="sequential"))
    with pytest.warns(DeprecationWarning, match="`tokenizer` argument was renamed .*: write `processing_class`"):
        trainer = CrossEncoderTrainer(model, arguments(tmp_path), tokenizer=model.tokenizer)  # type: ignore[call-arg]
    assert trainer.processing_class is model.tokenizer


def test_training_arguments_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = CrossEncoderTrainer(tiny_model(tmp_path), data_collator=CrossEncoderDataCollator())
    assert isinstance(trainer.args, CrossEncoderTrainingArguments) and trainer.args.output_dir == "tmp_trainer"
    assert copy.copy(trainer.args).batch_sampler == "batch_sampler"
