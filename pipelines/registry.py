"""The model registry: immutable versions of named models, and which of them is the current one.

    <registry>/<name>/versions/<version>/model/…       a checkpoint with its card; further folders beside it
    <registry>/<name>/versions/<version>/version.json  written last: a version without it does not exist
    <registry>/<name>/history/<NNNNNN>.json            promotions and rollbacks, numbered from 1
    <registry>/<name>/current.json                     for other programs: a copy of the newest entry

An entry of the history is made by one create-only PUT under the next number: of two writers at the same moment one gets
the number, and the other one sees it. So the history alone decides what is current; current.json follows it, is never
moved back, and is put right by the next look at it where a kill left it behind. It knows nothing of what a model is
good for, nor of how jobs run.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from crossenc.errors import InputError, RunConflictError, StorageError
from pipelines.storage import Location, exists, list_files, put_if, put_new, read_bytes
from pipelines.stored_files import StoredFile

#: Raised when the meaning of version.json or of a history entry changes.
FORMAT = 1
SCHEME = "registry://"
#: The part of a fingerprint that names the version, where the model is one of a registry.
PLAN_PART = "registered model"
VERSIONS_FOLDER, HISTORY_FOLDER, MODEL_FOLDER = "versions", "history", "model"
VERSION_FILE, CURRENT_FILE = "version.json", "current.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_READERS = 8

T = TypeVar("T")
R = TypeVar("R")
Action = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a model, which never changes.

    `files` are all its files, by path in the version's folder. `parent` is what it was trained from, None where that
    is not known. `facts` are for people and for later decisions; `crossenc models` shows `measure`, `value` and `gain`
    of them, and `summary`. `created_at` is a time in UTC as ISO 8601 writes it.
    """

    name: str
    version: str
    created_at: str
    parent: str | None
    files: tuple[StoredFile, ...]
    facts: Mapping[str, Any]

    @property
    def source(self) -> str:
        """What a job calls it."""
        return f"{SCHEME}{self.name}@{self.version}"

    @property
    def model_digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files, by path in its folder."""
        start = f"{MODEL_FOLDER}/"
        return {file.path.removeprefix(start): file.sha256 for file in self.files if file.path.startswith(start)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the history: since it `version` is the current one, before it `previous` was, None at the first.

    `key` is the caller's own name for the decision: asked again with the same one, it gets the entry that is there.
    """

    number: int
    action: Action
    version: str
    previous: str | None
    at: str
    reason: str
    key: str


_VERSION, _ENTRY = TypeAdapter(Version), TypeAdapter(Entry)


def store_version(
    registry: Location,
    name: str,
    version: str,
    folders: Mapping[str, Location],
    *,
    parent: str | None,
    facts: Mapping[str, Any],
) -> Version:
    """Copies the folders, of which `model` is required, into a new version and returns it.

    Called again with the same files it completes what a kill left, or returns the version that is there with its
    parent and facts of then. Raises RunConflictError where the version has other files, InputError for names that
    cannot be and for a folder without a checkpoint.
    """
    place = _version_folder(registry, name, version)
    sources = _sources(folders)
    if exists(place / VERSION_FILE):  # before anything is copied beside what is there
        there = {file.path for file in read_version(registry, name, version).files}
        if there != sources.keys():
            raise RunConflictError(_occupied(place))
    files = tuple(_copy(sources[path], place, path) for path in sorted(sources))  # one by one: weights are large
    _refuse_extra(place, files)
    made = Version(name, version, _now(), parent, files, dict(facts))
    body = json.dumps({"format": FORMAT} | asdict(made), indent=1, sort_keys=True).encode()
    stored = _parse_version(put_new(place / VERSION_FILE, body), place / VERSION_FILE)
    if stored.files != made.files:
        raise RunConflictError(_occupied(place))
    return stored


