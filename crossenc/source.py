"""What a CrossEncoder is put together from: a checkpoint folder, or parts that its user made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from crossenc.checkpoint import ADAPTER_FILE, read_json
from crossenc.errors import ConfigError
from crossenc.layout import Layout, load_config, read_layout
from crossenc.loading import load_parts
from crossenc.modules import Transformer
from crossenc.tokenizer import load_fast_tokenizer

if TYPE_CHECKING:
    from crossenc.onnx.session import OnnxNetwork


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model was put together from.

    `name` is the hub id, or of a folder or URI its last part: enough to know it by, and nothing of the machine.
    `readme` is the card of a local folder.
    `location` is where the transformers model came from, a folder, URI or hub id, and its revision: what an adapter
    names as its base. It is None once the weights are others.
    `network` scores in the place of `parts`, where there is one.
    """

    name: str | None
    parts: list[nn.Module]
    layout: Layout
    tokenizer: PreTrainedTokenizerFast
    readme: str | None = None
    location: tuple[str, str | None] | None = None
    network: "OnnxNetwork | None" = None


def source_of_folder(  # noqa: PLR0913
    folder: Path,
    given: str,
    revision: str | None,
    *,
    base: Path | None = None,
    num_labels: int | None,
    dtype: torch.dtype,
    config_settings: Mapping[str, Any],
    model_settings: Mapping[str, Any],
    processor_settings: Mapping[str, Any],
) -> ModelSource:
    """Load the local folder of the checkpoint that a user gave as `given`; a head that it lacks is made new.

    `revision` is the hub's, if one was given. `base` is the folder of the base model where the checkpoint is an
    adapter.
    Raises CheckpointError as `load_parts` does.
    """
    layout = read_layout(folder, load_config(base or folder))
    parts = load_parts(
        folder,
        layout,
        base=base,
        num_labels=num_labels,
        dtype=dtype,
        config_settings=config_settings,
        model_settings=model_settings,
        new_head_allowed=True,
    )
    tokenizer = load_fast_tokenizer(folder, processor_settings)
    transformer = parts[0]
    assert isinstance(transformer, Transformer)
    transformer.tokenizer = tokenizer
    is_hub_id = "://" not in given and not Path(given).expanduser().is_dir()
    name, _, suffix = given.partition("@") if is_hub_id else (given.rstrip("/").rpartition("/")[2], "", "")
    if base is not None:
        adapter = read_json(folder / ADAPTER_FILE)
        location = (adapter["base_model_name_or_path"], adapter.get("revision"))
    elif is_hub_id:
        location = (name, revision or suffix or None)
    else:
        location = (given if "://" in given else str(folder), None)
    card = folder / "README.md"
    readme = card.read_text(encoding="utf-8") if card.exists() else None
    return ModelSource(name, parts, layout, tokenizer, readme, location)


def source_of_modules(modules: Iterable[nn.Module] | Mapping[str, nn.Module]) -> ModelSource:
    """Take the parts as they are. Raises ConfigError unless the first is a Transformer with its tokenizer."""
    parts = list(modules.values()) if isinstance(modules, Mapping) else list(modules)
    if not parts or not isinstance(parts[0], Transformer) or parts[0].tokenizer is None:
        raise ConfigError("the first of the modules must be a Transformer that has its tokenizer")
    layout = Layout(parts[0].task, tuple((type(part).__name__, "") for part in parts[1:]))
    place = getattr(parts[0].model, "name_or_path", "")
    return ModelSource(None, parts, layout, parts[0].tokenizer, location=(place, None) if place else None)


def split_dtype(model_settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dtype among settings for a transformers model, by either of its names or None, and the other settings."""
    rest = dict(model_settings)
    old, new = rest.pop("torch_dtype", None), rest.pop("dtype", None)
    return (old if new is None else new), rest
