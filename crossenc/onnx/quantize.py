"""Float32 ONNX graphs to int8 ones that rank alike: what is multiplied in int8, and what had better not be.

Weights are int8 with a scale a column, activations uint8 with a scale a batch, found while scoring. Three things keep
the scores close to float32's:

    heads and embeddings   stay float32: they cost next to nothing, and every error in them is one of the score
    loud neurons           a few neurons between the two layers of a feed-forward block are many times louder than
                           the rest and would set its scale; they are computed beside it, in float32
    loud channels          of a normalised input are divided by a factor that its weights are multiplied with

Knows graphs and arrays, no texts, no model of torch and no ranking.

Shape letters: K inputs of a layer, N its outputs.
"""

import logging
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from crossenc.errors import CheckpointError
from crossenc.onnx.session import open_session, quiet_exporters

logger = logging.getLogger(__name__)

Inputs = Mapping[str, NDArray[np.int64]]
Target = Literal["avx2", "avx512_vnni", "arm64"]

#: Neurons of a feed-forward block that stay float32. With 16 of 1,536 the error of MiniLM-L6's scores that comes
#: from these layers falls from 0.19 to 0.05; with 64 it is the same.
_LOUD_NEURONS = 16
#: How much of a channel's loudness goes into the weights, of which the best for a model is taken: with 0.4 the error of
#: MiniLM-L6's scores is 0.09, with 0.5 it is 0.13, with 0 it is 0.21.
_SMOOTHINGS = (0.3, 0.4, 0.5, 0.6, 0.7)
#: Between the layers of a feed-forward block; elementwise, so that neurons may be taken apart.
_ACTIVATIONS = ("Gelu", "Relu", "Tanh", "Sigmoid")
_LOUDNESS = "loudness_of_"


@dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 graph; `left_out` names the layers that stay float32 because their error was too large."""

    model: onnx.ModelProto
    num_layers: int
    left_out: tuple[str, ...]


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
    the float32 logits. Layers are left in float32, those with the largest errors of their own first, until the error
    is small enough. The error is this machine's: without VNNI, a graph for it overflows here. Raises CheckpointError
    for a graph without a layer to quantise, or one of 2 GB and more.
    """
    model = onnx.load(str(path))
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise CheckpointError(f"{path} is larger than 2 GB, which int8 is not made of: use precision float32")
    if not _layers(model):
        raise CheckpointError(f"{path} has no layer whose weights can be int8: export it anew with precision float32")
    reference = _logits(model, calibration)
    allowed = max_error * float(reference.std())
    loudness = _loudness(model, calibration)
    _part_loud_neurons(model, loudness)

    def attempt(source: onnx.ModelProto, chosen: Sequence[str]) -> tuple[float, onnx.ModelProto]:
        quantized = _quantize_layers(source, chosen, target)
        return float(np.abs(_logits(quantized, calibration) - reference).mean()), quantized

    names = [name for group in _groups(model) for name in group]
    errors = [attempt(_smoothed(model, loudness, smoothing), names)[0] for smoothing in _SMOOTHINGS]
    model = _smoothed(model, loudness, _SMOOTHINGS[int(np.argmin(errors))])
    error, quantized = attempt(model, names)
    left_out: list[str] = []
    if error > allowed:
        logger.info("int8 of every layer is off by %.4f, %.4f is allowed: measuring each", error, allowed)
        worst_first = sorted(_groups(model), key=lambda group: -attempt(model, group)[0])
        while error > allowed and len(left_out) < len(names):
            left_out += worst_first.pop(0)
            error, quantized = attempt(model, [name for name in names if name not in left_out])
    return Quantized(quantized, len(names), tuple(left_out))


def _quantize_layers(model: onnx.ModelProto, names: Sequence[str], target: Target) -> onnx.ModelProto:
    if not names:
        return model
    with TemporaryDirectory(prefix="crossenc-int8-") as folder, quiet_exporters():
        source, result = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, str(source))
        quantize_dynamic(
            str(source),
            str(result),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            reduce_range=target == "avx2",
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(result))


def _logits(model: onnx.ModelProto, batches: Sequence[Inputs]) -> NDArray[np.float32]:
    return np.concatenate([outputs[0] for outputs in _run(model, batches)])


def _run(model: onnx.ModelProto, batches: Sequence[Inputs]) -> Iterator[list[NDArray[np.float32]]]:
    session = open_session(model.SerializeToString())
    for batch in batches:
        yield session.run(None, dict(batch))


# --- what a graph is made of


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


def _groups(model: onnx.ModelProto) -> list[list[str]]:
    """Names of the layers to quantise, those together that share an input, which is quantised once for all."""
    groups: dict[str, list[str]] = {}
    for node in _layers(model):
        if not node.name.endswith("_loud"):
            groups.setdefault(node.input[0], []).append(node.name)
    return list(groups.values())


def _loudness(model: onnx.ModelProto, batches: Sequence[Inputs]) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value of every channel of each layer's input: name of the input -> float32 [K]."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = list(dict.fromkeys(node.input[0] for node in _layers(model)))
    probed.graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), f"{_LOUDNESS}axes"))
    for name in names:
        output = f"{_LOUDNESS}{name}"
        probed.graph.node.append(helper.make_node("Abs", [name], [f"{output}_abs"]))
        axes = [f"{output}_abs", f"{_LOUDNESS}axes"]
        probed.graph.node.append(helper.make_node("ReduceMax", axes, [output], keepdims=0))
        probed.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    found = [outputs[1:] for outputs in _run(probed, batches)]
    return {
        name: np.max(np.stack(values), axis=0) for name, values in zip(names, zip(*found, strict=True), strict=True)
    }