def promote(
    registry: Location, name: str, version: str, *, reason: str, key: str, expected: int | None = None
) -> Entry:
    """Makes a version the current one and returns the entry that says so.

    That is the entry with this key where there is one, and the newest one, whatever its key, where the version is
    current already. `expected` is the number of the newest entry (0 for none) that the decision rests on: raises
    RunConflictError where there is a newer one, or none of this number. Without it, the last of several promotions
    counts. Raises InputError where there is no such version, RunConflictError where its files have changed.
    """

    def decide(entries: Sequence[Entry]) -> tuple[Action, str] | None:
        if entries and entries[-1].version == version:
            return None
        last = entries[-1].number if entries else 0
        if expected is not None and last < expected:
            raise RunConflictError(
                f"the history of {name} ends with entry {last}: there is no entry {expected} to expect; look at"
                f" `crossenc models {name}` and name the entry that {version} was compared at"
            )
        if expected is not None and last != expected:
            found = f"{entries[-1].action} of {entries[-1].version} ({entries[-1].reason})" if entries else "nothing"
            raise RunConflictError(
                f"{name} was changed since {version} was compared with it: entry {last} of its history, {found}, came"
                f" after entry {expected}; compare with {name} as it is now and promote again"
            )
        verify(registry, read_version(registry, name, version))
        return "promote", version

    return _append(registry, name, decide, reason, key)


def rollback(registry: Location, name: str, *, to: str | None = None, reason: str, key: str) -> Entry:
    """Makes an earlier version the current one again and returns the entry that says so.

    `to` is a version that was current once; by default it is the one that was before the present one. Rolled back
    again, it goes further back, not to and fro. Keys and a version that is current already are treated as `promote`
    does. Raises InputError where there is nothing to go back to, RunConflictError where its files have changed and,
    without `to`, where somebody else changed the history at the same moment.
    """
    seen: list[int] = []

    def decide(entries: Sequence[Entry]) -> tuple[Action, str] | None:
        seen.append(len(entries))
        if to is None and len(seen) > 1:
            raise RunConflictError(
                f"somebody else changed {name} at the same moment; look at `crossenc models {name}` and decide again"
            )
        target = _target(name, entries, to)
        if entries[-1].version == target:
            return None
        verify(registry, read_version(registry, name, target))
        return "rollback", target

    return _append(registry, name, decide, reason, key)


def _target(name: str, entries: Sequence[Entry], to: str | None) -> str:
    if not entries:
        raise InputError(f"no version of {name} was ever promoted: there is nothing to roll back")
    if to is not None:
        check_name("version", to)
        if all(entry.version != to for entry in entries):
            raise InputError(f"{to} was never the current version of {name}; promote it instead")
        return to
    before = _before(entries)
    if len(before) < 2:
        raise InputError(f"{before[-1]} is the first version of {name} that was promoted: there is none before it")
    return before[-2]


def _before(entries: Iterable[Entry]) -> list[str]:
    """The versions that rolling back goes through, the current one last."""
    stack: list[str] = []
    for entry in entries:
        if entry.action == "rollback" and entry.version in stack:
            while stack[-1] != entry.version:
                stack.pop()
        else:
            stack.append(entry.version)
    return stack


def _append(
    registry: Location,
    name: str,
    decide: Callable[[Sequence[Entry]], tuple[Action, str] | None],
    reason: str,
    key: str,
) -> Entry:
    """Adds an entry to the history, as `decide` says for the history there is; None leaves it as it is."""
    while True:
        entries = history(registry, name)
        same = next((entry for entry in entries if entry.key == key), None)
        if same is not None:
            _point(registry, name)
            return same
        decided = decide(entries)
        if decided is None:
            _point(registry, name)
            return entries[-1]
        action, version = decided
        number, previous = (entries[-1].number + 1, entries[-1].version) if entries else (1, None)
        entry = Entry(number, action, version, previous, _now(), reason, key)
        body = _entry_body(entry)
        if put_new(_folder(registry, name) / f"{HISTORY_FOLDER}/{number:06d}.json", body) == body:
            _point(registry, name)
            return entry


def _point(registry: Location, name: str) -> None:
    """Moves current.json to the newest entry, unless it is there."""
    place = _folder(registry, name) / CURRENT_FILE
    while True:
        try:
            stored = read_bytes(place)
        except FileNotFoundError:
            stored = None
        # After the look at the pointer: what the history says now is not older than what that was made from.
        entry = newest(registry, name)
        if entry is None or stored == _entry_body(entry):
            return
        with contextlib.suppress(FileNotFoundError):
            put_if(place, _entry_body(entry), stored)


