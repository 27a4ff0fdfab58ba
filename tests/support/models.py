"""Models that misbehave on purpose: a fake one that stumbles over marked documents."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossenc.records import TokenizedPairs
from crossenc.testing import FakeScorer, FakeTokenizer
from pipelines.testing import FakeModel

#: Words that a document may hold, and what the stumbling scorer does when it meets one.
NAN, RAISE, KILL, EXIT = "markernan", "markerraise", "markerkill", "markerexit"


@dataclass(frozen=True, slots=True)
class StumblingModel(FakeModel):
    """A FakeModel that gives NaN, raises, is killed or exits on documents with one of the marker words."""

    def digests(self) -> Mapping[str, str]:
        return {"stumbling": f"max_length {self.max_length}"}

    def load_scorer(self, threads: int) -> "StumblingScorer":
        tokenizer = self.load_tokenizer()
        return StumblingScorer(self.seconds_per_pair, marker_ids(tokenizer))


@dataclass(frozen=True, slots=True)
class StumblingScorer:
    seconds_per_pair: float
    markers: Mapping[str, int]
    max_batch_tokens: int = 4096

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]:
        found = {word for word, token in self.markers.items() if (pairs.input_ids == token).any()}
        if KILL in found:
            os.kill(os.getpid(), signal.SIGKILL)
        if EXIT in found:
            os._exit(3)
        if RAISE in found:
            raise RuntimeError("this document cannot be scored")
        scores = FakeScorer(self.seconds_per_pair).score(pairs)
        bad = np.add.reduceat(pairs.input_ids == self.markers[NAN], pairs.offsets[:-1]) > 0
        return np.where(bad, np.float32(np.nan), scores)


def marker_ids(tokenizer: FakeTokenizer) -> dict[str, int]:
    words = (NAN, RAISE, KILL, EXIT)
    pairs = tokenizer.encode([""] * len(words), list(words))
    return {
        word: int(pairs.input_ids[pairs.offsets[i] : pairs.offsets[i + 1]].tolist()[2]) for i, word in enumerate(words)
    }
