"""The parts that a cross-encoder is made of, each a step from a dict of tensors to the same dict with more in it.

    Transformer                                        a classification model: logits are the scores
    Transformer, Pooling, Dense, LayerNorm, Dense      a backbone with a head of small layers
    Transformer, LogitScore                            a language model that is asked yes or no

The names, the keys of the dict and the configuration files are those of sentence-transformers 6, so that either
library loads what the other saved. Nothing here knows texts, tokens' meaning or files beyond a part's own folder.

Shape letters: B pairs, W tokens of the longest pair, D width of the model, L labels, V vocabulary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossenc.activations import activation_name, named_activation
from crossenc.errors import CheckpointError, ConfigError

Features = dict[str, Any]

_ADAPTERS_COPY = re.compile(r"\.modules_to_save\.[^.]+")

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

#: Pooling before version 6: one true-or-false setting a mode -> the mode.
_OLD_POOLING_SETTINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: What transformers takes; other entries of a dict of features are for later parts.
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class Part(nn.Module):
    """A step of the forward pass that can be written to a folder and read back."""

    #: How sentence-transformers 6 names the class in modules.json.
    saved_type: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """What config.json of its folder holds."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write config.json and, where there are weights, model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings(), indent=4))
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if weights:
            save_file(weights, str(folder / "model.safetensors"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it back. Raises CheckpointError where a file is missing or does not fit."""
        settings = _read_settings(folder)
        try:
            part = cls.from_settings(settings)
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}") from error
        if part.state_dict():
            part._load_weights(folder / "model.safetensors")
        return part

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(**settings)

    def _load_weights(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: copy the whole checkpoint, or save it as safetensors")
        weights = load_file(path)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if wanted != found:
            raise CheckpointError(f"{path} holds {found}, but its config.json asks for {wanted}: copy it again")
        self.load_state_dict(weights)


class Transformer(nn.Module):
    """A transformers model: token ids [B, W] to logits [B, L], hidden states [B, W, D] or last logits [B, 1, V].

    `transformer_task` is "sequence-classification", "feature-extraction" or "text-generation", and says which.
    """

    saved_type = "sentence_transformers.base.modules.transformer.Transformer"
    #: task -> (output of transformers' model, key of the features).
    OUTPUTS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "sequence-classification": ("logits", "scores"),
        "feature-extraction": ("last_hidden_state", "token_embeddings"),
        "text-generation": ("logits", "causal_logits"),
    }

    model: Any

    def __init__(
        self,
        model_name_or_path: str | Path | nn.Module,
        *,
        transformer_task: str = "feature-extraction",
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        max_seq_length: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Load a folder, a URI or a hub id; or take a model of transformers as it is, with its fast `tokenizer`.

        The three mappings go to transformers. A model without a head for the task gets a random one, to be trained.
        Raises CheckpointError as crossenc.loading does, ConfigError for an unknown task.
        """
        super().__init__()
        if transformer_task not in self.OUTPUTS:
            raise ConfigError(f"there is no task {transformer_task!r}: choose from {', '.join(self.OUTPUTS)}")
        self.task = transformer_task
        self.new_weights: dict[str, Tensor] = {}
        self.base_lacks_head = False
        if isinstance(model_name_or_path, nn.Module):
            self.model, self.tokenizer = model_name_or_path, tokenizer
        else:
            self._load(model_name_or_path, model_kwargs or {}, processor_kwargs or {}, config_kwargs or {})
        if max_seq_length is not None:
            self.tokenizer.model_max_length = max_seq_length

    def _load(
        self,
        name: str | Path,
        model_settings: Mapping[str, Any],
        processor_settings: Mapping[str, Any],
        config_settings: Mapping[str, Any],
    ) -> None:
        # Imported here because loading checkpoints and knowing their tokenizers build on the parts.
        from crossenc.checkpoint import fetch
        from crossenc.layout import load_config
        from crossenc.loading import load_model, set_num_labels
        from crossenc.precision import resolve_dtype
        from crossenc.source import split_dtype
        from crossenc.tokenizer import load_fast_tokenizer

        folder = fetch(name)
        stated_dtype, rest = split_dtype(model_settings)
        dtype = resolve_dtype(stated_dtype, torch.device("cpu"))
        config = load_config(folder, config_settings)
        set_num_labels(config, config_settings.get("num_labels"))
        self.model, missing = load_model(folder, config, self.task, dtype, rest)
        self.remember_new(missing)
        self.tokenizer = load_fast_tokenizer(folder, processor_settings)

    def remember_new(self, names: Sequence[str]) -> None:
        """Note that the weights `names` were made up, not loaded: they make no scores before they are trained."""
        state = self.model.state_dict()
        self.new_weights = {name: state[name].detach().cpu().clone() for name in names if name in state}

    @property
    def head_is_new(self) -> bool:
        """Whether weights that were made up are still what they were."""
        if not self.new_weights:
            return False
        # A head that an adapter trains is a copy of this one, which stays beside it.
        state = {_ADAPTERS_COPY.sub("", name): weight for name, weight in self.model.state_dict().items()}
        is_new = all(
            torch.equal(state[name].cpu(), made.to(state[name].dtype)) for name, made in self.new_weights.items()
        )
        if not is_new:
            self.new_weights = {}
        return is_new

    def get_embedding_dimension(self) -> int:
        """D, the width of a token's hidden state."""
        return int(self.model.config.hidden_size)

    def forward(self, features: Features) -> Features:
        inputs = {name: features[name] for name in _MODEL_INPUTS if features.get(name) is not None}
        if self.task == "text-generation":
            inputs |= {"logits_to_keep": 1, "use_cache": False}
        output, key = self.OUTPUTS[self.task]
        return {**features, key: getattr(self.model(**inputs), output)}


class Pooling(Part):
    """Token states [B, W, D] to one vector a pair, [B, D times the modes], under "sentence_embedding".

    `pooling_mode` is one of POOLING_MODES or several, whose vectors are joined.
    """

    saved_type = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"

    def __init__(
        self, embedding_dimension: int, pooling_mode: str | Sequence[str] = "mean", include_prompt: bool = True
    ) -> None:
        super().__init__()
        self.modes = (pooling_mode,) if isinstance(pooling_mode, str) else tuple(pooling_mode)
        unknown = [mode for mode in self.modes if mode not in POOLING_MODES]
        if unknown or not self.modes:
            raise ConfigError(f"pooling_mode is {pooling_mode!r}: choose from {', '.join(POOLING_MODES)}")
        self.embedding_dimension = embedding_dimension
        self.include_prompt = include_prompt

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        known = dict(settings)
        width = known.pop("embedding_dimension", None) or known.pop("word_embedding_dimension")
        known.pop("word_embedding_dimension", None)
        old = [mode for name, mode in _OLD_POOLING_SETTINGS.items() if known.pop(name, False)]
        mode = known.pop("pooling_mode", None) or old or "mean"
        return cls(width, mode, **known)

    def settings(self) -> dict[str, Any]:
        mode = self.modes[0] if len(self.modes) == 1 else list(self.modes)
        return {
            "embedding_dimension": self.embedding_dimension,
            "pooling_mode": mode,
            "include_prompt": self.include_prompt,
        }

    def forward(self, features: Features) -> Features:
        states, mask = features["token_embeddings"], features["attention_mask"]
        pooled = [_pool(states, mask, mode) for mode in self.modes]
        return {**features, "sentence_embedding": torch.cat(pooled, dim=-1)}


def _pool(states_BWD: Tensor, mask_BW: Tensor, mode: str) -> Tensor:
    """One vector [B, D] out of each pair's token states; sums are taken in float32 at least."""
    rows = torch.arange(len(states_BWD), device=states_BWD.device)
    first = mask_BW.int().argmax(dim=1)
    if mode == "cls":
        return states_BWD[rows, first]
    if mode == "lasttoken":
        return states_BWD[rows, first + mask_BW.sum(dim=1) - 1]
    if mode == "max":
        return states_BWD.masked_fill(~mask_BW.bool().unsqueeze(-1), float("-inf")).amax(dim=1)
    dtype = torch.promote_types(states_BWD.dtype, torch.float32)
    weights_BW = mask_BW.to(dtype)
    if mode == "weightedmean":  # a token counts as often as its place, from 1
        weights_BW = weights_BW * weights_BW.cumsum(dim=1)
    sum_BD = torch.einsum("bwd,bw->bd", states_BWD.to(dtype), weights_BW)
    total_B1 = weights_BW.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return (sum_BD / (total_B1.sqrt() if mode == "mean_sqrt_len_tokens" else total_B1)).to(states_BWD.dtype)


class Dense(Part):
    """A linear layer with an activation, from one key of the features to another; "scores" ends the model."""

    saved_type = "sentence_transformers.base.modules.dense.Dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_function: nn.Module | None = nn.Tanh(),  # noqa: B008 - it has no state
        init_weight: Tensor | None = None,
        init_bias: Tensor | None = None,
        module_input_name: str = "sentence_embedding",
        module_output_name: str | None = None,
    ) -> None:
        """`init_weight` is [out_features, in_features], `init_bias` [out_features]; random ones where None."""
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        with torch.no_grad():
            for parameter, initial in ((self.linear.weight, init_weight), (self.linear.bias, init_bias)):
                if initial is not None:
                    parameter.copy_(initial)
        self.activation_function = nn.Identity() if activation_function is None else activation_function
        self.module_input_name = module_input_name
        self.module_output_name = module_output_name or module_input_name

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        known = dict(settings)
        if "activation_function" in known:
            known["activation_function"] = named_activation(known["activation_function"])
        return cls(**known)

    def settings(self) -> dict[str, Any]:
        return {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": activation_name(self.activation_function),
            "module_input_name": self.module_input_name,
            "module_output_name": self.module_output_name,
        }

    def forward(self, features: Features) -> Features:
        states = features[self.module_input_name].to(self.linear.weight.dtype)
        return {**features, self.module_output_name: self.activation_function(self.linear(states))}


class LayerNorm(Part):
    """Layer normalisation of "sentence_embedding", [B, D]."""

    saved_type = "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm"

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def settings(self) -> dict[str, Any]:
        return {"dimension": self.norm.normalized_shape[0]}

    def forward(self, features: Features) -> Features:
        return {**features, "sentence_embedding": self.norm(features["sentence_embedding"])}


class LogitScore(Part):
    """Scores [B, 1] from a language model's logits of the next token: yes minus no, or yes alone."""

    saved_type = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"

    def __init__(
        self, true_token_id: int, false_token_id: int | None = None, module_input_name: str = "causal_logits"
    ) -> None:
        super().__init__()
        self.true_token_id = true_token_id
        self.false_token_id = false_token_id
        self.module_input_name = module_input_name

    def settings(self) -> dict[str, Any]:
        return {
            "true_token_id": self.true_token_id,
            "false_token_id": self.false_token_id,
            "module_input_name": self.module_input_name,
        }

    def forward(self, features: Features) -> Features:
        last_BV = features[self.module_input_name][:, -1]
        scores_B = last_BV[:, self.true_token_id]
        if self.false_token_id is not None:
            scores_B = scores_B - last_BV[:, self.false_token_id]
        return {**features, "scores": scores_B.unsqueeze(-1)}


PARTS: Mapping[str, type[Part]] = {part.__name__: part for part in (Pooling, Dense, LayerNorm, LogitScore)}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy the whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return settings
