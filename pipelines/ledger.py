"""What is committed: the parts in storage, and nothing else, say which shards of a run are done.

Beside it a journal keeps what parts cannot say of themselves because equal shards must give equal files: timings,
and digests. The journal is a convenience; what it lacks is measured again or left out of the report.
"""

import hashlib
import logging
import re
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from crossenc.errors import RunConflictError
from pipelines.commit import SIDE_FOLDERS, Part, parse_footer
from pipelines.plan import RUN_FOLDER
from pipelines.records import ShardRecord, StageSeconds
from pipelines.schemas import means_damage
from pipelines.storage import FileInfo, Location, list_files, open_input, put, read_bytes

logger = logging.getLogger(__name__)

JOURNAL_FOLDER = f"{RUN_FOLDER}/journal"
_FLUSH_SECONDS = 15.0
_RECORD = TypeAdapter(ShardRecord)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The committed parts of one folder by part id, and damaged objects that bear a part's name.

    A part without a side file that its footer names counts as damaged: it has to be made again.
    """

    parts: Mapping[str, tuple[FileInfo, Part]]
    damaged: tuple[Location, ...]


def read(output: Location, folder: str, part_ids: Collection[str], fingerprint: str) -> Ledger:
    """Lists `folder` and checks every part's footer.

    Raises RunConflictError when a file there is not a part of this run.
    """
    wanted = set(part_ids)
    files = [f for f in list_files(output / folder) if not f.location.name.startswith((".", "_"))]
    for file in files:
        match = re.fullmatch(r"part-([0-9a-z-]+)\.parquet", file.location.name)
        if match is None or match[1] not in wanted or (output / folder / file.location.name) != file.location:
            raise RunConflictError(
                f"{file.location} is not part of this run; choose another output, or start over with --new-run"
            )
    with ThreadPoolExecutor(32) as pool:
        footers = list(pool.map(_read_part, files))
    # Listed after the parts: a side file is stored before the part that names it.
    sides = {file.location.uri for side in SIDE_FOLDERS for file in list_files(output / side)} if files else set()
    parts: dict[str, tuple[FileInfo, Part]] = {}
    damaged = []
    for file, part in zip(files, footers, strict=True):
        part_id = file.location.name.removeprefix("part-").removesuffix(".parquet")
        if part is None or part.shard_id != part_id:
            damaged.append(file.location)
        elif part.fingerprint != fingerprint:
            raise RunConflictError(
                f"{file.location} belongs to another run; choose another output, or start over with --new-run"
            )
        elif any((output / path).uri not in sides for path in part.side_paths):
            damaged.append(file.location)
        else:
            parts[part_id] = (file, part)
    return Ledger(parts, tuple(damaged))


def _read_part(file: FileInfo) -> Part | None:
    """What the part says of itself; None where it is damaged, or gone since it was listed."""
    try:
        with open_input(file) as source:
            return parse_footer(pq.read_metadata(source))
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        if not means_damage(error):
            raise
        return None


class Journal:
    """Appends records to storage now and then; one driver writes one journal."""

    def __init__(self, output: Location, epoch: int) -> None:
        self._output, self._epoch = output, epoch
        self._pending: list[bytes] = []
        self._num_files = 0
        self._flushed_at = time.monotonic()

    def add(self, record: ShardRecord) -> None:
        self._pending.append(_RECORD.dump_json(record))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            name = f"{JOURNAL_FOLDER}/records-{self._epoch:06d}-{self._num_files:06d}.jsonl"
            put(self._output / name, b"\n".join(self._pending) + b"\n")
            self._pending.clear()
            self._num_files += 1
        self._flushed_at = time.monotonic()


def read_journal(output: Location) -> dict[str, ShardRecord]:
    """Every journaled record by part id, the newest where a part has several. Torn lines are left out."""
    files = [f for f in list_files(output / JOURNAL_FOLDER) if f.location.name.endswith(".jsonl")]
    with ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(lambda file: read_bytes(file.location), files))
    records = (record for file, content in zip(files, contents, strict=True) for record in _parse(file, content))
    return {record.shard_id: record for record in records}


def _parse(file: FileInfo, content: bytes) -> Iterable[ShardRecord]:
    for line in content.splitlines():
        try:
            yield _RECORD.validate_json(line)
        except ValidationError:  # its part is measured again
            logger.warning("%s has a line that is no record; its timings are lost", file.location)


def recorded(output: Location, folder: str, ledger: Ledger) -> dict[str, ShardRecord]:
    """A record for every committed part: from the journal where it has one, else from the part itself, untimed."""
    journal = read_journal(output) if ledger.parts else {}
    records = {}
    unknown = []
    for part_id, (file, part) in ledger.parts.items():
        record = journal.get(part_id)
        path = f"{folder}/{file.location.name}"
        if record is not None and (record.path, record.num_bytes) == (path, file.num_bytes):
            records[part_id] = replace(record, counts=part.counts, side_paths=part.side_paths)
        else:
            unknown.append((part_id, file, part))
    with ThreadPoolExecutor(8) as pool:
        for record in pool.map(lambda entry: _measure(folder, *entry), unknown):
            records[record.shard_id] = record
    return records


def _measure(folder: str, part_id: str, file: FileInfo, part: Part) -> ShardRecord:
    data = read_bytes(file.location)
    return ShardRecord(
        shard_id=part_id,
        path=f"{folder}/{file.location.name}",
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        counts=part.counts,
        seconds=StageSeconds(),
        finished_at=0.0,
        side_paths=part.side_paths,
    )
