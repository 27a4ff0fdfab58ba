"""The model of a training job as its workers, and its end, build it: the same weights and frozen parts each time."""

from pathlib import Path

import torch

from crossenc.adapters import head_modules
from crossenc.errors import ConfigError
from crossenc.layout import load_config
from crossenc.loop.optimizer import freeze_lowest
from crossenc.model import CrossEncoder
from pipelines.model import CheckpointModel, checkpoint
from pipelines.train_config import LoraConfig, TrainConfig


def source(config: TrainConfig) -> CheckpointModel:
    """Where training starts from."""
    return checkpoint(config.model, config.registry, config.storage_options, max_length=config.max_length)


def build(
    config: TrainConfig, model_source: CheckpointModel, device: torch.device | str = "cpu", *, is_trained: bool = False
) -> CrossEncoder:
    """The model before its first step: a new head is drawn by the seed, what is not trained is frozen.

    Dropout is the job's, or once the model `is_trained` its parent's, as its configuration will say.
    """
    torch.manual_seed(config.seed)
    folder: Path = model_source.folder()
    dropouts = {} if config.dropout is None or is_trained else dict.fromkeys(_dropout_names(folder), config.dropout)
    name = None if "://" in config.model or Path(config.model).expanduser().is_dir() else config.model
    model = CrossEncoder(
        folder, num_labels=config.num_labels, max_length=config.max_length, device=device, config_kwargs=dropouts
    )
    if name is not None:  # of the hub: the card names it, and its revision
        model.model_card_data.base_model, _, revision = name.partition("@")
        model.model_card_data.base_revision = revision or None
    if config.lora is not None:
        _add_lora(model, config.lora)
    if config.freeze_layers:
        freeze_lowest(model, config.freeze_layers)
    return model


def _dropout_names(folder: Path) -> list[str]:
    """The settings of dropout in a model's configuration, whatever its family calls them."""
    settings = load_config(folder).to_dict()
    return [name for name, value in settings.items() if "dropout" in name and isinstance(value, float | None)]


def _add_lora(model: CrossEncoder, lora: LoraConfig) -> None:
    try:
        from peft import LoraConfig as PeftConfig
        from peft import TaskType
    except ImportError:
        raise ConfigError("lora needs the package peft: pip install 'crossenc[peft]'") from None
    settings = PeftConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else None,
        modules_to_save=head_modules(model) or None,
    )
    model.add_adapter(settings)