def _num_users(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes take each tensor. Weights have several users where layers share them."""
    return Counter(name for node in model.graph.node for name in node.input)


# --- exact changes of a graph that make its int8 form better


def _part_loud_neurons(model: onnx.ModelProto, loudness: Mapping[str, NDArray[np.float32]]) -> None:
    """Compute the loudest neurons of each feed-forward block, [h W1 + b1] activated times W2, beside the others."""
    maker = {output: node for node in model.graph.node for output in node.output}
    num_users = _num_users(model)
    weights = _weights(model)
    replaced: dict[int, list[onnx.NodeProto]] = {}
    dropped: set[int] = set()
    for second in _layers(model):
        activation = maker.get(second.input[0])
        add = maker.get(activation.input[0]) if activation and activation.op_type in _ACTIVATIONS else None
        if activation is None or add is None or add.op_type != "Add":
            continue
        bias = next((name for name in add.input if name in weights), None)
        first = next((maker[name] for name in add.input if name in maker), None)
        if bias is None or first is None or first.op_type != "MatMul" or first.input[1] not in weights:
            continue
        loud = loudness[second.input[0]]
        between = (first.output[0], add.output[0], activation.output[0])
        if len(loud) < 4 * _LOUD_NEURONS or any(num_users[name] != 1 for name in between):
            continue
        is_loud = np.zeros(len(loud), dtype=bool)
        is_loud[np.argsort(-loud)[:_LOUD_NEURONS]] = True
        block = _Block(first, add, activation, second, bias)
        replaced[id(second)] = block.parted(model, weights, is_loud)
        dropped |= {id(first), id(add), id(activation)}
    nodes = [new for node in model.graph.node for new in replaced.get(id(node), [node]) if id(node) not in dropped]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused_weights(model)


@dataclass(frozen=True, slots=True)
class _Block:
    """The nodes of a feed-forward block, and the name of its first bias."""

    first: onnx.NodeProto
    add: onnx.NodeProto
    activation: onnx.NodeProto
    second: onnx.NodeProto
    bias: str

    def parted(
        self, model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], is_loud: NDArray[np.bool_]
    ) -> list[onnx.NodeProto]:
        nodes: list[onnx.NodeProto] = []
        for suffix, chosen in (("_quiet", ~is_loud), ("_loud", is_loud)):
            nodes += self._part(model, weights, suffix, chosen)
        output = self.second.output[0]
        nodes.append(helper.make_node("Add", [f"{output}_quiet", f"{output}_loud"], [output]))
        return nodes

    def _part(
        self, model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], suffix: str, chosen: NDArray[np.bool_]
    ) -> list[onnx.NodeProto]:
        first_KN, second_KN = self.first.input[1], self.second.input[1]
        parts = {
            first_KN: numpy_helper.to_array(weights[first_KN])[:, chosen],
            self.bias: numpy_helper.to_array(weights[self.bias])[chosen],
            second_KN: numpy_helper.to_array(weights[second_KN])[chosen],
        }
        # Equal weights, such as biases of 0, are one tensor of many blocks: the new ones are named by this block.
        names = {name: f"{self.second.name}_{name}{suffix}" for name in parts}
        for name, array in parts.items():
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), names[name]))
        names |= {node.output[0]: f"{node.output[0]}{suffix}" for node in (self.first, self.add, self.activation)}
        nodes = []
        for node in (self.first, self.add, self.activation, self.second):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name += suffix
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [f"{name}{suffix}" for name in node.output]
            nodes.append(copy)
        return nodes


def _smoothed(
    original: onnx.ModelProto, loudness: Mapping[str, NDArray[np.float32]], smoothing: float
) -> onnx.ModelProto:
    """The model with each channel of a normalised input divided by a factor that the weights after it have in them."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    normalised = {node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    weights, num_users = _weights(model), _num_users(model)
    layers: dict[str, list[onnx.NodeProto]] = {}
    for node in _layers(model):
        if node.input[0] in normalised and num_users[node.input[1]] == 1 and not node.name.endswith("_loud"):
            layers.setdefault(node.input[0], []).append(node)
    first_use: dict[str, onnx.NodeProto] = {}
    for name, users in layers.items():
        largest_K = np.max(
            [np.abs(numpy_helper.to_array(weights[node.input[1]])).max(axis=1) for node in users], axis=0
        )
        loud_K = np.maximum(loudness[name], 1e-5)
        factor_K = (loud_K**smoothing / np.maximum(largest_K, 1e-5) ** (1 - smoothing)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(1 / factor_K, f"{name}_factor"))
        first_use[name] = helper.make_node("Mul", [name, f"{name}_factor"], [f"{name}_smooth"])
        for node in users:
            weight = weights[node.input[1]]
            array = numpy_helper.to_array(weight) * factor_K[:, None]
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
            node.input[0] = f"{name}_smooth"
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        nodes += [first_use[name] for name in node.output if name in first_use]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _drop_unused_weights(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
