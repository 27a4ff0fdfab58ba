"""ONNX files as networks that the engine runs: sessions of onnxruntime, and the checks before one is opened.

Knows features and logits; no texts, no checkpoint and no ranking.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx.external_data_helper import uses_external_data
from torch import nn

from crossenc.errors import CheckpointError, ConfigError
from crossenc.modules import Features

#: What a graph may ask for: the features that the engine makes.
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
CPU_PROVIDER = "CPUExecutionProvider"
#: What onnxruntime says when memory runs out; it has no exception class for it.
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory")


class OnnxNetwork(nn.Module):
    """The file of a whole cross-encoder as a network: token ids [B, W] to logits [B, L] under "scores".

    Its memory is the CPU's; a provider with another one copies. Its threads are torch's.
    """

    def __init__(self, path: Path, num_labels: int, provider: str = CPU_PROVIDER) -> None:
        """Raises CheckpointError for a file that is no such network, ConfigError for an unknown provider."""
        super().__init__()
        self.path = path
        self.provider = provider
        check_file(path)
        self._session = open_session(str(path), provider)
        self._names = [node.name for node in self._session.get_inputs()]
        outputs = self._session.get_outputs()
        unknown = sorted(set(self._names) - set(INPUT_NAMES))
        shape = outputs[0].shape
        if unknown or len(outputs) != 1 or len(shape) != 2 or (isinstance(shape[1], int) and shape[1] != num_labels):
            raise CheckpointError(
                f"{path} takes {', '.join(self._names)} and gives {', '.join(f'{o.name} {o.shape}' for o in outputs)},"
                f" not {num_labels} logits a pair from token ids: export it anew with `crossenc export`"
            )

    def save(self, folder: Path) -> None:
        """Copy the file, and those that hold its weights, into `folder`."""
        copy_files(self.path, folder)

    def forward(self, features: Features) -> Features:
        ids = features["input_ids"]
        inputs = {}
        for name in self._names:
            values = features.get(name)
            # A file of another exporter may ask for token types that the tokenizer does not make; they are all 0.
            inputs[name] = (torch.zeros_like(ids) if values is None else values).cpu().contiguous().numpy()
        try:
            (logits,) = self._session.run(None, inputs)
        except Exception as error:  # onnxruntime's own have no public base class
            if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        return {"scores": torch.from_numpy(logits).to(ids.device)}


def open_session(model: str | bytes, provider: str = CPU_PROVIDER) -> onnxruntime.InferenceSession:
    """A session of a file or of a serialised model, with one operator at a time on as many threads as torch has."""
    known = onnxruntime.get_available_providers()
    if provider not in known:
        raise ConfigError(f"there is no provider {provider!r} here: choose from {', '.join(known)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Plans of memory are kept for every shape, of which there are thousands.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    providers = [provider] if provider == CPU_PROVIDER else [provider, CPU_PROVIDER]
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # onnxruntime's own have no public base class
        shown = model if isinstance(model, str) else "the graph"
        raise CheckpointError(f"{shown} is no model that onnxruntime can run: {error}") from error


def check_file(path: Path) -> None:
    """Raise CheckpointError where there is no ONNX file, or one whose weights would be read from another folder."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}: export it with `crossenc export`")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's class of error is private
        raise CheckpointError(f"{path} is no ONNX file ({error}): export it anew") from error
    folder = path.parent.resolve()
    for place in external_files(model):
        if not (folder / place).resolve().is_relative_to(folder):
            raise CheckpointError(f"{path} reads weights from {place!r}, outside of its folder: it is not loaded")
        if not (folder / place).is_file():
            raise CheckpointError(f"{path} lacks its weights, {place}: copy it whole")


def external_files(model: onnx.ModelProto) -> list[str]:
    """The files beside it that a model's weights are in, as it names them."""
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        tensors += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
    entries = [entry for tensor in tensors if uses_external_data(tensor) for entry in tensor.external_data]
    return sorted({entry.value for entry in entries if entry.key == "location"})


def copy_files(graph: Path, folder: Path) -> Path:
    """Put an ONNX file, and those beside it that hold its weights, into `folder`; the file itself comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*external_files(onnx.load(str(graph), load_external_data=False)), graph.name]:
        if (folder / name).resolve() != (graph.parent / name).resolve():
            shutil.copyfile(graph.parent / name, folder / f"{name}.unfinished")
            os.replace(folder / f"{name}.unfinished", folder / name)
    return folder / graph.name


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep what exporters warn about, which users can do nothing about, off the terminal inside the block."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
