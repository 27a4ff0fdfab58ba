"""Training on rows of texts with transformers' Trainer, which needs the packages of `crossenc[train]`.

trainer         the trainer: what it adds to transformers'
arguments       its settings
collator        rows to batches
samplers        which rows make a batch
data            datasets checked, named, loaded
bound_losses    losses with the trainer's model in them
card_callback   what a model card learns from training
lists           tokenised lists with labels, for training without the trainer
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "BatchSamplers": "samplers",
    "CrossEncoderDataCollator": "collator",
    "CrossEncoderModelCardCallback": "card_callback",
    "CrossEncoderTrainer": "trainer",
    "CrossEncoderTrainingArguments": "arguments",
    "DefaultBatchSampler": "samplers",
    "MultiDatasetBatchSamplers": "samplers",
    "MultiDatasetDefaultBatchSampler": "samplers",
}


def __getattr__(name: str) -> Any:
    """Import the trainer and what goes with it on first use: `lists` does without torch and transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import accelerate  # noqa: F401 - transformers needs it, and would not say so
    except ModuleNotFoundError as error:
        message = "training needs the packages accelerate and datasets: pip install 'crossenc[train]'"
        raise ImportError(message) from error
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
