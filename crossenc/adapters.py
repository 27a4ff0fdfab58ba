"""PEFT adapters on a cross-encoder: transformers' own calls, handed on to the model inside."""

from typing import Any

from transformers import PreTrainedModel


class AdapterMixin:
    """Adds, loads and switches adapters of the transformers model inside. Needs the package peft."""

    @property
    def transformers_model(self) -> PreTrainedModel:
        raise NotImplementedError

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put a new adapter on the model, to be trained; the model's own weights are frozen."""
        self.transformers_model.add_adapter(adapter_config, adapter_name)

    def load_adapter(self, peft_model_id: str, adapter_name: str | None = None, **settings: Any) -> None:
        """Load a saved adapter from a local folder or the hub."""
        self.transformers_model.load_adapter(peft_model_id, adapter_name, **settings)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use this adapter from now on."""
        self.transformers_model.set_adapter(adapter_name)

    def enable_adapters(self) -> None:
        """Use the adapters, after `disable_adapters`."""
        self.transformers_model.enable_adapters()

    def disable_adapters(self) -> None:
        """Score with the model's own weights alone."""
        self.transformers_model.disable_adapters()

    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        names: list[str] = self.transformers_model.active_adapters()
        return names

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Any]:
        """An adapter's weights."""
        weights: dict[str, Any] = self.transformers_model.get_adapter_state_dict(adapter_name)
        return weights

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Remove adapters."""
        self.transformers_model.delete_adapter(adapter_names)
