"""CrossEncoderTrainer: transformers' Trainer, for losses of texts, several datasets, evaluators and model cards.

What is special of cross-encoders is here and in the modules beside; loop, devices, precision, checkpoints, schedules,
logging and distribution are the Trainer's. Knows no cluster of Ray.
"""

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from crossenc.adapters import has_adapters
from crossenc.deprecation import accepts_old_arguments
from crossenc.errors import CheckpointError, ConfigError, CrossEncError
from crossenc.evaluation import SequentialEvaluator
from crossenc.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from crossenc.model import CrossEncoder
from crossenc.saving import write_readme
from crossenc.training import bound_losses
from crossenc.training.arguments import CrossEncoderTrainingArguments
from crossenc.training.bound_losses import LossLike, WrappedModel
from crossenc.training.card_callback import CrossEncoderModelCardCallback
from crossenc.training.collator import CrossEncoderDataCollator
from crossenc.training.data import NoRows, check_datasets, check_names, data_loader, in_order, loader_settings, named
from crossenc.training.samplers import (
    DATASET_NAME,
    LABEL_COLUMNS,
    BatchSamplers,
    DefaultBatchSampler,
    GroupByLabelBatchSampler,
    MultiDatasetBatchSamplers,
    NoDuplicatesBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)

logger = logging.getLogger(__name__)


