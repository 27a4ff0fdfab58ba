"""Losses over more documents than fit in memory at once, with the gradients that they would have (GradCache).

All documents are scored in small parts without a graph; the loss and its gradient for each score are computed; and
in the backward pass each part is scored once more, now with a graph, and handed its share of that gradient. One
part's activations exist at a time, for about a third more computing.

Paper: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
Knows neither texts nor models: a part is whatever `score_part` takes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def cached_loss(
    parts: Iterable[Part],
    score_part: Callable[[Part], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """`loss_of` the scores of all parts, a scalar whose backward pass reaches what `score_part` computes with.

    `score_part` gives the scores [p] of one part and is called twice for each part, with the same random numbers
    (dropout) and the same autocast both times; `device` is the one it computes on. Without gradients enabled,
    it is called once.
    """
    if not torch.is_grad_enabled():
        return loss_of(torch.cat([score_part(part) for part in parts]))
    scored: list[tuple[Part, _Surroundings]] = []
    scores: list[Tensor] = []
    for part in parts:
        surroundings = _Surroundings.now(device)
        with torch.no_grad():
            scores.append(score_part(part))
        scored.append((part, surroundings))
    leaf = torch.cat(scores).requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    gradients = torch.split(gradient, [len(part_scores) for part_scores in scores])

    def score_again(upstream_gradient: Tensor) -> None:
        for (part, surroundings), part_gradient in zip(scored, gradients, strict=True):
            with torch.enable_grad(), surroundings.randomness(), surroundings.precision():
                part_scores = score_part(part)
            if part_scores.requires_grad:
                torch.autograd.backward(part_scores, part_gradient * upstream_gradient)

    result = loss.detach().requires_grad_()
    result.register_hook(score_again)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What besides its input decides a forward pass: the random numbers to come, and autocast."""

    device: torch.device
    cpu_state: Tensor
    device_state: Tensor | None
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> "_Surroundings":
        kind = device.type
        return cls(
            device=device,
            cpu_state=torch.get_rng_state(),
            device_state=None if kind == "cpu" else torch.get_device_module(kind).get_rng_state(*_argument(device)),
            autocast=torch.is_autocast_enabled(kind),
            autocast_dtype=torch.get_autocast_dtype(kind),
        )

    def precision(self) -> torch.autocast:
        """The autocast of that time."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast)

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """The random numbers of that time, and afterwards those of now."""
        present = _Surroundings.now(self.device)
        self._set_generators()
        try:
            yield
        finally:
            present._set_generators()

    def _set_generators(self) -> None:
        torch.set_rng_state(self.cpu_state)
        if self.device_state is not None:
            torch.get_device_module(self.device.type).set_rng_state(self.device_state, *_argument(self.device))


def _argument(device: torch.device) -> tuple[torch.device, ...]:
    """Generators are found by their device, except on Apple's GPUs, of which there is only one."""
    return () if device.type == "mps" else (device,)
