"""One step of the optimizer on a batch of lists, alone or as one of several workers.

The loss of a step is the sum of its terms over all workers and passes, divided by the sum of their weights. So
neither the number of workers nor the memory of one changes what is learned, but for rounding and dropout.

Shape letters: Q lists, N documents of the longest, P pairs, L labels.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from crossenc.loop.lists import TokenizedLists
from crossenc.loop.network import TrainingNetwork
from crossenc.loop.order import micro_batches
from crossenc.loop.validation import matrices
from crossenc.losses import LossSum

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], LossSum]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How a step is computed. `max_tokens` bounds a forward pass; weights stay in float32 whatever `dtype` is."""

    max_tokens: int
    dtype: torch.dtype = torch.float32
    max_grad_norm: float = 1.0
    seed: int = 42
    recomputes: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step came to, the same on all workers but for `is_guilty`.

    Unless `is_finite` no weight was changed, and `is_guilty` says whether this worker's lists may be why: each worker
    knows its own loss, and of gradients only the sum. `wishes` are those that any worker has.
    """

    loss: float
    gradient_norm: float
    is_finite: bool
    wishes: tuple[bool, ...]
    is_guilty: bool


class Learner:
    """A model in training, with its optimizer. Where torch.distributed is initialised, one worker of several.

    `loss` maps scores, labels, mask and the weights of lists to a LossSum. Parameters that no score depends on are
    frozen.
    """

    def __init__(
        self,
        model: "CrossEncoder",
        loss: Loss,
        make_optimizer: Callable[["CrossEncoder"], torch.optim.Optimizer],
        settings: LearnerSettings,
        example: TokenizedLists,
    ) -> None:
        self.model, self._loss, self._settings = model, loss, settings
        self._is_shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._num_workers = dist.get_world_size() if self._is_shared else 1
        self._rank = dist.get_rank() if self._is_shared else 0
        if settings.recomputes:
            _recompute(model.model)
        own = TrainingNetwork(model, recomputes=settings.recomputes)
        self.forward_kind = own.forward_kind
        self._is_packed = own.is_packed
        self._freeze_unused(own, example)
        self.optimizer = make_optimizer(model)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Steps scale their gradients themselves, and the module's buffers never differ.
        self._network: Any = own
        if self._is_shared:
            # Imported here because it sets environment variables of torch's compiler.
            from torch.nn.parallel import DistributedDataParallel

            self._network = DistributedDataParallel(own, forward_sync_buffers=False, gradient_as_bucket_view=True)
        is_half = settings.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=is_half and model.device.type == "cuda")

    def _freeze_unused(self, network: TrainingNetwork, example: TokenizedLists) -> None:
        """Freeze what gets no gradient from a real list: DistributedDataParallel would wait for it forever."""
        with self._autocast():
            network(example.pairs, np.arange(min(2, len(example.pairs)))).float().sum().backward()
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def step(
        self, step: int, lists: TokenizedLists, num_lists: int, *, rate: float, wishes: tuple[bool, ...] = ()
    ) -> StepResult:
        """Learn from this worker's share of a batch of `num_lists` lists, with learning rates multiplied by `rate`.

        An empty share is given as lists of weight 0. `wishes` are heard of by all workers in the result. Dropout
        depends on the seed, the step and the worker, so a step done again is the same.
        """
        torch.manual_seed(int(np.random.SeedSequence((self._settings.seed, step, self._rank)).generate_state(1)[0]))
        self._network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.tensor([0.0, 0.0, *map(float, wishes)], dtype=torch.float64)
        sizes, lengths = lists.sizes, lists.pairs.lengths
        passes = micro_batches(sizes, lengths, self._settings.max_tokens, is_packed=self._is_packed)
        for number, places in enumerate(passes):
            with self._synced_only_if(number == len(passes) - 1):
                found = self._loss_of(lists.take(places))
                # The mean over lists is of a size that half precision holds; what it should be is known afterwards.
                self.scaler.scale(found.value / num_lists).backward()  # type: ignore[no-untyped-call]
            total[0] += found.value.detach().double().cpu()
            total[1] += found.weight.detach().double().cpu()
        is_guilty = not math.isfinite(total[0].item())
        if self._is_shared:
            on_device = total.to(self.model.device)
            dist.all_reduce(on_device)
            total = on_device.cpu()
        value, weight, *wished = total.tolist()
        loss = value / weight if weight else 0.0
        norm, is_finite = math.nan, math.isfinite(loss)
        if is_finite:
            norm = self._gradient_norm(num_lists * self._num_workers / weight if weight else 0.0)
            is_finite = math.isfinite(norm) or self._skips_overflows()
            is_guilty = not is_finite
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return StepResult(loss, norm, is_finite, tuple(map(bool, wished)), is_guilty)

    def _skips_overflows(self) -> bool:
        """Whether a gradient that is no number may be half precision's own, of a loss that is scaled up too far.

        The scaler leaves such a step out and scales less in the next one. With a scale below 1 the gradient itself is
        what does not fit.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def _gradient_norm(self, factor: float) -> float:
        """Multiply gradients by `factor` and clip them; returns the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) * factor
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, factor * min(1.0, self._settings.max_grad_norm / (norm + 1e-6)))
        return norm

    def _loss_of(self, lists: TokenizedLists) -> LossSum:
        """The sum of the loss's terms over some lists, all in one forward pass."""
        by_length = np.argsort(-lists.pairs.lengths, kind="stable")
        with self._autocast():
            logits = self._network(lists.pairs, by_length)
        scores_PL = logits.float()[torch.from_numpy(np.argsort(by_length)).to(logits.device)]
        scores = scores_PL[:, 0] if scores_PL.shape[1] == 1 else scores_PL
        return self._loss(*matrices(scores, lists))

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._settings.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.model.device.type, dtype=dtype)

    def _synced_only_if(self, is_last: bool) -> AbstractContextManager[Any]:
        """Workers exchange gradients once a step, in its last pass."""
        return self._network.no_sync() if self._is_shared and not is_last else nullcontext()


def _recompute(model: Any) -> None:
    """Have a model of transformers compute activations again in the backward pass; version 6 names it anew."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
