"""What a CrossEncoderTrainer is told: transformers' TrainingArguments and a few more. Knows no model and no data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import BatchSampler
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from crossenc.errors import ConfigError
from crossenc.losses._texts import full_name
from crossenc.training.samplers import BatchSamplers, MultiDatasetBatchSamplers

_SAMPLERS = ("batch_sampler", "multi_dataset_batch_sampler")


@dataclass
class CrossEncoderTrainingArguments(TrainingArguments):  # type: ignore[misc]
    r"""transformers' TrainingArguments and these:

    `prompts` is the text before every query: one for all datasets, or a dict with one for each by name. A batch
    sampler is named as `BatchSamplers` says, or is a class or function that is called with the dataset and
    `batch_size`, `drop_last`, `valid_label_columns`, `generator` and `seed`; one for several datasets is named as
    `MultiDatasetBatchSamplers` says, or is called with the concatenated dataset and `batch_samplers`, `generator` and
    `seed`. `learning_rate_mapping` gives parameters whose name a regular expression finds a learning rate of their
    own: `{r"classifier\.": 1e-3}`. `router_mapping` reaches losses as `task`; models here have no routes, and the
    losses of crossenc take it for compatibility. `warmup_ratio` is the old way to give `warmup_steps` as a fraction.

    Only the loss is computed in evaluation; figures come from evaluators. Raises ConfigError for a dict given as a
    text that is not JSON, ValueError for an unknown name.
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "prompts", "learning_rate_mapping", "router_mapping")

    prompts: dict[str, str] | str | None = field(default=None, metadata={"help": "The text before every query."})
    batch_sampler: BatchSamplers | str | Callable[..., BatchSampler] = field(
        default=BatchSamplers.BATCH_SAMPLER, metadata={"help": "Which rows make a batch."}
    )
    multi_dataset_batch_sampler: MultiDatasetBatchSamplers | str | Callable[..., BatchSampler] = field(
        default=MultiDatasetBatchSamplers.PROPORTIONAL, metadata={"help": "Which dataset the next batch is from."}
    )
    router_mapping: dict[str, str] | str | None = field(
        default_factory=dict, metadata={"help": "The task of each dataset, handed to losses."}
    )
    learning_rate_mapping: dict[str, float] | str | None = field(
        default_factory=dict, metadata={"help": "Learning rates by a regular expression of parameter names."}
    )
    warmup_ratio: float | None = field(default=None, metadata={"help": "Deprecated: write warmup_steps."})

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            warnings.warn("warmup_ratio is deprecated: write warmup_steps, it may be a fraction", DeprecationWarning, 3)
            self.warmup_steps: float = self.warmup_steps or self.warmup_ratio
            self.warmup_ratio = None
        super().__post_init__()
        if isinstance(self.batch_sampler, str):
            self.batch_sampler = BatchSamplers(self.batch_sampler)
        if isinstance(self.multi_dataset_batch_sampler, str):
            self.multi_dataset_batch_sampler = MultiDatasetBatchSamplers(self.multi_dataset_batch_sampler)
        for name in ("learning_rate_mapping", "router_mapping"):
            value = getattr(self, name) or {}
            if isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}: give a dict, or one as JSON")
            setattr(self, name, value)
        self.prediction_loss_only = True
        # Buffers that DDP writes between two forward passes of one step would break the backward pass.
        self.ddp_broadcast_buffers = False
        if self.parallel_mode == ParallelMode.DISTRIBUTED:
            self.dataloader_drop_last = True  # processes with fewer batches would leave the others waiting

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values; a sampler of one's own by its name."""
        values: dict[str, Any] = super().to_dict()
        return values | {name: full_name(values[name]) for name in _SAMPLERS if callable(values[name])}
