"""The one seam to files: local disks and object stores through fsspec, with the guarantees that a run needs.

What it adds to fsspec: places are checked before use, reads are verified to their full length, transient failures
are retried up to a deadline, `put_new` creates an object at most once and returns what is really stored, and
messages never show credentials. It knows nothing of Parquet, shards or runs.
"""

import errno
import io
import ipaddress
import itertools
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from filelock import FileLock
from fsspec.spec import AbstractFileSystem

from crossenc.errors import ConfigError, InputError, StorageError

T = TypeVar("T")

#: How long one storage operation is retried before the run gives up (and can be resumed).
RETRY_SECONDS = 90.0
#: One PUT even for large objects: completing a multipart upload is not create-only on every store.
_SINGLE_PUT_BYTES = 2_500 * 2**20
_ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "local": "file"}
SCHEMES = ("file", "s3", "gs", "abfs", "memory")
_PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_PERMANENT_STATUSES = (405, 411, 501)
_CLIENT_MODULES = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "s3fs",
    "urllib3",
    "gcsfs",
    "adlfs",
    "azure",
    "google",
)
_PERMANENT_CLIENT_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "InvalidRegionError",
    "EndpointResolutionError",
    "NoRegionError",
)
_SECRET_NAMES = re.compile(r"secret|token|password|key$|credential|sas|connection_?string|auth", re.IGNORECASE)
_SECRET_PATTERNS = (
    (re.compile(r"(?<!registry://)(?<=://)[^/@\s]+@"), "***@"),  # registry://name@version holds no secret
    (re.compile(r"(?<=://)[^/@\s:]+:[^@\s]+@"), "***@"),  # a secret key may hold slashes
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), "***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
    (re.compile(r"(?i)(x-amz-[a-z-]+|token|signature|sig)=[^&\s'\"]+"), r"\1=***"),
    (re.compile(r"(?i)(AccountKey)=[^;\s]+"), r"\1=***"),  # in Azure's connection strings
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*)[^\r\n]+"), r"\1***"),
)
_SECRET_ENV = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "RAY_AUTH_TOKEN",
)


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder in a store. `uri` is complete, normalised and free of credentials."""

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def scheme(self) -> str:
        return self.uri.partition("://")[0]

    @property
    def path(self) -> str:
        """The path inside the file system, as fsspec names it."""
        return self.uri.partition("://")[2]

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    def below(self, folder: "Location") -> str:
        """The path from `folder`, which this lies in."""
        return self.uri.removeprefix(folder.uri.rstrip("/") + "/")

    def __truediv__(self, relative: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{relative}", self.options)

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A stored file. `version` changes whenever the content does: an etag, or a modification time."""

    location: Location
    num_bytes: int
    version: str


def locate(uri: str, options: Mapping[str, Any] | None = None) -> Location:
    """The location that `uri` names: a local path, or scheme://bucket/key with one of SCHEMES.

    Raises InputError for anything that could read or write another place than the one it seems to name.
    """
    shown = redact(uri)
    if not uri.strip() or re.search(r"[\x00-\x1f\x7f]", uri) or uri != uri.strip():
        raise InputError(f"{shown!r} is not a path or URI: it is empty or has spaces or control characters")
    if "::" in uri:
        raise InputError(f"{shown!r} is a chained URL; give the plain path or URI of the file itself")
    if "://" not in uri:
        if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:/", uri):
            raise InputError(f"{shown!r} looks like a URI with a slash missing; write scheme://bucket/key")
        return Location("file://" + os.path.abspath(os.path.expanduser(uri)))
    scheme, _, rest = uri.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{shown!r} has a scheme that is not allowed here; use a local path or one of {known}")
    bucket = rest.partition("/")[0]
    if "@" in bucket or ":" in bucket:
        raise InputError(
            f"the {scheme}:// address holds credentials or a port; write scheme://bucket/key, and give credentials by"
            " the environment or storage_options"
        )
    parts = rest.split("/")
    if ".." in parts or "%2e%2e" in rest.lower():
        raise InputError(f"{shown!r} has a '..' segment; write the path without it")
    if scheme == "file":
        if parts[0]:
            raise InputError(f"{shown!r} names a host; a local file is file:///path")
        return Location("file://" + os.path.abspath(rest))
    if not parts[0]:
        raise InputError(f"{shown!r} has no bucket; write {scheme}://bucket/key")
    _check_endpoint(options or {})
    return Location(f"{scheme}://{rest.rstrip('/')}", dict(options or {}))