def current(registry: Location, name: str) -> Entry | None:
    """The newest entry of the history, None where nothing was promoted yet. Moves current.json where it is behind."""
    entry = newest(registry, name)
    if entry is not None:
        # Who may only read, reads: the history says what is current, and the next writer moves the pointer.
        with contextlib.suppress(StorageError):
            _point(registry, name)
    return entry


def newest(registry: Location, name: str) -> Entry | None:
    """As `current`, and writes nothing."""
    places = _entries(registry, name)
    return _read_entry(places[max(places)]) if places else None


def history(registry: Location, name: str) -> tuple[Entry, ...]:
    """All entries, in order. Raises RunConflictError for one that cannot be read."""
    return tuple(_in_parallel(_read_entry, [place for _, place in sorted(_entries(registry, name).items())]))


def _entries(registry: Location, name: str) -> dict[int, Location]:
    """Where each entry is, by number."""
    places = [file.location for file in list_files(_folder(registry, name) / HISTORY_FOLDER)]
    return {int(place.name[:-5]): place for place in places if re.fullmatch(r"\d{6,}\.json", place.name)}


def versions(registry: Location, name: str) -> tuple[Version, ...]:
    """All versions, the oldest first."""
    folder = _folder(registry, name) / VERSIONS_FOLDER
    depth = folder.uri.count("/") + 2
    places = [
        file.location
        for file in list_files(folder)
        if file.location.name == VERSION_FILE and file.location.uri.count("/") == depth
    ]
    found = _in_parallel(lambda place: _parse_version(read_bytes(place), place), places)
    return tuple(sorted(found, key=lambda version: (version.created_at, version.version)))


def names(registry: Location) -> tuple[str, ...]:
    """The models that have a version or a history, in order."""
    paths = [file.location.below(registry).split("/") for file in list_files(registry)]
    found = {
        path[0]
        for path in paths
        if (len(path) == 4 and path[1] == VERSIONS_FOLDER and path[3] == VERSION_FILE)
        or (len(path) == 3 and path[1] == HISTORY_FOLDER)
    }
    return tuple(sorted(name for name in found if _NAME.fullmatch(name)))


def read_version(registry: Location, name: str, version: str) -> Version:
    """A version. Raises InputError, with those there are, where it does not exist."""
    place = _version_folder(registry, name, version) / VERSION_FILE
    try:
        return _parse_version(read_bytes(place), place)
    except FileNotFoundError:
        known = ", ".join(one.version for one in versions(registry, name)[-10:]) or "none"
        raise InputError(f"{registry} has no version {version} of {name}; there are: {known}") from None


def verify(registry: Location, version: Version) -> None:
    """Reads every file of a version. Raises RunConflictError for the first that was altered, removed or added."""
    place = _version_folder(registry, version.name, version.version)

    for file in version.files:
        try:
            digest = hashlib.sha256(read_bytes(place / file.path)).hexdigest()
        except FileNotFoundError:
            digest = ""
        if digest != file.sha256:
            raise RunConflictError(_changed(place, file, not digest))
    _refuse_extra(place, version.files)


def resolve(source: str, registry: Location) -> tuple[Version, Location]:
    """The version that registry://name (the current one) or registry://name@version names, and its model's folder.

    Raises InputError where there is none, RunConflictError where a file was removed, added or has another size. Whoever
    loads the model compares its digests.
    """
    name, version = parse(source)
    if version is None:
        entry = current(registry, name)
        if entry is None:
            known = ", ".join(names(registry)) or "none"
            raise InputError(
                f"{registry} has no current version of {name}: promote one with `crossenc promote`, or name another"
                f" model; there are: {known}"
            )
        version = entry.version
    found, place = read_version(registry, name, version), _version_folder(registry, name, version)
    sizes = _sizes(place)
    for file in found.files:
        if sizes.get(file.path) != file.num_bytes:
            raise RunConflictError(_changed(place, file, file.path not in sizes))
    _refuse_extra(place, found.files)
    return found, place / MODEL_FOLDER


