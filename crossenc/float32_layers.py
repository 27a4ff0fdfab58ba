"""Linear layers that compute in float32 inside of a network that computes in less."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crossenc.errors import ConfigError


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, also under autocast, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def keep_in_float32(network: nn.Module, names: Iterable[str]) -> None:
    """Let the plain linear layers `names` of `network` compute in float32, and no others.

    A name is a path such as "0.model.classifier". Raises ConfigError where it is not that of an nn.Linear.
    """
    chosen = {}
    for name in names:
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            layer = None
        if type(layer) not in (nn.Linear, Float32Linear):
            linear = [path for path, part in network.named_modules() if type(part) in (nn.Linear, Float32Linear)]
            raise ConfigError(f"{name!r} is no linear layer of the model, the last of which is {linear[-1:]}")
        chosen[id(layer)] = layer
    for layer in network.modules():
        if id(layer) in chosen:
            layer.__class__ = Float32Linear
        elif type(layer) is Float32Linear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # what it was before
