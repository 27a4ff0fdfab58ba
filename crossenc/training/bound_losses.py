"""Losses as the trainer holds them: made for its model, and led through whatever wraps that model.

DDP and torch.compile put a wrapper around a model, and only what goes through the wrapper is synchronised or
compiled. A loss knows a model by its `logits`, so it is given one whose logits take that way.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossenc.errors import ConfigError
from crossenc.model import CrossEncoder
from crossenc.pairs import Pair

#: A loss, or what makes one of a model: a class, a function.
LossLike = nn.Module | Callable[[Any], nn.Module]
Losses = nn.Module | dict[str, nn.Module]


class WrappedModel(nn.Module):
    """A CrossEncoder inside a wrapper, as losses know it; all but its forward pass is the CrossEncoder's own."""

    def __init__(self, wrapper: nn.Module, model: CrossEncoder) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.__dict__["_model"] = model  # no second child: the wrapper has it already

    def forward(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self.wrapper(features)
        return found

    def logits(self, pairs: Sequence[Pair], prompt: str | None = None) -> Tensor:
        """As CrossEncoder.logits."""
        scores: Tensor = self(self._model.preprocess(pairs, prompt))["scores"]
        return scores

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__.get("_model"), name)


def make_losses(given: LossLike | Mapping[str, LossLike], model: CrossEncoder) -> Losses:
    """The losses for `model`, on its device: what is a loss already gets it as its model, the rest is called with it.

    Raises ConfigError for what is neither.
    """
    if isinstance(given, Mapping):
        return {name: _make_loss(loss, model) for name, loss in given.items()}
    return _make_loss(given, model)


def _make_loss(given: LossLike, model: CrossEncoder) -> nn.Module:
    loss = given if isinstance(given, nn.Module) else given(model)
    if not isinstance(loss, nn.Module):
        raise ConfigError(f"loss gave a {type(loss).__name__}: pass a loss, or a function of the model that makes one")
    set_model(loss, model)
    return loss.to(model.device)


def each(losses: Losses) -> Iterator[nn.Module]:
    """The losses one by one."""
    yield from losses.values() if isinstance(losses, dict) else (losses,)


def set_model(loss: nn.Module, model: nn.Module) -> None:
    """Make `model` the model of a loss and of the losses inside it."""
    for part in list(loss.modules()):
        if isinstance(part._modules.get("model"), CrossEncoder | WrappedModel) and not isinstance(part, WrappedModel):
            part.model = model


def loss_value(loss: nn.Module, inputs: Sequence[Any], labels: Any, extras: Mapping[str, str]) -> Tensor:
    """What a loss says of columns of inputs and their labels; a dict of several values is added up.

    `extras` are the prompt and the task, where there are any. A loss whose forward knows neither is called without;
    raises ConfigError where it is given one.
    """
    parameters = inspect.signature(loss.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settings: dict[str, str | None] = {}
    for name in ("prompt", "task"):
        if takes_any or name in parameters:
            settings[name] = extras.get(name)
        elif name in extras:
            raise ConfigError(
                f"{type(loss).__name__} takes no {name}, and the arguments give {extras[name]!r}: give its forward a "
                f"parameter {name}=None and hand it to model.preprocess"
            )
    value: Tensor | Mapping[str, Tensor] = loss(inputs, labels, **settings)
    return torch.stack(list(value.values())).sum() if isinstance(value, Mapping) else value
