"""What becomes a version of the registry: a checkpoint's folder, or the output of a training job.

It knows what those look like, and nothing of what is in the registry already.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crossenc.errors import InputError, RunConflictError
from pipelines import registry
from pipelines.finish import MANIFEST_FILE, SUCCESS_FILE
from pipelines.model import REGISTERED_PART
from pipelines.registry import MODEL_FOLDER, Version
from pipelines.storage import Location, exists, read_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that could become a version: where it is, what it was trained from, and what is known of it."""

    model: Location
    parent: str | None
    facts: Mapping[str, Any]


def look(folder: Location) -> Candidate:
    """What is in `folder`: a checkpoint, or a training job's output with one.

    Raises InputError where it is neither, or the training is not finished, RunConflictError where the model is not
    the one that training wrote.
    """
    if exists(folder / "config.json"):
        return Candidate(folder, None, {})
    if not exists(folder / f"{MODEL_FOLDER}/config.json"):
        raise InputError(
            f"{folder} is neither a checkpoint, with config.json, nor the output of `crossenc train`, with"
            f" {MODEL_FOLDER}/; name the folder of one"
        )
    if not exists(folder / SUCCESS_FILE):
        raise InputError(f"the training in {folder} is not finished: run it again until it is")
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST_FILE))
        digests = {file["path"]: file["sha256"] for file in manifest["files"]}
        result, lineage, depends_on = manifest["result"], manifest["lineage"], manifest["depends_on"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder / MANIFEST_FILE} is missing or not that of a training job; name {folder / MODEL_FOLDER} to take"
            " the model as it is"
        ) from None
    for path, digest in digests.items():
        if hashlib.sha256(read_bytes(folder / path)).hexdigest() != digest:
            raise RunConflictError(f"{folder / path} was altered since the training wrote it; restore it")
    facts = {"measure": result["measure"], "value": result["value"], "training": lineage}
    if result["value"] is not None and result["before"] is not None:
        facts |= {"gain": result["value"] - result["before"], "gain_over": "before training"}
    return Candidate(folder / MODEL_FOLDER, depends_on.get(REGISTERED_PART), facts)


def add(place: Location, name: str, candidate: Candidate, version: str | None = None) -> Version:
    """Stores the candidate as a version, named by its content unless `version` is given.

    The same content again is the same version. Raises as `registry.store_version` does.
    """
    version = version or content_name(candidate.model)
    folders = {MODEL_FOLDER: candidate.model}
    return registry.store_version(place, name, version, folders, parent=candidate.parent, facts=candidate.facts)


def content_name(folder: Location) -> str:
    """A version name that is a function of the files in `folder`."""
    digest = hashlib.sha256()
    for path, file in registry.files_to_keep(folder).items():
        digest.update(json.dumps([path, hashlib.sha256(read_bytes(file)).hexdigest()]).encode())
    return f"sha-{digest.hexdigest()[:12]}"