def parse(source: str) -> tuple[str, str | None]:
    """Name and version of registry://name@version; the version is None where the current one is meant."""
    name, at, version = source.removeprefix(SCHEME).partition("@")
    if not source.startswith(SCHEME):
        raise InputError(f"{source} names no model of a registry; write {SCHEME}name or {SCHEME}name@version")
    check_name("model name", name)
    if at:
        check_name("version", version)
    return name, version if at else None


def check_name(what: str, name: str) -> None:
    """Raises InputError unless `name` can be a folder of its own in any store."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be a {what}: use up to 100 letters, digits, dots, dashes and underscores, a letter or"
            " digit first"
        )


def _folder(registry: Location, name: str) -> Location:
    check_name("model name", name)
    return registry / name


def _version_folder(registry: Location, name: str, version: str) -> Location:
    check_name("version", version)
    return _folder(registry, name) / f"{VERSIONS_FOLDER}/{version}"


def _sources(folders: Mapping[str, Location]) -> dict[str, Location]:
    """What to copy: path in the version -> where it is now. Hidden files stay behind."""
    sources: dict[str, Location] = {}
    for folder, place in folders.items():
        check_name("folder", folder)
        sources |= {f"{folder}/{path}": file for path, file in files_to_keep(place).items()}
    place = folders[MODEL_FOLDER]
    if f"{MODEL_FOLDER}/config.json" not in sources or not any(
        re.fullmatch(rf"{MODEL_FOLDER}/[^/]+\.safetensors", path) for path in sources
    ):
        raise InputError(
            f"{place} is no checkpoint: it has no config.json or no .safetensors file; name another folder"
        )
    return sources


def files_to_keep(folder: Location) -> dict[str, Location]:
    """The files that a version takes from a folder, by path in it: all but hidden ones."""
    found = {file.location.below(folder): file.location for file in list_files(folder)}
    return {path: file for path, file in found.items() if not any(part.startswith(".") for part in path.split("/"))}


def _copy(source: Location, place: Location, path: str) -> StoredFile:
    body = read_bytes(source)
    if put_new(place / path, body) != body:
        raise RunConflictError(_occupied(place))
    return StoredFile(path, len(body), hashlib.sha256(body).hexdigest())


def _refuse_extra(place: Location, files: Sequence[StoredFile]) -> None:
    """Raises RunConflictError for a file that is not of the version: it could change what is loaded."""
    extra = sorted(_sizes(place).keys() - {file.path for file in files} - {VERSION_FILE})
    if extra:
        raise RunConflictError(f"{place / extra[0]} is not of this version; remove it, or take another version name")


def _sizes(place: Location) -> dict[str, int]:
    """What is in a version's folder, by path in it; hidden files are those of writers at work, or killed."""
    sizes = {file.location.below(place): file.num_bytes for file in list_files(place)}
    return {path: size for path, size in sizes.items() if not path.rpartition("/")[2].startswith(".")}


def _changed(place: Location, file: StoredFile, is_gone: bool) -> str:
    return (
        f"{place / file.path} was {'removed' if is_gone else 'altered'} since the version was stored; restore it, or"
        " store the model as another version"
    )


def _occupied(place: Location) -> str:
    return f"{place} holds another content already; versions never change: take another version name"


def _read_entry(place: Location) -> Entry:
    try:
        body = json.loads(read_bytes(place))
        _check_format(body)
        entry = _ENTRY.validate_python(body)
        if place.name != f"{entry.number:06d}.json":
            raise ValueError("another number")
        return entry
    except (ValueError, TypeError) as error:
        raise RunConflictError(f"{place} is no history entry of this version ({error}); restore the file") from None


def _parse_version(body: bytes, place: Location) -> Version:
    try:
        content = json.loads(body)
        _check_format(content)
        version = _VERSION.validate_python(content)
        if not place.uri.endswith(f"/{version.name}/{VERSIONS_FOLDER}/{version.version}/{VERSION_FILE}"):
            raise ValueError("another name or version")
        return version
    except (ValueError, TypeError) as error:
        raise RunConflictError(f"{place} is no version of a model ({error}); restore the file") from None


def _check_format(body: Any) -> None:
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise ValueError("another format")


def _entry_body(entry: Entry) -> bytes:
    return json.dumps({"format": FORMAT} | asdict(entry), indent=1, sort_keys=True).encode()


def _in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(function, items))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
