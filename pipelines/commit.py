"""The last stage of a shard: ranks it, and makes it part of the output by one create-only PUT.

A part's name is a function of its shard alone. Its side files (completeness, quarantine) are stored before it under
names that carry their digest, and its footer names them: so whichever attempt wins the PUT, the part and its side
files belong together. It knows nothing of Ray.
"""

import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from crossenc.errors import RunConflictError, StorageError
from pipelines.inputs import hash_ids
from pipelines.plan import FORMAT, RUN_FOLDER
from pipelines.rank import RankSettings, rank_rows
from pipelines.records import LENGTH_EDGES, SCORE_BINS, ShardCounts, ShardRecord, StageSeconds
from pipelines.schemas import TOKEN_FIELDS, to_parquet
from pipelines.storage import Location, put, put_new

_METADATA_KEY = b"crossenc"
COUNTS = TypeAdapter(ShardCounts)
#: Where parts of shards lie when a second phase ranks them; hidden from readers of the output.
SCORED_FOLDER = f"{RUN_FOLDER}/scored"
RESULTS_FOLDER = "results"
SIDE_FOLDERS = ("completeness", "quarantine", "trec")


@dataclass(frozen=True, slots=True)
class CommitSettings:
    """What committing needs to know, the same for all shards of a run."""

    output: Location
    fingerprint: str
    rank: RankSettings
    num_buckets: int
    score_range: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Part:
    """What a part says of itself in its footer."""

    shard_id: str
    fingerprint: str
    counts: ShardCounts
    side_paths: tuple[str, ...]


def commit_shard(
    shard_id: str,
    rows: pa.Table,
    num_padded_tokens: int,
    seconds: StageSeconds,
    settings: CommitSettings,
    forward_kind: str = "",
) -> ShardRecord:
    """Commits a scored shard: ranked into results, or as thin rows by bucket when a second phase ranks.

    `num_padded_tokens` were given to the model, which was called as `forward_kind` says.
    """
    started = time.perf_counter()
    token_counts = _token_counts(rows, num_padded_tokens, settings.score_range, forward_kind)
    rows = rows.drop_columns([field.name for field in TOKEN_FIELDS])
    if settings.num_buckets:
        counts = ShardCounts(
            num_queries=0,
            num_candidates=rows.num_rows,
            num_scored=rows.num_rows - rows.column("model_score").null_count,
            num_results=0,
            refused=_count_reasons(rows),
            **token_counts,
        )
        table, lengths = _by_bucket(rows, settings.num_buckets)
        record = _store(shard_id, SCORED_FOLDER, table, counts, {}, settings, row_group_rows=lengths)
    else:
        record = _commit_ranked(shard_id, rows, token_counts, settings)
    return _with_times(record, seconds, started)


def commit_bucket(bucket_id: str, rows: pa.Table, seconds: StageSeconds, settings: CommitSettings) -> ShardRecord:
    """Commits a bucket of queries whose candidates were scored in the first phase."""
    started = time.perf_counter()
    nothing = _token_counts(None, 0, settings.score_range, "")
    return _with_times(_commit_ranked(bucket_id, rows, nothing, settings), seconds, started)


def _commit_ranked(
    part_id: str, rows: pa.Table, token_counts: Mapping[str, Any], settings: CommitSettings
) -> ShardRecord:
    ranked = rank_rows(rows, settings.rank)
    counts = ShardCounts(
        num_queries=ranked.num_queries,
        num_candidates=ranked.num_candidates,
        num_scored=ranked.num_scored,
        num_results=ranked.results.num_rows,
        refused=ranked.refused,
        **token_counts,
    )
    sides = {
        f"{folder}/part-{part_id}-{{}}.parquet": to_parquet(table)
        for folder, table in (("completeness", ranked.completeness), ("quarantine", ranked.quarantine))
        if table.num_rows
    }
    if settings.rank.trec_run and ranked.results.num_rows:
        sides[f"trec/part-{part_id}-{{}}.run"] = trec_lines(ranked.results)
    return _store(part_id, RESULTS_FOLDER, ranked.results, counts, sides, settings)


