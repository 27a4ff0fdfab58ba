"""Token-budget batches: which pairs share a forward pass. Pure numpy; knows lengths, not ids and no model.

A padded batch costs what its longest pair costs, once per pair; a packed one costs its tokens. Sorting by length inside
a window keeps padding small, and equal lengths together, while only a window of results is out of order; batches are a
function of the lengths alone, so a rerun of the same shard makes the same batches and therefore the same scores.
"""

import numpy as np
from numpy.typing import NDArray

#: Pairs that are sorted together. A window of 65,536 pairs pads within a few percent of a global sort.
WINDOW = 65_536


def token_budget_batches(
    lengths: NDArray[np.int64],
    max_batch_tokens: int,
    window: int = WINDOW,
    max_batch_pairs: int | None = None,
    *,
    is_packed: bool = False,
) -> list[NDArray[np.int64]]:
    """Cut pairs into batches of at most `max_batch_tokens` tokens, longest pairs first in each window.

    Tokens are counted with the padding to each batch's longest pair unless batches are packed.

    `lengths` is int64 [P], in tokens. Each batch is an int64 array of positions in `lengths`; every position
    is in exactly one batch. Windows are consecutive and never share a batch; equal lengths keep their order.
    A pair longer than the budget is a batch of its own. `max_batch_pairs` caps the pairs of a batch as well.
    Raises ValueError when a limit is below 1.
    """
    for name, limit in (
        ("max_batch_tokens", max_batch_tokens),
        ("window", window),
        ("max_batch_pairs", max_batch_pairs),
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; it must be at least 1")
    batches: list[NDArray[np.int64]] = []
    for window_start in range(0, len(lengths), window):
        in_window = lengths[window_start : window_start + window]
        longest_first = np.argsort(-in_window, kind="stable") + window_start
        tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(1, lengths[longest_first]))])
        start = 0
        while start < len(longest_first):
            if is_packed:
                limit = tokens_before[start] + max_batch_tokens
                num_pairs = int(np.searchsorted(tokens_before, limit, side="right")) - 1 - start
            else:
                num_pairs = max_batch_tokens // max(1, int(lengths[longest_first[start]]))
            num_pairs = max(1, num_pairs)
            if max_batch_pairs is not None:
                num_pairs = min(num_pairs, max_batch_pairs)
            batches.append(longest_first[start : start + num_pairs])
            start += num_pairs
    return batches


def padded_tokens(lengths: NDArray[np.int64], max_batch_tokens: int) -> int:
    """Count the tokens, padding included, that the model sees when pairs of `lengths` are batched so, not packed."""
    batches = token_budget_batches(lengths, max_batch_tokens)
    return sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
