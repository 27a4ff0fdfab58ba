"""Checkpoints as files: bringing a folder to this machine, and judging whether it is whole and safe.

Only safetensors weights are let in. What is in them is read by crossenc.layout and loaded by crossenc.loading.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from crossenc.errors import CheckpointError, ConfigError, CrossEncError, InputError, StorageError

#: The kinds of files that a checkpoint is made of; nothing else is copied, pickled weights least of all.
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "file", "memory")
_THREE_FORMS = (
    "give a folder that exists, a URI such as s3://bucket/folder "
    f"({', '.join(_SCHEMES)}), or a hub id such as owner/name or owner/name@revision"
)
#: Whose a hub id without an owner is, if it is nobody's.
_DEFAULT_OWNER = "cross-encoder"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.][\w./-]*))?")
#: What file listings call a file's version, the surest first.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
#: Any one of these makes a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
#: Folders inside a checkpoint that hold parts of the model, such as 1_Pooling.
_PART_FOLDER = re.compile(r"\d+_[A-Za-z]+")
#: What a folder holds in place of config.json when it is an adapter, and where its weights are.
ADAPTER_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, object] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    adapter_allowed: bool = False,
    also: str | None = None,
) -> Path:
    """Return a local, checked checkpoint folder for `source`, copying it to this machine at most once.

    `source` is a local folder (used where it is), a URI of an allowed scheme (copied under `cache_dir`, by
    default $CROSSENC_CACHE or ~/.cache/crossenc, again only when a file there changed), or a Hugging Face hub
    id with an optional `@revision` (kept in the hub's own cache unless `cache_dir` or $SENTENCE_TRANSFORMERS_HOME is
    given), whose owner is cross-encoder where it has none and the hub knows no such model.
    `storage_options` go to the fsspec filesystem of a URI, `token` to the hub, which `local_files_only` keeps from
    being asked. `also` is the path in the checkpoint of one more file, brought along if it is there, with those whose
    names begin with its own.
    Several processes may fetch the same source at once, and any of them may be killed. With `adapter_allowed` it may
    be an adapter's folder, whose base model `fetch_base` gives.
    Raises InputError when `source` is none of these or does not exist, StorageError when it cannot be read,
    CheckpointError when what is there is not a complete checkpoint.
    """
    text = os.path.expanduser(os.fspath(source))
    if os.path.isdir(text):
        folder = Path(text).absolute()
    elif "://" in text:
        root = Path(cache_dir or os.environ.get("CROSSENC_CACHE") or Path.home() / ".cache" / "crossenc")
        folder = _fetch_uri(text, root, storage_options or {}, also)
    else:
        folder = _fetch_from_hub(text, revision, cache_dir, token, local_files_only, also)
    if adapter_allowed and (folder / ADAPTER_FILE).exists():
        _check_adapter(folder)
    else:
        check_folder(folder)
    return folder


def fetch_base(folder: Path, **places: Any) -> Path | None:
    """The local, checked folder of the model that the adapter in `folder` was made for; None if it is no adapter.

    `places` are settings of `fetch`, which gets the base and raises its errors.
    """
    if not (folder / ADAPTER_FILE).exists():
        return None
    settings = read_json(folder / ADAPTER_FILE)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / ADAPTER_FILE} names no base model: write it there as base_model_name_or_path")
    try:
        return fetch(base, revision=settings.get("revision"), **places)
    except CrossEncError as error:
        raise type(error)(f"the base model of the adapter {folder} cannot be used: {error}") from error


def check_folder(folder: str | Path) -> None:
    """Raise CheckpointError, naming the file and the remedy, unless `folder` holds a whole checkpoint."""
    folder = Path(folder)
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder} is an adapter, which only CrossEncoder loads: load it there, call merge_adapters() and save the"
            " whole model"
        )
    read_json(folder / "config.json")
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder} has no tokenizer: save tokenizer.json beside config.json")
    _check_weights(folder)


def file_digests(folder: str | Path, also: str | None = None) -> dict[str, str]:
    """SHA-256 in hex of every file that a checkpoint is made of: path in the folder -> digest, in order.

    `also` is the path in the folder of one more file, which counts with those whose names begin with its own.
    """
    root = Path(folder)
    parts = [path for path in root.iterdir() if path.is_dir() and _PART_FOLDER.fullmatch(path.name)]
    files = [path for place in (root, *parts) for path in place.iterdir() if path.suffix in _SUFFIXES]
    if also is not None:
        files += root.glob(f"{also}*")
    digests = {}
    for path in sorted(path for path in files if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fetch_from_hub(
    text: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
    also: str | None,
) -> Path:
    match = _HUB_ID.fullmatch(text)
    if match is None:
        # What stands before an @ may be a secret.
        shown = text.rpartition("@")[2]
        raise InputError(f"no checkpoint at {shown!r}: {_THREE_FORMS}")
    suffix = match["revision"]
    if revision is not None and suffix is not None and revision != suffix:
        raise InputError(f"{text} and revision={revision!r} name different revisions: give one")

    def download(repo: str, allowed: list[str], ignored: list[str] | None) -> str:
        return snapshot_download(
            repo,
            revision=revision or suffix,
            cache_dir=cache_dir or os.environ.get("SENTENCE_TRANSFORMERS_HOME"),
            token=token,
            local_files_only=local_files_only,
            allow_patterns=allowed,
            ignore_patterns=ignored,
        )

    def download_all(repo: str) -> Path:
        # fnmatch's * matches a slash too; other folders hold checkpoints of the training run, other formats
        folder = download(repo, [f"*{suffix}" for suffix in _SUFFIXES], ["[!0-9]*/*", "*/*/*"])
        if also is not None:
            download(repo, [f"{also}*"], None)  # into the same folder; weights beside an ONNX file begin with its name
        return Path(folder)

    try:
        try:
            return download_all(match["repo"])
        except (RepositoryNotFoundError, LocalEntryNotFoundError):
            if "/" in match["repo"]:
                raise
        return download_all(f"{_DEFAULT_OWNER}/{match['repo']}")
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{text} is no folder here and not on the hub (or not readable): {_THREE_FORMS}") from error
    except OSError as error:
        raise StorageError(
            f"{text} is no folder here, and the hub could not be reached: check the spelling, or the network"
        ) from error


def _fetch_uri(uri: str, root: Path, storage_options: Mapping[str, object], also: str | None) -> Path:
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
    files = _list_checkpoint_files(filesystem, remote_folder, uri, also)
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
            (partial / name).parent.mkdir(exist_ok=True)
            _copy_file(filesystem, f"{remote_folder.rstrip('/')}/{name}", partial / name, num_bytes)
        if _list_checkpoint_files(filesystem, remote_folder, uri, also) != files:
            raise StorageError(f"{uri} changed while it was copied: run again when its upload is complete")
        _fsync(partial)
        partial.rename(folder)
        _fsync(root)
    return folder


def _list_checkpoint_files(filesystem: Any, folder: str, uri: str, also: str | None) -> dict[str, tuple[int, str]]:
    """Files of a checkpoint in a remote folder and its parts: path in it -> (bytes, whatever tells its version)."""
    further = PurePosixPath(also or "")
    try:
        entries = [("", entry) for entry in _list_anew(filesystem, folder)]
        for _, entry in list(entries):
            part = entry["name"].rstrip("/")
            name = part.rpartition("/")[2]
            if entry["type"] == "directory" and (_PART_FOLDER.fullmatch(name) or name == str(further.parent)):
                entries += [(f"{name}/", inner) for inner in _list_anew(filesystem, part)]
    except FileNotFoundError as error:
        raise InputError(f"there is no folder {uri}: check the spelling and the credentials") from error
    except Exception as error:  # each store's client has errors of its own
        raise StorageError(f"{uri} could not be listed: {error}") from error
    files = {}
    for prefix, entry in entries:
        name = entry["name"].rpartition("/")[2]
        is_further = also is not None and (prefix + name).startswith(also)
        if entry["type"] == "file" and (is_further or (name.endswith(_SUFFIXES) and prefix != f"{further.parent}/")):
            version = next((entry[key] for key in _VERSION_KEYS if entry.get(key) is not None), "")
            files[prefix + name] = (int(entry["size"]), str(version))
    if not files:
        raise InputError(f"there are no checkpoint files directly in {uri}: give the folder with config.json")
    return dict(sorted(files.items()))


def _list_anew(filesystem: Any, folder: str) -> list[dict[str, Any]]:
    """What lies directly in a remote folder now, not at an earlier look."""
    filesystem.invalidate_cache(folder)
    entries: list[dict[str, Any]] = filesystem.ls(folder, detail=True)
    return entries


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


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds. Raises CheckpointError where it is missing or no JSON."""
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


