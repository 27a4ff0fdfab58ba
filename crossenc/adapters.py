"""PEFT adapters on a cross-encoder: small weights beside frozen ones, which are trained, saved and switched alone.

A model with adapters is saved without its base: the folder holds the adapter in use and says which model it is for.
Needs the package peft for all but importing. Knows no pairs and no scores.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from crossenc.checkpoint import ADAPTER_FILE, fetch
from crossenc.errors import CheckpointError, ConfigError
from crossenc.modules import Transformer

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder


class AdapterMixin:
    """Gives CrossEncoder the calls of transformers for adapters, on the transformers model inside."""

    @property
    def transformers_model(self) -> PreTrainedModel:
        raise NotImplementedError

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put a new adapter on the model and use it; training changes it and no longer the model's own weights.

        `adapter_config` is one of peft's, such as LoraConfig(task_type="SEQ_CLS"). Raises ConfigError where the head
        is new and `modules_to_save` leaves it out, or where the weights are of no saved checkpoint.
        """
        check_peft()
        cross_encoder, model = cast("CrossEncoder", self), self.transformers_model
        base_of(cross_encoder)
        if cross_encoder.head_is_new:
            head = head_modules(cross_encoder)
            if set(head) - set(getattr(adapter_config, "modules_to_save", None) or ()):
                raise ConfigError(
                    f"the head is new, and an adapter without it would freeze it: set modules_to_save={head}"
                )
        model.add_adapter(adapter_config, adapter_name)

    def load_adapter(
        self, peft_model_id: str | Path | None = None, adapter_name: str | None = None, **settings: Any
    ) -> None:
        """Load a saved adapter and use it; with `is_trainable` it can be trained further.

        `peft_model_id` is a folder, a URI or a hub id, as `crossenc.checkpoint.fetch` takes it, with its errors; other
        settings go to transformers. Raises CheckpointError where the adapter does not fit, and is then not loaded.
        """
        check_peft()
        model = self.transformers_model
        if peft_model_id is None:  # its weights are among the settings
            _load(model, None, adapter_name, **settings)
            return
        hub = dict(settings.pop("adapter_kwargs", None) or {})
        folder = fetch(
            peft_model_id,
            revision=hub.get("revision"),
            token=hub.get("token"),
            local_files_only=settings.pop("local_files_only", False),
            adapter_allowed=True,
        )
        if not (folder / ADAPTER_FILE).exists():
            raise CheckpointError(f"{folder} has no {ADAPTER_FILE}: it is a whole model, not an adapter")
        put_saved_adapter(model, folder, (), adapter_name or "default", **settings)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use this adapter from now on."""
        check_peft()
        self.transformers_model.set_adapter(adapter_name)

    def enable_adapters(self) -> None:
        """Use the adapters, after `disable_adapters`."""
        check_peft()
        self.transformers_model.enable_adapters()

    def disable_adapters(self) -> None:
        """Score with the model's own weights alone. Raises ConfigError where these have no trained head."""
        check_peft()
        self._check_base_head()
        self.transformers_model.disable_adapters()

    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        check_peft()
        names: list[str] = self.transformers_model.active_adapters()
        return names

    def get_adapter_state_dict(self, adapter_name: str | None = None, **settings: Any) -> dict[str, Any]:
        """An adapter's weights, by default of the one in use."""
        check_peft()
        weights: dict[str, Any] = self.transformers_model.get_adapter_state_dict(adapter_name, **settings)
        return weights

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Remove adapters; after the last one the model's own weights are trained and saved again.

        Raises ConfigError where these have no trained head.
        """
        check_peft()
        self._check_base_head()
        model = self.transformers_model
        model.delete_adapter(adapter_names)
        if not has_adapters(model):
            _take_out(model, merge=False)

    def merge_adapters(self) -> None:
        """Add the adapters in use to the model's own weights and remove them all: the scores stay, to rounding.

        The model is a whole one again, and is saved whole.
        """
        check_peft()
        model = self.transformers_model
        if not has_adapters(model):
            raise ConfigError("the model has no adapter to merge: add or load one first")
        _take_out(model, merge=True)
        del model.peft_config
        model._hf_peft_config_loaded = False
        cast("CrossEncoder", self).mark_merged()

    def _check_base_head(self) -> None:
        if cast("CrossEncoder", self).base_lacks_head:
            raise ConfigError("without its adapter the model has a random head, so its scores would mean nothing")


def check_peft() -> None:
    """Raise ImportError where the package peft is missing."""
    if find_spec("peft") is None:
        raise ImportError("adapters need the package peft, which is not installed: pip install 'crossenc[peft]'")


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether there are adapters on a model, in use or not."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapters_are_off(model: PreTrainedModel) -> bool:
    """Whether the adapters on a model are disabled."""
    return has_adapters(model) and any(getattr(part, "disable_adapters", None) is True for part in model.modules())


def base_of(model: "CrossEncoder") -> tuple[str, str | None]:
    """What an adapter of `model` names as its base, with the revision. Raises ConfigError where there is none."""
    if model.base_location is None:
        raise ConfigError(
            "the model's weights are in no checkpoint that an adapter could name as its base: save the model, and add"
            " the adapter to CrossEncoder(the saved folder)"
        )
    return model.base_location


def save_adapter(model: "CrossEncoder", folder: Path) -> None:
    """Write the adapter in use. Raises ConfigError where its base is in no checkpoint."""
    name, revision = base_of(model)
    inner = model.transformers_model
    active = inner.active_adapters()
    if len(active) != 1:
        raise ConfigError(f"{', '.join(active)} are in use, and one is saved at a time: choose it with set_adapter()")
    # A local folder: peft would look at the hub for a hub id, and warn where it cannot.
    inner.peft_config[active[0]].base_model_name_or_path = inner.name_or_path
    inner.save_pretrained(str(folder))
    settings = json.loads((folder / ADAPTER_FILE).read_bytes())
    settings |= {"base_model_name_or_path": name, "revision": revision}
    (folder / ADAPTER_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True))


def head_modules(model: "CrossEncoder") -> list[str]:
    """The children of a classification model that are its head: what an adapter names as `modules_to_save` to train it.

    Other models have none there: their heads are layers of their own, which adapters leave alone.
    """
    first, inner = model[0], model.transformers_model
    assert isinstance(first, Transformer)
    if first.task != "sequence-classification":
        return []
    return sorted(name for name, child in inner.named_children() if name != inner.base_model_prefix and has_own(child))


def has_own(module: nn.Module) -> bool:
    """Whether a module has weights."""
    return next(module.parameters(), None) is not None


def put_saved_adapter(
    model: PreTrainedModel, folder: Path, missing: Iterable[str], name: str = "default", **settings: Any
) -> list[str]:
    """Put the adapter of a checked local folder on its base model; which of `missing` weights it did not bring.

    Raises CheckpointError where it does not fit the model, which then stays as it was; ImportError where peft is
    missing, ConfigError where there is an adapter of that name.
    """
    check_peft()
    if has_adapters(model) and name in model.peft_config and not settings.get("hotswap"):
        raise ConfigError(f"there is an adapter {name!r} already: give this one another adapter_name")
    settings |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # what differs in size is refused below
    try:
        info = _load(model, folder, name, adapter_kwargs={"local_files_only": True}, **settings)
        _check_fit(model, folder, info)
    except Exception as error:  # each kind of adapter has errors of its own
        _drop(model, name)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the adapter in {folder} does not load: {error}") from error
    mark = f".modules_to_save.{name}"
    brought = {weight.replace(mark, "") for weight in model.state_dict() if mark in weight}
    return [weight for weight in missing if weight not in brought]


def _check_fit(model: PreTrainedModel, folder: Path, info: Any) -> None:
    lost, surplus = sorted(info.missing_keys)[:3], sorted(info.unexpected_keys)[:3]
    mismatched = sorted(weight for weight, *_ in info.mismatched_keys)[:3]
    if lost or mismatched or surplus:
        raise CheckpointError(
            f"the adapter in {folder} does not fit its base model: it lacks {lost}, has another shape for {mismatched}"
            f" and too many of {surplus}; give the base that it was trained on"
        )
    for weight, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{weight} of the adapter in {folder} is NaN or infinite: use another checkpoint")


def _drop(model: PreTrainedModel, name: str) -> None:
    """Take out an adapter that was put on the model in part."""
    if has_adapters(model) and name in getattr(model, "peft_config", {}):
        model.delete_adapter(name)
    if not getattr(model, "peft_config", {}):
        _take_out(model, merge=False)
        model._hf_peft_config_loaded = False


def _load(model: PreTrainedModel, place: Path | None, name: str | None = None, **settings: Any) -> Any:
    """transformers' `load_adapter`, without the names of the adapter's weights staying those of the whole model's."""
    renamings = vars(model).get("_weight_conversions")
    info = model.load_adapter(None if place is None else str(place), name, **settings)
    if renamings is not None:
        model._weight_conversions = renamings
    else:
        vars(model).pop("_weight_conversions", None)
    return info


def _take_out(model: PreTrainedModel, merge: bool) -> None:
    """Put a model's own layers back where those of adapters stand, with the adapters in use added if `merge`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for name, module in wrapped:
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif merge:
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            plain = module.original_module
        model.set_submodule(name, plain)
    model.requires_grad_(True)
