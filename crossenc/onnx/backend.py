"""The ONNX file that a CrossEncoder scores with: found in its checkpoint, or made from it for the moment.

Knows names of files and settings; graphs are crossenc.onnx.export's and sessions crossenc.onnx.session's.
"""

import logging
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from crossenc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder
    from crossenc.onnx.session import OnnxNetwork

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

    @classmethod
    def taken_from(cls, model_settings: dict[str, Any]) -> "OnnxSettings":
        """The settings that are ONNX's, which are removed from `model_settings`. Raises ConfigError for bad ones."""
        settings = cls(**{name: model_settings.pop(name) for name in cls.__slots__ if model_settings.get(name)})
        path = PurePosixPath(settings.file_name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".onnx":
            raise ConfigError(f"file_name is {settings.file_name!r}: give the name of an .onnx file of the checkpoint")
        return settings

    @property
    def path(self) -> str:
        """The file's path in a checkpoint."""
        return self.file_name if "/" in self.file_name else f"{FOLDER}/{self.file_name}"


def load_network(model: "CrossEncoder", folder: Path | None, settings: OnnxSettings) -> "OnnxNetwork":
    """The network that `model`, which lies in `folder`, scores with.

    Where there is no float32 file, and `export` does not forbid it, the graph is made now, in a temporary folder that
    lasts as long as the network. Raises CheckpointError for a file that is missing otherwise or is no such network,
    ConfigError where onnxruntime or its provider is missing.
    """
    try:
        from crossenc.onnx.export import export_onnx
        from crossenc.onnx.session import CPU_PROVIDER, OnnxNetwork
    except ModuleNotFoundError as error:
        raise ConfigError(f"backend='onnx' needs {error.name}: pip install 'crossenc[onnx]'") from error
    provider = settings.provider or CPU_PROVIDER
    path = None if folder is None else folder / settings.path
    found = path is not None and path.is_file()
    if not settings.export and (found or settings.export is False or settings.path != f"{FOLDER}/{FLOAT32_FILE}"):
        if path is None or not found:
            others = sorted(other.name for other in (folder / FOLDER).glob("*.onnx")) if folder else []
            raise CheckpointError(
                f"the checkpoint has no {settings.path} (in its folder {FOLDER}: {', '.join(others) or 'nothing'}):"
                " make it with `crossenc export`"
            )
        return OnnxNetwork(path, model.num_labels, provider)
    made = tempfile.mkdtemp(prefix="crossenc-onnx-")
    try:
        network = OnnxNetwork(export_onnx(model, made), model.num_labels, provider)
    except BaseException:
        shutil.rmtree(made)
        raise
    weakref.finalize(network, shutil.rmtree, made, ignore_errors=True)
    logger.warning("exported the model to ONNX for this process alone: keep it with save_pretrained()")
    return network