def _check_adapter(folder: Path) -> None:
    others = sorted(path.name for path in folder.glob("*.safetensors*") if path.name != ADAPTER_WEIGHTS_FILE)
    if others:
        raise CheckpointError(f"{folder} holds an adapter and also {', '.join(others)}: keep them in two folders")
    if not (folder / ADAPTER_WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_WEIGHTS_FILE}: copy it again, or where it has adapter_model.bin and you trust"
            " the source, load the adapter there and call save_pretrained()"
        )
    if read_json(folder / ADAPTER_FILE).get("megatron_config") is not None:
        raise CheckpointError(f"{folder / ADAPTER_FILE} asks for Megatron, whose code it names itself: unset it")
    _check_weights(folder)


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
        absent = sorted(_listed_shards(index_path) - {path.name for path in weights})
        if absent:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, listed in {index_path.name}: copy it again")
    elif not any((folder / name).exists() for name in ("model.safetensors", ADAPTER_WEIGHTS_FILE)):
        raise CheckpointError(f"{folder} has {weights[0].name} but no {index_path.name}: copy the whole checkpoint")
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file{_impostor(path)} ({error}): download it again"
            ) from error


def _listed_shards(index_path: Path) -> set[str]:
    """The files that an index of sharded weights names, all of them directly beside it."""
    index = read_json(index_path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index_path} has no weight_map from weights to files: download it again")
    listed = set(places.values())
    strange = sorted(name for name in listed if Path(name).name != name or not name.endswith(".safetensors"))
    if strange:
        raise CheckpointError(
            f"{index_path} names {strange[0]!r}, which is no safetensors file directly in the folder: correct it"
        )
    return listed
