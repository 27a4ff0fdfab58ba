"""How much a pair of documents counts in `lambda_loss`. Knows gains and discounts, neither scores nor models.

A scheme is called with three tensors whose documents stand in the order of the model's scores, best first: gains
[Q, N], `(2^label - 1)` divided by the best DCG that the query allows; discounts [1, N], `log2(1 + rank)` with ranks
from 1; labels [Q, N], those below 0 raised to 0. It returns weights that broadcast to [Q, N, N]: entry (i, j) weighs
the pair in which document i should stand above document j.

Paper of all: Wang et al. 2018, The LambdaLoss Framework for Ranking Metric Optimization.
"""

import torch
from torch import Tensor


class BaseWeightingScheme(torch.nn.Module):
    """What a scheme of one's own derives from; it has to define `forward`."""

    #: Whether pairs count whose first document does not have the higher label.
    uses_all_pairs = False

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        """Weights that broadcast to [Q, N, N], from gains [Q, N], discounts [1, N] and labels [Q, N]."""
        raise NotImplementedError(f"{type(self).__name__} has to define forward(gain, discount, true_sorted)")


class NoWeightingScheme(BaseWeightingScheme):
    """Every pair counts the same: `w = 1`. This makes RankNet of LambdaLoss."""

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        return gain.new_ones(())


class NDCGLoss1Scheme(BaseWeightingScheme):
    """`w_ij = G_i / D_i`: a loose bound on nDCG, over all pairs. For comparisons; the next one is tighter."""

    uses_all_pairs = True

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        return (gain / discount)[:, :, None]


class NDCGLoss2Scheme(BaseWeightingScheme):
    """`w_ij = |1/D(d) - 1/D(d + 1)| |G_i - G_j|` with `d = |i - j|`: a tight bound on nDCG.

    The weight depends on how far the two stand apart, not on where: neighbours weigh most, anywhere in the list.
    """

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        num_documents = gain.shape[1]
        ranks = torch.arange(num_documents, device=gain.device)
        distances = (ranks[:, None] - ranks[None, :]).abs()
        # D of every distance 1..N; a document has no distance to itself, and its entry is set to 0.
        inverse = torch.arange(1, num_documents + 2, device=gain.device, dtype=gain.dtype).add(1).log2().reciprocal()
        steps = inverse[:-1] - inverse[1:]
        deltas = steps[(distances - 1).clamp(min=0)].masked_fill(distances == 0, 0.0)
        return deltas[None] * _gain_differences(gain)


class LambdaRankScheme(BaseWeightingScheme):
    """`w_ij = |1/D_i - 1/D_j| |G_i - G_j|`: what nDCG would change if the two traded places.

    The weights of LambdaRank and LambdaMART: the top of the list matters most.
    """

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        inverse = discount.reciprocal()
        return (inverse[:, :, None] - inverse[:, None, :]).abs() * _gain_differences(gain)


class NDCGLoss2PPScheme(BaseWeightingScheme):
    """`mu` times NDCGLoss2 plus LambdaRank: the strongest of the paper, and the default."""

    def __init__(self, mu: float = 10.0) -> None:
        super().__init__()
        self.mu = mu
        self.ndcg_loss2 = NDCGLoss2Scheme()
        self.lambda_rank = LambdaRankScheme()

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        tight: Tensor = self.ndcg_loss2(gain, discount, true_sorted)
        swapped: Tensor = self.lambda_rank(gain, discount, true_sorted)
        return self.mu * tight + swapped


def _gain_differences(gain: Tensor) -> Tensor:
    return (gain[:, :, None] - gain[:, None, :]).abs()
