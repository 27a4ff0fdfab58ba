"""Models that misbehave on purpose: over documents that hold a marker word, or when they are loaded."""

import hashlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossenc.batching import padded_tokens
from crossenc.records import TokenizedPairs
from crossenc.testing import FakeScorer, FakeTokenizer
from pipelines import storage
from pipelines.testing import FakeModel

#: Words that a document may hold, and what the stumbling scorer does when it meets one.
NAN, RAISE, KILL, QUIT = "markernan", "markerraise", "markerkill", "markerquit"


@dataclass(frozen=True, slots=True)
class StumblingModel(FakeModel):
    """A FakeModel that gives NaN, raises, is killed or exits (with 0) on documents with a marker word.

    It takes `seconds_per_pair`. With `on_load` its scorer cannot be loaded at all. Its scorers write a line to the file
    `score_log` when they begin and when they end: which, and a digest of the pairs.
    """

    seconds_per_pair: float = 0.0
    on_load: Literal["", "raise", "kill"] = ""
    score_log: str = ""

    def digests(self) -> Mapping[str, str]:
        return {"stumbling": f"max_length {self.max_length}"}

    def load_scorer(self, threads: int) -> "StumblingScorer":
        if self.on_load == "raise":
            raise RuntimeError("this model cannot be loaded")
        if self.on_load == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return StumblingScorer(self.seconds_per_pair, marker_ids(self.load_tokenizer()), self.score_log)


@dataclass(frozen=True, slots=True)
class ImpatientModel(StumblingModel):
    """A StumblingModel that sets how long storage is retried, in every process that it is sent to."""

    retry_seconds: float = storage.RETRY_SECONDS

    def __post_init__(self) -> None:
        storage.RETRY_SECONDS = self.retry_seconds

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class StumblingScorer:
    seconds_per_pair: float
    markers: Mapping[str, int]
    score_log: str = ""
    max_batch_tokens: int = 4096
    is_packed: bool = False
    forward_kind: str = "padded: there is no model"

    def num_fed_tokens(self, lengths: NDArray[np.int64]) -> int:
        return padded_tokens(lengths, self.max_batch_tokens)

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]:
        found = {word for word, token in self.markers.items() if (pairs.input_ids == token).any()}
        if KILL in found:
            os.kill(os.getpid(), signal.SIGKILL)
        if QUIT in found:
            os._exit(0)
        if RAISE in found:
            raise RuntimeError("this document cannot be scored")
        self._note("begin", pairs)
        scores = FakeScorer(self.seconds_per_pair).score(pairs)
        self._note("end", pairs)
        bad = np.add.reduceat(pairs.input_ids == self.markers[NAN], pairs.offsets[:-1]) > 0
        return np.where(bad, np.float32(np.nan), scores)

    def _note(self, what: str, pairs: TokenizedPairs) -> None:
        if self.score_log:
            digest = hashlib.sha256(pairs.input_ids.tobytes()).hexdigest()[:16]
            with open(self.score_log, "a") as file:
                file.write(f"{what} {digest}\n")


def marker_ids(tokenizer: FakeTokenizer) -> dict[str, int]:
    words = [NAN, RAISE, KILL, QUIT]
    return dict(zip(words, _ids(tokenizer, words), strict=True))


def plain_words(number: int) -> list[str]:
    """So many words that no stumbling scorer takes for a marker: an id is a hash, which words may share."""
    tokenizer = FakeTokenizer()
    words = [f"w{i}" for i in range(2 * number)]
    markers = set(marker_ids(tokenizer).values())
    return [word for word, id in zip(words, _ids(tokenizer, words), strict=True) if id not in markers][:number]


def _ids(tokenizer: FakeTokenizer, words: list[str]) -> list[int]:
    pairs = tokenizer.encode([""] * len(words), words)
    return [int(pairs.input_ids[start + 2]) for start in pairs.offsets[:-1]]
