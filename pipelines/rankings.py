"""Rankings as files: read from TREC runs, Parquet and rerank runs, and written as TREC runs.

A TREC run is ordered as trec_eval orders it: by score in single precision, the highest first, and equal scores by
document id, the last one first; its rank column means nothing. (ir_measures has measures of other origin, as RR with a
cutoff, which order equal scores the other way; here all measures see one order.) A table is ordered by rank, else by
score.
"""

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from crossenc.errors import InputError
from crossenc.evaluation.comparison import Run
from pipelines import plan as plans
from pipelines.commit import trec_lines
from pipelines.evaluate import first_stage_runs, reranked_runs
from pipelines.inputs import list_candidates, scan
from pipelines.plan import Plan
from pipelines.records import SUCCESS_FILE
from pipelines.storage import FileInfo, Location, exists, expand, info, locate, open_input


@dataclass(frozen=True, slots=True)
class Tables:
    """Parquet files of candidates or of a ranking, with what their columns need to be found. See CandidatesConfig."""

    candidate_uris: tuple[str, ...]
    layout: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    queries: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    pass_through: tuple[str, ...] = ()
    skip_bad_files: bool = False

    def plan(self) -> Plan:
        """Which files there are and what their columns mean. Raises InputError naming what is wrong."""
        return plans.make(scan(self, list_candidates(self)), {}, shard_candidates=None, force_two_phase=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Where a ranking is: the files that hold it, and the reason if it is known to lack documents."""

    files: tuple[FileInfo, ...]
    kind: str  # "trec", "parquet" or "rerank"
    location: Location
    cut: str = ""


def find(uri: str, storage_options: Mapping[str, Any]) -> Ranking:
    """The ranking at `uri`: a TREC run, Parquet (file, folder or glob), or the output of a finished rerank run.

    Raises InputError where there is none.
    """
    location = locate(uri, storage_options)
    plan = plans.load(location) if info(location) is None else None
    if plan is not None:
        if plan.parts.get("job") or not exists(location / SUCCESS_FILE):
            raise InputError(f"{location} is not the output of a finished rerank run; let it finish, or name another")
        top_k = plan.parts.get("option top_k", "null")
        cut = "" if top_k == "null" else f"the run kept the best {top_k} documents of each query"
        return Ranking(tuple(expand(location / "results", ".parquet")), "rerank", location, cut)
    files = expand(location, ".parquet")
    kinds = {is_parquet(file) for file in files}
    if len(kinds) > 1:
        raise InputError(f"{location} mixes Parquet and other files; name one kind")
    return Ranking(tuple(files), "parquet" if kinds == {True} else "trec", location)


def read(ranking: Ranking, queries: Collection[str], storage_options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Query id -> document ids, best first, of those `queries` that it ranks. Raises InputError naming the place."""
    if ranking.kind == "rerank":
        return reranked_runs(ranking.location, {query: {} for query in queries})
    if ranking.kind == "trec":
        return read_trec_run(ranking.files, queries)
    uris = tuple(file.location.uri for file in ranking.files)
    plan = Tables(uris, layout="ids", queries="none are needed", storage_options=storage_options).plan()
    return whole_runs(plan, queries, storage_options)


def whole_runs(plan: Plan, queries: Collection[str], storage_options: Mapping[str, Any]) -> dict[str, list[str]]:
    """The candidates of `queries` in first-stage order. Raises InputError at a damaged file: figures would be wrong."""
    runs, damaged = first_stage_runs(plan, {query: {} for query in queries}, storage_options)
    if damaged:
        raise InputError(f"{damaged[0]} is damaged; restore the file")
    return runs


def is_parquet(file: FileInfo) -> bool:
    """Whether the file starts as Parquet files do."""
    with open_input(file) as source:
        return bool(source.read(4) == b"PAR1")


def read_trec_run(files: Sequence[FileInfo], queries: Collection[str]) -> dict[str, list[str]]:
    """The rankings of `queries` in TREC runs. Raises InputError naming file and line of what is none."""
    wanted = set(queries)
    scores: dict[str, dict[str, float]] = {}
    for file in files:
        for number, line in _lines(file):
            fields = line.split()
            if not fields:
                continue
            score = _score(fields[4]) if len(fields) == 6 else None
            if score is None:
                raise InputError(f"{file.location}, line {number}: write `query-id Q0 doc-id rank score name`")
            if fields[0] in wanted:
                ranked = scores.setdefault(fields[0], {})
                if fields[2] in ranked:
                    raise InputError(f"{file.location}, line {number}: query {fields[0]!r} has {fields[2]!r} twice")
                ranked[fields[2]] = score
    return {
        query: sorted(sorted(ranked, reverse=True), key=ranked.__getitem__, reverse=True)
        for query, ranked in scores.items()
    }


def _score(text: str) -> float | None:
    """The number in single precision, as trec_eval keeps it; None where it is no finite number."""
    try:
        with np.errstate(over="ignore"):
            score = float(np.float32(text))
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def _lines(file: FileInfo) -> Iterator[tuple[int, str]]:
    with open_input(file) as source, io.BufferedReader(source, 2**20) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file.location}, line {number}: not text in UTF-8 ({error.reason})") from None


def trec_run(run: Run) -> bytes:
    """The rankings as a TREC run. Scores fall by one a rank: every tool then keeps the order, ties included."""
    rows = [
        {"query_id": query, "doc_id": doc_id, "rank": rank, "score": len(docs) - rank + 1}
        for query, docs in run.items()
        for rank, doc_id in enumerate(docs, start=1)
    ]
    schema = pa.schema(
        [("query_id", pa.string()), ("doc_id", pa.string()), ("rank", pa.int64()), ("score", pa.int64())]
    )
    return trec_lines(pa.Table.from_pylist(rows, schema=schema))
