"""Training on rows of texts with transformers' Trainer. Needs the packages of `crossenc[train]`.

trainer         the trainer: what it adds to transformers'
arguments       its settings
collator        rows to batches
samplers        which rows make a batch
data            datasets checked, named, loaded
bound_losses    losses with the trainer's model in them
card_callback   what a model card learns from training
"""

try:
    import accelerate  # noqa: F401 - transformers needs it, and would not say so
except ModuleNotFoundError as error:
    raise ImportError("training needs the packages accelerate and datasets: pip install 'crossenc[train]'") from error

from crossenc.training.arguments import CrossEncoderTrainingArguments
from crossenc.training.card_callback import CrossEncoderModelCardCallback
from crossenc.training.collator import CrossEncoderDataCollator
from crossenc.training.samplers import (
    BatchSamplers,
    DefaultBatchSampler,
    MultiDatasetBatchSamplers,
    MultiDatasetDefaultBatchSampler,
)
from crossenc.training.trainer import CrossEncoderTrainer

__all__ = [
    "BatchSamplers",
    "CrossEncoderDataCollator",
    "CrossEncoderModelCardCallback",
    "CrossEncoderTrainer",
    "CrossEncoderTrainingArguments",
    "DefaultBatchSampler",
    "MultiDatasetBatchSamplers",
    "MultiDatasetDefaultBatchSampler",
]
