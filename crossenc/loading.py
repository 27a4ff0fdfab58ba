"""Checkpoints as models: the parts of a folder with their weights.

No code that a checkpoint brings is run, and no weight is ever made up. Knows no pairs and no scores.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from crossenc.activations import make_activation
from crossenc.adapters import put_saved_adapter
from crossenc.errors import CheckpointError, ConfigError
from crossenc.layout import Layout, activation_kind, claims_head, load_config
from crossenc.modules import PARTS, Dense, LogitScore, Transformer
from crossenc.quiet import quiet_transformers

_LOADERS: Mapping[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "feature-extraction": AutoModel,
    "text-generation": AutoModelForCausalLM,
}
#: Weights that a backbone may lack, because pooling by its first token is never asked of it.
_UNUSED_WEIGHTS = "pooler."


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
    may_lack_head = new_head_allowed and is_classifier and (makes_anew or not claims_head(config))
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


def set_num_labels(config: PretrainedConfig, num_labels: int | None) -> None:
    """Set the labels of a classification model; those of a backbone, which states none, are one by default."""
    if num_labels is not None:
        config.num_labels = num_labels
    elif not claims_head(config):
        config.num_labels = 1


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
    given = _taken(settings or {})
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


def _taken(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a user's settings goes to transformers. Raises ConfigError for those that are never taken."""
    if settings.get("device_map") is not None:
        raise ConfigError("device_map is not supported: choose the device by device=, and several by a pool")
    if settings.get("trust_remote_code"):
        raise ConfigError("trust_remote_code is not supported: code that comes with a checkpoint is never run")
    if settings.get("use_safetensors") is False:
        raise ConfigError("use_safetensors=False is not supported: weights are never read from pickles")
    fixed = ("device_map", "trust_remote_code", "use_safetensors", "local_files_only")  # as we set them anyway
    return {name: value for name, value in settings.items() if name not in fixed}


def _check_finite(part: nn.Module, folder: str | Path) -> None:
    for name, tensor in part.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} of {folder} has weights that are NaN or infinite in {tensor.dtype}: "
                f"{'load it in float32 or bfloat16, or ' if tensor.dtype == torch.float16 else ''}"
                "use an earlier checkpoint of the training run"
            )


def resolve_activation(layout: Layout, num_labels: int) -> nn.Module:
    """What the checkpoint's scores go through. Raises CheckpointError as `activation_kind` does."""
    return make_activation(activation_kind(layout, num_labels))
