"""How the engine calls a model: on packed batches where it can be, and with its head in float32.

A packed batch is one row of token ids, sequence after sequence without padding, whose positions start again in each.
The backbone computes it as it is; the head then gets one row a sequence, as it does of a padded batch. What is called
is a copy that shares the model's weights: the model stays as it was, and other threads may use it meanwhile. Knows no
texts, no batches' sizes and no devices' memory.

Shape letters: T tokens, B pairs, D width of the model, L labels.
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from crossenc import mpnet
from crossenc.attention import (
    PACKED_ATTENTION,
    Sequences,
    current_sequences,
    packed_attention,
    register,
    takes_varlen_kernel,
    varlen_has_settings,
)
from crossenc.compiling import is_compiled
from crossenc.float32_layers import Float32Linear
from crossenc.modules import Dense, Features, LayerNorm, LogitScore, Pooling, Transformer
from crossenc.precision import is_narrow
from crossenc.records import TokenizedPairs

#: Encoders of transformers whose attention goes through its registry and knows no position but position_ids; and
#: MPNet, whose attention is replaced.
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert", "mpnet")
#: Those that count positions from the padding id on, and skip padding ids in the text.
_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "mpnet")
#: Those built like BERT, whose last layer is spared all but first tokens: a sixth of MiniLM-L6's time.
_BUILT_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "electra")
#: Where the forwards are defined that call one part after the other.
_SEQUENTIAL_FORWARDS = ("torch.nn.modules.container", "crossenc.model")

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class PackedForward:
    """The logits of packed batches, by a network that `why_padded` has nothing against, in its state of the moment."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        parts = _parts_of(network)
        assert parts is not None
        register()
        transformer = _shallow_copy(parts[0])
        transformer.model = _set_to_packed(transformer.model, {})
        kind = transformer.model.config.model_type
        if kind == "mpnet":
            transformer.model = _with_packed_mpnet(transformer.model)
        is_counted = kind in _COUNTS_FROM_PADDING
        self._padding_id: int | None = transformer.model.base_model.embeddings.padding_idx if is_counted else None
        self._last = _last_attention(transformer.model)
        #: The network as it is called: its parameters are the network's own.
        self.view = scoring_view(nn.Sequential(transformer, *parts[1]), is_packed=True)
        self._device = device

    def __call__(self, pairs: TokenizedPairs, batch: NDArray[np.int64]) -> Tensor:
        """Logits [B, L] of the pairs at `batch`, on the device."""
        features, sequences = pack(pairs, batch, self._padding_id, self._device)
        with packed_attention(sequences, self._last):
            logits: Tensor = self.view(features)["scores"]
        return logits


def why_padded(network: nn.Module, device: torch.device) -> str | None:
    """Why a network cannot be called on packed batches, in words; None when it can."""
    return next(_objections(network, device), None)


def _objections(network: nn.Module, device: torch.device) -> Iterator[str]:
    if device.type not in ("cpu", "cuda"):
        yield f"there is no packed attention on {device.type}"
    parts = _parts_of(network)
    if parts is None or type(network).forward.__module__ not in _SEQUENTIAL_FORWARDS:
        yield f"{type(network).__name__} is not a plain sequence of parts"
        return
    transformer, heads = parts
    model, config = transformer.model, transformer.model.config
    kind = type(model).__name__
    if config.model_type not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        yield f"{kind} is not known to take packed batches"
    if transformer.task == "feature-extraction" and not any(type(part) is Pooling for part in heads):
        yield "its parts pool no tokens"
    if transformer.task != "feature-extraction" and not kind.endswith("ForSequenceClassification"):
        yield f"the head of {kind} is not known"
    if type(transformer) is not Transformer or any(type(part) not in (Pooling, Dense, LayerNorm) for part in heads):
        yield "it has a part that is not known"
    if getattr(config, "is_decoder", False):
        yield "it is configured as a decoder"
    if config.output_attentions or config.output_hidden_states:
        yield "it is configured to return attentions or hidden states"
    if getattr(config, "chunk_size_feed_forward", 0):
        yield "it is configured to feed forward in chunks"
    if config._attn_implementation != ("eager" if config.model_type == "mpnet" else "sdpa"):
        yield f"its attention is set to {config._attn_implementation}"
    if any(map(_is_altered, network.modules())):
        yield "it is compiled, or has hooks"


