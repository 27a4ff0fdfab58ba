"""Checkpoints: bringing a folder to this machine, judging whether it is whole and safe, loading its model.

Only safetensors weights are read and no code that a checkpoint brings is run. Knows no pairs and no scores.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from crossenc.errors import CheckpointError, ConfigError, InputError, StorageError

#: The kinds of files that a checkpoint is made of; nothing else is copied, pickled weights least of all.
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "file", "memory")
_THREE_FORMS = (
    "give a folder that exists, a URI such as s3://bucket/folder "
    f"({', '.join(_SCHEMES)}), or a hub id such as owner/name or owner/name@revision"
)
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.][\w./-]*))?")
#: What file listings call a file's version, the surest first.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
#: Any one of these makes a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
#: Activations that a checkpoint may name, by class name in torch.nn: elementwise, without arguments.
_ACTIVATIONS = {
    *("ELU", "GELU", "Hardsigmoid", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "ReLU", "SELU"),
    *("SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh"),
}


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Path:
    """Return a local, checked checkpoint folder for `source`, copying it to this machine at most once.

    `source` is a local folder (used where it is), a URI of an allowed scheme (copied under `cache_dir`, by
    default $CROSSENC_CACHE or ~/.cache/crossenc, again only when a file there changed), or a Hugging Face hub
    id with an optional `@revision` (kept in the hub's own cache unless `cache_dir` is given).
    `storage_options` go to the fsspec filesystem of a URI. Several processes may fetch the same source at
    once, and any of them may be killed.
    Raises InputError when `source` is none of these or does not exist, StorageError when it cannot be read,
    CheckpointError when what is there is not a complete checkpoint.
    """
    text = os.path.expanduser(os.fspath(source))
    if os.path.isdir(text):
        folder = Path(text).absolute()
    elif "://" in text:
        root = Path(cache_dir or os.environ.get("CROSSENC_CACHE") or Path.home() / ".cache" / "crossenc")
        folder = _fetch_uri(text, root, storage_options or {})
    else:
        folder = _fetch_from_hub(text, revision, cache_dir)
    check_folder(folder)
    return folder


def check_folder(folder: str | Path) -> None:
    """Raise CheckpointError, naming the file and the remedy, unless `folder` holds a whole checkpoint."""
    folder = Path(folder)
    _read_json(folder / "config.json")
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder} has no tokenizer: save tokenizer.json beside config.json")
    _check_weights(folder)
    _check_one_transformer(folder)


def file_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 in hex of every file that a checkpoint is made of: file name -> digest, in name order."""
    digests = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in _SUFFIXES:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def load_config(folder: str | Path) -> PretrainedConfig:
    """Read config.json. Raises CheckpointError when transformers has no class of its own for it."""
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json is not of a model that transformers itself knows, and code that comes "
            f"with a checkpoint is never run: {error}"
        ) from error


def load_model(folder: str | Path, *, num_labels: int | None = None, dtype: torch.dtype) -> PreTrainedModel:
    """Load the sequence classification model of a local folder onto the CPU, in eval mode.

    Raises CheckpointError when any weight is missing, has another shape than the config says (`num_labels`
    overrides the config's), or is not finite in `dtype`: a head is never made up.
    """
    config = load_config(folder)
    if num_labels is not None:
        config.num_labels = num_labels
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are reported in `info`, and refused below
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the model of {folder} does not load: {error}") from error
    _check_loading(folder, info)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} of {folder} has weights that are NaN or infinite in {dtype}: "
                "load it in float32 or bfloat16, or use an earlier checkpoint of the training run"
            )
    model.eval()
    return model


def resolve_activation(folder: str | Path, config: PretrainedConfig) -> str:
    """Name, in torch.nn, of the activation that the checkpoint's scores go through.

    The first of these that is set: config_sentence_transformers.json "activation_fn"; config.json
    "sentence_transformers"."activation_fn"; config.json "sbert_ce_default_activation_function"; else Sigmoid
    for one label and Identity for more.
    Raises CheckpointError for anything but a known torch.nn activation: no other class is ever imported.
    """
    path = Path(folder) / "config_sentence_transformers.json"
    own_settings = _read_json(path) if path.exists() else {}
    nested_settings = getattr(config, "sentence_transformers", None) or {}
    for named in (
        own_settings.get("activation_fn"),
        nested_settings.get("activation_fn"),
        getattr(config, "sbert_ce_default_activation_function", None),
    ):
        if named is not None:
            module, _, name = str(named).rpartition(".")
            if (module == "torch.nn" or module.startswith("torch.nn.modules.")) and name in _ACTIVATIONS:
                return name
            raise CheckpointError(
                f"{folder} names the activation {named!r}, which is not one of torch.nn's "
                f"{', '.join(sorted(_ACTIVATIONS))}: pass activation_fn yourself, or correct the checkpoint"
            )
    return "Sigmoid" if config.num_labels == 1 else "Identity"


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


def _fetch_from_hub(text: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    match = _HUB_ID.fullmatch(text)
    if match is None:
        # What stands before an @ may be a secret.
        shown = text.rpartition("@")[2]
        raise InputError(f"no checkpoint at {shown!r}: {_THREE_FORMS}")
    suffix = match["revision"]
    if revision is not None and suffix is not None and revision != suffix:
        raise InputError(f"{text} and revision={revision!r} name different revisions: give one")
    try:
        return Path(
            snapshot_download(
                match["repo"],
                revision=revision or suffix,
                cache_dir=cache_dir,
                allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES],
                ignore_patterns=["*/*"],  # checkpoints of the training run, other formats
            )
        )
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{text} is no folder here and not on the hub (or not readable): {_THREE_FORMS}") from error
    except OSError as error:
        raise StorageError(
            f"{text} is no folder here, and the hub could not be reached: check the spelling, or the network"
        ) from error


