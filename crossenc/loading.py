"""Checkpoints as models: which layout a folder has, and its parts with their weights.

    classic    transformers' files alone: a sequence classification model, or a causal language model
    modular    modules.json names the parts, each with a folder of its own (sentence-transformers 6)

No code that a checkpoint brings is run, and no weight is ever made up. Knows no pairs and no scores.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from crossenc.activations import named_activation
from crossenc.adapters import put_saved_adapter
from crossenc.checkpoint import read_json
from crossenc.errors import CheckpointError, ConfigError
from crossenc.modules import PARTS, Dense, LogitScore, Transformer
from crossenc.tokenizer import check_text_settings

OWN_SETTINGS_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
TRANSFORMER_FILE = "sentence_bert_config.json"

_LOADERS: Mapping[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "feature-extraction": AutoModel,
    "text-generation": AutoModelForCausalLM,
}
#: Weights that a backbone may lack, because pooling by its first token is never asked of it.
_UNUSED_WEIGHTS = "pooler."


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint folder is made up.

    `task` is the Transformer's; `parts` holds the class and the folder of each part after it. `activation` is the
    full name that the checkpoint gives, None where it gives none. `text_settings` may hold the max_length and the
    truncation of pairs, `template_settings` are for the chat template. `fp32_modules` are linear layers that compute in
    float32.
    """

    task: str
    parts: tuple[tuple[str, str], ...] = ()
    activation: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    text_settings: Mapping[str, Any] = field(default_factory=dict)
    template_settings: Mapping[str, Any] = field(default_factory=dict)
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
        known = kind == "Transformer" if not kinds else kind in PARTS
        if not known or origin.partition(".")[0] != "sentence_transformers":
            raise CheckpointError(
                f"{folder} has a part {module['type']}, which is not supported here, and code that comes with a"
                f" checkpoint is never run: the parts may be Transformer, {', '.join(PARTS)}"
            )
        place = Path(module["path"])
        if place.is_absolute() or ".." in place.parts or len(place.parts) > 1:
            raise CheckpointError(f"{folder / MODULES_FILE} names the folder {place}, which is not directly in it")
        kinds.append((kind, str(module["path"])))
    if not kinds or kinds[0][1]:
        raise CheckpointError(f"{folder / MODULES_FILE} has no Transformer in the folder itself: save the model anew")
    settings = read_json(folder / TRANSFORMER_FILE)
    task = settings.get("transformer_task", "feature-extraction")
    if task not in _LOADERS:
        raise CheckpointError(f"{folder / TRANSFORMER_FILE} asks for {task}: supported are {', '.join(_LOADERS)}")
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
    return task, tuple(kinds[1:]), {"text_settings": text_settings, "template_settings": template_settings}


def load_parts(
    folder: str | Path,
    layout: Layout,
    *,
    base: Path | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype,
    config_settings: Mapping[str, Any] | None = None,
    model_settings: Mapping[str, Any] | None = None,
    new_head_allowed: bool = False,
) -> list[nn.Module]:
    """The parts of the model on the CPU, in eval mode; the last one gives "scores".

    `base` is the folder of the model that `folder` is an adapter of, if it is one. `num_labels` overrides what the
    checkpoint states; `config_settings` and `model_settings` go to transformers. With `new_head_allowed` a backbone
    without a head gets a random one, to be trained.
    Raises CheckpointError when a weight is missing, has another shape than its configuration says or is not finite
    in `dtype`.
    """
    folder = Path(folder)
    config = load_config(base or folder, config_settings)
    is_classifier = layout.task == "sequence-classification"
    if is_classifier:
        set_num_labels(config, num_labels)
    model, missing = load_model(base or folder, config, layout.task, dtype, model_settings)
    base_lacks_head = bool(missing)
    if base is not None:
        with quiet_transformers():
            missing = put_saved_adapter(model, folder, missing)
    makes_anew = bool((model_settings or {}).get("ignore_mismatched_sizes"))
    may_lack_head = new_head_allowed and is_classifier and (makes_anew or not _claims_head(config))
    if missing and not (may_lack_head and _is_head(missing, model)):
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing[:5])}: it is not a trained cross-encoder; train its head first"
        )
    transformer = Transformer(model, transformer_task=layout.task)
    transformer.remember_new(missing)
    transformer.base_lacks_head = base_lacks_head
    parts: list[nn.Module] = [transformer]
    for kind, place in layout.parts:
        parts.append(PARTS[kind].load(folder / place).to(dtype))
        _check_finite(parts[-1], folder / place)
    if layout.is_causal and not layout.parts:
        parts.append(_yes_or_no(folder))
    if layout.task == "feature-extraction" and not (
        isinstance(parts[-1], Dense) and parts[-1].module_output_name == "scores"
    ):
        raise CheckpointError(f"the parts of {folder} end in no scores: its head was never trained, or not saved")
    found = num_labels_of(parts)
    if num_labels is not None and found != num_labels:
        raise CheckpointError(f"{folder} gives {found} scores a pair, not {num_labels}: leave num_labels out")
    return [part.eval() for part in parts]


