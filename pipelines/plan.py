"""The plan of a run: its shards, and the fingerprint of everything that its results depend on.

The plan is written once, before any work, and is read again by every later attempt, so that all attempts agree on
what a shard is. It knows nothing of Ray and nothing of what is done already (see ledger).
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossenc.errors import RunConflictError
from pipelines.inputs import FileScan, Inputs
from pipelines.layout import Columns
from pipelines.storage import FileInfo, Location, put_new, read_bytes

#: Raised when the meaning of plan, results or fingerprint changes; part of every fingerprint.
FORMAT = 1
RUN_FOLDER = "_run"
PLAN_FILE = f"{RUN_FOLDER}/plan.json"
_BUCKET_CANDIDATES = 1_000_000
_MAX_BUCKETS = 256


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file as it was when the plan was made."""

    uri: str
    num_bytes: int
    version: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [row_start, row_end) of one input file: the unit of work and of commit."""

    shard_id: str
    file: int  # index into Plan.inputs
    row_start: int
    row_end: int
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that fixes the results of a run.

    `parts` names each thing that the results depend on, with its version: the fingerprint is their digest.
    `num_buckets` is 0 where each query lies inside one shard; otherwise shards score, and buckets of queries rank.
    """

    fingerprint: str
    parts: Mapping[str, str]
    columns: Columns
    inputs: tuple[InputFile, ...]
    skipped: tuple[tuple[str, str], ...]
    num_buckets: int
    query_id_type: str
    doc_id_type: str
    shards: tuple[Shard, ...]

    @property
    def num_candidates(self) -> int:
        """Candidates in all shards; an estimate in the nested layout."""
        return sum(shard.num_candidates for shard in self.shards)

    @property
    def is_two_phase(self) -> bool:
        return self.num_buckets > 0


