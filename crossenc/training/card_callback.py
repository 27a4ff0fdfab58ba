"""What a model card learns from training: data, losses, settings, figures as they come, and the time it took."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from crossenc.card import CrossEncoderModelCardData, DatasetFacts, Evaluation, describe_datasets, describe_emissions
from crossenc.training.bound_losses import each

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder
    from crossenc.training.trainer import CrossEncoderTrainer

#: Settings that say nothing of the model: where files go, what is logged and when, secrets.
_NOT_SHOWN = frozenset(
    (
        "accelerator_config",
        "dataloader_pin_memory",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "eval_delay",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "greater_is_better",
        "hub_token",
        "logging_dir",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "metric_for_best_model",
        "output_dir",
        "prediction_loss_only",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "use_cpu",
    )
)


class CrossEncoderModelCardCallback(TrainerCallback):  # type: ignore[misc]
    """Fills the card of the model in training. `default_args` are all settings as they are by default."""

    def __init__(self, default_args: Mapping[str, Any]) -> None:
        super().__init__()
        self._default_args = dict(default_args)
        self._trainer: CrossEncoderTrainer | None = None
        self._started = 0.0
        self._evaluations_at: dict[int, list[Evaluation]] = {}

    def on_init_end(
        self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", trainer: "CrossEncoderTrainer", **_: Any
    ) -> None:
        """Called by the trainer once it is made."""
        self._trainer = trainer
        self._record_start(args, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", **_: Any) -> None:
        card = model.model_card_data
        if not card.losses:  # a new model, by model_init
            self._record_start(args, model)
        shown = {name: value for name, value in args.to_dict().items() if name not in _NOT_SHOWN}
        card.set_hyperparameters(shown, self._default_args)
        card.best_step = None
        if not card.logs:  # rows of the training that this one goes on with
            for entry in state.log_history:
                self._add_figures(card, entry.get("epoch", 0.0), entry["step"], entry)
        self._started = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", logs: Mapping[str, Any], **_: Any
    ) -> None:
        assert self._trainer is not None
        self._add_figures(model.model_card_data, *self._trainer.moment, logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", **_: Any) -> None:
        self._evaluations_at[state.global_step] = model.model_card_data.evaluations

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", **_: Any) -> None:
        model.model_card_data.training_seconds = time.monotonic() - self._started

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: "CrossEncoder", **_: Any) -> None:
        card = model.model_card_data
        card.training_seconds = time.monotonic() - self._started
        if card.best_step is not None:  # the model is again what it was then
            card.evaluations = self._evaluations_at.get(card.best_step, card.evaluations)
        assert self._trainer is not None
        trackers = (getattr(callback, "tracker", None) for callback in self._trainer.callback_handler.callbacks)
        for tracker in trackers:
            if found := getattr(tracker, "final_emissions_data", None):
                card.emissions = describe_emissions(found)

    def _record_start(self, args: Any, model: "CrossEncoder") -> None:
        trainer, card = self._trainer, model.model_card_data
        assert trainer is not None
        card.model_id = card.model_id or args.hub_model_id
        card.training = _facts(trainer.train_dataset, model, card.train_datasets)
        card.validation = _facts(trainer.eval_dataset, model, card.eval_datasets)
        _add_hub_datasets(card)
        card.losses.clear()
        for loss in each(trainer.loss):
            settings: Callable[[], Mapping[str, Any]] = getattr(loss, "get_config_dict", dict)
            card.add_loss(type(loss).__name__, settings(), getattr(loss, "citation", ""))

    def _add_figures(self, card: CrossEncoderModelCardData, epoch: float, step: int, entry: Mapping[str, Any]) -> None:
        """Put what belongs in the card's table of logs there, out of what transformers' Trainer logs."""
        assert self._trainer is not None
        columns = {"loss": "Training Loss", "eval_loss": "Validation Loss"}
        columns |= {f"eval_{name}": name for name in _primary_metrics(self._trainer.evaluator)}
        columns |= {name: f"{found[1]} loss" for name in entry if (found := re.fullmatch("eval_(.+)_loss", name))}
        if figures := {column: entry[name] for name, column in columns.items() if name in entry}:
            card.add_log(epoch, step, figures)


def _primary_metrics(evaluator: Any) -> list[str]:
    """The metrics that evaluators go by, with the evaluators' names before them."""
    found = []
    for single in getattr(evaluator, "evaluators", [evaluator]):
        primary, prefix = getattr(single, "primary_metric", None), getattr(single, "name", "")
        if primary:
            found.append(primary if not prefix or primary.startswith(f"{prefix}_") else f"{prefix}_{primary}")
    return found


def _facts(data: Any, model: "CrossEncoder", named: Sequence[Mapping[str, str]]) -> list[DatasetFacts]:
    """Facts of one dataset, or of a dict of datasets. `named` are the names that the user gave, in the same order."""
    if data is None:
        return []
    datasets = data if isinstance(data, Mapping) else {None: data}
    facts = []
    for number, (key, rows) in enumerate(datasets.items()):
        given = named[number].get("name") if number < len(named) else None
        facts += describe_datasets(rows, model.count_tokens, name=given or key)
    return facts


def _add_hub_datasets(card: CrossEncoderModelCardData) -> None:
    """Name the datasets where their user did not and some are from the hub, for the front matter."""
    found = [
        {"name": facts.name} | ({"id": facts.dataset_id, "revision": facts.revision or ""} if facts.dataset_id else {})
        for facts in card.training
    ]
    if not card.train_datasets and any("id" in named for named in found):
        card.train_datasets = found