def _is_head(missing: list[str], model: PreTrainedModel) -> bool:
    """Whether every one of the weights `missing` lies outside of the backbone."""
    prefix = f"{model.base_model_prefix}."
    return not any(name.startswith(prefix) and not name.startswith(f"{prefix}pooler.") for name in missing)


def _claims_head(config: PretrainedConfig) -> bool:
    """Whether the checkpoint says that it has a head for classification."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def set_num_labels(config: PretrainedConfig, num_labels: int | None) -> None:
    """Set the labels of a classification model; those of a backbone, which states none, are one by default."""
    if num_labels is not None:
        config.num_labels = num_labels
    elif not _claims_head(config):
        config.num_labels = 1


def read_num_labels(folder: str | Path, layout: Layout) -> int:
    """Scores that a pair gets, from the configuration files alone."""
    kind, place = layout.parts[-1] if layout.parts else ("LogitScore" if layout.is_causal else "Transformer", "")
    if kind == "Dense":
        return int(read_json(Path(folder) / place / "config.json")["out_features"])
    return 1 if kind == "LogitScore" else int(load_config(folder).num_labels)


def num_labels_of(parts: list[nn.Module]) -> int:
    """Scores that a pair gets."""
    last = parts[-1]
    if isinstance(last, Dense):
        return last.linear.out_features
    if isinstance(last, Transformer):
        return int(last.model.config.num_labels)
    return 1


def _yes_or_no(folder: Path) -> LogitScore:
    """The score of a causal checkpoint that has none of its own: the words yes and no in its vocabulary."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    if None in ids or tokenizer.unk_token_id in ids:
        raise CheckpointError(
            f"{folder} is a language model whose vocabulary lacks 'yes' or 'no': give it a LogitScore part"
        )
    return LogitScore(*ids)


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


def load_model(
    folder: str | Path,
    config: PretrainedConfig,
    task: str,
    dtype: torch.dtype,
    settings: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load transformers' model for `task` onto the CPU; also the names of the weights that the folder lacks.

    Raises CheckpointError where it does not load, or weights have another shape than the configuration says.
    """
    given = dict(settings or {})
    makes_anew = bool(given.pop("ignore_mismatched_sizes", False))
    try:
        with quiet_transformers():
            model, info = _LOADERS[task].from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are reported in `info`, and refused below
                output_loading_info=True,
                **given,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the model of {folder} does not load: {error}") from error
    mismatched = sorted(name for name, *_ in info["mismatched_keys"])
    if (mismatched and not makes_anew) or info["error_msgs"]:
        problem = f"has another shape for {', '.join(mismatched[:5])}" if mismatched else f"says {info['error_msgs']}"
        raise CheckpointError(
            f"{folder} does not fit its configuration: it {problem}; correct num_labels or the configuration"
        )
    unused = _UNUSED_WEIGHTS if task == "feature-extraction" else "\0"
    missing = sorted(name for name in {*info["missing_keys"], *mismatched} if not name.startswith(unused))
    _check_finite(model, folder)
    model.eval()
    return model, missing


def _check_finite(part: nn.Module, folder: str | Path) -> None:
    for name, tensor in part.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} of {folder} has weights that are NaN or infinite in {tensor.dtype}: "
                f"{'load it in float32 or bfloat16, or ' if tensor.dtype == torch.float16 else ''}"
                "use an earlier checkpoint of the training run"
            )


def resolve_activation(layout: Layout, num_labels: int) -> nn.Module:
    """What the checkpoint's scores go through: what it names, else Sigmoid for one label and Identity for more.

    Raises CheckpointError for anything but an activation of torch.nn without arguments: no other class is ever
    imported.
    """
    if layout.activation is None:
        return default_activation(num_labels)
    try:
        return named_activation(layout.activation)
    except ConfigError as error:
        raise CheckpointError(
            f"the checkpoint names an unsupported one: {error}; pass activation_fn yourself, or correct the checkpoint"
        ) from None


def default_activation(num_labels: int) -> nn.Module:
    """What the scores of a checkpoint that names nothing go through."""
    return nn.Sigmoid() if num_labels == 1 else nn.Identity()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal inside the block."""
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if had_progress_bar:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