def _fetch_uri(uri: str, root: Path, storage_options: Mapping[str, object]) -> Path:
    scheme, _, rest = uri.partition("://")
    if "::" in uri or "?" in rest or set("@:") & set(rest.partition("/")[0]):
        raise InputError(
            "a checkpoint's URI may not hold credentials, a query or a chain (::): put credentials into "
            "storage_options or the environment"
        )
    if scheme not in _SCHEMES:
        raise InputError(f"{scheme}:// is not a scheme that checkpoints are read from: {_THREE_FORMS}")
    try:
        filesystem, remote_folder = fsspec.url_to_fs(uri, **storage_options)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs another package: {error}") from error
    files = _list_checkpoint_files(filesystem, remote_folder, uri)
    state = json.dumps([scheme, remote_folder, files])
    key = hashlib.sha256(state.encode()).hexdigest()[:32]
    folder, partial = root / key, root / f"{key}.partial"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        if folder.is_dir():  # another process was faster
            return folder
        if partial.exists():  # what a killed process left
            shutil.rmtree(partial)
        partial.mkdir()
        for name, (num_bytes, _) in files.items():
            _copy_file(filesystem, f"{remote_folder.rstrip('/')}/{name}", partial / name, num_bytes)
        if _list_checkpoint_files(filesystem, remote_folder, uri) != files:
            raise StorageError(f"{uri} changed while it was copied: run again when its upload is complete")
        _fsync(partial)
        partial.rename(folder)
        _fsync(root)
    return folder


def _list_checkpoint_files(filesystem: Any, folder: str, uri: str) -> dict[str, tuple[int, str]]:
    """Files of a checkpoint directly in a remote folder: name -> (bytes, whatever tells its version)."""
    filesystem.invalidate_cache(folder)
    try:
        entries = filesystem.ls(folder, detail=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no folder {uri}: check the spelling and the credentials") from error
    except Exception as error:  # each store's client has errors of its own
        raise StorageError(f"{uri} could not be listed: {error}") from error
    files = {}
    for entry in entries:
        name = entry["name"].rpartition("/")[2]
        if entry["type"] == "file" and name.endswith(_SUFFIXES):
            version = next((entry[key] for key in _VERSION_KEYS if entry.get(key) is not None), "")
            files[name] = (int(entry["size"]), str(version))
    if not files:
        raise InputError(f"there are no checkpoint files directly in {uri}: give the folder with config.json")
    return dict(sorted(files.items()))


def _copy_file(filesystem: Any, remote: str, local: Path, num_bytes: int) -> None:
    try:
        filesystem.get_file(remote, str(local))
    except Exception as error:  # each store's client has errors of its own
        raise StorageError(f"{remote} could not be read: {error}") from error
    # A cut connection can end in a short file without any error.
    if local.stat().st_size != num_bytes:
        raise StorageError(f"{remote} gave {local.stat().st_size} of {num_bytes} bytes: run again")
    _fsync(local)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}: save the model with save_pretrained()")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON{_impostor(path)}: download it again") from error
    return content


def _impostor(path: Path) -> str:
    """What a file holds in place of the expected content, for a message; empty when it is not recognised."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return " but an empty file"
    if start.startswith(b"version https://git-lfs"):
        return " but a Git LFS pointer"
    if start.startswith(b"<"):
        return " but a web page"
    return ""


def _check_weights(folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    index_path = folder / "model.safetensors.index.json"
    if not weights and not index_path.exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
        found = f"only {', '.join(pickled)}, which can run code when loaded" if pickled else "no weights"
        raise CheckpointError(
            f"{folder} has {found}: convert to model.safetensors where you trust the source, by loading the "
            "model there and calling save_pretrained()"
        )
    if index_path.exists():
        listed = set(_read_json(index_path)["weight_map"].values())
        absent = sorted(listed - {path.name for path in weights})
        if absent:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, listed in {index_path.name}: copy it again")
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file{_impostor(path)} ({error}): download it again"
            ) from error


def _check_one_transformer(folder: Path) -> None:
    """Refuse sentence-transformers layouts whose scores are not those of one plain classification model."""
    if not (folder / "modules.json").exists():
        return
    modules = _read_json(folder / "modules.json")
    settings = _read_json(folder / "sentence_bert_config.json")
    types = [str(module["type"]).rpartition(".")[2] for module in modules]
    task = settings.get("transformer_task", "feature-extraction")
    if types != ["Transformer"] or modules[0]["path"] or task != "sequence-classification":
        raise CheckpointError(
            f"{folder} is a chain of modules ({', '.join(types)}; task {task}): use a checkpoint that is a "
            "single Transformer for sequence-classification"
        )
    own_settings = _read_json(folder / "config_sentence_transformers.json")
    if own_settings.get("default_prompt_name") or settings.get("processing_kwargs"):
        raise CheckpointError(
            f"{folder} sets a default prompt or processing_kwargs, which change the texts and are not "
            "supported: use a checkpoint without them"
        )


def _check_loading(folder: str | Path, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    mismatched = sorted(name for name, *_ in info["mismatched_keys"])
    if missing or mismatched or info["error_msgs"]:
        problem = (
            f"lacks {', '.join(missing[:5])}"
            if missing
            else f"has another shape than its config for {', '.join(mismatched[:5])}"
            if mismatched
            else f"does not load: {info['error_msgs']}"
        )
        raise CheckpointError(
            f"{folder} {problem}: it is not a trained cross-encoder with this number of labels; "
            "train its head first, or correct num_labels"
        )
