"""Activations by name: what a checkpoint may ask for, and nothing else is ever imported."""

from typing import TYPE_CHECKING

from crossenc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

#: By class name in torch.nn: over the labels of a pair.
_OVER_LABELS = ("LogSoftmax", "Softmax")
#: The same: elementwise, without arguments.
_ELEMENTWISE = {
    *("ELU", "GELU", "Hardsigmoid", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "ReLU", "SELU"),
    *("SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh"),
}


def known_kind(name: str) -> str:
    """The class in torch.nn of a full name such as "torch.nn.modules.activation.Sigmoid".

    Raises ConfigError for anything but an elementwise activation or a softmax of torch.nn.
    """
    module, _, kind = str(name).rpartition(".")
    known = {*_ELEMENTWISE, *_OVER_LABELS}
    if (module == "torch.nn" or module.startswith("torch.nn.modules.")) and kind in known:
        return kind
    raise ConfigError(f"activation {name!r} is not one of torch.nn's {', '.join(sorted(known))}")


def make_activation(kind: str) -> "nn.Module":
    """An activation of a class that `known_kind` gave."""
    from torch import nn

    activation: nn.Module = getattr(nn, kind)(**({"dim": -1} if kind in _OVER_LABELS else {}))
    return activation


def named_activation(name: str) -> "nn.Module":
    """The activation of a full name. Raises ConfigError as `known_kind` does."""
    return make_activation(known_kind(name))


def is_told_by_name(activation: object) -> bool:
    """Whether `named_activation` gives it back: a known class with no settings of its own."""
    name = activation_name(activation)
    if name.rpartition(".")[2] in _OVER_LABELS:
        return True
    try:
        return repr(named_activation(name)) == repr(activation)
    except ConfigError:
        return False


def activation_name(activation: object) -> str:
    """The full name of an activation's class, or of a function, as it is written into a checkpoint."""
    kind = activation if hasattr(activation, "__qualname__") else type(activation)
    return f"{kind.__module__}.{kind.__qualname__}"