def kernel_of(network: nn.Module, device: torch.device) -> str:
    """What computes the attention of packed batches, for people."""
    parts = _parts_of(network)
    assert parts is not None
    model = parts[0].model
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    groups = "SDPA by groups of equal length"
    if config.model_type == "mpnet" or not takes_varlen_kernel(device, model.dtype, width):
        return groups
    has_windows = getattr(config, "sliding_window", None) is not None
    return f"varlen kernel, {groups} within windows" if has_windows and not varlen_has_settings() else "varlen kernel"


def _parts_of(network: nn.Module) -> tuple[Transformer, list[nn.Module]] | None:
    """The transformers model and the parts after it; None for anything else."""
    parts = list(network) if isinstance(network, nn.Sequential) else []
    if not parts or not isinstance(parts[0], Transformer) or not isinstance(parts[0].model, PreTrainedModel):
        return None
    return parts[0], parts[1:]


def _last_attention(model: PreTrainedModel) -> Any:
    """The attention of the last layer, where nothing but first tokens is asked of that layer; else None."""
    if model.config.model_type not in _BUILT_LIKE_BERT or model.base_model is model:
        return None
    return model.base_model.encoder.layer[-1].attention.self


def _is_altered(module: nn.Module) -> bool:
    """Whether somebody else has a say in how the module is called: torch.compile, hooks, another forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or is_compiled(module))


def pack(
    pairs: TokenizedPairs, batch: NDArray[np.int64], padding_id: int | None, device: torch.device
) -> tuple[Features, Sequences]:
    """The pairs at `batch` end to end: model inputs, each int64 [1, T], and where the pairs lie.

    Positions count from `padding_id` on and skip it in the text, or from 0 where that is None. All goes to the device
    in one copy.
    """
    lengths = pairs.lengths[batch]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    num_tokens = int(starts[-1])
    places = np.arange(num_tokens) - np.repeat(starts[:-1], lengths)
    source = np.repeat(pairs.offsets[batch], lengths) + places
    input_ids = pairs.input_ids[source]
    rows = {"input_ids": input_ids, "position_ids": places}
    if padding_id is not None:
        rows["position_ids"] = _positions_of_text(input_ids != padding_id, starts, padding_id)
    if pairs.token_type_ids is not None:
        rows["token_type_ids"] = pairs.token_type_ids[source]
    sent = to_device(np.concatenate([*rows.values(), starts], dtype=np.int32, casting="same_kind"), device)
    inputs, starts_on_device = sent[: len(rows) * num_tokens], sent[len(rows) * num_tokens :]
    features = dict(zip(rows, inputs.long().view(len(rows), 1, num_tokens), strict=True))
    return features, Sequences(lengths, starts_on_device)


def _positions_of_text(
    is_text: NDArray[np.bool_], starts: NDArray[np.int64], padding_id: int
) -> NDArray[np.integer[Any]]:
    """Positions that count from the padding id on, and stand still at padding ids inside of a text."""
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_text)])
    before = np.repeat(counts[starts[:-1]], np.diff(starts))
    positions: NDArray[np.integer[Any]] = np.where(is_text, counts[1:] - before, 0) + padding_id
    return positions


def to_device(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy to the device at once; to CUDA from pinned memory, without waiting for it."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def scoring_view(network: nn.Module, is_packed: bool) -> nn.Module:
    """The network as the engine calls it: the same backbone, and a head in float32 that takes packed batches.

    It shares weights with the network, whose state of the moment it is, so it is made anew for each use. Where there
    is nothing to change, or the network is of unknown make, it is the network itself.
    """
    parts = _parts_of(network)
    if parts is None:
        return network
    transformer, heads = parts
    if transformer.task == "text-generation":
        return _asked_in_float32(network, transformer, heads)
    is_wide = not is_narrow(transformer.model.dtype)
    if is_wide and not is_packed:
        return network
    seen = _shallow_copy(transformer)
    seen.model = _model_view(transformer.model, transformer.task, is_wide=is_wide, is_packed=is_packed)
    heads = [part if is_wide else copy.deepcopy(part).float() for part in heads]
    return nn.Sequential(seen, *[_PackedPooling(part) if type(part) is Pooling else part for part in heads])


def answers_are_coarse(network: nn.Module) -> bool:
    """Whether a language model computes its yes and no in a narrow format, since its head is of unknown make."""
    parts = _parts_of(network)
    if parts is None or parts[0].task != "text-generation":
        return False
    return is_narrow(parts[0].model.dtype) and _output_embedding(*parts) is None


def _output_embedding(transformer: Transformer, heads: list[nn.Module]) -> tuple[str, nn.Linear] | None:
    """What makes logits of a language model that is asked yes or no, with its name there; None if of unknown make.

    What transformers' models do to logits afterwards, such as capping them, they do to each alone.
    """
    model = transformer.model
    is_known = type(model).__module__.startswith("transformers.models.")
    is_known &= type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and type(transformer) is Transformer
    if not is_known or [type(part) for part in heads] != [LogitScore] or heads[0].module_input_name != "causal_logits":
        return None
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Float32Linear) or _is_altered(head):
        return None
    return next(((name, child) for name, child in model.named_children() if child is head), None)


def _asked_in_float32(network: nn.Module, transformer: Transformer, heads: list[nn.Module]) -> nn.Module:
    """A language model that computes in float32 the logits that its score is made of, and no others."""
    embedding = _output_embedding(transformer, heads)
    if embedding is None or not is_narrow(transformer.model.dtype):
        return network
    name, head = embedding
    asked: Any = heads[0]
    token_ids = [token for token in (asked.true_token_id, asked.false_token_id) if token is not None]
    seen = _shallow_copy(transformer)
    seen.model = _with_child(transformer.model, [name], _TokenLogits(head, token_ids))
    return nn.Sequential(seen, LogitScore(0, None if asked.false_token_id is None else 1))


def _model_view(model: nn.Module, task: str, *, is_wide: bool, is_packed: bool) -> nn.Module:
    if task == "feature-extraction":
        return _Backbone(model, gives_rows=False, is_wide=is_wide)
    name = str(model.base_model_prefix)
    if name not in model._modules:
        return model
    seen = _shallow_copy(model)
    for child, module in model.named_children():
        if child == name:
            is_short = is_packed and _last_attention(model) is not None
            backbone = _with_short_last_layer(module) if is_short else module
            seen._modules[child] = _Backbone(backbone, gives_rows=True, is_wide=is_wide)
        elif not is_wide:
            seen._modules[child] = copy.deepcopy(module).float()
    return seen


def _with_short_last_layer(backbone: nn.Module) -> nn.Module:
    """A backbone built like BERT that goes on with first tokens alone after the last attention: states [1, B, D]."""
    last = str(len(backbone.get_submodule("encoder.layer")) - 1)  # type: ignore[arg-type]
    path = ["encoder", "layer", last, "attention", "output"]
    output = backbone.get_submodule(".".join(path))
    return _with_child(backbone, path, _FirstTokens(output))


def _with_packed_mpnet(model: nn.Module) -> nn.Module:
    """An MPNet with the same weights whose layers have the attention of crossenc.mpnet."""
    path = [] if model.base_model is model else [str(model.base_model_prefix)]
    path.append("encoder")
    encoder: Any = model.get_submodule(".".join(path))
    seen: Any = _shallow_copy(encoder)
    seen.compute_position_bias = mpnet.longest_bias(encoder)
    for i, layer in enumerate(encoder.layer):
        attention = mpnet.PackedSelfAttention(layer.get_submodule(".".join(mpnet.ATTENTION)))
        seen = _with_child(seen, ["layer", str(i), *mpnet.ATTENTION], attention)
    return _with_child(model, path, seen)


def _with_child(module: nn.Module, path: list[str], child: nn.Module) -> nn.Module:
    """The module with another one at `path`; what lies elsewhere is shared."""
    seen = _shallow_copy(module)
    inner = module.get_submodule(path[0])
    seen._modules[path[0]] = child if len(path) == 1 else _with_child(inner, path[1:], child)
    return seen


def _set_to_packed(module: AnyModule, configs: dict[int, PretrainedConfig]) -> AnyModule:
    """The module with the same weights and PACKED_ATTENTION in its `configs`, which are copied, each once."""
    seen = _shallow_copy(module)
    for name, child in module._modules.items():
        if child is not None:
            seen._modules[name] = _set_to_packed(child, configs)
    config = vars(module).get("config")
    if isinstance(config, PretrainedConfig):
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation = PACKED_ATTENTION
        vars(seen)["config"] = configs[id(config)]
        return seen
    return seen if any(child is not module._modules[name] for name, child in seen._modules.items()) else module


def _shallow_copy(module: AnyModule) -> AnyModule:
    """A module with the same parameters and children, whose children can be replaced."""
    seen = object.__new__(type(module))
    vars(seen).update(vars(module), _modules=dict(module._modules))
    vars(seen).pop("_compiled_call_impl", None)  # it calls the module itself
    return seen


class _FirstTokens(nn.Module):
    """What follows the last attention, on first tokens alone."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(self, attended: Tensor, states: Tensor) -> Any:
        sequences = current_sequences()
        assert sequences is not None  # packed batches alone come here
        first = sequences.first_tokens
        return self.output(attended[:, first], states[:, first])


