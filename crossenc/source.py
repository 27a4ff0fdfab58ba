"""What a CrossEncoder is put together from: a checkpoint folder, or parts that its user made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from crossenc.errors import ConfigError
from crossenc.loading import Layout, load_parts, read_layout
from crossenc.modules import Transformer
from crossenc.tokenizer import load_fast_tokenizer

if TYPE_CHECKING:
    from crossenc.onnx.session import OnnxNetwork

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class ModelSource:
    """What a model was put together from.

    `name` is the hub id, or of a folder or URI its last part: enough to know it by, and nothing of the machine.
    `readme` is the card of a local folder. `network` scores in the place of `parts`, where there is one.
    """

    name: str | None
    parts: list[nn.Module]
    layout: Layout
    tokenizer: PreTrainedTokenizerFast
    head_is_new: bool
    readme: str | None = None
    network: "OnnxNetwork | None" = None


def source_of_folder(
    folder: Path,
    given: str,
    *,
    num_labels: int | None,
    dtype: torch.dtype,
    config_settings: Mapping[str, Any],
    model_settings: Mapping[str, Any],
    processor_settings: Mapping[str, Any],
) -> ModelSource:
    """Load the local folder of the checkpoint that a user gave as `given`; a head that it lacks is made new.

    Raises CheckpointError as `load_parts` does.
    """
    layout = read_layout(folder)
    loaded = load_parts(
        folder,
        layout,
        num_labels=num_labels,
        dtype=dtype,
        config_settings=config_settings,
        model_settings=model_settings,
        new_head_allowed=True,
    )
    tokenizer = load_fast_tokenizer(folder, processor_settings)
    is_hub_id = "://" not in given and not Path(given).expanduser().is_dir()
    name = given.partition("@")[0] if is_hub_id else given.rstrip("/").rpartition("/")[2]
    card = folder / "README.md"
    readme = card.read_text(encoding="utf-8") if card.exists() else None
    return ModelSource(name, loaded.parts, layout, tokenizer, loaded.head_is_new, readme)


def source_of_modules(modules: Iterable[nn.Module] | Mapping[str, nn.Module]) -> ModelSource:
    """Take the parts as they are. Raises ConfigError unless the first is a Transformer with its tokenizer."""
    parts = list(modules.values()) if isinstance(modules, Mapping) else list(modules)
    if not parts or not isinstance(parts[0], Transformer) or parts[0].tokenizer is None:
        raise ConfigError("the first of the modules must be a Transformer that has its tokenizer")
    layout = Layout(parts[0].task, tuple((type(part).__name__, "") for part in parts[1:]))
    return ModelSource(None, parts, layout, parts[0].tokenizer, head_is_new=False)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A torch dtype, given itself or by name; float32 when None. Raises ConfigError for an unsupported one."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype in _DTYPES:
        return _DTYPES[str(dtype)]
    raise ConfigError(f"dtype is {dtype!r}: choose from {', '.join(_DTYPES)}")
