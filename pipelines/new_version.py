"""What becomes a version of the registry: a checkpoint's folder, or the output of a training or distillation job.

It knows what those look like, and nothing of what is in the registry already.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from crossenc.errors import InputError, RunConflictError
from pipelines import registry
from pipelines.records import MANIFEST_FILE, SUCCESS_FILE
from pipelines.registry import MODEL_FOLDER, Version
from pipelines.storage import Location, exists, locate, put, read_bytes

#: Where a version has what the evaluation that judged it found.
EVALUATION_FOLDER = "evaluation"
#: Where a distillation has its training run.
_STUDENT_FOLDER = "student"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that could become a version: where it is, what it was trained from, and what is known of it.

    `evaluation` is the output of an evaluation that judged it, if there is one.
    """

    model: Location
    parent: str | None
    facts: Mapping[str, Any]
    evaluation: Location | None = None


def look(folder: Location) -> Candidate:
    """What is in `folder`: a checkpoint, or the output of a training or distillation job with one.

    Raises InputError where it is neither, or the training is not finished, RunConflictError where the model is not
    the one that training wrote.
    """
    if exists(folder / "config.json"):
        return Candidate(folder, None, {})
    if exists(folder / f"{_STUDENT_FOLDER}/{MODEL_FOLDER}/config.json"):
        return look(folder / _STUDENT_FOLDER)
    if not exists(folder / f"{MODEL_FOLDER}/config.json"):
        raise InputError(
            f"{folder} is neither a checkpoint, with config.json, nor the output of `crossenc train`, with"
            f" {MODEL_FOLDER}/, or `crossenc distill`, with {_STUDENT_FOLDER}/; name the folder of one"
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
    return Candidate(folder / MODEL_FOLDER, depends_on.get(registry.PLAN_PART), facts)


def judged(candidate: Candidate, folder: Location) -> Candidate:
    """The candidate with an evaluation that judged it, and with its figures: means over the collections.

    Raises InputError where the evaluation is not finished, or judged no model with the candidate's weights.
    """
    # Imported here because it imports scipy and more, which listing models need not wait for.
    from pipelines.evaluation_output import load, means_of, stored

    if not exists(folder / SUCCESS_FILE):
        raise InputError(
            f"{folder} is no finished output of `crossenc evaluate`; run it to its end, or name another one"
        )
    found = load(folder)
    weights = {
        path: hashlib.sha256(read_bytes(file)).hexdigest()
        for path, file in registry.files_to_keep(candidate.model).items()
        if path.endswith(".safetensors")
    }
    systems = _systems(stored(folder)["depends_on"])
    same = [name for name, files in systems.items() if files and files.items() <= weights.items()]
    if not same:
        raise InputError(
            f"{folder} judged no model with the weights of {candidate.model}, but {', '.join(systems) or 'none'};"
            " evaluate this one"
        )
    name = next((one for one in same if one != found.baseline), same[0])
    value, gain = means_of(found, name)
    facts = {"measure": found.measures[0], "value": value, "judged_on": [one.collection for one in found.collections]}
    if gain is not None:
        facts |= {"gain": gain, "gain_over": found.baseline}
    others = {key: value for key, value in candidate.facts.items() if key not in ("gain", "gain_over")}
    return replace(candidate, facts=others | facts, evaluation=folder)


def _systems(depends_on: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The models of an evaluation: name -> path of a file with weights -> digest."""
    systems: dict[str, dict[str, str]] = {}
    for part, digest in depends_on.items():
        if part.startswith("model "):
            name, _, path = part.removeprefix("model ").partition(" ")
            files = systems.setdefault(name, {})
            if path.endswith(".safetensors"):
                files[path] = digest
    return systems


def add(place: Location, name: str, candidate: Candidate, version: str | None = None) -> Version:
    """Stores the candidate as a version, named by its content unless `version` is given.

    The same content again is the same version. Raises as `registry.store_version` does.
    """
    from pipelines.evaluation_output import EVALUATION_FILES  # here for the reason that `judged` gives

    version = version or content_name(candidate.model)
    folders = {MODEL_FOLDER: candidate.model}
    with tempfile.TemporaryDirectory(prefix="crossenc-evaluation-") as temporary:
        if candidate.evaluation is not None:
            folders[EVALUATION_FOLDER] = locate(temporary)
            for file in EVALUATION_FILES:
                put(folders[EVALUATION_FOLDER] / file, read_bytes(candidate.evaluation / file))
        return registry.store_version(place, name, version, folders, parent=candidate.parent, facts=candidate.facts)


def content_name(folder: Location) -> str:
    """A version name that is a function of the files in `folder`."""
    digest = hashlib.sha256()
    for path, file in registry.files_to_keep(folder).items():
        digest.update(json.dumps([path, hashlib.sha256(read_bytes(file)).hexdigest()]).encode())
    return f"sha-{digest.hexdigest()[:12]}"
