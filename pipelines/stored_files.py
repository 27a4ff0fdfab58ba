"""Files that a unit of work leaves: made once, by one create-only PUT, with their digests. Knows no Ray."""

import hashlib
from dataclasses import dataclass

from crossenc.errors import RunConflictError
from pipelines.storage import Location, put_new


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
