"""A CrossEncoder as one ONNX file: from token ids to logits, the head included.

    <folder>/onnx/model.onnx               float32
    <folder>/onnx/model_qint8_avx2.onnx    int8, by the instructions that it is for

These are the names under which checkpoints on the hub carry ONNX files. Whether int8 ranks as well as float32 is for
crossenc.onnx.quality to judge, on data.

Shape letters: B pairs, W tokens, L labels.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx
import torch
from torch import Tensor, nn

from crossenc.batching import token_budget_batches
from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.modules import LogitScore
from crossenc.onnx.backend import FLOAT32_FILE, FOLDER
from crossenc.onnx.quantize import Inputs, Target, quantize, target_of_this_machine
from crossenc.onnx.session import OnnxNetwork, copy_files, quiet_exporters
from crossenc.pairs import Pair
from crossenc.records import TokenizedPairs

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

Precision = Literal["float32", "int8"]

#: float32 logits of onnxruntime and torch may differ by this, times the larger of 1 and the logit: MiniLM-L6's, which
#: go up to 11, differ by 1e-5.
_TOLERANCE = 1e-4
_MAX_CHECKED_TOKENS = 1024
#: Protobuf holds 2 GB; the weights of larger models go into a file beside theirs.
_MAX_FILE_BYTES = 1_900_000_000
_CALIBRATION_BATCH_TOKENS = 2048
#: Mean difference of int8's logits on the calibration pairs, in standard deviations of the logits. Random errors of
#: this size leave the nDCG@10 of MiniLM-L6 on 200 queries within 0.002 in 17 draws of 20, twice as large ones in 13.
MAX_INT8_ERROR = 0.012


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file; `left_out` names those of its `num_int8_layers` layers for int8 that stayed float32."""

    path: Path
    num_int8_layers: int = 0
    left_out: tuple[str, ...] = ()


def file_name(precision: Precision, target: Target | None = None) -> str:
    """The name of the file in the folder `onnx`."""
    return FLOAT32_FILE if precision == "float32" else f"model_qint8_{target or target_of_this_machine()}.onnx"


def export_onnx(
    model: "CrossEncoder",
    folder: str | Path,
    *,
    precision: Precision = "float32",
    calibration: Sequence[Pair] | TokenizedPairs = (),
    target: Target | None = None,
) -> Exported:
    """Write `model` as ONNX into the folder `onnx` of `folder`.

    The float32 graph is compared with torch on batches of one pair and more, of one token and up to the longest that
    the model takes, or 1,024. For int8, `calibration` holds pairs such as will be scored, 64 or more; `target` are the
    instructions of the machines that will score, this one's when None; layers whose int8 would take the logits of
    these pairs further than MAX_INT8_ERROR from the float32 ones stay float32.
    Raises ConfigError for a language model that is asked yes or no or a precision that does not exist, InputError for
    int8 without pairs, CheckpointError where the graph's scores are not the model's.
    """
    if precision not in ("float32", "int8"):
        raise ConfigError(f"precision is {precision!r}: choose float32 or int8")
    if precision == "int8" and len(calibration) == 0:
        raise InputError("int8 needs pairs to calibrate on: give 64 or more, such as will be scored")
    if any(isinstance(part, LogitScore) for part in model):
        raise ConfigError("a language model that is asked yes or no is not exported: score it with backend='torch'")
    place = Path(folder) / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place) as unfinished:
        graph = Path(unfinished) / FLOAT32_FILE
        parts = _float32_parts(model)
        names = _input_names(model)
        _write_graph(parts, names, graph)
        _check_like_torch(model, parts, names, graph)
        if precision == "int8":
            chosen = target or target_of_this_machine()
            quantized = quantize(graph, _batches(model, calibration), chosen, MAX_INT8_ERROR)
            graph = graph.with_name(file_name("int8", chosen))
            onnx.save(quantized.model, str(graph))
            return Exported(copy_files(graph, place), quantized.num_layers, quantized.left_out)
        return Exported(copy_files(graph, place))


