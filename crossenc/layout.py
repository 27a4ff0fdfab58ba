"""What a checkpoint folder says about itself, read without loading a weight or building a model.

classic    transformers' files alone: a sequence classification model, or a causal language model
modular    modules.json names the parts, each with a folder of its own (sentence-transformers 6)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from crossenc.activations import known_kind
from crossenc.checkpoint import read_json
from crossenc.errors import CheckpointError, ConfigError
from crossenc.quiet import quiet_transformers
from crossenc.tokenizer import check_text_settings

OWN_SETTINGS_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
TRANSFORMER_FILE = "sentence_bert_config.json"

#: What a Transformer may be asked to compute.
TASKS = ("sequence-classification", "feature-extraction", "text-generation")
#: Classes of the parts that may follow it; crossenc.modules has them.
PART_NAMES = ("Pooling", "Dense", "LayerNorm", "LogitScore")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint folder is made up.

    `task` is the Transformer's; `parts` holds the class and the folder of each part after it. `activation` is the
    full name that the checkpoint gives, None where it gives none. `text_settings` may hold the max_length and the
    truncation of pairs, `template_settings` are for the chat template, which pairs go through where the tokenizer has
    one and `may_chat`. `fp32_modules` are linear layers that compute in float32.
    """

    task: str
    parts: tuple[tuple[str, str], ...] = ()
    activation: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    text_settings: Mapping[str, Any] = field(default_factory=dict)
    template_settings: Mapping[str, Any] = field(default_factory=dict)
    may_chat: bool = True
    fp32_modules: tuple[str, ...] = ()

    @property
    def is_causal(self) -> bool:
        return self.task == "text-generation"


def read_layout(folder: str | Path, config: PretrainedConfig | None = None) -> Layout:
    """The layout of a local checkpoint folder. Raises CheckpointError for one that gives no scores."""
    folder = Path(folder)
    config = config or load_config(folder)
    own = read_json(folder / OWN_SETTINGS_FILE) if (folder / OWN_SETTINGS_FILE).exists() else {}
    nested = getattr(config, "sentence_transformers", None) or {}
    named = (
        own.get("activation_fn"),
        nested.get("activation_fn"),
        getattr(config, "sbert_ce_default_activation_function", None),
    )
    is_backbone = (folder / MODULES_FILE).exists() and _is_of_another_kind(folder, own)
    prompts, default = own.get("prompts") or {}, own.get("default_prompt_name")
    if is_backbone:  # what was put before the texts it embedded is not for pairs
        prompts, default = {}, None
    if default is not None and default not in prompts:
        raise CheckpointError(f"{folder / OWN_SETTINGS_FILE} names the prompt {default!r} and does not give it")
    common: dict[str, Any] = {
        "activation": next((str(name) for name in named if name is not None), None),
        "prompts": prompts,
        "default_prompt_name": default,
        "fp32_modules": () if is_backbone else tuple(own.get("keep_in_fp32_modules") or ()),
    }
    if (folder / MODULES_FILE).exists() and not is_backbone:
        task, parts, processing = _read_modules(folder)
        return Layout(task, parts, **processing, **common)
    architecture = (config.architectures or [""])[0]
    return Layout("text-generation" if architecture.endswith("ForCausalLM") else "sequence-classification", **common)


def _is_of_another_kind(folder: Path, own: Mapping[str, Any]) -> bool:
    """Whether the parts embed texts one by one, so that the first of them is the backbone of a new cross-encoder."""
    kinds = [str(module["type"]).rpartition(".")[2] for module in read_json(folder / MODULES_FILE)]
    stated = own.get("model_type")
    return stated != "CrossEncoder" if stated is not None else bool(kinds) and kinds[-1] in ("Pooling", "Normalize")


