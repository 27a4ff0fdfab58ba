"""What is remembered of retrainings: what each set out with, what was decided, and how it ended. Each is written once.

    retrainings/<key>/retraining.json   label files, the version to start from, the entry of the history at that moment
    retrainings/<key>/decision.json     promote or refuse, with reasons and figures
    retrainings/<key>/ending.json       promoted, refused or void: nothing is left to do

Label files count as used once a retraining that trained on them was promoted or refused. One that was refused may be
tried again: its files are new once more. It knows nothing of how the steps between are done.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from crossenc.errors import RunConflictError
from crossenc.evaluation.gate import Decision
from crossenc.evaluation.results import FIRST_STAGE
from pipelines.records import SUCCESS_FILE
from pipelines.storage import FileInfo, Location, exists, list_files, locate, put_new, read_bytes

RETRAININGS_FOLDER = "retrainings"
RETRAINING_FILE, DECISION_FILE, ENDING_FILE = "retraining.json", "decision.json", "ending.json"

#: The steps with folders of their own, in order, and what each leaves when it is done.
RERANKED_FOLDER, MINED_FOLDER, DISTILLED_FOLDER = "reranked", "mined", "distilled"
TRAINED_FOLDER, EVALUATION_FOLDER = "trained", "evaluation"

#: What the evaluation calls the base model.
BASE = "base"

EndState = Literal["promoted", "refused", "void"]


@dataclass(frozen=True, slots=True)
class LabelFile:
    """A file of labels as it was. `num_leaking` of its rows are not trained on."""

    uri: str
    num_bytes: int
    version: str
    is_new: bool
    num_leaking: int

    @property
    def identity(self) -> tuple[str, int, str]:
        """What tells it from another file, and from the same one with another content."""
        return self.uri, self.num_bytes, self.version


@dataclass(frozen=True, slots=True)
class Retraining:
    """What a retraining set out with.

    `key` names it, its folder and the version that it makes. `parent` is the version that it starts from and is
    compared with, None where the registry has none: it is compared with the base model then, if `judges_base`, or else
    with the first stage. `entry` is the number of the newest entry of the history at the start, 0 for none. `parts` are
    what it depends on; `files` is what it trains on, `num_leaking_before` are rows of other label files that are judged
    on. `known_files` are all label files, where mining must know of more positives than `files` have. `started` is Unix
    time.
    """

    key: str
    started: float
    parent: str | None
    entry: int
    files: tuple[LabelFile, ...]
    parts: Mapping[str, str]
    num_leaking_before: int = 0
    judges_base: bool = False
    known_files: tuple[LabelFile, ...] = ()

    @property
    def baseline(self) -> str:
        """What the candidate is compared with, as the evaluation calls it."""
        return self.parent or (BASE if self.judges_base else FIRST_STAGE)

    @property
    def new_files(self) -> tuple[LabelFile, ...]:
        return tuple(file for file in self.files if file.is_new)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a retraining ended, and why. `entry` is that of the promotion. `ended` is Unix time."""

    state: EndState
    reason: str
    entry: int | None
    ended: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a retraining, and whether it is done."""

    name: str
    done: bool


_RETRAINING, _ENDING, _DECISION = TypeAdapter(Retraining), TypeAdapter(Ending), TypeAdapter(Decision)


def new_key(now: float, content: Any) -> str:
    """A name that no other retraining has: the day and, of everything that it sets out with, a digest."""
    digest = hashlib.sha256(json.dumps([now, content], sort_keys=True).encode()).hexdigest()
    return f"{time.strftime('%Y-%m-%d', time.gmtime(now))}-{digest[:8]}"


def folder_of(output: Location, key: str) -> Location:
    """The folder of a retraining."""
    return output / f"{RETRAININGS_FOLDER}/{key}"


def begin(output: Location, retraining: Retraining) -> Retraining:
    """Stores what a retraining sets out with, before anything else of it."""
    place = folder_of(output, retraining.key) / RETRAINING_FILE
    return _retraining(put_new(place, _RETRAINING.dump_json(retraining, indent=1)), place)


def end(output: Location, retraining: Retraining, ending: Ending) -> Ending:
    """Stores how a retraining ended; returns how it did, if that is stored already."""
    place = folder_of(output, retraining.key) / ENDING_FILE
    return _ending(put_new(place, _ENDING.dump_json(ending, indent=1)), place)


def read_all(output: Location) -> list[tuple[Retraining, Ending | None]]:
    """Every retraining with how it ended, None for one that has not, the oldest first."""
    endings, found = {}, []
    depth = (output / RETRAININGS_FOLDER).uri.count("/") + 2
    for file in list_files(output / RETRAININGS_FOLDER):
        place = file.location
        if place.uri.count("/") != depth:
            continue
        if place.name == RETRAINING_FILE:
            found.append(_retraining(read_bytes(place), place))
        elif place.name == ENDING_FILE:
            endings[place.uri.split("/")[-2]] = _ending(read_bytes(place), place)
    return [(one, endings.get(one.key)) for one in sorted(found, key=lambda one: (one.started, one.key))]


def steps(output: Location, retraining: Retraining) -> list[Step]:
    """The steps of a retraining that has not ended, in order."""
    folder = folder_of(output, retraining.key)
    places = {
        "mine": f"{MINED_FOLDER}/{SUCCESS_FILE}",
        "distil": f"{DISTILLED_FOLDER}/{SUCCESS_FILE}",
        "train": f"{TRAINED_FOLDER}/{SUCCESS_FILE}",
        "evaluate": f"{EVALUATION_FOLDER}/{SUCCESS_FILE}",
        "decide": DECISION_FILE,
    }
    for name, section in (("mine", "mine"), ("distil", "distill")):
        if json.loads(retraining.parts.get(f"option {section}", "null")) is None:
            del places[name]
    found = [Step(name, exists(folder / place)) for name, place in places.items()]
    return [*found, Step("promote or refuse", False)]


def decided(
    known: Iterable[tuple[Retraining, Ending | None]], registry: Location, name: str
) -> list[tuple[Retraining, Ending]]:
    """The retrainings of one model in one registry that were promoted or refused, the oldest first."""
    ended = [(one, ending) for one, ending in known if ending is not None and ending.state != "void"]
    return [(one, ending) for one, ending in ended if _model_of(one, registry) == (registry.uri, name)]


def _model_of(one: Retraining, registry: Location) -> tuple[str, str]:
    """The registry and the name in it that a retraining made a version for."""
    uri, name = (json.loads(one.parts.get(f"option {part}", "null")) for part in ("registry", "name"))
    return locate(uri, registry.options).uri if uri else "", name


def to_try_again(
    before: Sequence[tuple[Retraining, Ending]], files: Sequence[FileInfo], parts: Mapping[str, str]
) -> Retraining | None:
    """The last decided retraining, where it was refused and could end otherwise now.

    That is so with other settings or another fixed set, and where one of its files was changed or removed.
    """
    if not before or before[-1][1].state != "refused":
        return None
    last = before[-1][0]
    present = {(file.location.uri, file.num_bytes, file.version) for file in files}
    is_same = last.parts == parts and all(file.identity in present for file in last.files)
    return None if is_same else last


def used_files(before: Iterable[tuple[Retraining, Ending]], again: Retraining | None) -> set[tuple[str, int, str]]:
    """The label files, by identity, that decided retrainings were about, but for what was new to one tried again."""
    used = {file.identity for one, _ in before for file in one.files}
    return used - {file.identity for file in again.new_files} if again is not None else used


def label_files(files: Sequence[FileInfo], used: set[tuple[str, int, str]]) -> list[LabelFile]:
    """Files as they are now; those that are not in `used` are new."""
    found = [LabelFile(file.location.uri, file.num_bytes, file.version, True, 0) for file in files]
    return [LabelFile(*file.identity, file.identity not in used, 0) for file in found]


def as_info(file: LabelFile, options: Mapping[str, Any]) -> FileInfo:
    """The file as storage knows it."""
    return FileInfo(locate(file.uri, options), file.num_bytes, file.version)


def store_decision(folder: Location, decision: Decision, beside: Mapping[str, Any]) -> Decision:
    """Stores a decision with what is told beside it; returns the one that is stored."""
    body = {"summary": decision.summary, "reasons": list(decision.reasons), **asdict(decision), **beside}
    place = folder / DECISION_FILE
    return _decision(put_new(place, json.dumps(body, indent=1, ensure_ascii=False).encode()), place)


def read_decision(folder: Location) -> Decision | None:
    """The decision of a retraining, None where none was made yet."""
    try:
        return _decision(read_bytes(folder / DECISION_FILE), folder / DECISION_FILE)
    except FileNotFoundError:
        return None


def _retraining(body: bytes, place: Location) -> Retraining:
    with _naming(place):
        return _RETRAINING.validate_json(body)


def _ending(body: bytes, place: Location) -> Ending:
    with _naming(place):
        return _ENDING.validate_json(body)


def _decision(body: bytes, place: Location) -> Decision:
    with _naming(place):
        return _DECISION.validate_json(body)


@contextmanager
def _naming(place: Location) -> Iterator[None]:
    try:
        yield
    except ValidationError:
        raise RunConflictError(f"{place} is not of this version; restore it, or choose another output") from None
