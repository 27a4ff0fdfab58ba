"""`CrossEncoder.fit`: a plain training loop in one process, as users of its namesake know it.

Examples come from a DataLoader, the loss is a function of scores and labels or of texts and labels, and the best
model by an evaluator is kept. Knows no cluster; jobs for many workers are another matter.
"""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import optimization

from crossenc.activations import activation_name
from crossenc.card import describe_dataset, measured_emissions
from crossenc.errors import ConfigError, InputError, ScoreError
from crossenc.losses import TextLoss
from crossenc.pairs import label_tensors

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

logger = logging.getLogger(__name__)

#: Steps between two figures of the training loss in the model card's log.
LOG_STEPS = 500
#: Weights with these names are not decayed.
_NOT_DECAYED = ("bias", "LayerNorm", "layer_norm", "norm.weight")
_SCHEDULERS = ("constantlr", "warmupconstant", "warmuplinear", "warmupcosine", "warmupcosinewithhardrestarts")


@dataclass(slots=True)
class InputExample:
    """A training example: texts and what the model should say of them.

    `texts` is a query and a document, or what the loss asks for; `label` a number, a list of them, or None for a loss
    that takes none.
    """

    guid: str = ""
    texts: Sequence[Any] = field(default_factory=list)
    label: Any = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How to train. `warmup_steps` and `evaluation_steps` count optimizer steps; 0 evaluates after epochs only."""

    epochs: int = 1
    scheduler: str = "WarmupLinear"
    warmup_steps: int = 10_000
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    optimizer_params: Mapping[str, Any] = field(default_factory=lambda: {"lr": 2e-5})
    weight_decay: float = 0.01
    evaluation_steps: int = 0
    output_path: str | None = None
    save_best_model: bool = True
    max_grad_norm: float = 1.0
    use_amp: bool = False
    show_progress_bar: bool = True


class FitMixin:
    """Gives CrossEncoder its `fit`."""

    def fit(  # noqa: PLR0913
        self,
        train_dataloader: Any,
        evaluator: Callable[..., Any] | None = None,
        epochs: int = 1,
        loss_fct: nn.Module | None = None,
        activation_fct: nn.Module | None = None,
        scheduler: str = "WarmupLinear",
        warmup_steps: int = 10_000,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_params: Mapping[str, Any] | None = None,
        weight_decay: float = 0.01,
        evaluation_steps: int = 0,
        output_path: str | None = None,
        save_best_model: bool = True,
        max_grad_norm: float = 1.0,
        use_amp: bool = False,
        callback: Callable[[float, int, int], None] | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        """Train on a DataLoader of InputExample, in this process.

        `loss_fct` is one of crossenc.losses or a torch loss of scores and labels; by default binary cross-entropy
        for one label, cross-entropy for more. `activation_fct` comes before a torch loss (none by default).
        `scheduler` is ConstantLR, WarmupConstant, WarmupLinear, WarmupCosine or WarmupCosineWithHardRestarts.
        `use_amp` computes in float16 on CUDA and bfloat16 elsewhere. The rest is explained at
        FitSettings and the function `fit`, with the errors.
        """
        settings = FitSettings(
            epochs=epochs,
            scheduler=scheduler,
            warmup_steps=warmup_steps,
            optimizer_class=optimizer_class,
            optimizer_params={"lr": 2e-5} if optimizer_params is None else optimizer_params,
            weight_decay=weight_decay,
            evaluation_steps=evaluation_steps or 0,
            output_path=output_path,
            save_best_model=save_best_model,
            max_grad_norm=max_grad_norm,
            use_amp=use_amp,
            show_progress_bar=show_progress_bar,
        )
        if not isinstance(train_dataloader, torch.utils.data.DataLoader) or isinstance(
            train_dataloader.dataset, torch.utils.data.IterableDataset
        ):
            raise ConfigError("fit takes a DataLoader of a dataset with a length, such as a list of InputExample")
        if loss_fct is not None and not isinstance(loss_fct, nn.Module):
            raise ConfigError(f"loss_fct is {loss_fct!r}: pass an instance of a loss, such as torch.nn.MSELoss()")
        train_dataloader.collate_fn = list  # examples as they are
        model = cast("CrossEncoder", self)
        activation_fct = activation_fct or nn.Identity()
        loss = text_loss(model, loss_fct, activation_fct)
        try:
            record_start(model, train_dataloader, settings, loss_fct, activation_fct)
        except Exception:  # a card must never cost a model
            logger.warning("what training starts with could not be noted for the model card", exc_info=True)
        fit(model, train_dataloader, loss, settings, evaluator, callback)


def fit(
    model: "CrossEncoder",
    batches: Iterable[Sequence[InputExample]],
    loss: Callable[[Sequence[InputExample]], Tensor],
    settings: FitSettings,
    evaluator: Callable[..., Any] | None = None,
    callback: Callable[[float, int, int], None] | None = None,
) -> None:
    """Train `model` on `batches`, which can be gone through once per epoch.

    `loss` maps a batch to a scalar. After each epoch, and each `evaluation_steps`, `evaluator` is called and
    `callback(value, epoch, step)` told; the best model by it is saved to `output_path`, or without an evaluator the
    last one. Raises ScoreError when the loss is not finite, InputError when there are no batches, ConfigError when all
    weights are frozen.
    """
    num_batches = len(batches)  # type: ignore[arg-type]
    if num_batches == 0:
        raise InputError("there is nothing to train on: the data loader gives no batches")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "all weights are frozen: load the adapter with is_trainable=True, add a new one, or call requires_grad_()"
        )
    optimizer = settings.optimizer_class(_parameter_groups(model, settings.weight_decay), **settings.optimizer_params)
    schedule = _schedule(settings, optimizer, num_batches * settings.epochs)
    keeper = _BestKeeper(model, settings, evaluator, callback)
    scaler = torch.amp.GradScaler(enabled=settings.use_amp and model.device.type == "cuda")
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, losses, started = 0, list[float](), time.monotonic()
    card = model.model_card_data
    with measured_emissions(card), _progress(num_batches * settings.epochs, settings.show_progress_bar) as advance:
        for epoch in range(settings.epochs):
            for batch in batches:
                model.train()
                with _autocast(model, settings.use_amp):
                    value = loss(batch)
                if not math.isfinite(value.item()):
                    raise ScoreError(
                        f"the loss is {value.item()} at step {step + 1}: lower the learning rate, or look for labels"
                        f" out of range in {[example.guid or example.texts for example in batch][:1]}"
                    )
                optimizer.zero_grad()
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                step += 1
                losses.append(value.item())
                advance(losses[-1])
                if step % LOG_STEPS == 0 or step % num_batches == 0:
                    card.add_log(step / num_batches, step, {"Training Loss": statistics.fmean(losses)})
                    losses.clear()
                if settings.evaluation_steps > 0 and step % settings.evaluation_steps == 0:
                    keeper.evaluate(epoch, step, step / num_batches)
            model.eval()
            model.mark_trained()
            if not (settings.evaluation_steps > 0 and step % settings.evaluation_steps == 0):
                keeper.evaluate(epoch, step, step / num_batches)
    card.training_seconds = time.monotonic() - started
    keeper.warn_if_none()
    if evaluator is None and settings.output_path is not None:
        model.save_pretrained(settings.output_path)


class _BestKeeper:
    """Evaluates now and then, and saves the model when it is better than ever before."""

    def __init__(
        self,
        model: "CrossEncoder",
        settings: FitSettings,
        evaluator: Callable[..., Any] | None,
        callback: Callable[[float, int, int], None] | None,
    ) -> None:
        self._model, self._settings, self._evaluator, self._callback = model, settings, evaluator, callback
        self._best = -math.inf

    def evaluate(self, epoch: int, step: int, num_epochs: float) -> None:
        """Call the evaluator, which counts whole epochs; keep the model if it is the best after `num_epochs`."""
        if self._evaluator is None:
            return
        model, output_path = self._model, self._settings.output_path
        model.eval()
        model.mark_trained()
        result = self._evaluator(model, output_path=output_path, epoch=epoch, steps=step)
        for row in model.model_card_data.logs:
            if row.step == step:
                row.epoch = num_epochs
        value = float(result[self._evaluator.primary_metric] if isinstance(result, Mapping) else result)  # type: ignore[attr-defined]
        if self._callback is not None:
            self._callback(value, epoch, step)
        value = value if getattr(self._evaluator, "greater_is_better", True) else -value
        if value > self._best:
            self._best = value
            model.model_card_data.best_step = step if self._settings.save_best_model else None
            if self._settings.save_best_model and output_path is not None:
                model.save_pretrained(output_path)

    def warn_if_none(self) -> None:
        """Say that no model was saved, where one should have been."""
        wants_one = self._evaluator is not None and self._settings.save_best_model and self._settings.output_path
        if wants_one and self._best == -math.inf:
            logger.warning("no model was saved: no evaluation gave a number that could be the best")


def text_loss(
    model: "CrossEncoder", loss_fct: nn.Module | None, activation_fct: nn.Module
) -> Callable[[Sequence[InputExample]], Tensor]:
    """A function from a batch of examples to a loss.

    `loss_fct` is one of crossenc.losses, which take texts; or a torch loss of scores and labels, by default binary
    cross-entropy for one label and cross-entropy for more.
    """
    if isinstance(loss_fct, TextLoss):
        return lambda batch: loss_fct(_columns(batch), _labels(batch, model.device))
    chosen: nn.Module = loss_fct or (nn.BCEWithLogitsLoss() if model.num_labels == 1 else nn.CrossEntropyLoss())
    chosen.to(model.device)

    def compute(batch: Sequence[InputExample]) -> Tensor:
        for example in batch:
            if len(example.texts) != 2:
                raise InputError(f"an example has {len(example.texts)} texts: this loss needs a query and a document")
        scores_BL = activation_fct(model.logits([tuple(example.texts) for example in batch]))
        labels = _labels(batch, model.device)
        if model.num_labels == 1:
            value: Tensor = chosen(scores_BL.view(-1), labels.float())
        else:
            value = chosen(scores_BL, labels.long())
        return value

    return compute


def record_start(
    model: "CrossEncoder",
    dataloader: Any,
    settings: FitSettings,
    loss_fct: nn.Module | None,
    activation_fct: nn.Module,
) -> None:
    """Note for the model card what training starts with: data, loss and settings."""
    card = model.model_card_data
    examples = dataloader.dataset
    rows = (
        {**{f"sentence_{i}": text for i, text in enumerate(example.texts)}, "label": example.label}
        for example in (examples[i] for i in range(len(examples)))
    )
    card.training = [describe_dataset(rows, len(examples), model.count_tokens)]
    card.losses.clear()
    if isinstance(loss_fct, TextLoss):
        card.add_loss(type(loss_fct).__name__, loss_fct.get_config_dict(), getattr(loss_fct, "citation", ""))
    else:
        pos_weight = getattr(loss_fct, "pos_weight", None)
        config = {
            "activation_fn": activation_name(activation_fct),
            "pos_weight": None if pos_weight is None else pos_weight.item(),
        }
        default = "BinaryCrossEntropyLoss" if model.num_labels == 1 else "CrossEntropyLoss"
        name = default if loss_fct is None else type(loss_fct).__name__
        card.add_loss(name.replace("BCEWithLogitsLoss", "BinaryCrossEntropyLoss"), config)
    known = {"batch_size": dataloader.batch_size, "seed": torch.initial_seed()}
    card.set_hyperparameters({**known, **_shown(settings)}, _shown(FitSettings()))


def _shown(settings: FitSettings) -> dict[str, Any]:
    """The settings that a card shows, which say nothing of the machine."""
    shown = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for name in ("output_path", "show_progress_bar"):
        del shown[name]
    shown["optimizer_class"] = settings.optimizer_class.__name__
    return shown


def _columns(batch: Sequence[InputExample]) -> list[list[Any]]:
    """The examples' first texts, their second ones …"""
    return [list(column) for column in zip(*(example.texts for example in batch), strict=True)]


