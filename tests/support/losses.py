"""A stand-in for a model whose logits are given, and random lists to give it. For tests of losses."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GivenLogits:
    """Has what losses ask of a model. `table` [C, L] holds the logits of C calls to come, by the document's text.

    A document is a number, the row of its logits; which query stands beside it changes nothing. `calls` notes the
    number of pairs of each call, `prompts` the prompt.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.num_labels = table.shape[1]
        self.device = table.device
        self.calls: list[int] = []
        self.prompts: list[str | None] = []

    def logits(self, pairs: Sequence[tuple[str, str]], *, prompt: str | None = None) -> Tensor:
        self.calls.append(len(pairs))
        self.prompts.append(prompt)
        return self.table[[int(document) for _, document in pairs]]


def numbered_lists(lengths: Sequence[int]) -> list[list[str]]:
    """Lists of so many documents, numbered from 0 over all lists."""
    numbers = iter(range(sum(lengths)))
    return [[str(next(numbers)) for _ in range(length)] for length in lengths]


def matrix(rows: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Ragged rows as a padded matrix and its mask; NaN stands where there is no document."""
    width = max(len(row) for row in rows)
    values = torch.full((len(rows), width), float("nan"), dtype=dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        values[number, : len(row)] = torch.tensor(row, dtype=dtype)
        mask[number, : len(row)] = True
    return values, mask