def check_apart(output: Location, inputs: Iterable[str | None]) -> None:
    """Raises ConfigError where a job's output and one of its inputs (None is none) lie inside each other."""
    own = output.uri.rstrip("/").split("/")
    for uri in filter(None, inputs):
        place = locate(uri, output.options).uri.rstrip("/")
        if _meet(place.split("/"), own):
            raise ConfigError(f"output {output} and input {place} lie inside each other; choose another output")


def _meet(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a path, which may be a glob, can name `folder`, something in it or something that it is in."""
    if not pattern or not folder:
        return True
    if pattern[0] == folder[0]:
        return _meet(pattern[1:], folder[1:])
    is_matched = has_magic(pattern[0]) and not _is_hidden(folder[0])
    if "**" in pattern[0]:
        return _meet(pattern[1:], folder) or (is_matched and _meet(pattern, folder[1:]))
    return is_matched and fnmatchcase(folder[0], pattern[0]) and _meet(pattern[1:], folder[1:])


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is metadata of other tools, or of a run."""
    return name.startswith(("_", "."))


def _check_endpoint(options: Mapping[str, Any]) -> None:
    """Refuses the addresses at which clouds hand out a machine's own credentials."""
    client = options.get("client_kwargs") or {}
    urls = [options.get("endpoint_url"), client.get("endpoint_url")]
    urls += [os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")]
    for url in urls:
        host = urlsplit(str(url or "")).hostname or ""
        if _is_link_local(host):
            raise InputError(f"the storage endpoint {host} is a link-local address; give the address of a real store")


def _is_link_local(host: str) -> bool:
    try:
        if ":" not in host:
            host = socket.inet_ntoa(socket.inet_aton(host))  # also reads 2852039166 and 0xa9fea9fe
        address = ipaddress.ip_address(host)
    except (OSError, ValueError):
        return False  # a name
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_link_local) or address in ipaddress.ip_network("fd00:ec2::/32")


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """`text` without anything that looks like a credential, and without the values of secret options."""
    secrets = [os.environ.get(name, "") for name in _SECRET_ENV]
    for secret in [*secrets, *_secret_values(options or {})]:
        if len(secret) >= 6:
            text = text.replace(secret, "***")
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _secret_values(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif _SECRET_NAMES.search(name):
            yield str(value)


def redact_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options as they may be printed: the values of secret names become ***, others are redacted."""
    return {name: "***" if _SECRET_NAMES.search(name) else _redacted(value) for name, value in options.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_options(value)
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _filesystem(location: Location, fresh: bool = False) -> AbstractFileSystem:
    options: dict[str, Any] = {"skip_instance_cache": True} if fresh else {}
    if location.scheme == "s3":
        options |= {"use_listings_cache": False, "config_kwargs": {"retries": {"max_attempts": 2}}}
    return fsspec.filesystem(location.scheme, **{**options, **location.options})


def _is_transient(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    if isinstance(error, IsADirectoryError | NotADirectoryError | NotImplementedError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS and _http_status(error) not in _PERMANENT_STATUSES
    return _is_of_store(error) and type(error).__name__ not in _PERMANENT_CLIENT_ERRORS


def _is_of_store(error: Exception) -> bool:
    """Whether a disk or a store's client raised it, and not a mistake in our code."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENT_MODULES


def _http_status(error: BaseException) -> int | None:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, Mapping):
            status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status
    return None


def _retrying(operation: Callable[[AbstractFileSystem], T], location: Location, doing: str) -> T:
    """Runs `operation`, again after transient failures (with a fresh client) until RETRY_SECONDS have passed."""
    deadline = time.monotonic() + RETRY_SECONDS
    pause = 0.1
    for attempt in range(1, 10_000):
        try:
            return operation(_filesystem(location, fresh=attempt > 1))
        except Exception as error:
            if isinstance(error, FileNotFoundError | FileExistsError):
                raise
            if not _is_transient(error):
                if _is_of_store(error):
                    raise _storage_error(error, location, doing) from None
                raise
            if time.monotonic() + pause > deadline:
                raise _storage_error(error, location, doing, f" ({attempt} attempts)") from None
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(pause * 2, 5.0)
    raise AssertionError("unreachable: the deadline ends the loop")


def _storage_error(error: Exception, location: Location, doing: str, note: str = "") -> StorageError:
    message = redact(f"{type(error).__name__}: {error}", location.options)
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        hint = "no space is left there: free some and run the same command again, it continues"
    elif isinstance(error, PermissionError):
        hint = "check the credentials and the rights on this place, then run the same command again"
    elif isinstance(error, FileNotFoundError):
        hint = "check that the bucket or the folder exists, then run the same command again"
    elif type(error).__name__ in _PERMANENT_CLIENT_ERRORS:
        hint = "check the credentials and the region that are set here, then run the same command again"
    elif _http_status(error) == 411:
        hint = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required for this store and run the same command again"
    else:
        hint = "run the same command again when the store answers, it continues"
    text = f"could not {doing} {location}{note}: {message}; {hint}"
    return StorageError(text) if code is None else StorageError(code, text)


def read_bytes(location: Location) -> bytes:
    """The whole content, verified against the size that the store states. FileNotFoundError if there is none."""

    def read(fs: AbstractFileSystem) -> bytes:
        data: bytes = fs.cat_file(location.path)
        stated = fs.info(location.path)["size"]
        if len(data) != stated:
            raise ConnectionError(f"got {len(data)} of {stated} bytes")
        return data

    return _retrying(read, location, "read")


def exists(location: Location) -> bool:
    """Whether there is a file."""
    return info(location) is not None


def info(location: Location) -> FileInfo | None:
    """Size and version of a file, or None where there is no such file."""
    try:
        return _retrying(lambda fs: _file_info(location, fs.info(location.path)), location, "look up")
    except FileNotFoundError:
        return None


def _file_info(location: Location, detail: Mapping[str, Any]) -> FileInfo | None:
    if detail["type"] != "file" or detail["name"].endswith("/"):  # object stores mark folders by such names
        return None
    version = next((detail[k] for k in ("ETag", "etag", "md5Hash", "generation") if detail.get(k)), None)
    if version is None:
        version = detail.get("mtime") or detail.get("created") or detail.get("last_modified") or ""
    return FileInfo(location, int(detail["size"]), str(version).strip('"'))


def list_files(folder: Location) -> list[FileInfo]:
    """Every file below `folder`, sorted by name; empty where the folder does not exist.

    Links to files count as the files; links to folders are not followed.
    """
    root = folder.path.strip("/") + "/"

    try:
        found = _retrying(lambda fs: fs.find(folder.path, detail=True), folder, "list")
    except FileNotFoundError:
        return []
    infos = [
        _listed(folder / path.lstrip("/").removeprefix(root), detail)
        for path, detail in sorted(found.items())
        if path.lstrip("/").startswith(root)
    ]
    return [entry for entry in infos if entry is not None]


def _listed(location: Location, detail: Mapping[str, Any]) -> FileInfo | None:
    """What a listing says of a file, or, where it is a link, what the file itself says."""
    if not detail.get("islink"):
        return _file_info(location, detail)
    if not os.path.exists(location.path):
        raise InputError(f"{location} is a link to a file that does not exist; restore the file or remove the link")
    return info(location)


def expand(location: Location, suffix: str | tuple[str, ...]) -> list[FileInfo]:
    """The data files that `location` names: itself, the files of a folder, or the matches of a glob.

    A file that is named whole, or matched whole by a glob, is taken whatever its suffix. In folders only names ending
    in `suffix`, or in one of several, count. Names starting with "_" or "." are metadata of other tools: files and
    folders of such names are left out in a folder, and in the one that a glob searches.
    Raises InputError when nothing is there.
    """
    single = info(location)
    if single is not None:
        return [single]
    found = _matches(location, suffix) if has_magic(location.path) else _files_in(location, suffix)
    if not found:
        kinds = suffix if isinstance(suffix, str) else " or ".join(suffix)
        raise InputError(f"there is no {kinds} file at {location}: check the path, or the prefix and the bucket")
    return found


def _matches(pattern: Location, suffix: str | tuple[str, ...]) -> list[FileInfo]:
    searched = "/".join(itertools.takewhile(lambda part: not has_magic(part), pattern.path.split("/")))
    details = _retrying(lambda fs: fs.glob(pattern.path, detail=True), pattern, "list")
    found: dict[str, FileInfo] = {}  # a glob with ** matches a folder and again what is in it
    for path, detail in sorted(details.items()):
        root = "/" if pattern.scheme == "file" else ""
        place = Location(f"{pattern.scheme}://{root}{path.lstrip('/')}", pattern.options)
        if any(map(_is_hidden, place.path[len(searched) :].split("/"))):
            continue
        entry = _listed(place, detail)
        for file in [entry] if entry is not None else _files_in(place, suffix):
            found.setdefault(file.location.uri, file)
    return list(found.values())


def _files_in(folder: Location, suffix: str | tuple[str, ...]) -> list[FileInfo]:
    root = len(folder.path.rstrip("/")) + 1
    return [
        entry
        for entry in list_files(folder)
        if entry.location.name.endswith(suffix) and not any(map(_is_hidden, entry.location.path[root:].split("/")))
    ]


class _RangeFile(io.RawIOBase):
    """A read-only file over ranged reads, each verified to its length and retried."""

    def __init__(self, file: FileInfo) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.num_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._file.num_bytes
        if size is not None and size >= 0:
            end = min(end, self._position + size)
        start = self._position
        if start >= end:
            return b""

        def fetch(fs: AbstractFileSystem) -> bytes:
            data: bytes = fs.cat_file(self._file.location.path, start=start, end=end)
            if len(data) != end - start:
                raise ConnectionError(f"got {len(data)} of {end - start} bytes")
            return data

        data = _retrying(fetch, self._file.location, "read")
        self._position = end
        return data

    def readall(self) -> bytes:
        return self.read()


def open_input(file: FileInfo) -> pa.NativeFile:
    """A random-access Arrow file over `file`."""
    if file.location.scheme == "file":
        return pa.OSFile(file.location.path)
    return pa.PythonFile(_RangeFile(file), mode="r")


def put(location: Location, data: bytes) -> None:
    """Stores `data` whole, replacing what is there; readers see the old content or the new, never a part."""
    if location.scheme == "file":
        _local(location, lambda path: _write_aside(path, data, os.replace))
        return
    try:
        _retrying(lambda fs: fs.pipe_file(location.path, data, **_put_options(location)), location, "write")
    except FileNotFoundError as error:  # no such bucket
        raise _storage_error(error, location, "write") from None


def _put_options(location: Location) -> dict[str, Any]:
    return {"chunksize": _SINGLE_PUT_BYTES} if location.scheme == "s3" else {}


def put_new(location: Location, data: bytes) -> bytes:
    """Creates `location` with `data` unless it exists already, and returns what is stored there afterwards.

    Whatever the store answers (an answer can be lost), the stored content decides: equal to `data` means that
    the object is as wanted, anything else is the work of another writer.
    """
    if location.scheme == "file":
        _local(location, lambda path: _write_aside(path, data, _link_new))
        return read_bytes(location)
    deadline = time.monotonic() + RETRY_SECONDS
    pause = 0.1
    while True:
        failure = _try_create(location, data)
        try:
            return read_bytes(location)
        except FileNotFoundError:
            failure = failure or ConnectionError("the store has it, but does not give it back")
            if not _is_transient(failure) or time.monotonic() + pause > deadline:
                raise _storage_error(failure, location, "write") from None
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(pause * 2, 5.0)


def _try_create(location: Location, data: bytes) -> Exception | None:
    fs = _filesystem(location)
    try:
        fs.pipe_file(location.path, data, mode="create", **_put_options(location))
    except FileExistsError:
        return None
    except Exception as error:
        if isinstance(error, NotImplementedError) or _http_status(error) == 501:
            if info(location) is None:  # the store has no create-only PUT; the lease is then the only guard
                put(location, data)
            return None
        if not _is_of_store(error):
            raise
        return error
    return None


def put_if(location: Location, data: bytes, expected: bytes | None) -> bytes:
    """Replaces the content `expected`, None for no file, with `data`; returns what is stored there afterwards.

    As with `put_new` the stored content decides, whatever the store answers: equal to `data` means that it is as
    wanted, anything else is the work of another writer. One winner among concurrent writers on local disks, and in
    S3 stores that know If-Match; in others, two that look at the same moment can both write, and the last one stays.
    """
    if expected is None:
        return put_new(location, data)
    deadline = time.monotonic() + RETRY_SECONDS
    pause = 0.1
    for mark in itertools.cycle(('"', "")):  # HTTP has an etag in quotes; radosgw takes none
        failure = _try_replace(location, data, expected, mark)
        found = read_bytes(location)
        if found != expected or found == data:
            return found
        failure = failure or ConnectionError("the store refuses it, though nobody else has changed it")
        if not _is_transient(failure) or time.monotonic() + pause > deadline:
            raise _storage_error(failure, location, "write") from None
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(pause * 2, 5.0)
    raise AssertionError("unreachable: the deadline ends the loop")


def _try_replace(location: Location, data: bytes, expected: bytes, mark: str) -> Exception | None:
    if location.scheme == "file":
        _local(location, lambda path: _replace_locked(path, data, expected))
        return None
    state = info(location)  # before the content: where that is the expected one, it is of this version or a newer one
    if state is None or read_bytes(location) != expected:
        return None
    condition = {"IfMatch": f"{mark}{state.version}{mark}"} if location.scheme == "s3" else {}
    try:
        _filesystem(location).pipe_file(location.path, data, **_put_options(location), **condition)
    except Exception as error:
        if _http_status(error) == 501:  # the store has no such PUT
            put(location, data)
            return None
        if not _is_of_store(error):
            raise
        return None if _http_status(error) == 412 else error
    return None


def _replace_locked(path: Path, data: bytes, expected: bytes) -> None:
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=RETRY_SECONDS):
        if path.exists() and path.read_bytes() == expected:
            _write_aside(path, data, os.replace)


