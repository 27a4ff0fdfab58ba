"""The stages of a run as Ray Data runs them: one row per shard in, one row per shard out, always.

A stage never raises for what a shard contains: problems travel on as rows, so that Ray has nothing to retry but
lost processes. The work itself is in prepare, isolation and commit, which know nothing of Ray.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import TypeAdapter
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from crossenc.errors import CheckpointError, CrossEncError, InputError, RunConflictError, ScoreError, StorageError
from crossenc.records import Scorer, TokenizedPairs
from pipelines.commit import CommitSettings, commit_bucket, commit_shard
from pipelines.control import GIVE_UP_LOADING_AFTER_DEATHS
from pipelines.inputs import first_line
from pipelines.isolation import Outcome, is_broken, score_halving, score_isolated
from pipelines.logs import NAMED_REFUSALS, Logs, note
from pipelines.logs import begin as begin_logs
from pipelines.merge import read_bucket
from pipelines.model import Model
from pipelines.plan import InputFile, Shard, bucket_id
from pipelines.prepare import ReadSettings, Tokenizer, prepare
from pipelines.records import ShardRecord, StageSeconds
from pipelines.schemas import from_ipc, to_ipc
from pipelines.storage import redact

logger = logging.getLogger(__name__)
RECORD = TypeAdapter(ShardRecord)

#: What one read task makes: a shard of the input, or (a number) a bucket of queries.
Item = Shard | int
Kind = Literal["rows", "failure", "skipped"]
_ROW_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("payload", pa.large_binary()),
        ("num_padded_tokens", pa.int64()),
        ("forward_kind", pa.string()),
        ("read_seconds", pa.float64()),
        ("tokenise_seconds", pa.float64()),
        ("score_seconds", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every stage of a run shares; put into the object store once."""

    model: Model
    read: ReadSettings
    commit: CommitSettings
    inputs: tuple[InputFile, ...]
    threads: int
    logs: Logs


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a shard: a record, or why there is none."""

    shard_id: str
    kind: Kind
    record: ShardRecord | None
    message: str


@lru_cache(maxsize=2)
def _context(ref_hex: str, holder: "ContextRef") -> RunContext:
    context: RunContext = ray.get(holder.ref)
    begin_logs(context.logs)
    return context


@dataclass(frozen=True)
class ContextRef:
    """A reference to a RunContext that can be hashed, so that each process fetches the context once."""

    ref: Any

    def get(self) -> RunContext:
        return _context(self.ref.hex(), self)


@lru_cache(maxsize=2)
def _tokenizer(model_key: str, holder: ContextRef) -> Tokenizer:
    return holder.get().model.load_tokenizer()


class Tasks(Datasource):  # type: ignore[misc]
    """A Ray datasource with exactly one read task, one block and one row for each item."""

    def __init__(self, items: Sequence[Item], context: ContextRef) -> None:
        self._items = items
        self._context = context

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(_Read(item, self._context), metadata, schema=_ROW_SCHEMA) for item in self._items]


@dataclass(frozen=True, slots=True)
class _Read:
    """The body of one read task: prepares a shard, or collects a bucket (an item that is a number)."""

    item: Item
    context: ContextRef

    def __call__(self) -> Iterable[pa.Table]:
        context = self.context.get()
        shard_id = bucket_id(self.item) if isinstance(self.item, int) else self.item.shard_id
        started = time.perf_counter()
        try:
            if isinstance(self.item, int):
                rows = read_bucket(context.commit.output, context.commit.fingerprint, self.item)
                read, tokenise = time.perf_counter() - started, 0.0
            else:
                tokenizer = _tokenizer(self.context.ref.hex(), self.context)
                prepared = prepare(self.item, context.inputs[self.item.file], context.read, tokenizer)
                rows, read, tokenise = prepared.rows, prepared.read_seconds, prepared.tokenise_seconds
        except (CrossEncError, OSError, pa.ArrowException) as error:
            return [_failure(shard_id, "read", error)]
        seconds = round(read + tokenise, 3)
        note(logger, "read", stage="read", shard=shard_id, num_candidates=rows.num_rows, seconds=seconds)
        return [_row(shard_id, "rows", payload=to_ipc(rows), read_seconds=read, tokenise_seconds=tokenise)]


def _row(shard_id: str, kind: Kind, **values: Any) -> pa.Table:
    defaults: dict[str, Any] = {"message": "", "payload": b"", "num_padded_tokens": 0, "forward_kind": ""}
    defaults |= {"read_seconds": 0.0, "tokenise_seconds": 0.0, "score_seconds": 0.0}
    row = defaults | {"shard_id": shard_id, "kind": kind} | values
    return pa.table([pa.array([row[field.name]], field.type) for field in _ROW_SCHEMA], schema=_ROW_SCHEMA)


def _failure(shard_id: str, stage: str, error: BaseException) -> pa.Table:
    if isinstance(error, pa.ArrowException) and not isinstance(error, MemoryError):
        error = CrossEncError(
            f"Arrow could not {stage} the rows of {shard_id} ({type(error).__name__}: {first_line(error)}); write the"
            " column that it is about with a plain type, or leave it out of pass_through"
        )
    message = failure_message(error)
    note(logger, message.partition("\n")[2], logging.ERROR, stage=stage, shard=shard_id)
    return _row(shard_id, "failure", message=message)


def failure_message(error: BaseException) -> str:
    """An error as a text that `raise_failure` raises again, without credentials."""
    kinds = {"input": InputError, "conflict": RunConflictError, "storage": OSError}
    kind = next((name for name, kind in kinds.items() if isinstance(error, kind)), "other")
    text = str(error) if isinstance(error, CrossEncError) else f"{type(error).__name__}: {error}"
    return f"{kind}\n{redact(text)}"


class ScoreShards:
    """The scoring actor: holds one model, scores one shard per call."""

    def __init__(self, context: ContextRef, control: Any) -> None:
        self._context = context.get()
        self._control = control
        self._failure: CrossEncError | None = None
        self._scorer: Scorer | None = None
        here = ray.get_runtime_context()
        actor_id, self._node_id = here.get_actor_id(), here.get_node_id()
        deaths = ray.get(control.begin_loading.remote(actor_id, self._node_id))
        try:
            if deaths >= GIVE_UP_LOADING_AFTER_DEATHS:
                raise ScoreError(
                    f"loading the model ended the scoring process {deaths} times: lower scoring.actors if memory is"
                    " short, and try the model alone on one pair"
                )
            self._scorer = self._context.model.load_scorer(self._context.threads)
        except CrossEncError as error:  # reported with the first shard, as a message instead of a dead actor
            self._failure = error
        except Exception as error:
            self._failure = CheckpointError(
                f"{self._context.model.name} cannot be loaded on this node: {type(error).__name__}: {error}"
            )
        control.end_loading.remote(actor_id)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard_id, kind = batch["shard_id"][0].as_py(), batch["kind"][0].as_py()
        if kind != "rows":
            return batch
        if self._scorer is None:
            assert self._failure is not None
            return _failure(shard_id, "score", self._failure)
        verdict = ray.get(self._control.begin.remote(shard_id, self._node_id))
        if verdict == "stop":
            return _row(shard_id, "skipped")
        started = time.perf_counter()
        rows = from_ipc(batch["payload"][0].as_buffer())
        try:
            outcome, num_padded_tokens = self._score(rows, verdict)
        except CrossEncError as error:
            return _failure(shard_id, "score", error)
        finally:
            self._control.end.remote(shard_id)
        seconds = round(time.perf_counter() - started, 3)
        how = {} if verdict == "score" else {"reason": verdict}
        note(logger, "scored", stage="score", shard=shard_id, num_pairs=len(outcome.scores), seconds=seconds, **how)
        times = {name: batch[name][0].as_py() for name in ("read_seconds", "tokenise_seconds")}
        payload = to_ipc(_with_scores(rows, outcome))
        return _row(
            shard_id,
            "rows",
            payload=payload,
            num_padded_tokens=num_padded_tokens,
            forward_kind=self._scorer.forward_kind,
            score_seconds=time.perf_counter() - started,
            **times,
        )

    def _score(self, rows: pa.Table, verdict: str) -> tuple[Outcome, int]:
        assert self._scorer is not None
        pairs = good_pairs(rows)
        num_padded_tokens = self._scorer.num_fed_tokens(pairs.lengths) if len(pairs) else 0
        if verdict == "refuse":
            crash = ("scoring_crash", "the shard ended its scoring process again and again")
            scores = np.full(len(pairs), np.nan, dtype=np.float32)
            return Outcome(scores, dict.fromkeys(range(len(pairs)), crash)), num_padded_tokens
        if verdict == "careful":
            return score_isolated(self._context.model, self._context.threads, self._scorer, pairs), num_padded_tokens
        outcome = score_halving(self._scorer, pairs)
        if outcome.failures and is_broken(self._context.model, self._scorer):
            os._exit(1)  # an error that stays, as CUDA's do: a new process starts the shard again
        return outcome, num_padded_tokens


def good_pairs(rows: pa.Table) -> TokenizedPairs:
    """The tokenised pairs of the rows that have no reason against them, in row order."""
    good = rows.filter(pc.is_null(rows.column("reason"))).combine_chunks()
    ids = good.column("input_ids").combine_chunks()
    types = good.column("token_type_ids").combine_chunks()
    lengths = pc.list_value_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    has_types = len(types) > 0 and types.null_count == 0
    return TokenizedPairs(
        input_ids=pc.list_flatten(ids).to_numpy().astype(np.int32, copy=False),
        offsets=offsets,
        token_type_ids=pc.list_flatten(types).to_numpy().astype(np.uint8, copy=False) if has_types else None,
        truncated=good.column("truncated").to_numpy(),
    )


def _with_scores(rows: pa.Table, outcome: Outcome) -> pa.Table:
    """`rows` with model scores, and with reasons for the pairs that have none."""
    good = np.flatnonzero(pc.is_null(rows.column("reason")).to_numpy())
    finite = np.isfinite(outcome.scores)
    scores = np.full(rows.num_rows, np.nan, dtype=np.float32)
    scores[good[finite]] = outcome.scores[finite]
    reasons, details = rows.column("reason"), rows.column("detail")
    if not finite.all():
        reason_list, detail_list = reasons.to_pylist(), details.to_pylist()
        for i in np.flatnonzero(~finite).tolist():
            reason, detail = outcome.failures.get(i, ("score_not_finite", str(outcome.scores[i])))
            reason_list[good[i]], detail_list[good[i]] = reason, detail or None
        reasons, details = pa.array(reason_list, pa.string()), pa.array(detail_list, pa.string())
    values = {"reason": reasons, "detail": details, "model_score": pa.array(scores, mask=np.isnan(scores))}
    for name, column in values.items():
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return rows


@dataclass(frozen=True)
class Commit:
    """The committing stage, as a function of a batch."""

    context: ContextRef
    is_bucket: bool = False

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.drop_columns(["payload"]).to_pylist()[0]
        if row["kind"] == "rows":
            try:
                row |= {"message": RECORD.dump_json(self._commit(row, batch)).decode()}
            except (CrossEncError, OSError, pa.ArrowException) as error:
                row = _failure(row["shard_id"], "write", error).drop_columns(["payload"]).to_pylist()[0]
        return pa.table({name: [row[name]] for name in ("shard_id", "kind", "message")})

    def _commit(self, row: dict[str, Any], batch: pa.Table) -> ShardRecord:
        settings = self.context.get().commit
        rows = from_ipc(batch["payload"][0].as_buffer())
        seconds = StageSeconds(read=row["read_seconds"], tokenise=row["tokenise_seconds"], score=row["score_seconds"])
        if self.is_bucket:
            record = commit_bucket(row["shard_id"], rows, seconds, settings)
        else:
            padded, kind = row["num_padded_tokens"], row["forward_kind"]
            record = commit_shard(row["shard_id"], rows, padded, seconds, settings, kind)
            _note_refusals(row["shard_id"], rows)
        counts = {"num_candidates": record.counts.num_candidates, "num_scored": record.counts.num_scored}
        note(logger, "committed", stage="write", shard=row["shard_id"], refused=dict(record.counts.refused), **counts)
        return record


def _note_refusals(shard_id: str, rows: pa.Table) -> None:
    """Names the first of a shard's refused candidates."""
    if not logger.isEnabledFor(logging.INFO):
        return
    refused = rows.filter(pc.is_valid(rows.column("reason"))).slice(0, NAMED_REFUSALS)
    for row in refused.select(["query_id", "doc_id", "reason", "detail"]).to_pylist():
        ids = {"query": row["query_id"], "document": row["doc_id"], "reason": row["reason"]}
        note(logger, row["detail"] or "refused", stage="score", shard=shard_id, **ids)


def parse_result(row: dict[str, str]) -> Result:
    """What the last stage says of one shard."""
    kind: Any = row["kind"]
    record = RECORD.validate_json(row["message"]) if kind == "rows" else None
    return Result(row["shard_id"], kind, record, row["message"] if kind == "failure" else "")


def raise_failure(message: str) -> None:
    """Raises the error that a failed stage reported."""
    kind, _, text = message.partition("\n")
    kinds = {"input": InputError, "conflict": RunConflictError, "storage": StorageError}
    raise kinds.get(kind, CrossEncError)(text)
