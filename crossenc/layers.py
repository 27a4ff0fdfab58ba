"""A shallower model out of a deeper one: some of its layers, with all else as it is. The start of a student.

Knows the encoders of transformers by family; knows no data and no training.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from crossenc.errors import CheckpointError, ConfigError
from crossenc.layout import load_config

#: Family -> where its backbone has its layers.
_PLACES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"), ("encoder", "layer")),
    "distilbert": ("transformer", "layer"),
    "modernbert": ("", "layers"),
}


def spread(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Which of `num_layers` layers are kept, rising from 0: the first, the last and others evenly between.

    One alone is the first. A student that starts from layers of all heights: Sanh et al. 2019, DistilBERT, arXiv
    1910.01108. Raises ConfigError where there are fewer than 1 or more than there are.
    """
    if not 1 <= num_kept <= num_layers:
        raise ConfigError(f"the model has {num_layers} layers: it cannot keep {num_kept} of them")
    steps = max(1, num_kept - 1)
    return tuple((2 * number * (num_layers - 1) + steps) // (2 * steps) for number in range(num_kept))


def layers_to_keep(folder: str | Path, num_kept: int) -> tuple[int, ...]:
    """What `keep_layers` would keep of the checkpoint in a local folder; raises as it does, and loads no weights."""
    config = load_config(folder)
    if config.model_type not in _PLACES:
        raise CheckpointError(
            f"the layers of a {config.model_type} model cannot be taken out: start from a model of"
            f" {', '.join(_PLACES)}, or make the student yourself"
        )
    return spread(config.num_hidden_layers, num_kept)


def keep_layers(folder: str | Path, num_kept: int, target: str | Path) -> tuple[int, ...]:
    """Write to `target` the cross-encoder of a local folder with `num_kept` of its layers; returns which (`spread`).

    Embeddings, head, tokenizer and settings stay as they are. Raises CheckpointError for a family whose layers are not
    known, ConfigError for a number of layers that it does not have.
    """
    from crossenc.model import CrossEncoder

    kept = layers_to_keep(folder, num_kept)
    model = CrossEncoder(folder, device="cpu")
    place, name = _PLACES[model.config.model_type]
    parent = model.model.base_model.get_submodule(place)
    layers = list(getattr(parent, name))
    setattr(parent, name, nn.ModuleList([layers[number] for number in kept]))
    for config in {id(one): one for one in (model.config, model.model.config, model.model.base_model.config)}.values():
        _shorten(config, kept)
    model.save_pretrained(target, create_model_card=False)
    return kept


def _shorten(config: PretrainedConfig, kept: tuple[int, ...]) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:  # ModernBERT: whether a layer attends to all tokens or to near ones
        config.layer_types = [kinds[number] for number in kept]
    config.num_hidden_layers = len(kept)
