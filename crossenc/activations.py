"""Activations by name: what a checkpoint may ask for, and nothing else is ever imported."""

from torch import nn

from crossenc.errors import ConfigError

#: By class name in torch.nn: elementwise, without arguments.
_KNOWN = {
    *("ELU", "GELU", "Hardsigmoid", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "ReLU", "SELU"),
    *("SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh"),
}


def named_activation(name: str) -> nn.Module:
    """The activation of a full name such as "torch.nn.modules.activation.Sigmoid".

    Raises ConfigError for anything but an elementwise activation of torch.nn.
    """
    module, _, kind = str(name).rpartition(".")
    if (module == "torch.nn" or module.startswith("torch.nn.modules.")) and kind in _KNOWN:
        activation: nn.Module = getattr(nn, kind)()
        return activation
    raise ConfigError(f"activation {name!r} is not one of torch.nn's {', '.join(sorted(_KNOWN))}")


def activation_name(activation: object) -> str:
    """The full name of an activation's class, or of a function, as it is written into a checkpoint."""
    kind = activation if hasattr(activation, "__qualname__") else type(activation)
    return f"{kind.__module__}.{kind.__qualname__}"
