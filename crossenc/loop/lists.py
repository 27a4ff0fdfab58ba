"""Labelled lists as training reads them: token ids, labels and weights laid end to end. Plain numpy.

It knows no files, no model and no batches.

Shape letters: Q lists, P pairs of all lists together, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossenc.records import TokenizedPairs


@dataclass(frozen=True, slots=True)
class TokenizedLists:
    """Q lists of tokenised pairs with a label each: a query's documents, or a single pair.

    `pairs` holds P pairs, list after list; `sizes` int64 [Q], pairs of each list; `labels` float32 [P];
    `weights` float32 [Q]; `origins` Q places such as "file, row 17", for messages.

    Raises ValueError where these lengths do not fit together.
    """

    pairs: TokenizedPairs
    sizes: NDArray[np.int64]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]
    origins: tuple[str, ...]

    def __post_init__(self) -> None:
        num_pairs, num_lists = int(self.sizes.sum()), len(self.sizes)
        if not (
            len(self.pairs) == len(self.labels) == num_pairs and len(self.weights) == len(self.origins) == num_lists
        ):
            raise ValueError(
                f"{num_lists} lists of {num_pairs} pairs have {len(self.pairs)} pairs, {len(self.labels)} labels,"
                f" {len(self.weights)} weights and {len(self.origins)} origins"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, indices: NDArray[np.int64]) -> "TokenizedLists":
        """The lists at `indices`, in that order; an index may come twice. Raises IndexError outside of [-Q, Q)."""
        indices = np.arange(len(self))[np.asarray(indices, np.int64)]
        sizes = self.sizes[indices]
        chosen = ranges((np.cumsum(self.sizes) - self.sizes)[indices], sizes)
        return TokenizedLists(
            pairs=_take_pairs(self.pairs, chosen),
            sizes=sizes,
            labels=self.labels[chosen],
            weights=self.weights[indices],
            origins=tuple(self.origins[index] for index in indices.tolist()),
        )


@dataclass(frozen=True, slots=True)
class LabelStatistics:
    """The labels of a data set. `num_distinct` counts to 10: 10 stands for ten or more.

    `num_positive` pairs have a label above 0; in `num_single_label_lists` of the lists all labels are equal, which
    they are in every list of one pair.
    """

    minimum: float
    maximum: float
    mean: float
    num_distinct: int
    num_positive: int
    num_lists: int
    num_single_label_lists: int


def concatenate(parts: Sequence[TokenizedLists]) -> TokenizedLists:
    """All lists of `parts`, in order. Raises ValueError where some have token types and others have not."""
    return TokenizedLists(
        pairs=concatenate_pairs([part.pairs for part in parts]),
        sizes=np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)]),
        labels=np.concatenate([np.empty(0, np.float32), *(part.labels for part in parts)]),
        weights=np.concatenate([np.empty(0, np.float32), *(part.weights for part in parts)]),
        origins=tuple(origin for part in parts for origin in part.origins),
    )


def concatenate_pairs(parts: Sequence[TokenizedPairs]) -> TokenizedPairs:
    """All pairs of `parts`, in order; errors as `concatenate`. Parts without pairs need no token types."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    types = [part.token_type_ids for part in parts if part.token_type_ids is not None]
    if types and len(types) != len(parts):
        raise ValueError("some of the pairs have token types and some have none: they come from different tokenizers")
    lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
    return TokenizedPairs(
        input_ids=np.concatenate([np.empty(0, np.int32), *(part.input_ids for part in parts)]),
        offsets=offsets_of(lengths),
        token_type_ids=np.concatenate(types) if types else None,
        truncated=np.concatenate([np.empty(0, np.bool_), *(part.truncated for part in parts)]),
    )


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of several rows that are laid end to end starts, and where the last one ends, int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers starts[0], starts[0] + 1 …, `lengths[0]` of them, then those from starts[1], and so on."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)


def _take_pairs(pairs: TokenizedPairs, indices: NDArray[np.int64]) -> TokenizedPairs:
    lengths = pairs.lengths[indices]
    tokens = ranges(pairs.offsets[:-1][indices], lengths)
    types = pairs.token_type_ids
    return TokenizedPairs(
        input_ids=pairs.input_ids[tokens],
        offsets=offsets_of(lengths),
        token_type_ids=None if types is None else types[tokens],
        truncated=pairs.truncated[indices],
    )
