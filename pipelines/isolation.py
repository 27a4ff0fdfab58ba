"""Scores pairs that may raise or kill the process, and finds the guilty ones by halving.

`score_halving` contains exceptions in this process. `score_isolated` runs the scorer in a child process, so that a
crash (segmentation fault, out-of-memory kill, exit) costs the child only.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
from numpy.typing import NDArray

from crossenc.batching import token_budget_batches
from crossenc.errors import ScoreError
from crossenc.records import Scorer, TokenizedPairs
from pipelines.model import Model, check_canary

#: A shard whose scoring kills more children than this is given up: what is left of it is refused.
MAX_CHILD_DEATHS = 64
_GAVE_UP = ("scoring_crash", "not tried: the shard has ended too many scoring processes")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Scores float32 [P], NaN where there is none; `failures` maps such a pair's index to (reason, detail)."""

    scores: NDArray[np.float32]
    failures: dict[int, tuple[str, str]]


def select(pairs: TokenizedPairs, indices: NDArray[np.int64]) -> TokenizedPairs:
    """The chosen pairs, in the given order."""
    lengths = pairs.lengths[indices]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1]) + np.repeat(pairs.offsets[indices] - offsets[:-1], lengths)
    token_type_ids = None if pairs.token_type_ids is None else pairs.token_type_ids[tokens]
    return TokenizedPairs(pairs.input_ids[tokens], offsets, token_type_ids, pairs.truncated[indices])


def score_halving(scorer: Scorer, pairs: TokenizedPairs) -> Outcome:
    """Scores all pairs; where that raises, halves until the pairs that raise stand alone."""
    outcome = Outcome(np.full(len(pairs), np.nan, dtype=np.float32), {})
    if len(pairs):
        _halve(lambda chosen: scorer.score(select(pairs, chosen)), np.arange(len(pairs)), outcome)
    return outcome


def _halve(score: Callable[[NDArray[np.int64]], NDArray[np.float32]], indices: NDArray[np.int64], out: Outcome) -> None:
    try:
        out.scores[indices] = score(indices)
        return
    except Exception as error:
        problem = _describe(error)
    # Outside of the handler, where the traceback no longer holds what the failed forward pass had on the device.
    if len(indices) == 1:
        out.failures[int(indices[0])] = ("scoring_error", problem)
        return
    middle = len(indices) // 2
    _halve(score, indices[:middle], out)
    _halve(score, indices[middle:], out)


def is_broken(model: Model, scorer: Scorer) -> bool:
    """Whether a scorer that raised cannot score an ordinary pair either.

    A CUDA error sticks to its process: after one bad pair every other one raises too, and none of them is guilty.
    """
    try:
        check_canary(scorer, model.load_tokenizer(), model.name)
    except Exception:
        return True
    return False


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def score_isolated(model: Model, threads: int, scorer: Scorer, pairs: TokenizedPairs) -> Outcome:
    """Scores batch by batch in a child process; a batch that kills or breaks it is halved down to single pairs.

    Raises ScoreError where no child can be started.
    """
    outcome = Outcome(np.full(len(pairs), np.nan, dtype=np.float32), {})
    pending = token_budget_batches(pairs.lengths, scorer.max_batch_tokens, is_packed=scorer.is_packed)[::-1]
    child = _Child(model, threads)
    deaths = 0
    try:
        while pending:
            indices = pending.pop()
            if deaths > MAX_CHILD_DEATHS:
                outcome.failures.update(dict.fromkeys(indices.tolist(), _GAVE_UP))
                continue
            reply = child.score(select(pairs, indices))
            if not isinstance(reply, str):
                outcome.scores[indices] = reply
                continue
            reason, _, detail = reply.partition(": ")
            if reason == "scoring_crash":
                deaths += 1
                child.close()  # the next pairs start another
            if len(indices) == 1:
                outcome.failures.update(dict.fromkeys(indices.tolist(), (reason, detail)))
            else:
                middle = len(indices) // 2
                pending += [indices[middle:], indices[:middle]]
    finally:
        child.close()
    return outcome


class _Child:
    """A process with a scorer of its own, started when it is first needed."""

    def __init__(self, model: Model, threads: int) -> None:
        self._model, self._threads = model, threads
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32] | str:
        """The scores, or "reason: detail"."""
        if self._pipe is None:
            # Children are forked by a clean process that has torch imported already: each new one starts at once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["crossenc.engine", "crossenc.tokenizer", "pipelines.isolation"])
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._model, self._threads, theirs), daemon=True)
            self._process.start()
            theirs.close()
            self._wait_until_ready()
        try:
            self._pipe.send(pairs)
            reply: NDArray[np.float32] | str = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            assert self._process is not None
            self._process.join(5)
            return f"scoring_crash: the process ended with code {self._process.exitcode}"
        return reply

    def _wait_until_ready(self) -> None:
        assert self._pipe is not None
        try:
            problem = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            problem = "it died while loading the model"
        if problem is not None:
            raise ScoreError(f"could not start a separate scoring process: {problem}")

    def close(self) -> None:
        if self._pipe is not None and self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join(5)
        self._pipe = self._process = None


def _serve(model: Model, threads: int, pipe: Connection) -> None:
    try:
        scorer = model.load_scorer(threads)
    except Exception as error:
        pipe.send(_describe(error))
        return
    pipe.send(None)
    while True:
        try:
            pairs: TokenizedPairs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(scorer.score(pairs))
            continue
        except Exception as error:
            problem = _describe(error)
        # Outside of the handler, as above.
        reason = "scoring_crash" if is_broken(model, scorer) else "scoring_error"
        pipe.send(f"{reason}: {problem}")
