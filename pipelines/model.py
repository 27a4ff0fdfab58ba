"""The model of a run, as a value that travels to every node: where it comes from and how to load its two halves.

The tokenizer is loaded by CPU tasks, the scorer by scoring actors; both from a node-local copy whose files are
checked against the digests that the run was planned with. Here, too, a job's name for a model becomes a place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crossenc.errors import CheckpointError, ConfigError, InputError, ScoreError
from crossenc.records import Scorer
from pipelines import metrics, registry
from pipelines.config import RerankConfig
from pipelines.prepare import Tokenizer
from pipelines.storage import Location, locate


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
    """A cross-encoder checkpoint: a folder that every node can read, a URI, or a hub id with `@revision`.

    `label` is what people call it; that of a registry has in `registered` the digests it must have.
    """

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
    label: str | None = None
    registered: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.label or self.source

    def digests(self) -> Mapping[str, str]:
        from crossenc.checkpoint import file_digests

        folder, onnx_path = self.folder(), self._onnx_path()
        if onnx_path is not None and not (folder / onnx_path).is_file():
            raise CheckpointError(f"{self.name} has no {onnx_path}: make it with `crossenc export`")
        return file_digests(folder, onnx_path)

    def pinned(self) -> "CheckpointModel":
        """The same model, which from now on refuses to load from files with other digests.

        Raises CheckpointError where they are not those of its version in the registry.
        """
        found = dict(self.digests())
        registered = found if self.registered is None else self.registered
        altered = [name for name, digest in found.items() if registered.get(name) != digest]
        if altered:
            raise CheckpointError(
                f"{altered[0]} of {self.name} was altered since the version was stored; restore it, or roll back with"
                " `crossenc rollback`"
            )
        return replace(self, expected=found)

    def score_range(self) -> tuple[float, float]:
        from crossenc.layout import activation_kind, read_layout, read_num_labels

        folder = self.folder()
        layout = read_layout(folder)
        num_labels = read_num_labels(folder, layout)
        if num_labels != 1:
            raise InputError(f"{self.name} gives {num_labels} scores a pair; reranking needs a model with one label")
        own = activation_kind(layout, num_labels)
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
        check_canary(engine, tokenizer, self.name)
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


def choose(
    source: str,
    registry_uri: str | None,
    options: Mapping[str, Any],
    planned: Callable[[], Mapping[str, str]] = dict,
) -> tuple[str, str]:
    """A model as a job names it, with the version of the registry that the job uses; and what people should hear.

    registry://name is the current version. `planned()` gives the parts of the run that is stored, if there is one: it
    goes on with the version that it was planned with, wherever the registry points now, since a run never mixes two.
    """
    if not source.startswith(registry.SCHEME):
        return source, ""
    name, version = registry.parse(source)
    if version is not None:
        return source, ""
    place = _registry(source, registry_uri, options)
    before = planned().get(registry.PLAN_PART, "")
    if not before.startswith(f"{source}@"):
        found, _ = registry.resolve(source, place)
        return found.source, f"the model is {found.source}"
    entry = registry.current(place, name)
    if entry is None or f"{source}@{entry.version}" == before:
        return before, ""
    return before, (
        f"this run was planned with {before} and stays with it; the current version is {entry.version}: another output,"
        " or --new-run, takes that"
    )


def checkpoint(source: str, registry_uri: str | None, options: Mapping[str, Any], **settings: Any) -> CheckpointModel:
    """The checkpoint that `source` names, as `choose` gives it, with `settings` of CheckpointModel.

    A folder becomes its full path, since workers have working folders of their own. Raises InputError where the
    registry has no such version, RunConflictError where that is damaged.
    """
    if not source.startswith(registry.SCHEME):
        folder = Path(source).expanduser()
        if "://" not in source and folder.is_dir():
            return CheckpointModel(source=str(folder.resolve()), label=source, **settings)
        return CheckpointModel(source=source, storage_options=options if "://" in source else {}, **settings)
    version, place = registry.resolve(source, _registry(source, registry_uri, options))
    return CheckpointModel(
        source=place.path if place.scheme == "file" else place.uri,
        storage_options=place.options,
        label=version.source,
        registered=version.model_digests,
        **settings,
    )


def registered_part(source: str) -> dict[str, str]:
    """The part of a fingerprint that a model of a registry adds to the digests of its files."""
    return {registry.PLAN_PART: source} if source.startswith(registry.SCHEME) else {}


def _registry(source: str, uri: str | None, options: Mapping[str, Any]) -> Location:
    if uri is None:
        raise ConfigError(
            f"model {source}: say where the registry is, by `registry: s3://bucket/models` in the job file or by"
            " CROSSENC_REGISTRY in the environment"
        )
    return locate(uri, options)


def from_config(config: RerankConfig) -> CheckpointModel:
    """The model that a job names."""
    scoring = config.scoring
    return checkpoint(
        config.model,
        config.registry,
        config.storage_options,
        dtype=scoring.dtype,
        max_length=scoring.max_length,
        max_batch_tokens=scoring.max_batch_tokens,
        device="cuda" if scoring.gpus_per_actor > 0 else "cpu",
        compiles=scoring.compile,
        activation=scoring.activation,
        backend=scoring.backend,
        onnx_file=scoring.onnx_file,
    )


def check_canary(scorer: Scorer, tokenizer: Tokenizer, name: str) -> None:
    """Scores one harmless pair. Raises ScoreError unless the score is finite: the model is broken then."""
    pairs = tokenizer.encode(["what is a query"], ["a query is a question put to a search engine"])
    score = scorer.score(pairs)
    if not np.isfinite(score).all():
        raise ScoreError(
            f"{name} gives {score.ravel()[0]} for an ordinary pair: its weights are damaged, or too large for its"
            " number format; fetch the model again, or take dtype: float32"
        )
