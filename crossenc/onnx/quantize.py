"""Float32 ONNX graphs to int8 ones that rank alike: what is multiplied in int8, and what had better not be.

The input of a layer becomes uint8 with a scale for every token, found while scoring; weights are int8 with a scale for
every output. Four things keep the scores close to float32's:

    heads and embeddings   stay float32: they cost next to nothing, and every error in them is one of the score
    loud inputs            some inputs of a layer are many times louder than the rest and would set a token's scale:
                           each is divided by a factor that its weights are multiplied with
    careful rounding       a weight's rounding error is made up for by the weights of the same output that are rounded
                           after it, as far as their inputs go together: Frantar et al., GPTQ (2022), algorithm 1
    no overflow            before VNNI, processors sum two products in 16 bits: weights are scaled so that no two are
                           too large together, which costs less precision than 7 bits for all of them

Knows graphs and arrays, no texts, no model of torch and no ranking.

Shape letters: K inputs of a layer, N its outputs.
"""

import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.linalg import cholesky

from crossenc.errors import CheckpointError
from crossenc.onnx.session import open_session

logger = logging.getLogger(__name__)

Inputs = Mapping[str, NDArray[np.int64]]
Target = Literal["avx2", "avx512_vnni", "arm64"]

#: The largest code of a weight, and of two weights of one sign that are next to each other where sums have 16 bits:
#: 255 * (127 + 1) < 2 ** 15, the 1 for both being rounded up.
_LARGEST_CODE = 127
#: How much of an input's loudness goes into the weights.
_SMOOTHING = 0.5
#: Share of the mean that is added to the diagonal of an input's moments, so that they have an inverse.
_DAMPING = 0.01
_ROUNDED_AT_ONCE = 64
#: Of this many batches one measures every group of layers alone, to put them in order.
_MEASURED_ALONE = 3
_PREFIX = "int8_"


@dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 graph; `left_out` names the layers that stay float32 because their error was too large."""

    model: onnx.ModelProto
    num_layers: int
    left_out: tuple[str, ...]


@dataclass(slots=True)
class _Seen:
    """What calibration saw of a layer's input: the largest absolute value [K] and the extremes; the moments [K, K]."""

    loudness_K: NDArray[np.float32]
    lowest: float
    highest: float
    moments_KK: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers with the same input, which is quantised once for all: (input - lowest) / factor.

    `is_signed` is whether codes of 128 stand for 0; otherwise codes start at `lowest`. Each layer of `codes` has its
    weights, int8 [K, N], what one of them is worth, [N], and what the subtraction of `lowest` takes away, [N].
    """

    source: str
    is_signed: bool
    lowest: float
    factor_K: NDArray[np.float32]
    codes: dict[str, tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]]

    @property
    def num_weights(self) -> int:
        return sum(codes_KN.size for codes_KN, _, _ in self.codes.values())


def target_of_this_machine() -> Target:
    """Which int8 instructions there are: without VNNI, sums of products of full 8 bits overflow 16 bits."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    return "avx512_vnni" if {"avx512_vnni", "avx_vnni"} & set(flags) else "avx2"


def quantize(path: Path, calibration: Sequence[Inputs], target: Target, max_error: float) -> Quantized:
    """The graph at `path` in int8, with logits that differ by at most `max_error` in the mean over `calibration`.

    `calibration` holds batches of model inputs, int64 [B, W]; `max_error` is in units of the standard deviation of
    the float32 logits. Layers are left in float32, those first whose squared error is largest for the time that int8
    saves there, until the error is small enough. The error is this machine's: without VNNI, a graph for it overflows
    here. Raises CheckpointError for a graph without a layer to quantise, or one of 2 GB and more.
    """
    model = onnx.load(str(path))
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise CheckpointError(f"{path} is larger than 2 GB, which int8 is not made of: use precision float32")
    if not _layers(model):
        raise CheckpointError(f"{path} has no layer whose weights can be int8: export it anew with precision float32")
    reference = _logits(model, calibration)
    allowed = max_error * float(reference.std())
    groups = _quantized_groups(model, calibration, target)
    quantized = _in_int8(model, groups)
    left_out: list[str] = []
    if (error := _error(quantized, calibration, reference)) > allowed:
        logger.info("int8 of every layer is off by %.4f, %.4f is allowed: measuring each", error, allowed)
        some = calibration[::_MEASURED_ALONE]
        some_logits = _logits(model, some)
        groups.sort(key=lambda group: _error(_in_int8(model, [group]), some, some_logits) ** 2 / group.num_weights)
    while groups and error > allowed:
        left_out += groups.pop().codes
        quantized = _in_int8(model, groups)
        error = _error(quantized, calibration, reference)
    return Quantized(quantized, len(_layers(model)), tuple(left_out))


