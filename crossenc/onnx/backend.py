"""The ONNX file that a CrossEncoder scores with: found in its checkpoint, or made from it for the moment.

Knows names of files and settings; graphs are crossenc.onnx.export's and sessions crossenc.onnx.session's.
"""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from crossenc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from crossenc.engine import Engine
    from crossenc.model import CrossEncoder
    from crossenc.onnx.session import OnnxNetwork
    from crossenc.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FOLDER = "onnx"
FLOAT32_FILE = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSettings:
    """What `model_kwargs` say about ONNX: the file, onnxruntime's provider, and whether to export.

    `file_name` is a name in the folder `onnx`, or a path in the checkpoint; `export` is whether to make the graph anew,
    None for where there is no such file.
    """

    file_name: str = FLOAT32_FILE
    provider: str | None = None
    export: bool | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file_name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".onnx" or len(path.parts) > 2:
            raise ConfigError(f"the ONNX file is {self.file_name!r}: give the name of an .onnx file of the checkpoint")

    @classmethod
    def taken_from(cls, model_settings: dict[str, Any]) -> "OnnxSettings":
        """The settings that are ONNX's, which are removed from `model_settings`."""
        return cls(**{name: model_settings.pop(name) for name in cls.__slots__ if name in model_settings})

    @property
    def path(self) -> str:
        """The file's path in a checkpoint."""
        return self.file_name if "/" in self.file_name else f"{FOLDER}/{self.file_name}"


def load_engine(
    folder: Path, tokenizer: "Tokenizer", settings: OnnxSettings, max_batch_tokens: int | None = None
) -> "Engine":
    """A Scorer of the ONNX file in a local checkpoint, whose weights for torch are not read. Errors as load_network's.

    The labels and the activation are the checkpoint's own.
    """
    import torch

    from crossenc.engine import Engine, default_batch_tokens
    from crossenc.layout import read_layout, read_num_labels
    from crossenc.loading import resolve_activation

    layout = read_layout(folder)
    num_labels = read_num_labels(folder, layout)
    device = torch.device("cpu")
    return Engine(
        network=_open(folder / settings.path, num_labels, settings.provider),
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        padding_side=tokenizer.padding_side,
        activation=resolve_activation(layout, num_labels),
        device=device,
        max_batch_tokens=default_batch_tokens(device) if max_batch_tokens is None else max_batch_tokens,
    )


def load_network(model: "CrossEncoder", folder: Path | None, settings: OnnxSettings) -> "OnnxNetwork":
    """The network that `model`, which lies in `folder`, scores with.

    Where there is no float32 file, and `export` does not forbid it, the graph is made now, in a temporary folder that
    lasts as long as the network. Raises CheckpointError for a file that is missing otherwise or is no such network,
    ConfigError where onnxruntime or its provider is missing.
    """
    path = None if folder is None else folder / settings.path
    is_found = path is not None and path.is_file()
    if not settings.export and (is_found or settings.export is False or settings.path != f"{FOLDER}/{FLOAT32_FILE}"):
        if path is None or not is_found:
            others = sorted(other.name for other in (folder / FOLDER).glob("*.onnx")) if folder else []
            raise CheckpointError(
                f"the checkpoint has no {settings.path} (in its folder {FOLDER}: {', '.join(others) or 'nothing'}):"
                " make it with `crossenc export`"
            )
        return _open(path, model.num_labels, settings.provider)
    made = tempfile.mkdtemp(prefix="crossenc-onnx-")
    try:
        network = _open(_export(model, made), model.num_labels, settings.provider)
    except BaseException:
        shutil.rmtree(made)
        raise
    weakref.finalize(network, shutil.rmtree, made, ignore_errors=True)
    logger.warning("exported the model to ONNX for this process alone: keep it with save_pretrained()")
    return network


def _open(path: Path, num_labels: int, provider: str | None) -> "OnnxNetwork":
    with _named_packages():
        from crossenc.onnx.session import CPU_PROVIDER, OnnxNetwork
    return OnnxNetwork(path, num_labels, provider or CPU_PROVIDER)


def _export(model: "CrossEncoder", folder: str) -> Path:
    with _named_packages():
        from crossenc.onnx.export import export_onnx
    return export_onnx(model, folder).path


@contextmanager
def _named_packages() -> Iterator[None]:
    """Turns a missing package into a ConfigError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'crossenc[onnx]'") from error
