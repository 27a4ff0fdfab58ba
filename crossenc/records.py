"""The records that ranking data is made of, and what scores them. Knows no model, no file format, no cluster.

Ids are strings. A ranking's ranks start at 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query with the documents that a first stage retrieved for it, in first-stage order.

    Raises ValueError when `doc_ids` and `documents` differ in length.
    """

    query_id: str
    query: str
    doc_ids: tuple[str, ...]
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.doc_ids) != len(self.documents):
            raise ValueError(
                f"query {self.query_id!r} has {len(self.doc_ids)} doc_ids but {len(self.documents)} documents"
            )


@dataclass(frozen=True, slots=True)
class ScoredDoc:
    """One document of a ranking. `score` is finite."""

    doc_id: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """A query's documents, best first."""

    query_id: str
    docs: tuple[ScoredDoc, ...]


#: Relevance judgements: query id -> doc id -> grade. A grade of 1 or more is relevant.
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """P tokenised (query, document) pairs laid end to end without padding: T tokens in all.

    `input_ids` int32 [T]; `offsets` int64 [P + 1], pair p is `input_ids[offsets[p]:offsets[p + 1]]`;
    `token_type_ids` uint8 [T], or None where the model's tokenizer makes none;
    `truncated` bool [P], whether the pair lost tokens to the length limit.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    token_type_ids: NDArray[np.uint8] | None
    truncated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each pair, int64 [P]."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])


class Scorer(Protocol):
    """What turns tokenised pairs into scores: the seam between pipelines and models."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that a forward pass holds at most, unless one pair alone is longer."""
        ...

    @property
    def is_packed(self) -> bool:
        """Whether batches hold no padding."""
        ...

    @property
    def forward_kind(self) -> str:
        """For people: how the model is called, and why so."""
        ...

    def num_fed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Tokens that the model is given for pairs of these lengths [P], with padding."""
        ...

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]:
        """Scores in the order of `pairs`: float32 [P] for one label, [P, L] for L labels."""
        ...