def _error(model: onnx.ModelProto, batches: Sequence[Inputs], reference: NDArray[np.float32]) -> float:
    return float(np.abs(_logits(model, batches) - reference).mean())


def _logits(model: onnx.ModelProto, batches: Sequence[Inputs]) -> NDArray[np.float32]:
    return np.concatenate([outputs[0] for outputs in _run(model, batches)])


def _run(model: onnx.ModelProto, batches: Sequence[Inputs]) -> Iterator[list[NDArray[np.float32]]]:
    session = open_session(model.SerializeToString())
    for batch in batches:
        yield session.run(None, dict(batch))


# --- what is to be quantised


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Multiplications of states [B, W, K] with weights [K, N]. Those of vectors [B, K], in heads, are Gemm nodes."""
    weights = _weights(model)
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and len(weights[node.input[1]].dims) == 2
    ]


def _seen(model: onnx.ModelProto, names: Iterable[str], batches: Sequence[Inputs]) -> dict[str, _Seen]:
    """What the tensors `names`, of float32 [B, W, K], are like over the batches."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = list(names)
    probed.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    seen: dict[str, _Seen] = {}
    for outputs in _run(probed, batches):
        for name, values in zip(names, outputs[1:], strict=True):
            states_TK = values.reshape(-1, values.shape[-1])
            now = _Seen(
                np.abs(states_TK).max(axis=0), float(values.min()), float(values.max()), states_TK.T @ states_TK
            )
            before = seen.setdefault(name, now)
            if before is not now:
                np.maximum(before.loudness_K, now.loudness_K, out=before.loudness_K)
                before.lowest, before.highest = min(before.lowest, now.lowest), max(before.highest, now.highest)
                before.moments_KK += now.moments_KK
    return seen


# --- weights


def _quantized_groups(model: onnx.ModelProto, calibration: Sequence[Inputs], target: Target) -> list[_Group]:
    weights = _weights(model)
    layers: dict[str, dict[str, NDArray[np.float32]]] = {}
    for node in _layers(model):
        layers.setdefault(node.input[0], {})[node.name] = numpy_helper.to_array(weights[node.input[1]])
    seen = _seen(model, layers, calibration)
    return [_quantized_group(source, seen[source], layers[source], target == "avx2") for source in layers]


def _quantized_group(
    source: str, seen: _Seen, layers: Mapping[str, NDArray[np.float32]], sums_have_16_bits: bool
) -> _Group:
    largest_K = np.max([np.abs(weight_KN).max(axis=1) for weight_KN in layers.values()], axis=0)
    factor_K = np.maximum(seen.loudness_K, 1e-5) ** _SMOOTHING / np.maximum(largest_K, 1e-5) ** (1 - _SMOOTHING)
    # What activations like GELU give is hardly below 0: signed codes would waste half of the 256.
    is_signed = seen.lowest < -seen.highest / 4
    lowest = 0.0 if is_signed else seen.lowest
    moments_KK = (seen.moments_KK / np.outer(factor_K, factor_K)).astype(np.float32)
    codes = {}
    for name, weight_KN in layers.items():
        smooth_KN = weight_KN * factor_K[:, None]
        scale_N = _scales(smooth_KN, sums_have_16_bits)
        codes_KN = _rounded(smooth_KN / scale_N, moments_KK)
        taken_KN = codes_KN * scale_N / factor_K[:, None] * lowest
        codes[name] = (codes_KN, scale_N, taken_KN.sum(axis=0).astype(np.float32))
    return _Group(source, is_signed, lowest, factor_K, codes)


def _scales(weight_KN: NDArray[np.float32], sums_have_16_bits: bool) -> NDArray[np.float32]:
    """What a code of 1 is worth, [N], so that the largest weight, or two that are summed, have codes up to 127."""
    largest_N = np.abs(weight_KN).max(axis=0)
    if sums_have_16_bits:
        even_KN = np.pad(weight_KN, ((0, len(weight_KN) % 2), (0, 0)))
        for part_KN in (np.maximum(even_KN, 0), np.maximum(-even_KN, 0)):
            largest_N = np.maximum(largest_N, (part_KN[::2] + part_KN[1::2]).max(axis=0))
    scale_N: NDArray[np.float32] = np.maximum(largest_N, 1e-9) / np.float32(_LARGEST_CODE)
    return scale_N