def _labels(batch: Sequence[InputExample], device: torch.device) -> Any:
    """The labels as a tensor, as a list of tensors where each is a list, or None where there are none."""
    labels = [example.label for example in batch]
    return None if all(label is None for label in labels) else label_tensors(labels, device)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = [parameter for name, parameter in named if any(part in name for part in _NOT_DECAYED)]
    decayed = [parameter for name, parameter in named if not any(part in name for part in _NOT_DECAYED)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _schedule(settings: FitSettings, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    name, warmup = settings.scheduler.lower(), settings.warmup_steps
    if name == "constantlr":
        return optimization.get_constant_schedule(optimizer)
    if name == "warmupconstant":
        return optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    if name == "warmuplinear":
        return optimization.get_linear_schedule_with_warmup(optimizer, warmup, num_steps)
    if name == "warmupcosine":
        return optimization.get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    if name == "warmupcosinewithhardrestarts":
        return optimization.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, num_steps)
    raise ConfigError(f"there is no scheduler {settings.scheduler!r}: choose from {', '.join(_SCHEDULERS)}")


def _autocast(model: "CrossEncoder", use_amp: bool) -> contextlib.AbstractContextManager[Any]:
    if not use_amp:
        return contextlib.nullcontext()
    dtype = torch.float16 if model.device.type == "cuda" else torch.bfloat16
    return torch.autocast(model.device.type, dtype=dtype)


@contextlib.contextmanager
def _progress(num_steps: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """Give a function that moves a progress bar one step on and shows the loss."""
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=num_steps)
        yield lambda loss: bar.update(task, advance=1, description=f"loss {loss:.4f}")
