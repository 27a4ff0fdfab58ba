"""A model without weights, for trying pipelines out and for measuring what they cost themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

from crossenc.testing import FakeScorer, FakeTokenizer


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Scores by hashing tokens, in [0, 1). A `model.Model`."""

    max_length: int = 512

    @property
    def name(self) -> str:
        return "fake"

    def digests(self) -> Mapping[str, str]:
        return {"fake": f"max_length {self.max_length}"}

    def score_range(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def load_tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer(max_length=self.max_length)

    def load_scorer(self, threads: int) -> FakeScorer:
        return FakeScorer()

    def exact(self) -> None:
        return None
