"""PEFT adapters on a cross-encoder: small weights beside frozen ones, which are trained, saved and switched alone.

A model with adapters is saved without its base: the folder holds the adapter in use and says which model it is for.
Needs the package peft for all but importing. Knows no pairs and no scores.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from crossenc.checkpoint import ADAPTER_FILE
from crossenc.errors import CheckpointError, ConfigError

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
            head = {
                name for name, child in model.named_children() if name != model.base_model_prefix and has_own(child)
            }
            forgotten = head - set(getattr(adapter_config, "modules_to_save", None) or ())
            if forgotten:
                raise ConfigError(
                    f"the head is new, and an adapter without it would freeze it: set modules_to_save={sorted(head)}"
                )
        model.add_adapter(adapter_config, adapter_name)

    def load_adapter(self, peft_model_id: str | Path, adapter_name: str | None = None, **settings: Any) -> None:
        """Load a saved adapter from a local folder or the hub, and use it; `is_trainable` to train it further."""
        check_peft()
        _load(self.transformers_model, peft_model_id, adapter_name, **settings)

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


def has_own(module: nn.Module) -> bool:
    """Whether a module has weights."""
    return next(module.parameters(), None) is not None


def put_saved_adapter(model: PreTrainedModel, folder: Path, missing: Iterable[str]) -> list[str]:
    """Put the adapter of a checked local folder on its base model; which of `missing` weights it did not bring.

    Raises CheckpointError where it does not fit the model, ImportError where peft is missing.
    """
    check_peft()
    try:
        info = _load(
            model,
            folder,
            adapter_kwargs={"local_files_only": True},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported in `info`, and refused below
        )
    except Exception as error:  # each kind of adapter has errors of its own
        raise CheckpointError(f"the adapter in {folder} does not load: {error}") from error
    lost = sorted(info.missing_keys)
    mismatched = sorted(name for name, *_ in info.mismatched_keys)
    if lost or mismatched or info.unexpected_keys:
        raise CheckpointError(
            f"the adapter in {folder} does not fit its base model: it"
            f" lacks {lost[:3]}, has another shape for {mismatched[:3]} and too many of"
            f" {sorted(info.unexpected_keys)[:3]}; give the base that it was trained on"
        )
    brought = {
        name.replace(".modules_to_save.default", "") for name in model.state_dict() if ".modules_to_save." in name
    }
    return [name for name in missing if name not in brought]


def _load(model: PreTrainedModel, place: str | Path, name: str | None = None, **settings: Any) -> Any:
    """transformers' `load_adapter`, without the names of the adapter's weights staying those of the whole model's."""
    renamings = vars(model).get("_weight_conversions")
    info = model.load_adapter(str(place), name, **settings)
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