class CrossEncoderTrainer(Trainer):  # type: ignore[misc]
    """Trains a CrossEncoder on rows of texts with labels.

    Columns are read in their order, one called label, labels, score or scores as the label; which columns and labels
    there must be is for the loss to say. Several datasets come as a dict, such as a DatasetDict, one row of a batch
    being from the same dataset as the others.
    """

    @accepts_old_arguments({"tokenizer": "processing_class"})
    def __init__(  # noqa: PLR0913 - the arguments of transformers' Trainer
        self,
        model: CrossEncoder | None = None,
        args: CrossEncoderTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: LossLike | Mapping[str, LossLike] | None = None,
        evaluator: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        data_collator: Callable[..., Any] | None = None,
        processing_class: Any = None,
        model_init: Callable[..., CrossEncoder] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
    ) -> None:
        """Make ready to train `model`, or what `model_init` returns anew for each training.

        A dataset is a datasets.Dataset or a sequence of dicts; `train_dataset` may be one stream, such as a
        datasets.IterableDataset, with `max_steps` in `args`. `loss` is one of crossenc.losses or of one's own, a class
        or function that makes one of the model, or a dict of such for datasets of the same names; by default binary
        cross-entropy for a model with one label and cross-entropy for others. `evaluator` is one or several; its
        metrics are logged as `eval_<metric>`, the primary one of several is that of the last, and of several processes
        the main one evaluates. The rest is as in transformers' Trainer, but that there are no predictions to compute
        metrics of.

        Raises InputError for datasets that do not fit the loss or each other, ConfigError for settings.
        """
        args = CrossEncoderTrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check_arguments(args, eval_dataset is not None or evaluator is not None, compute_metrics)
        check_datasets(train_dataset, eval_dataset)
        super().__init__(
            model=None if model_init is not None else model,
            args=args,
            data_collator=data_collator or self.get_data_collator(model, args, processing_class),
            train_dataset=train_dataset,
            # Not None, or transformers would refuse to evaluate with an evaluator alone.
            eval_dataset=[] if eval_dataset is None and evaluator is not None else eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.eval_dataset = eval_dataset
        self.can_return_loss = True  # without being told by the batch
        self.evaluator: Callable[..., Any] | None = (
            SequentialEvaluator(evaluator) if isinstance(evaluator, Sequence) else evaluator
        )
        self._given_loss = self.get_default_loss if loss is None else loss
        self._loss_model: nn.Module = self.model
        self.loss = bound_losses.make_losses(self._given_loss, self.model)
        check_names(self.loss, train_dataset, eval_dataset)
        # Only now, with devices set up: made before, these would set them up in their way.
        default_args = CrossEncoderTrainingArguments(
            output_dir="default", accelerator_config={"use_configured_state": True}
        )
        self.add_callback(_AfterStep())
        self.add_model_card_callback(default_args.to_dict())

    # --- what a subclass may replace

    def get_data_collator(
        self, model: CrossEncoder | None, args: CrossEncoderTrainingArguments, processing_class: Any = None
    ) -> Callable[..., Any]:
        """What makes batches of rows."""
        return CrossEncoderDataCollator(prompts=args.prompts, router_mapping=args.router_mapping)

    def get_default_loss(self, model: CrossEncoder) -> nn.Module:
        """The loss where none was given."""
        return BinaryCrossEntropyLoss(model) if model.num_labels == 1 else CrossEntropyLoss(model)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Have the model's card filled from now on."""
        callback = CrossEncoderModelCardCallback(default_args_dict)
        self.add_callback(callback)
        callback.on_init_end(self.args, self.state, self.control, model=self.model, trainer=self)

    def get_batch_sampler(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> BatchSampler:
        """Which rows of one dataset make a batch."""
        chosen = self.args.batch_sampler
        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "drop_last": drop_last,
            "valid_label_columns": valid_label_columns,
            "generator": generator,
            "seed": seed,
        }
        if callable(chosen):
            sampler: BatchSampler = chosen(dataset, **settings)
            return sampler
        if chosen == BatchSamplers.GROUP_BY_LABEL:
            return GroupByLabelBatchSampler(dataset, **settings)
        if chosen == BatchSamplers.BATCH_SAMPLER:
            return DefaultBatchSampler(RandomSampler(dataset, generator=generator), **settings)
        hashes = chosen == BatchSamplers.NO_DUPLICATES_HASHED
        return NoDuplicatesBatchSampler(dataset, precompute_hashes=hashes, **settings)

    def get_multi_dataset_batch_sampler(
        self,
        dataset: "ConcatDataset[Any]",
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> BatchSampler:
        """Which dataset the next batch is from."""
        chosen = self.args.multi_dataset_batch_sampler
        if callable(chosen):
            sampler: BatchSampler = chosen(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)
            return sampler
        takes_turns = chosen == MultiDatasetBatchSamplers.ROUND_ROBIN
        kind = RoundRobinBatchSampler if takes_turns else ProportionalBatchSampler
        return kind(dataset, batch_samplers, generator, seed)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[Any], Any]:
        """The columns of a batch, and its labels or None."""
        columns = dict(inputs)
        labels = columns.pop("label", None)
        return list(columns.values()), labels

    # --- the loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss of a batch. Raises ConfigError for a batch of a dataset that has none."""
        if model is not self._loss_model:
            for loss in bound_losses.each(self.loss):
                bound_losses.set_model(loss, model if model is self.model else WrappedModel(model, self.model))
            self._loss_model = model
        batch = dict(inputs)
        name = batch.pop(DATASET_NAME, None)
        extras = {key: batch.pop(key) for key in ("prompt", "task") if isinstance(batch.get(key), str)}
        columns, labels = self.collect_features(batch)
        value = bound_losses.loss_value(self._loss_of(name), columns, labels, extras)
        return (value, {}) if return_outputs else value

    def _loss_of(self, dataset_name: str | None) -> nn.Module:
        if not isinstance(self.loss, dict):
            return self.loss
        if dataset_name not in self.loss:
            raise ConfigError(f"there is no loss for the dataset {dataset_name!r}: give it one of {list(self.loss)}")
        return self.loss[dataset_name]

    def call_model_init(self, trial: Any = None) -> CrossEncoder:
        """A new model; the losses are given it, or made anew."""
        model: CrossEncoder = super().call_model_init(trial)
        if hasattr(self, "loss"):
            self.loss = bound_losses.make_losses(self._given_loss, model)
            self._loss_model = model
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters and of those that losses have of their own."""
        is_new = self.optimizer is None
        losses = nn.ModuleList(bound_losses.each(self.loss))
        trained = nn.ModuleDict({"model": self.model if model is None else model, "loss": losses})
        optimizer: torch.optim.Optimizer = super().create_optimizer(trained)
        if is_new:
            for pattern, learning_rate in self.args.learning_rate_mapping.items():
                _set_learning_rate(optimizer, trained, pattern, learning_rate)
        return optimizer

    # --- data

    def get_train_dataloader(self) -> "DataLoader[Any]":
        """Batches to train on. Raises ConfigError without a dataset."""
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on: give the trainer a train_dataset")
        # Batches that are filled up with rows of others would mix datasets.
        self.accelerator.even_batches = False
        return self._loader(self.train_dataset, self._train_batch_size, self.args.dataloader_drop_last, shuffles=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> "DataLoader[Any]":
        """Batches of a dataset to evaluate on: the trainer's, by default; of several the one of that name."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None and self.evaluator is not None:
            return DataLoader(NoRows())
        if data is None:
            raise ConfigError("there is nothing to evaluate on: give the trainer an eval_dataset or an evaluator")
        if isinstance(data, str):
            data = self._with_name(self.eval_dataset[data], data)
        self.accelerator.even_batches = True  # or processes with fewer batches would leave the others waiting
        shuffles = self.args.batch_sampler != BatchSamplers.BATCH_SAMPLER
        return self._loader(data, self.args.eval_batch_size, False, shuffles)

    def get_test_dataloader(self, test_dataset: Any) -> "DataLoader[Any]":
        """Batches of a dataset to test on."""
        return self.get_eval_dataloader(test_dataset)

    def _with_name(self, data: Any, name: str) -> Any:
        """The dataset with its name in every row, where losses, prompts or tasks go by names."""
        by_name = (self.loss, self.args.prompts, self.args.router_mapping)
        return named(data, name) if any(isinstance(value, dict) and value for value in by_name) else data

    def _loader(self, data: Any, batch_size: int, drop_last: bool, shuffles: bool) -> "DataLoader[Any]":
        generator = torch.Generator().manual_seed(self.args.seed)
        columns = getattr(self.data_collator, "valid_label_columns", LABEL_COLUMNS)

        def sampler_for(rows: Any) -> BatchSampler:
            if not shuffles:
                return in_order(rows, batch_size)
            return self.get_batch_sampler(rows, batch_size, drop_last, columns, generator, self.args.seed)

        def join(rows: "ConcatDataset[Any]", samplers: Sequence[BatchSampler]) -> BatchSampler:
            return self.get_multi_dataset_batch_sampler(rows, samplers, generator, self.args.seed)

        # Each process takes its part of a stream itself: accelerate could only hand out tensors.
        self.accelerator.dataloader_config.dispatch_batches = False
        if isinstance(data, Mapping):
            data = {name: self._with_name(rows, name) for name, rows in data.items()}
        settings = loader_settings(self.args, self.data_collator)
        loader: DataLoader[Any] = self.accelerator.prepare(
            data_loader(data, batch_size, drop_last, sampler_for, join, settings)
        )
        return loader

    # --- evaluation

    @property
    def moment(self) -> tuple[float, int]:
        """The epoch and step of the training; -1 and -1 before and after it, when the model may be another."""
        return (self.state.epoch or 0.0, self.state.global_step) if self.is_in_train else (-1, -1)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on each dataset, by default the trainer's, and the evaluator's metrics, all by name."""
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._with_name(data, name) for name, data in eval_dataset.items()}
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def evaluation_loop(
        self,
        dataloader: "DataLoader[Any]",
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss on one dataset; and the evaluator's metrics, with the first of several datasets only."""
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, Mapping) else []
        name = metric_key_prefix.removeprefix("eval_") if self.is_in_train else ""
        if self.evaluator is not None and (name not in names or name == names[0]):
            output.metrics.update(self._evaluator_metrics("eval" if name in names else metric_key_prefix))
        return output

    def _evaluator_metrics(self, prefix: str) -> dict[str, Any]:
        """What the evaluator finds, by names that begin with `prefix`. It runs in the main process, for all."""
        metrics: Any = {}
        assert self.evaluator is not None
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "eval"
            folder.mkdir(parents=True, exist_ok=True)
            epoch, step = self.moment
            metrics = self.evaluator(self.model, output_path=str(folder), epoch=epoch, steps=step)
            metrics = metrics if isinstance(metrics, Mapping) else {"evaluator": float(metrics)}
        (metrics,) = broadcast_object_list([dict(metrics)])
        return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}

    # --- checkpoints and the hub

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.model.save_pretrained(self.args.output_dir if output_dir is None else output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = CrossEncoder(resume_from_checkpoint, device="cpu", dtype=self.model.dtype).state_dict()
        if has_adapters(self.model.model):  # the one in use was saved, and is loaded as "default"
            name = f".{self.model.active_adapters()[0]}"
            saved = {re.sub(r"\.default(?=\.|$)", name, key): value for key, value in saved.items()}
        found = self.model.load_state_dict(saved, strict=not has_adapters(self.model.model))
        if found.unexpected_keys:
            raise CheckpointError(
                f"{resume_from_checkpoint} has weights that the model lacks: {found.unexpected_keys[:3]}"
            )
        self.model.mark_trained()

    def _load_best_model(self) -> None:
        try:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        except CrossEncError:
            place = self.state.best_model_checkpoint
            logger.exception(
                "the best checkpoint, %s, does not load: the model keeps the weights of the last step", place
            )
            return
        self.model.model_card_data.best_step = self.state.best_global_step

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        **_: Any,
    ) -> None:
        """Write the model's card to the output folder; what is given goes into it, other settings have no effect."""
        if not self.is_world_process_zero():
            return
        card = self.model.model_card_data
        card.language, card.license = language or card.language, license or card.license
        card.model_name = card.model_name or model_name
        new = [tags] if isinstance(tags, str) else list(tags or ())
        card.tags = [*card.tags, *(tag for tag in new if tag not in card.tags)]
        write_readme(self.model, Path(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._save()  # transformers would copy its own files alone
        super()._push_from_checkpoint(checkpoint_folder)


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """What is done after each step of the optimizer."""

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: CrossEncoder, optimizer: Any, **_: Any
    ) -> None:
        optimizer.zero_grad()  # of parameters that a loss has of its own, too
        model.mark_trained()


def _check_arguments(args: Any, can_evaluate: bool, compute_metrics: Any) -> None:
    if not isinstance(args, CrossEncoderTrainingArguments):
        raise ConfigError(f"args are {type(args).__name__}: pass CrossEncoderTrainingArguments")
    if args.fsdp or args.deepspeed:
        raise ConfigError("CrossEncoderTrainer trains in one process or with DDP: leave out fsdp and deepspeed")
    if args.eval_strategy != "no" and not can_evaluate:
        raise ConfigError(
            f"eval_strategy is {args.eval_strategy.value!r} and there is nothing to evaluate on: give an eval_dataset "
            "or an evaluator, or set eval_strategy='no'"
        )
    if args.train_sampling_strategy != "random":
        warnings.warn("train_sampling_strategy has no effect: choose a batch_sampler", UserWarning, 4)
    if compute_metrics is not None:
        warnings.warn("compute_metrics has no effect, there being no predictions: pass an evaluator", UserWarning, 4)


def _set_learning_rate(optimizer: torch.optim.Optimizer, trained: nn.Module, pattern: str, rate: float) -> None:
    """Move the parameters whose name has the pattern in it to groups with another learning rate."""
    chosen = {id(parameter) for name, parameter in trained.named_parameters() if re.search(pattern, name)}
    if not chosen:
        raise ConfigError(f"learning_rate_mapping has {pattern!r}, and no parameter has that in its name")
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if moved:
            optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": group["weight_decay"]})
