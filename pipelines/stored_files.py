"""Files that a run leaves in its output, with their digests. Knows no Ray."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossenc.errors import RunConflictError
from pipelines.storage import Location, put, put_new


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the output. `path` is relative to the output folder."""

    path: str
    num_bytes: int
    sha256: str


def store(path: str, body: bytes, output: Location) -> StoredFile:
    """Creates a file whose bytes depend on the unit alone: one that is there already is this one."""
    stored = put_new(output / path, body)
    if stored != body:
        raise RunConflictError(
            f"{output / path} holds something else than this run makes; choose another output, or start over with"
            " --new-run"
        )
    return StoredFile(path, len(body), hashlib.sha256(body).hexdigest())


def store_model(folder: Path, name: str, output: Location) -> list[dict[str, Any]]:
    """Copies a model's folder to `name` below the output, its configuration last: without it there is no model.

    Returns path, size and digest of each file, as manifests list them.
    """
    stored = []
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.name == "config.json"):
        body, place = path.read_bytes(), f"{name}/{path.relative_to(folder).as_posix()}"
        put(output / place, body)
        stored.append({"path": place, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()})
    return stored
