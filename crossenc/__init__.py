"""Rerank billions of query-document pairs with cross-encoders.

This is the library's public face: a name is imported with it only where that needs no torch.
"""

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
    from crossenc.fitting import InputExample
    from crossenc.model import CrossEncoder

    __version__: str

__all__ = [
    "Candidates",
    "CheckpointError",
    "ConfigError",
    "CrossEncError",
    "CrossEncoder",
    "InputError",
    "InputExample",
    "Ranking",
    "RunConflictError",
    "ScoreError",
    "ScoredDoc",
    "StorageError",
    "__version__",
    "rank",
]


def __getattr__(name: str) -> Any:
    """Import on first use what takes seconds (torch) or reads files (the version)."""
    if name == "CrossEncoder":
        from crossenc.model import CrossEncoder

        return CrossEncoder
    if name == "InputExample":
        from crossenc.fitting import InputExample

        return InputExample
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("crossenc")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+uninstalled"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