class _TokenLogits(nn.Module):
    """Logits of a few tokens, from states [B, W, D] by their rows of an output embedding; all in float32."""

    def __init__(self, head: nn.Linear, token_ids: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach()[token_ids].float(), requires_grad=False)
        self.bias = None if head.bias is None else head.bias.detach()[token_ids].float()

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states.float(), self.weight, self.bias)


class _Backbone(nn.Module):
    """A backbone as its head sees it: states in float32 at least, and of a packed batch one row a sequence.

    These rows [B, 1, D] look like sequences of one token, so a head that takes the first token, or the mean of all,
    takes what is meant.
    """

    def __init__(self, backbone: nn.Module, *, gives_rows: bool, is_wide: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.gives_rows = gives_rows
        pooler = getattr(backbone, "pooler", None) if gives_rows else None
        self.pooler = pooler if is_wide or pooler is None else copy.deepcopy(pooler).float()
        self.takes_mean = getattr(getattr(backbone, "config", None), "classifier_pooling", "cls") == "mean"

    def forward(self, *args: Any, **inputs: Any) -> Any:
        output = self.backbone(*args, **inputs)
        sequences, states = current_sequences(), output.last_hidden_state
        if sequences is not None and self.gives_rows:
            states = self._rows(states[0], sequences)
        if is_narrow(states.dtype):
            states = states.float()
        output.last_hidden_state = states
        if self.pooler is not None:
            output.pooler_output = self.pooler(states)
        return output

    def _rows(self, states_TD: Tensor, sequences: Sequences) -> Tensor:
        if len(states_TD) == len(sequences.lengths):  # first tokens already, or all are
            return states_TD.unsqueeze(1)
        if not self.takes_mean:
            return states_TD[sequences.first_tokens].unsqueeze(1)
        wide = torch.promote_types(states_TD.dtype, torch.float32)
        means = [
            states_TD[first:end].view(-1, length, states_TD.shape[-1]).to(wide).mean(dim=1, keepdim=True)
            for first, end, length in sequences.groups
        ]
        return torch.cat(means)


class _PackedPooling(nn.Module):
    """A Pooling part that also takes the token states of a packed batch, [1, T, D]: by sequences of equal length."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, features: Features) -> Features:
        sequences = current_sequences()
        if sequences is None:
            unpacked: Features = self.pooling(features)
            return unpacked
        states_TD = features["token_embeddings"][0]
        pooled = []
        for first, end, length in sequences.groups:
            states = states_TD[first:end].view(-1, length, states_TD.shape[-1])
            mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
            pooled.append(self.pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"])
        return {**features, "sentence_embedding": torch.cat(pooled)}
