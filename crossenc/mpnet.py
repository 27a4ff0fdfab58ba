"""MPNet's attention for packed batches: it goes through no registry, and adds a bias by the distance of two tokens.

Knows the modules of one family. Shape letters: T tokens of all sequences, W tokens of the longest, H heads, D width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from crossenc.attention import attend, current_sequences

#: Where in an encoder the attention of a layer is, which `PackedSelfAttention` takes the place of.
ATTENTION = ("attention", "attn")


class PackedSelfAttention(nn.Module):
    """MPNet's attention on states [1, T, D], given the bias [1, H, W, W] of the longest sequence."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, states: Tensor, _: Tensor | None, position_bias: Tensor, **__: Any) -> tuple[Tensor]:
        sequences = current_sequences()
        assert sequences is not None  # packed batches alone come here
        own = self.attention
        heads = (-1, own.num_attention_heads, own.attention_head_size)
        query, key, value = (layer(states[0]).view(heads) for layer in (own.q, own.k, own.v))
        dropout = own.dropout.p if own.training else 0.0
        scale, bias = own.attention_head_size**-0.5, position_bias[0]
        attended = attend(query, key, value, scale, sequences, bias=bias, dropout=dropout)
        return (own.o(attended.flatten(1)).unsqueeze(0),)


def longest_bias(encoder: Any) -> Callable[[Tensor], Tensor]:
    """What makes the bias of the longest sequence, in which those of shorter ones lie, in place of that of T tokens."""

    def compute(states: Tensor) -> Tensor:
        sequences = current_sequences()
        assert sequences is not None
        bias: Tensor = encoder.compute_position_bias(states[:, : sequences.lengths.max()])
        return bias

    return compute