def _store(
    part_id: str,
    folder: str,
    table: pa.Table,
    counts: ShardCounts,
    sides: Mapping[str, bytes],
    settings: CommitSettings,
    row_group_rows: list[int] | None = None,
) -> ShardRecord:
    assert counts.num_candidates == counts.num_scored + sum(counts.refused.values()), "candidates got lost"
    side_paths = []
    for template, data in sides.items():
        path = template.format(hashlib.sha256(data).hexdigest()[:12])
        put(settings.output / path, data)
        side_paths.append(path)
    footer = {"format": FORMAT, "shard_id": part_id, "fingerprint": settings.fingerprint, "sides": side_paths}
    footer["counts"] = asdict(counts)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(footer, sort_keys=True).encode()})
    path = f"{folder}/part-{part_id}.parquet"
    stored = put_new(settings.output / path, to_parquet(table, row_group_rows=row_group_rows))
    try:
        part = parse_footer(pq.read_metadata(io.BytesIO(stored)))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{settings.output / path} came back damaged ({error}); run the command again") from None
    if part is None or (part.shard_id, part.fingerprint) != (part_id, settings.fingerprint):
        raise RunConflictError(
            f"{settings.output / path} was written by another run; choose another output, or start over with --new-run"
        )
    return ShardRecord(
        shard_id=part_id,
        path=path,
        num_bytes=len(stored),
        sha256=hashlib.sha256(stored).hexdigest(),
        counts=part.counts,
        seconds=StageSeconds(),
        finished_at=0.0,
        side_paths=part.side_paths,
    )


def _with_times(record: ShardRecord, seconds: StageSeconds, started: float) -> ShardRecord:
    times = replace(seconds, write=time.perf_counter() - started)
    return replace(record, seconds=times, finished_at=time.time())


def trec_lines(results: pa.Table) -> bytes:
    """Results as lines of a TREC run; white space inside an id, which would break the format, is percent-encoded."""
    lines = [
        f"{_trec_id(query_id)} Q0 {_trec_id(doc_id)} {rank} {score!r} crossenc\n"
        for query_id, doc_id, rank, score in zip(
            *(results.column(name).to_pylist() for name in ("query_id", "doc_id", "rank", "score")),
            strict=True,
        )
    ]
    return "".join(lines).encode()


def _trec_id(value: str | int) -> str:
    return "".join(quote(character) if character.isspace() else character for character in str(value))


def parse_footer(metadata: pq.FileMetaData) -> Part | None:
    """What a part's footer says, or None where it is no part of a run of this format."""
    try:
        body = json.loads((metadata.metadata or {})[_METADATA_KEY])
        if body["format"] != FORMAT:
            return None
        counts = COUNTS.validate_python(body["counts"])
        return Part(body["shard_id"], body["fingerprint"], counts, tuple(body["sides"]))
    except (KeyError, TypeError, ValueError):
        return None


def _token_counts(
    rows: pa.Table | None, num_padded_tokens: int, score_range: tuple[float, float], forward_kind: str
) -> dict[str, Any]:
    lengths = np.empty(0, dtype=np.int64)
    scores: NDArray[np.float32] = np.empty(0, dtype=np.float32)
    num_truncated = 0
    if rows is not None:
        good = pc.is_null(rows.column("reason"))
        lengths = pc.list_value_length(rows.column("input_ids").filter(good)).to_numpy().astype(np.int64)
        scores = rows.column("model_score").filter(good).to_numpy()
        num_truncated = int(pc.sum(rows.column("truncated").filter(good)).as_py() or 0)
    low, high = score_range
    histogram, _ = np.histogram(np.clip(scores, low, high), bins=SCORE_BINS, range=score_range)
    bins = np.searchsorted(np.array(LENGTH_EDGES), lengths, side="left")
    return {
        "num_tokens": int(lengths.sum()),
        "num_padded_tokens": num_padded_tokens,
        "num_truncated": num_truncated,
        "score_histogram": tuple(histogram.tolist()),
        "length_histogram": tuple(np.bincount(bins, minlength=len(LENGTH_EDGES) + 1).tolist()),
        "forward_kinds": {forward_kind: len(scores)} if forward_kind and len(scores) else {},
    }


def _count_reasons(rows: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(rows.column("reason").drop_null()).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counted, key=lambda entry: entry["values"])}


def _by_bucket(rows: pa.Table, num_buckets: int) -> tuple[pa.Table, list[int]]:
    """The rows sorted by bucket of their query id, one row group for each bucket."""
    buckets = (hash_ids(rows.column("query_id").combine_chunks()) % np.uint64(num_buckets)).astype(np.int64)
    by = np.argsort(buckets, kind="stable")
    return rows.take(pa.array(by)), np.bincount(buckets, minlength=num_buckets).tolist()