def make(inputs: Inputs, parts: Mapping[str, str], *, shard_candidates: int | None, force_two_phase: bool) -> Plan:
    """Cuts the scanned inputs into shards at query boundaries, or anywhere when queries are spread over files."""
    total = sum(scan.num_candidates for scan in inputs.scans)
    target = shard_candidates or default_shard_candidates(total)
    two_phase = force_two_phase or not inputs.is_clustered
    shards: list[Shard] = []
    for index, scan in enumerate(inputs.scans):
        for start, end, num_candidates in cut(scan, target, anywhere=two_phase):
            shards.append(_shard(len(shards), index, scan, start, end, num_candidates))
    if not shards:  # an empty part still gives readers the schema
        shards = [_shard(0, 0, inputs.scans[0], 0, 0, 0)]
    schema = inputs.scans[0].schema
    return Plan(
        fingerprint=fingerprint(parts),
        parts=dict(parts),
        columns=inputs.columns,
        inputs=tuple(
            InputFile(s.file.location.uri, s.file.num_bytes, s.file.version, s.num_rows) for s in inputs.scans
        ),
        skipped=inputs.skipped,
        num_buckets=min(_MAX_BUCKETS, max(1, -(-total // _BUCKET_CANDIDATES))) if two_phase else 0,
        query_id_type=_id_type(schema, inputs.columns.query_id, None),
        doc_id_type=_id_type(schema, inputs.columns.doc_id, inputs.columns),
        shards=tuple(shards),
    )


def bucket_id(bucket: int) -> str:
    """The part id of a bucket of queries."""
    return f"b{bucket:05d}"


def default_shard_candidates(num_candidates: int) -> int:
    """Candidates per shard: about 256 shards for small inputs, at most 32,768 candidates in one for large ones."""
    return int(min(32_768, max(512, num_candidates // 256)))


def planned_parts(output: Location) -> Mapping[str, str]:
    """What the run in `output` depends on; nothing where there is none."""
    plan = load(output)
    return {} if plan is None else plan.parts


def fingerprint(parts: Mapping[str, str]) -> str:
    """SHA-256 of the named parts, in hex."""
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def _shard(index: int, file: int, scan: FileScan, start: int, end: int, num_candidates: int) -> Shard:
    identity = json.dumps([scan.file.location.uri, scan.file.num_bytes, scan.file.version, start, end])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return Shard(f"{index:06d}-{digest}", file, start, end, num_candidates)


def cut(scan: FileScan, target: int, anywhere: bool) -> list[tuple[int, int, int]]:
    """Row ranges of about `target` candidates as (start, end, candidates), on row-group bounds where one is near."""
    if scan.num_rows == 0:
        return []
    if anywhere and len(scan.run_starts) != scan.num_rows:
        rows = np.arange(scan.num_rows + 1, dtype=np.int64)
        before = rows
    else:
        rows = np.append(scan.run_starts, np.int64(scan.num_rows))
        before = scan.num_candidates_before
    at_group = np.isin(rows, scan.row_group_starts)
    cuts, at = [], 0
    while at < len(rows) - 1:
        end = _next_cut(before, at_group, at, target)
        cuts.append((int(rows[at]), int(rows[end]), int(before[end] - before[at])))
        at = end
    return cuts


def _next_cut(before: NDArray[np.int64], at_group: NDArray[np.bool_], at: int, target: int) -> int:
    sizes = np.array([target // 2, target, target + target // 2])
    low, wanted, high = (int(index) - 1 for index in before.searchsorted(before[at] + sizes, side="right"))
    near = np.flatnonzero(at_group[max(low, at + 1) : high + 1]) + max(low, at + 1)
    if len(near):
        return int(near[np.argmin(np.abs(near - wanted))])
    return max(wanted, at + 1)


def _id_type(schema: pa.Schema, name: str, columns: Columns | None) -> str:
    """The Arrow type an id has in the results: integers stay as they are, everything else is string."""
    if columns is not None and columns.struct:
        kind = schema.field(columns.struct).type.value_type.field(name).type
    else:
        kind = schema.field(name).type
        if columns is not None and columns.layout == "nested":
            kind = kind.value_type
    return str(kind) if pa.types.is_integer(kind) else "string"


def save(plan: Plan, output: Location) -> Plan:
    """Stores the plan create-only and returns the stored one: another writer's, if that came first."""
    table = pa.table({field.name: [getattr(shard, field.name) for shard in plan.shards] for field in fields(Shard)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    shards_file = f"{RUN_FOLDER}/shards-{digest[:16]}.parquet"
    put_new(output / shards_file, buffer.getvalue())
    body: dict[str, Any] = {"format": FORMAT, "shards_file": shards_file, "shards_sha256": digest}
    body |= asdict(replace(plan, shards=()))
    del body["shards"]
    put_new(output / PLAN_FILE, json.dumps(body, indent=1, sort_keys=True).encode())
    stored = load(output)
    assert stored is not None, "the plan was just stored"
    return stored


def load(output: Location) -> Plan | None:
    """The stored plan, or None. Raises RunConflictError where what is stored cannot be trusted."""
    try:
        data = read_bytes(output / PLAN_FILE)
    except FileNotFoundError:
        return None
    try:
        body = json.loads(data)
        if body.pop("format") != FORMAT:
            raise ValueError("another format")
        if body["fingerprint"] != fingerprint(body["parts"]):
            raise ValueError("another fingerprint than that of its parts")
        shards_file, digest = body.pop("shards_file"), body.pop("shards_sha256")
        if shards_file != f"{RUN_FOLDER}/shards-{digest[:16]}.parquet":
            raise ValueError("a shards file of another name")
        shards = read_bytes(output / shards_file)
        if hashlib.sha256(shards).hexdigest() != digest:
            raise ValueError("damaged shards")
        rows = pq.read_table(io.BytesIO(shards)).to_pylist()
        body["columns"]["pass_through"] = tuple(body["columns"]["pass_through"])
        body["columns"] = Columns(**body["columns"])
        body["inputs"] = tuple(InputFile(**file) for file in body["inputs"])
        body["skipped"] = tuple((file, why) for file, why in body["skipped"])
        return Plan(shards=tuple(Shard(**row) for row in rows), **body)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise RunConflictError(
            f"{output / PLAN_FILE} is not a plan of this version ({error}); start over with --new-run"
        ) from None


def check_unchanged(stored: Mapping[str, str], wanted: Mapping[str, str], output: Location) -> None:
    """Raises RunConflictError naming what differs between the stored run and the one asked for."""
    changes = [
        f"{name}: was {stored.get(name, 'absent')}, is {wanted.get(name, 'absent')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if changes:
        shown = "\n  ".join(changes[:10]) + (f"\n  … and {len(changes) - 10} more" if len(changes) > 10 else "")
        raise RunConflictError(
            f"{output} holds a run of other inputs, model or options:\n  {shown}\n"
            "Undo the change to resume it, choose another output, or start over with --new-run."
        )


def describe_parts(files: Sequence[FileInfo], model: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, str]:
    """The named parts of a fingerprint: input files, model files and the options that change results."""
    parts = {"format": str(FORMAT)}
    parts |= {f"input {file.location}": f"{file.num_bytes} bytes, version {file.version}" for file in files}
    parts |= {f"model {name}": digest for name, digest in model.items()}
    parts |= {f"option {name}": json.dumps(value, sort_keys=True) for name, value in options.items()}
    return parts
