"""A scorer that does to chosen pairs what a test asks for. Light to import, for child processes do it often."""

import ctypes
import os
import signal
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crossenc.batching import padded_tokens
from crossenc.records import TokenizedPairs
from crossenc.testing import FakeScorer, FakeTokenizer

#: Pair p consists of this token + p; a FakeTokenizer makes no token as large.
FIRST_TOKEN = 40_000
PAIR_TOKENS = 4


def make_pairs(num_pairs: int) -> TokenizedPairs:
    tokens = np.repeat(FIRST_TOKEN + np.arange(num_pairs, dtype=np.int32), PAIR_TOKENS)
    offsets = np.arange(num_pairs + 1, dtype=np.int64) * PAIR_TOKENS
    return TokenizedPairs(tokens, offsets, None, np.zeros(num_pairs, dtype=bool))


@dataclass
class GuiltyScorer:
    """A FakeScorer in batches of 2 pairs that does to some pairs what `crimes` says."""

    crimes: dict[int, str]
    max_batch_tokens: int = 2 * PAIR_TOKENS
    is_packed: bool = False
    is_broken: bool = field(default=False, init=False)
    forward_kind: str = "padded: there is no model"

    def num_fed_tokens(self, lengths: NDArray[np.int64]) -> int:
        return padded_tokens(lengths, self.max_batch_tokens)

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]:
        for pair in np.unique(pairs.input_ids - FIRST_TOKEN).tolist():
            self._commit_crime(self.crimes.get(pair, ""))
        if self.is_broken:
            raise RuntimeError("an earlier error sticks")
        return FakeScorer().score(pairs)

    def _commit_crime(self, crime: str) -> None:
        if crime == "raise":
            raise ValueError("no score for this\nand a second line")
        if crime == "exit":
            os._exit(3)
        if crime == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if crime == "segfault":
            ctypes.string_at(0)
        if crime == "stick":
            self.is_broken = True


@dataclass(frozen=True)
class GuiltyModel:
    crimes: dict[int, str]
    load_crime: str = ""
    name: str = "guilty"

    def digests(self) -> dict[str, str]:
        return {}

    def score_range(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def load_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def load_scorer(self, threads: int) -> GuiltyScorer:
        if self.load_crime == "raise":
            raise OSError("the weights are gone")
        if self.load_crime == "exit":
            os._exit(5)
        return GuiltyScorer(self.crimes)

    def exact(self) -> None:
        return None