def _local(location: Location, write: Callable[[Path], None]) -> None:
    path = Path(location.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise _storage_error(error, location, "write") from None


def _write_aside(path: Path, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    """Writes a hidden file beside `path`, makes it durable, then publishes it under its name in one step."""
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


def _link_new(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        return


def delete(locations: Iterable[Location]) -> None:
    """Deletes files; those that are gone already are no error."""

    def one(location: Location) -> None:
        try:
            _retrying(lambda fs: fs.rm_file(location.path), location, "delete")
        except FileNotFoundError:
            return

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, locations))


CreateOnly = Literal["atomic", "racy", "ignored", "unsupported"]


def probe(folder: Location) -> CreateOnly:
    """Tells what a create-only PUT does in this store, by trying; also proves that the folder can be written.

    atomic: one winner among concurrent writers; racy: sometimes more than one; ignored: later writers overwrite;
    unsupported: the store refuses such requests. Local disks are atomic by link(2). Raises StorageError where the
    folder cannot be written.
    """
    place = folder / f"_probe-{uuid.uuid4().hex[:12]}"
    put(place, b"probe")
    try:
        return "atomic" if folder.scheme == "file" else _probe_create(place)
    finally:
        delete([place, *(Location(f"{place}-{i}", place.options) for i in range(4))])


def _probe_create(place: Location) -> CreateOnly:
    def attempt(location: Location) -> str:
        try:
            _filesystem(location).pipe_file(location.path, b"second", mode="create")
        except FileExistsError:
            return "refused"
        except Exception as error:
            return "unsupported" if _http_status(error) == 501 or isinstance(error, NotImplementedError) else "refused"
        return "written"

    first = attempt(place)
    if first == "unsupported":
        return "unsupported"
    if first == "written":
        return "ignored"
    with ThreadPoolExecutor(8) as pool:
        for i in range(4):
            contested = Location(f"{place}-{i}", place.options)
            if list(pool.map(attempt, [contested] * 8)).count("written") > 1:
                return "racy"
    return "atomic"
