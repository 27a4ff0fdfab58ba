"""The model of a run, as a value that travels to every node: where it comes from and how to load its two halves.

The tokenizer is loaded by CPU tasks, the scorer by scoring actors; both from a node-local copy whose files are
checked against the digests that the run was planned with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import CheckpointError, InputError, ScoreError
from crossenc.records import TokenizedPairs
from pipelines import metrics
from pipelines.config import RerankConfig
from pipelines.prepare import Tokenizer


class Scorer(Protocol):
    """Scores tokenised pairs, float32 [P]; in batches of at most `max_batch_tokens`, without padding if packed."""

    @property
    def max_batch_tokens(self) -> int: ...

    @property
    def is_packed(self) -> bool: ...

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]: ...


class Model(Protocol):
    """What a run needs of a model. Instances are small and can be sent to other processes."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each file, or whatever else identifies the model's results exactly."""
        ...

    def score_range(self) -> tuple[float, float]:
        """Edges for the score histogram."""
        ...

    def load_tokenizer(self) -> Tokenizer: ...

    def load_scorer(self, threads: int) -> Scorer: ...

    def exact(self) -> "Model | None":
        """The same model computed in float32, to compare with; None where it is so already."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointModel:
    """A cross-encoder checkpoint: a folder that every node can read, a URI, or a hub id with `@revision`."""

    source: str
    dtype: str = "float32"
    max_length: int | None = None
    max_batch_tokens: int | None = None
    device: str | None = None
    compiles: bool = False
    activation: str = "checkpoint"  # or identity: scores are raw logits
    backend: str = "torch"
    onnx_file: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    expected: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.source

    def digests(self) -> Mapping[str, str]:
        from crossenc.checkpoint import file_digests

        folder, onnx_path = self.folder(), self._onnx_path()
        if onnx_path is not None and not (folder / onnx_path).is_file():
            raise CheckpointError(f"{self.source} has no {onnx_path}: make it with `crossenc export`")
        return file_digests(folder, onnx_path)

    def pinned(self) -> "CheckpointModel":
        """The same model, which from now on refuses to load from files with other digests."""
        return replace(self, expected=dict(self.digests()))

    def score_range(self) -> tuple[float, float]:
        from crossenc.loading import read_layout, read_num_labels, resolve_activation

        folder = self.folder()
        layout = read_layout(folder)
        num_labels = read_num_labels(folder, layout)
        if num_labels != 1:
            raise InputError(f"{self.source} gives {num_labels} scores a pair; reranking needs a model with one label")
        own = type(resolve_activation(layout, num_labels)).__name__
        return (0.0, 1.0) if own == "Sigmoid" and self.activation != "identity" else (-12.0, 12.0)

    def load_tokenizer(self) -> Tokenizer:
        from crossenc.tokenizer import load_tokenizer

        return load_tokenizer(self.folder(), self.max_length)

    def load_scorer(self, threads: int) -> Scorer:
        import torch

        from crossenc.engine import Engine
        from crossenc.tokenizer import load_tokenizer

        torch.set_num_threads(threads)
        folder = self.folder()
        self._check_files(folder)
        tokenizer = load_tokenizer(folder, self.max_length)
        if self.backend == "onnx":
            from crossenc.onnx.backend import OnnxSettings, load_engine

            settings = OnnxSettings(file_name=self._onnx_path() or "")
            engine = load_engine(folder, tokenizer, settings, self.max_batch_tokens)
        else:
            engine = Engine.from_checkpoint(
                folder,
                tokenizer,
                dtype=self.dtype,
                device=self.device,
                max_batch_tokens=self.max_batch_tokens,
                compiles=self.compiles,
            )
            engine = replace(engine, on_out_of_memory=metrics.out_of_memory)
        if self.activation == "identity":
            engine = engine.with_limits(torch.nn.Identity(), None)
        check_canary(engine, tokenizer, self.source)
        return engine

    def exact(self) -> "CheckpointModel | None":
        if self.dtype == "float32" and self.backend == "torch":
            return None
        onnx_path = self._onnx_path() or "\0"
        expected = {name: digest for name, digest in self.expected.items() if not name.startswith(onnx_path)}
        return replace(self, dtype="float32", compiles=False, backend="torch", onnx_file=None, expected=expected)

    def folder(self) -> Path:
        """The checkpoint on this machine, fetched first where it is not."""
        from crossenc.checkpoint import fetch

        return fetch(self.source, storage_options=self.storage_options, also=self._onnx_path())

    def _onnx_path(self) -> str | None:
        from crossenc.onnx.backend import FLOAT32_FILE, OnnxSettings

        return OnnxSettings(file_name=self.onnx_file or FLOAT32_FILE).path if self.backend == "onnx" else None

    def _check_files(self, folder: Path) -> None:
        from crossenc.checkpoint import file_digests

        if not self.expected:
            return
        found = file_digests(folder, self._onnx_path())
        changed = [name for name in sorted({*found, *self.expected}) if found.get(name) != self.expected.get(name)]
        if changed:
            raise CheckpointError(
                f"{folder} differs on this node from the model that the run was planned with ({', '.join(changed)});"
                " remove the copy so that it is fetched again"
            )


def from_config(config: RerankConfig) -> CheckpointModel:
    """The model that a job names."""
    scoring = config.scoring
    return CheckpointModel(
        source=config.model,
        dtype=scoring.dtype,
        max_length=scoring.max_length,
        max_batch_tokens=scoring.max_batch_tokens,
        device="cuda" if scoring.gpus_per_actor > 0 else "cpu",
        compiles=scoring.compile,
        activation=scoring.activation,
        backend=scoring.backend,
        onnx_file=scoring.onnx_file,
        storage_options=config.storage_options if "://" in config.model else {},
    )


def check_canary(scorer: Scorer, tokenizer: Tokenizer, name: str) -> None:
    """Scores one harmless pair. Raises ScoreError unless the score is finite: the model is broken then."""
    pairs = tokenizer.encode(["what is a query"], ["a query is a question put to a search engine"])
    score = scorer.score(pairs)
    if not np.isfinite(score).all():
        raise ScoreError(f"{name} gives {score.ravel()[0]} for an ordinary pair: its weights are damaged")