def _rounded(weight_KN: NDArray[np.float32], moments_KK: NDArray[np.float32]) -> NDArray[np.int8]:
    """Weights in units of their scales as codes, whose outputs for inputs of these moments differ as little as may be.

    Row by row: what rounding a row does to the outputs is taken off the rows after it.
    """
    num_inputs = len(weight_KN)
    damping_K = np.full(num_inputs, _DAMPING * max(float(np.mean(np.diag(moments_KK))), 1e-9))
    upper_KK = cholesky(np.linalg.inv(moments_KK.astype(np.float64) + np.diag(damping_K)))
    rest_KN = weight_KN.astype(np.float64)
    codes_KN = np.empty(weight_KN.shape, np.int8)
    for start in range(0, num_inputs, _ROUNDED_AT_ONCE):
        stop = min(start + _ROUNDED_AT_ONCE, num_inputs)
        errors = np.empty((stop - start, weight_KN.shape[1]))
        for row in range(start, stop):
            codes_KN[row] = np.clip(np.round(rest_KN[row]), -_LARGEST_CODE, _LARGEST_CODE)
            errors[row - start] = (rest_KN[row] - codes_KN[row]) / upper_KK[row, row]
            rest_KN[row + 1 : stop] -= np.outer(upper_KK[row, row + 1 : stop], errors[row - start])
        rest_KN[stop:] -= upper_KK[start:stop, stop:].T @ errors
    return codes_KN


# --- graphs


def _in_int8(original: onnx.ModelProto, groups: Sequence[_Group]) -> onnx.ModelProto:
    """The model with the layers of `groups` in int8."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    if not groups:
        return model
    group_of = {name: group for group in groups for name in group.codes}
    quantized: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        group = group_of.get(node.name)
        if group is None:
            nodes.append(node)
            continue
        if group.source not in quantized:
            nodes += _input_nodes(model, group)
            quantized.add(group.source)
        nodes += _layer_nodes(model, group, node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _constant(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _input_nodes(model: onnx.ModelProto, group: _Group) -> list[onnx.NodeProto]:
    """From a group's input to `<prefix><input>_codes`, uint8 [B, W, K], and `_scale`, float32 [B, W, 1]."""
    name = f"{_PREFIX}{group.source}"
    step = 1 / _LARGEST_CODE if group.is_signed else 1 / 255
    constants = {
        "lowest": np.float32(group.lowest),
        "inverse": (1 / group.factor_K).astype(np.float32),
        "axes": np.array([-1]),
        "step": np.float32(step),
        "least": np.float32(1e-9),
        "one": np.float32(1),
        "zero": np.uint8(128 if group.is_signed else 0),
    }
    for suffix, value in constants.items():
        _constant(model, f"{name}_{suffix}", value)
    steps: list[tuple[str, list[str], str]] = [
        ("Sub", [group.source, f"{name}_lowest"], "shifted"),
        ("Mul", [group.source if group.is_signed else f"{name}_shifted", f"{name}_inverse"], "smooth"),
        ("Abs", [f"{name}_smooth"], "absolute"),
        ("ReduceMax", [f"{name}_absolute", f"{name}_axes"], "largest"),
        ("Mul", [f"{name}_largest", f"{name}_step"], "stepped"),
        ("Max", [f"{name}_stepped", f"{name}_least"], "scale"),
        ("Div", [f"{name}_smooth", f"{name}_scale"], "divided"),
        ("QuantizeLinear", [f"{name}_divided", f"{name}_one", f"{name}_zero"], "codes"),
    ]
    return [
        helper.make_node(kind, inputs, [f"{name}_{output}"], name=f"{name}_{output}")
        for kind, inputs, output in (steps[1:] if group.is_signed else steps)
    ]


def _layer_nodes(model: onnx.ModelProto, group: _Group, layer: onnx.NodeProto) -> list[onnx.NodeProto]:
    name, source = f"{_PREFIX}{layer.name}", f"{_PREFIX}{group.source}"
    codes_KN, scale_N, taken_N = group.codes[layer.name]
    inputs = [
        f"{source}_codes",
        _constant(model, f"{name}_weight", codes_KN),
        f"{source}_one",
        _constant(model, f"{name}_weight_scale", scale_N),
        f"{source}_zero",
    ]
    output = layer.output[0]
    scaled = output if group.is_signed else f"{name}_scaled"
    nodes = [
        helper.make_node("MatMulIntegerToFloat", inputs, [f"{name}_sums"], name=name, domain="com.microsoft"),
        helper.make_node("Mul", [f"{name}_sums", f"{source}_scale"], [scaled], name=f"{name}_scaled"),
    ]
    if not group.is_signed:
        taken = _constant(model, f"{name}_taken", taken_N)
        nodes.append(helper.make_node("Add", [scaled, taken], [output], name=f"{name}_given_back"))
    return nodes