class _Logits(nn.Module):
    """A network of tensors alone, as exporters want it: token ids [B, W] and what goes with them to logits [B, L]."""

    def __init__(self, parts: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.parts, self.names = parts, names

    def forward(self, *inputs: Tensor) -> Tensor:
        features = self.parts(dict(zip(self.names, inputs, strict=True)))
        logits: Tensor = features["scores"]
        return logits


def _float32_parts(model: "CrossEncoder") -> nn.Sequential:
    """The parts of `model` in float32, on the CPU and in eval mode: a copy, unless they are so already."""
    parts = nn.Sequential(*model)
    first = next(parts.parameters())
    if first.dtype != torch.float32 or first.device.type != "cpu" or any(part.training for part in parts.modules()):
        parts = copy.deepcopy(parts).to("cpu", torch.float32).eval()
    return parts


def _input_names(model: "CrossEncoder") -> list[str]:
    return list(model.preprocess([("a", "b")]))


def _write_graph(parts: nn.Module, names: Sequence[str], path: Path) -> None:
    example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in names)
    any_shape = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in names)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parts.state_dict().values())
    with quiet_exporters(), torch.inference_mode():
        program = torch.onnx.export(
            _Logits(parts, names).eval(),
            example,
            dynamo=True,
            input_names=list(names),
            output_names=["logits"],
            dynamic_shapes=(any_shape,),
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=num_bytes > _MAX_FILE_BYTES)
    graph = onnx.load(str(path), load_external_data=False)
    del graph.graph.value_info[:]  # some shapes date from before the exporter turned weights over, and are wrong
    for tensor in (*graph.graph.input, *graph.graph.output):
        dimensions = tensor.type.tensor_type.shape.dim
        dimensions[0].dim_param = "pairs"
        if tensor.name in names:
            dimensions[1].dim_param = "tokens"
    onnx.save(graph, str(path))


def _check_like_torch(model: "CrossEncoder", parts: nn.Module, names: Sequence[str], path: Path) -> None:
    """Raise CheckpointError unless the graph at `path` gives torch's logits for batches of several shapes."""
    network = OnnxNetwork(path, model.num_labels)
    longest = min(model.max_length, _MAX_CHECKED_TOKENS)
    generator = torch.Generator().manual_seed(0)
    for num_pairs, width in ((1, 1), (1, longest), (2, 3), (3, min(17, longest)), (5, longest // 2 + 1)):
        lengths_B1 = torch.randint(1, width + 1, (num_pairs, 1), generator=generator)
        lengths_B1[0] = width
        columns_W = torch.arange(width)
        mask_BW = columns_W < lengths_B1
        if model.tokenizer.padding_side == "left":
            mask_BW = mask_BW.flip(1)
        ids_BW = torch.randint(0, model.config.vocab_size, (num_pairs, width), generator=generator)
        features = {
            "input_ids": torch.where(mask_BW, ids_BW, model.tokenizer.pad_token_id),
            "attention_mask": mask_BW.long(),
            "token_type_ids": ((columns_W >= width // 2) & mask_BW).long(),
        }
        features = {name: features[name] for name in names}
        with torch.inference_mode():
            expected = parts(features)["scores"]
        difference = (network(features)["scores"] - expected).abs() / expected.abs().clamp(min=1)
        if not bool((difference <= _TOLERANCE).all()):
            raise CheckpointError(
                f"the exported graph's logits differ from torch's by up to {difference.max():.1e} on {num_pairs} pairs"
                f" of {width} tokens: this kind of model cannot be exported, score it with backend='torch'"
            )


def _batches(model: "CrossEncoder", pairs: Sequence[Pair] | TokenizedPairs) -> list[Inputs]:
    """Batches of pairs as arrays [B, W]."""
    if isinstance(pairs, TokenizedPairs):
        engine = model.engine
        chosen = token_budget_batches(pairs.lengths, _CALIBRATION_BATCH_TOKENS)
        batches = [engine.batch_inputs(pairs, batch) for batch in chosen]
    else:
        batches = [model.preprocess(pairs[start : start + 16]) for start in range(0, len(pairs), 16)]
    return [{name: tensor.cpu().numpy() for name, tensor in batch.items()} for batch in batches]
