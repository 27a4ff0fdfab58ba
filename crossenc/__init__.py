"""Rerank billions of query-document pairs with cross-encoders.

This is the library's public face: a name is imported with it only where that needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crossenc.errors import (
    CheckpointError,
    ConfigError,
    CrossEncError,
    InputError,
    RunConflictError,
    ScoreError,
    StorageError,
)
from crossenc.ranking import rank
from crossenc.records import Candidates, Ranking, ScoredDoc

if TYPE_CHECKING:
    from crossenc.card import CrossEncoderModelCardData
    from crossenc.fitting import InputExample
    from crossenc.model import CrossEncoder
    from crossenc.training import (
        BatchSamplers,
        CrossEncoderDataCollator,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        MultiDatasetBatchSamplers,
    )

    __version__: str

__all__ = [
    "BatchSamplers",
    "Candidates",
    "CheckpointError",
    "ConfigError",
    "CrossEncError",
    "CrossEncoder",
    "CrossEncoderDataCollator",
    "CrossEncoderModelCardData",
    "CrossEncoderTrainer",
    "CrossEncoderTrainingArguments",
    "InputError",
    "InputExample",
    "MultiDatasetBatchSamplers",
    "Ranking",
    "RunConflictError",
    "ScoreError",
    "ScoredDoc",
    "StorageError",
    "__version__",
    "rank",
]

#: Names whose modules take seconds to import.
_HEAVY = {
    "BatchSamplers": "crossenc.training",
    "CrossEncoder": "crossenc.model",
    "CrossEncoderDataCollator": "crossenc.training",
    "CrossEncoderModelCardData": "crossenc.card",
    "CrossEncoderTrainer": "crossenc.training",
    "CrossEncoderTrainingArguments": "crossenc.training",
    "InputExample": "crossenc.fitting",
    "MultiDatasetBatchSamplers": "crossenc.training",
}


def __getattr__(name: str) -> Any:
    """Import on first use what takes seconds (torch) or reads files (the version)."""
    if name in _HEAVY:
        return getattr(import_module(_HEAVY[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("crossenc")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+uninstalled"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
