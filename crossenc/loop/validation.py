"""How good a model in training is on lists that it does not learn from: ranking measures and the loss.

Each worker judges a share of the lists; the sums of all workers are the result.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from crossenc.evaluation.metrics import per_query
from crossenc.loop.lists import TokenizedLists
from crossenc.losses import LossSum

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

MEASURES = ("nDCG@10", "RR@10")


def validate(
    model: "CrossEncoder",
    parts: Iterable[TokenizedLists],
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], LossSum],
) -> dict[str, float]:
    """The loss under "validation_loss" and, where labels are grades, the mean of each of MEASURES.

    `parts` are this worker's lists. Measures are means over lists with documents of different grades; labels that are
    not whole numbers from 0 are no grades. A mean over nothing is left out. All workers get the same result.
    """
    engine = model.training_engine.with_limits(nn.Identity(), None)
    sums = torch.zeros(4 + len(MEASURES), dtype=torch.float64)
    for lists in parts:
        scores = engine.score(lists.pairs)
        found = loss(*matrices(torch.from_numpy(scores), lists))
        sums[0] += float(found.value)
        sums[1] += float(found.weight)
        if scores.ndim == 1 and are_grades(lists.labels):
            values = measured(scores, lists)
            sums[2] += len(values)
            sums[4:] += torch.from_numpy(values.sum(axis=0))
        else:
            sums[3] += 1
    if dist.is_available() and dist.is_initialized():
        on_device = sums.to(model.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    value, weight, num_lists, num_ungraded = sums[:4].tolist()
    result = {"validation_loss": value / weight} if weight else {}
    if num_lists and not num_ungraded:
        result |= {name: total / num_lists for name, total in zip(MEASURES, sums[4:].tolist(), strict=True)}
    return result


def are_grades(labels: NDArray[np.float32]) -> bool:
    """Whether labels are whole numbers from 0, as measures of rankings need them."""
    return bool((labels >= 0).all() and (labels == np.round(labels)).all())


def measured(scores: NDArray[np.float32], lists: TokenizedLists) -> NDArray[np.float64]:
    """MEASURES of each list with documents of different grades, float64 [n, measures]: others have no better ranking.

    Documents with equal scores stand with the worse ones first: a model that cannot tell them apart earns nothing.
    """
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, list[str]] = {}
    ends = np.cumsum(lists.sizes)
    for number, (end, size) in enumerate(zip(ends.tolist(), lists.sizes.tolist(), strict=True)):
        labels = lists.labels[end - size : end]
        if len(set(labels.tolist())) > 1:
            order = np.lexsort((labels, -scores[end - size : end].astype(np.float64)))
            run[str(number)] = [str(place) for place in order]
            qrels[str(number)] = {str(place): int(label) for place, label in enumerate(labels)}
    if not qrels:
        return np.empty((0, len(MEASURES)))
    values = per_query(MEASURES, qrels, run)
    return np.array([[values[name][query] for name in MEASURES] for query in qrels])


def matrices(scores: Tensor, lists: TokenizedLists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [Q, N] (or [Q, N, L]), labels [Q, N], mask [Q, N] and weights [Q] from the scores [P] of the pairs."""
    device = scores.device
    sizes = torch.from_numpy(lists.sizes).to(device)
    mask = torch.arange(int(lists.sizes.max()), device=device) < sizes[:, None]
    filled = scores.new_zeros((*mask.shape, *scores.shape[1:]))
    filled = filled.index_put(torch.nonzero(mask, as_tuple=True), scores)
    labels = torch.zeros(mask.shape, device=device)
    labels[mask] = torch.from_numpy(lists.labels).to(device)
    return filled, labels, mask, torch.from_numpy(lists.weights).to(device)