def _read_modules(folder: Path) -> tuple[str, tuple[tuple[str, str], ...], dict[str, Any]]:
    """The Transformer's task, class and folder of the parts after it, and how texts are processed."""
    kinds: list[tuple[str, str]] = []
    for module in read_json(folder / MODULES_FILE):
        origin, _, kind = str(module["type"]).rpartition(".")
        known = kind == "Transformer" if not kinds else kind in PART_NAMES
        if not known or origin.partition(".")[0] != "sentence_transformers":
            raise CheckpointError(
                f"{folder} has a part {module['type']}, which is not supported here, and code that comes with a"
                f" checkpoint is never run: the parts may be Transformer, {', '.join(PART_NAMES)}"
            )
        place = Path(module["path"])
        if place.is_absolute() or ".." in place.parts or len(place.parts) > 1:
            raise CheckpointError(f"{folder / MODULES_FILE} names the folder {place}, which is not directly in it")
        kinds.append((kind, str(module["path"])))
    if not kinds or kinds[0][1]:
        raise CheckpointError(f"{folder / MODULES_FILE} has no Transformer in the folder itself: save the model anew")
    settings = read_json(folder / TRANSFORMER_FILE)
    task = settings.get("transformer_task", "feature-extraction")
    if task not in TASKS:
        raise CheckpointError(f"{folder / TRANSFORMER_FILE} asks for {task}: supported are {', '.join(TASKS)}")
    processing = dict(settings.get("processing_kwargs") or {})
    text_settings = dict(processing.pop("text", {}))
    template_settings = dict(processing.pop("chat_template", {}))
    template_settings.pop("restore_suffix", None)  # what the template ends in is always kept here
    unknown = [*processing, *check_text_settings(text_settings)]
    if unknown:
        raise CheckpointError(
            f"{folder / TRANSFORMER_FILE} sets processing_kwargs for {', '.join(unknown)}, which change what the"
            " model sees and are not supported"
        )
    inputs = settings.get("modality_config")
    return (
        task,
        tuple(kinds[1:]),
        {
            "text_settings": text_settings,
            "template_settings": template_settings,
            "may_chat": inputs is None or "message" in inputs,
        },
    )


def read_num_labels(folder: str | Path, layout: Layout) -> int:
    """Scores that a pair gets, from the configuration files alone."""
    kind, place = layout.parts[-1] if layout.parts else ("LogitScore" if layout.is_causal else "Transformer", "")
    if kind == "Dense":
        return int(read_json(Path(folder) / place / "config.json")["out_features"])
    return 1 if kind == "LogitScore" else int(load_config(folder).num_labels)


def claims_head(config: PretrainedConfig) -> bool:
    """Whether the checkpoint says that it has a head for classification."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def ranks(folder: str | Path) -> bool:
    """Whether the checkpoint ranks as it is, by one score a pair; a backbone does not before its head is trained."""
    config = load_config(folder)
    layout = read_layout(folder, config)
    has_head = bool(layout.parts) or layout.is_causal or claims_head(config)
    return has_head and read_num_labels(folder, layout) == 1


def load_config(folder: str | Path, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Read config.json. Raises CheckpointError when transformers has no class of its own for it."""
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **(settings or {})
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json is not of a model that transformers itself knows, and code that comes "
            f"with a checkpoint is never run: {error}"
        ) from error
    return config


def activation_kind(layout: Layout, num_labels: int) -> str:
    """Class in torch.nn of what the checkpoint's scores go through: what it names, else the default.

    Raises CheckpointError for anything but an activation of torch.nn without arguments: no other class is ever
    imported.
    """
    if layout.activation is None:
        return default_kind(num_labels)
    try:
        return known_kind(layout.activation)
    except ConfigError as error:
        raise CheckpointError(
            f"the checkpoint names an unsupported one: {error}; pass activation_fn yourself, or correct the checkpoint"
        ) from None


def default_kind(num_labels: int) -> str:
    """The same for a checkpoint that names nothing."""
    return "Sigmoid" if num_labels == 1 else "Identity"
