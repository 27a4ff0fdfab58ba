"""What the optimizer works on: parameter groups, the course of the learning rate, and its state as plain tensors."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from crossenc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

ScheduleName = Literal["linear", "cosine", "constant"]

#: AdamW's state of a parameter.
_STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")


def parameter_groups(
    model: "CrossEncoder", *, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: biases and the weights of normalisation are not decayed, the head may learn at its own rate.

    Each has its rate of the start under "base_lr". Frozen parameters are in none. The head is whatever stands outside
    of the backbone. Raises ConfigError where all weights are frozen.
    """
    backbone = {id(parameter) for parameter in model.model.base_model.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((id(parameter) not in backbone, is_decayed), []).append(parameter)
    if not groups:
        raise ConfigError("all weights are frozen: freeze fewer layers")
    found = []
    for (is_head, is_decayed), parameters in groups.items():
        rate = head_learning_rate if is_head and head_learning_rate is not None else learning_rate
        decay = weight_decay if is_decayed else 0.0
        found.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return found


def freeze_lowest(model: "CrossEncoder", num_layers: int) -> None:
    """Freeze the embeddings and the `num_layers` layers above them. Raises ConfigError where there are fewer."""
    backbone = model.model.base_model
    layers = max(
        (module for module in backbone.modules() if isinstance(module, nn.ModuleList)), key=len, default=nn.ModuleList()
    )
    if len(layers) < num_layers:
        raise ConfigError(f"the model has {len(layers)} layers: it cannot freeze {num_layers} of them")
    above = {id(parameter) for layer in list(layers)[num_layers:] for parameter in layer.parameters()}
    inside = {id(parameter) for parameter in layers.parameters()}
    passed_layers = False
    for parameter in backbone.parameters():
        passed_layers = passed_layers or id(parameter) in inside
        is_below = id(parameter) in inside - above or (id(parameter) not in inside and not passed_layers)
        if is_below:
            parameter.requires_grad_(False)


def rate_factor(step: int, num_steps: int, num_warmup_steps: int, schedule: ScheduleName) -> float:
    """What the learning rate of step `step`, from 0, is multiplied by: up in a line, then down to 0 or level.

    Formulas with p, the share done of the steps after warm-up: `1 - p` (linear), `(1 + cos(pi p)) / 2` (cosine), 1.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 1.0 - done if schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy on the CPU, of every parameter that is trained and every buffer that is stored."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fixed = {name for name, _ in model.named_parameters()} - trained
    return {name: _copied(tensor) for name, tensor in model.state_dict().items() if name not in fixed}


def load_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put them back. Raises CheckpointError where the model has no such weights."""
    own = model.state_dict()
    strange = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    if strange:
        raise CheckpointError(
            f"the stored weights are not those of this model ({strange[0]}): start over with --new-run"
        )
    model.load_state_dict(dict(weights), strict=False)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors, copied to the CPU: "<parameter>/<entry>"."""
    found = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{entry}"] = _copied(value)
    return found


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put AdamW's state back. Raises CheckpointError where it is another model's."""
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {key.rpartition("/")[0] for key in tensors} != set(names):
        raise CheckpointError("the stored state of the optimizer is not this model's: start over with --new-run")
    for name, parameter in names.items():
        state = {entry: tensors[f"{name}/{entry}"].to(parameter.device) for entry in _STATE_NAMES}
        # Steps are counted on the CPU unless the optimizer is fused.
        if not optimizer.defaults.get("fused"):
            state["step"] = state["step"].cpu()
        optimizer.state[parameter] = state


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
