"""How CrossEncoder scores texts: here or by a pool, tokenised while others are scored, with a progress bar.

Shape letters: P pairs, L labels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crossenc.engine import Activation, Budget
from crossenc.errors import ConfigError
from crossenc.pairs import Pair, split_texts
from crossenc.pool import Pool
from crossenc.ranking import order
from crossenc.records import TokenizedPairs
from crossenc.tokenizer import check_texts

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

#: Pairs that are tokenised while those before them are scored, and that are sorted by length among each other.
PAIRS_AHEAD = 8192


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How one call scores. `activation_fn` is the model's own when None."""

    prompt: str
    activation_fn: Activation | None
    batch_size: int | None
    shows_progress: bool
    processing_kwargs: Mapping[str, Any] = field(default_factory=dict)


def score_inputs(
    model: "CrossEncoder",
    inputs: Iterable[Any],
    settings: ScoreSettings,
    device: str | torch.device | list[str | torch.device] | None,
    pool: Pool | None,
    chunk_size: int | None,
) -> NDArray[np.float32]:
    """The scores [P] or [P, L] of pairs, among which there may be texts that stand alone."""
    pairs, places, texts, places_of_texts = split_texts(inputs)
    queries, documents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = score_pairs(model, queries, documents, settings, device, pool, chunk_size)
    if not texts:
        return scores
    alone = [score_text(model, text, settings) for text in texts]
    return np.concatenate([scores, *alone])[np.argsort([*places, *places_of_texts])]


def score_pairs(
    model: "CrossEncoder",
    queries: list[str],
    documents: list[str],
    settings: ScoreSettings,
    device: str | torch.device | list[str | torch.device] | None,
    pool: Pool | None,
    chunk_size: int | None,
) -> NDArray[np.float32]:
    """The scores [P] or [P, L] of pairs, computed here, or by the processes of a pool."""
    if isinstance(device, list) and pool is None:
        with model.start_multi_process_pool(device) as own_pool:
            return score_pairs(model, queries, documents, settings, None, own_pool, chunk_size)
    check_texts(queries, "query")  # all of them now, so that an error names the place among all
    check_texts(documents, "document")
    if pool is None:
        if device is not None:
            model.to(torch.device(device))  # type: ignore[arg-type]  # no list, as seen above
        return _score_here(model, queries, documents, settings)
    pairs = list(zip(queries, documents, strict=True))
    own_activation = replace(
        settings, activation_fn=settings.activation_fn or model.activation_fn, shows_progress=False
    )
    chunks = pool.map(_PoolTask(own_activation), pairs, chunk_size)
    return np.concatenate(chunks) if chunks else _score_here(model, [], [], settings)


def _score_here(
    model: "CrossEncoder", queries: list[str], documents: list[str], settings: ScoreSettings
) -> NDArray[np.float32]:
    check_activation(settings.activation_fn)
    engine = model.engine.with_limits(settings.activation_fn, settings.batch_size)
    tokenizer = model.pair_tokenizer(settings.processing_kwargs)

    def tokenise(start: int) -> TokenizedPairs:
        chunk = slice(start, start + PAIRS_AHEAD)
        return tokenizer.encode(queries[chunk], documents[chunk], settings.prompt)

    with _progress(len(queries), settings.shows_progress) as on_batch, ThreadPoolExecutor(1) as thread:
        scores, budget = [], Budget(engine.max_batch_tokens)  # what did not fit once is not tried again
        ahead = thread.submit(tokenise, 0)
        for start in range(0, max(1, len(queries)), PAIRS_AHEAD):
            pairs = ahead.result()
            if start + PAIRS_AHEAD < len(queries):
                ahead = thread.submit(tokenise, start + PAIRS_AHEAD)
            scores.append(engine.score(pairs, on_batch, budget))
    return np.concatenate(scores)


def score_text(model: "CrossEncoder", text: str, settings: ScoreSettings) -> NDArray[np.float32]:
    """The score of one text without a document, [1] or [1, L]."""
    check_activation(settings.activation_fn)
    tokenizer = model.pair_tokenizer(settings.processing_kwargs)
    engine = model.engine.with_limits(settings.activation_fn, settings.batch_size)
    return engine.score(tokenizer.encode_text(text, settings.prompt))


@dataclass(frozen=True, slots=True)
class _PoolTask:
    """What a process of a pool does with its model and a chunk of pairs."""

    settings: ScoreSettings

    def __call__(self, model: "CrossEncoder", pairs: Sequence[Pair]) -> NDArray[np.float32]:
        queries, documents = zip(*pairs, strict=True)
        return _score_here(model, list(queries), list(documents), self.settings)


def ranked(
    scores: NDArray[np.float32], texts: Sequence[str], top_k: int | None, return_documents: bool
) -> list[dict[str, Any]]:
    """The documents of one query as `rank` gives them, best first."""
    # Positions serve as first-stage ranks; they are all different, so document ids decide nothing.
    best_first = order(scores, np.arange(len(texts)), [""] * len(texts))[:top_k].tolist()
    results: list[dict[str, Any]] = [
        {"corpus_id": position, "score": float(scores[position])} for position in best_first
    ]
    if return_documents:
        for result in results:
            result["text"] = texts[result["corpus_id"]]
    return results


@contextmanager
def _progress(num_pairs: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a progress bar on by so many pairs."""
    columns = (TextColumn("Scoring pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=num_pairs)
        yield lambda num_done: bar.advance(task, num_done)


def check_activation(activation_fn: Activation | None) -> None:
    """Raise ConfigError for what is no activation, such as a class instead of an instance."""
    if activation_fn is not None and (isinstance(activation_fn, type) or not callable(activation_fn)):
        raise ConfigError(f"activation_fn is {activation_fn!r}: pass an instance such as torch.nn.Sigmoid()")
