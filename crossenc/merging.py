"""One model out of several that were trained from the same one: a mean of their weights, or a point between two."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crossenc.adapters import has_adapters
from crossenc.errors import ConfigError

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

METHODS = ("linear", "slerp")
#: Below this angle, in radians, two directions are one, and the straight line between them is as good.
_SMALLEST_ANGLE = 1e-4


def merge_models(models: "Sequence[CrossEncoder]", method: str, parameters: Mapping[str, Any]) -> "CrossEncoder":
    """A new model like the first of `models`, with merged weights.

    "linear" is the mean of all, weighted by `parameters["weight"]` (equal where it is not given; Wortsman et al. 2022,
    "Model soups"). "slerp" is the point at `parameters["t"]` (0.5) of the way from the first to the second on the arc
    between them, tensor by tensor (Shoemake 1985). Computed in float32. Raises ConfigError for models that do not fit
    each other, an unknown method or a parameter out of range.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r} of merging: choose from {', '.join(METHODS)}")
    if len(models) < 2 or (method == "slerp" and len(models) != 2):
        raise ConfigError(f"{method} merges {'two' if method == 'slerp' else 'two or more'} models, not {len(models)}")
    unknown = set(parameters) - {"weight" if method == "linear" else "t"}
    if unknown:
        raise ConfigError(f"{method} has no parameter {sorted(unknown)[0]!r}")
    _check_alike(models)
    states = [model.state_dict() for model in models]
    if method == "linear":
        weights = _shares(parameters.get("weight"), len(models))
        merged = {name: _mean([state[name] for state in states], weights) for name in states[0]}
    else:
        t = float(parameters.get("t", 0.5))
        if not 0 <= t <= 1:
            raise ConfigError(f"t is {t}: give a share of the way from the first model (0) to the second (1)")
        merged = {name: _on_arc(states[0][name], states[1][name], t) for name in states[0]}
    result = deepcopy(models[0])
    result.load_state_dict(merged)
    result.forget_origin()
    return result


def _check_alike(models: "Sequence[CrossEncoder]") -> None:
    first = models[0]
    for position, model in enumerate(models):
        if has_adapters(model.model):
            raise ConfigError(f"model {position} has an adapter, which has no mean: call merge_adapters() on it first")
    shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
    for position, model in enumerate(models[1:], start=1):
        if {name: tensor.shape for name, tensor in model.state_dict().items()} != shapes:
            raise ConfigError(f"model {position} has other weights than model 0: merge models of one architecture")
        if model.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise ConfigError(f"model {position} has another vocabulary than model 0: merge models of one backbone")


def _shares(weight: Sequence[float] | float | None, num_models: int) -> list[float]:
    weights = [1.0] * num_models if weight is None or isinstance(weight, int | float) else [float(w) for w in weight]
    if len(weights) != num_models or sum(weights) == 0:
        raise ConfigError(f"weight is {weight}: give one number a model, {num_models} in all, whose sum is not 0")
    return [share / sum(weights) for share in weights]


def _mean(tensors: list[Tensor], weights: list[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = sum(weight * tensor.float() for weight, tensor in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def _on_arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    if not first.is_floating_point():
        return first
    a, b = first.float(), second.float()
    norms = a.norm() * b.norm()
    angle = torch.acos(((a * b).sum() / norms).clamp(-1, 1)) if norms > 0 else torch.tensor(0.0)
    if angle < _SMALLEST_ANGLE or torch.pi - angle < _SMALLEST_ANGLE:
        return ((1 - t) * a + t * b).to(first.dtype)
    return ((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)).to(first.dtype)
