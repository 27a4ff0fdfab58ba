"""Names that users of sentence-transformers know for what CrossEncoder has under another one."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from crossenc.deprecation import warn_deprecated

if TYPE_CHECKING:
    from crossenc.fitting import InputExample
    from crossenc.model import CrossEncoder
    from crossenc.modules import Features


class OldNamesMixin:
    """Gives CrossEncoder properties and methods under further names; those that warn are deprecated."""

    @property
    def max_seq_length(self) -> int:
        """The same as `max_length`."""
        return _model(self).max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        _model(self).max_length = value

    def get_model_kwargs(self) -> list[str]:
        """Further keywords that the parts of the model take when they are called: none."""
        return []

    def clear_placement_cache(self) -> None:
        """Nothing is remembered of where a model lies: it is looked up each time."""

    def get_max_seq_length(self) -> int:
        """The same as `max_length`."""
        return _model(self).max_length

    @property
    def modalities(self) -> list[str]:
        """What can be scored: texts."""
        return ["text"]

    def supports(self, modality: str) -> bool:
        """Whether inputs of this kind can be scored."""
        return modality in self.modalities

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The same as `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        """Have the transformers model compute activations again on the way back: slower, in less memory."""
        chosen = None if activation_checkpointing_kwargs is None else dict(activation_checkpointing_kwargs)
        inner = _model(self).model
        if hasattr(inner, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
            inner.activation_checkpointing_enable(chosen, **settings)
        else:
            inner.gradient_checkpointing_enable(chosen)

    def get_default_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation that the checkpoint asks for, or that suits its number of labels."""
        return _model(self).checkpoint_activation()

    @property
    def default_activation_function(self) -> Callable[[Tensor], Tensor]:
        _warn_renamed("default_activation_function", "activation_fn")
        return _model(self).activation_fn

    @property
    def _target_device(self) -> torch.device:
        _warn_renamed("_target_device", "device")
        return _model(self).device

    @_target_device.setter
    def _target_device(self, device: str | torch.device) -> None:
        _warn_renamed("_target_device", "device")
        _model(self).to(torch.device(device))

    def tokenize(self, texts: Sequence[Any]) -> "Features":
        """The same as `preprocess`, which new code should call."""
        warn_deprecated("The `tokenize` method was renamed and is now deprecated: call `preprocess`")
        return _model(self).preprocess(texts)

    def old_fit(self, *args: Any, **kwargs: Any) -> None:
        """The same as `fit`."""
        _model(self).fit(*args, **kwargs)

    def smart_batching_collate(self, batch: "Sequence[InputExample]") -> tuple["Features", Tensor]:
        """Model inputs [P, W] and labels [P] of examples with a query and a document each."""
        model = _model(self)
        labels = torch.tensor([example.label for example in batch], device=model.device)
        return self.smart_batching_collate_text_only(batch), labels.float() if model.num_labels == 1 else labels.long()

    def smart_batching_collate_text_only(self, batch: "Sequence[InputExample]") -> "Features":
        """Model inputs [P, W] of examples with a query and a document each."""
        return _model(self).preprocess([tuple(example.texts) for example in batch])


def _model(mixin: OldNamesMixin) -> "CrossEncoder":
    return cast("CrossEncoder", mixin)


def _warn_renamed(old: str, new: str) -> None:
    warn_deprecated(f"The `{old}` property was renamed and is now deprecated: write `{new}`", 4)
