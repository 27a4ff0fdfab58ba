"""CrossEncoder: a checkpoint that scores texts, with the calls that users of sentence-transformers know.

It joins the tokenizer and the engine, and knows neither files of queries nor clusters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from crossenc.checkpoint import fetch
from crossenc.engine import Activation, Engine
from crossenc.errors import ConfigError, InputError
from crossenc.ranking import order
from crossenc.tokenizer import PairTokenizer

Pair = tuple[str, str] | list[str]
Scores = NDArray[np.float32] | np.float32 | torch.Tensor | list[torch.Tensor]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CrossEncoder:
    """A cross-encoder loaded from a folder, a URI or the hub, in eval mode.

    `max_length` is in tokens, `dtype` a torch dtype or its name (float32 when None), `device` the fastest
    that the machine has when None. `activation_fn` maps float32 logits [B, L] to scores and `num_labels` is
    L; both are the checkpoint's own when None. `max_batch_tokens` bounds a batch's padded tokens.
    Raises InputError, CheckpointError or StorageError as `crossenc.checkpoint.fetch` does, ConfigError for a
    setting that does not fit the checkpoint.
    """

    def __init__(  # noqa: PLR0913 - one flat, keyword-only list is what users of this class's namesake expect
        self,
        model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        activation_fn: Activation | None = None,
        num_labels: int | None = None,
        cache_folder: str | Path | None = None,
        max_batch_tokens: int | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        _check_activation(activation_fn)
        folder = fetch(model_name_or_path, revision=revision, cache_dir=cache_folder, storage_options=storage_options)
        self._tokenizer = PairTokenizer.from_checkpoint(folder, max_length)
        self._engine = Engine.from_checkpoint(
            folder,
            self._tokenizer,
            num_labels=num_labels,
            dtype=_resolve_dtype(dtype),
            device=device,
            activation=activation_fn,
            max_batch_tokens=max_batch_tokens,
        )

    @property
    def engine(self) -> Engine:
        """The Scorer inside, for pairs that are already tokenised."""
        return self._engine

    @property
    def model(self) -> PreTrainedModel:
        return self._engine.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._tokenizer.tokenizer

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def max_length(self) -> int:
        return self._tokenizer.max_length

    @property
    def num_labels(self) -> int:
        return int(self.config.num_labels)

    @property
    def activation_fn(self) -> Activation:
        return self._engine.activation

    def predict(
        self,
        inputs: Pair | Iterable[Pair] | NDArray[Any],
        *,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Scores:
        """Score (query, document) pairs, in the order given.

        Returns float32 [n], or [n, L] for L > 1 labels; without the first dimension for a single pair. It is
        a numpy array, or a tensor on the model's device with `convert_to_tensor`, or a list of n tensors when
        both flags are off. `apply_softmax` normalises over the labels, where there are several. `batch_size`
        caps the pairs of a batch beside the token budget.
        Raises InputError naming the first input that is not a pair of texts.
        """
        queries, documents, is_single = _split_pairs(inputs)
        scores = torch.from_numpy(self._score(queries, documents, activation_fn, batch_size, bool(show_progress_bar)))
        if apply_softmax and scores.ndim > 1:
            scores = torch.softmax(scores, dim=1)
        if convert_to_tensor:
            on_device = scores.to(self.device)
            return on_device[0] if is_single else on_device
        if convert_to_numpy:
            array: NDArray[np.float32] = scores.numpy()
            return array[0] if is_single else array
        tensors = list(scores.to(self.device))
        return tensors[0] if is_single else tensors

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        activation_fn: Activation | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Order `documents` for `query`, best first; documents with equal scores keep their order.

        Each result holds `corpus_id` (the position in `documents`), `score`, and `text` with
        `return_documents`. `top_k` keeps the first so many.
        Raises ValueError for a model with several labels or a negative `top_k`, ScoreError when a score is
        not finite, InputError naming the first document that is not a text.
        """
        if self.num_labels != 1:
            raise InputError(
                f"rank needs one score a document, but this model has {self.num_labels} labels: use predict"
            )
        if top_k is not None and top_k < 0:
            raise InputError(f"top_k is {top_k}: give the number of documents to keep, or None to keep all")
        texts = list(documents)
        scores = self._score([query] * len(texts), texts, activation_fn, batch_size, bool(show_progress_bar))
        # Positions serve as first-stage ranks; they are all different, so document ids decide nothing.
        best_first = order(scores, np.arange(len(texts)), [""] * len(texts))[:top_k].tolist()
        results: list[dict[str, Any]] = [
            {"corpus_id": position, "score": float(scores[position])} for position in best_first
        ]
        if return_documents:
            for result in results:
                result["text"] = texts[result["corpus_id"]]
        return results

    def _score(
        self,
        queries: list[str],
        documents: list[str],
        activation_fn: Activation | None,
        batch_size: int | None,
        show_progress_bar: bool,
    ) -> NDArray[np.float32]:
        _check_activation(activation_fn)
        engine = replace(self._engine, activation=activation_fn or self.activation_fn, max_batch_pairs=batch_size)
        pairs = self._tokenizer.encode(queries, documents)
        with _progress(len(pairs), show_progress_bar) as on_batch:
            return engine.score(pairs, on_batch)


@contextmanager
def _progress(num_pairs: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a progress bar on by so many pairs."""
    columns = (TextColumn("Scoring pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=num_pairs)
        yield lambda num_done: bar.advance(task, num_done)


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype in _DTYPES:
        return _DTYPES[str(dtype)]
    raise ConfigError(f"dtype is {dtype!r}: choose from {', '.join(_DTYPES)}")


def _check_activation(activation_fn: Activation | None) -> None:
    if activation_fn is not None and (isinstance(activation_fn, type) or not callable(activation_fn)):
        raise ConfigError(f"activation_fn is {activation_fn!r}: pass an instance such as torch.nn.Sigmoid()")


def _split_pairs(inputs: Pair | Iterable[Pair] | NDArray[Any]) -> tuple[list[str], list[str], bool]:
    """Queries, documents, and whether `inputs` is one bare pair."""
    if isinstance(inputs, str | Mapping):
        raise InputError("predict needs a (query, document) pair or several of them, not a single text or mapping")
    items = list(inputs)
    is_single = len(items) == 2 and all(isinstance(item, str) for item in items)
    pairs = [items] if is_single else items
    for position, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list | np.ndarray) or len(pair) != 2:
            raise InputError(f"input {position} is not a (query, document) pair: give two texts")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], is_single
