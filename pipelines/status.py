"""What can be seen of a run from its output folder alone, by anyone who can read it."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossenc.errors import InputError
from pipelines import checkpoints, lease, ledger
from pipelines import plan as plans
from pipelines import retrain_records as records
from pipelines.checkpoints import TRAIN_STATE_FILE
from pipelines.commit import RESULTS_FOLDER, SCORED_FOLDER
from pipelines.plan import bucket_id
from pipelines.records import SUCCESS_FILE, add_counts
from pipelines.storage import exists, locate

State = Literal["running", "resumable", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as it stands. `num_candidates` counts committed ones; the planned number is an estimate if nested."""

    state: State
    detail: str
    num_shards: int
    num_shards_done: int
    num_candidates_planned: int
    num_candidates: int
    num_scored: int
    num_results: int
    refused: Mapping[str, int]
    pairs_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStatus:
    """A training run as it stands. `progress` is what its driver last said, empty where it never did.

    `last_step` is that of the newest checkpoint, 0 where there is none.
    """

    state: State
    detail: str
    last_step: int
    num_steps: int
    progress: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainStatus:
    """An output of retrainings as it stands: finished means that the last one was decided.

    `retraining` is the last one; `steps_done` and `steps_to_do` are its, empty once it has ended.
    """

    state: State
    detail: str
    retraining: str
    num_promoted: int
    num_refused: int
    num_void: int
    steps_done: tuple[str, ...]
    steps_to_do: tuple[str, ...]


def look_at_retraining(output_uri: str) -> RetrainStatus | None:
    """The status of the retrainings in `output_uri`, None where there are none."""
    output = locate(output_uri)
    known = records.read_all(output)
    if not known:
        return None
    last, ending = known[-1]
    state, detail, _ = _state(ending is not None, lease.last_holder(output))
    steps = records.steps(output, last) if ending is None else []
    ended = Counter(one.state for _, one in known if one is not None)
    return RetrainStatus(
        state=state,
        detail=ending.reason if ending else detail,
        retraining=last.key,
        num_promoted=ended["promoted"],
        num_refused=ended["refused"],
        num_void=ended["void"],
        steps_done=tuple(step.name for step in steps if step.done),
        steps_to_do=tuple(step.name for step in steps if not step.done),
    )


def look_at_training(output_uri: str) -> TrainStatus | None:
    """The status of the training run in `output_uri`, None where there is none."""
    output = locate(output_uri)
    if not exists(output / TRAIN_STATE_FILE):
        return None
    holder = lease.last_holder(output)
    stored = checkpoints.read_all(output)
    state, detail, _ = _state(exists(output / SUCCESS_FILE), holder)
    return TrainStatus(
        state=state,
        detail=detail,
        last_step=stored[-1].step if stored else 0,
        num_steps=stored[-1].num_steps if stored else 0,
        progress=dict(holder.progress) if holder and state == "running" else {},
    )


def look(output_uri: str) -> RunStatus:
    """The status of the run in `output_uri`. Raises InputError where there is none."""
    output = locate(output_uri)
    plan = plans.load(output)
    if plan is None:
        raise InputError(f"{output} holds no run; give the output folder of a rerank, training or retraining job")
    if "job" in plan.parts:
        raise InputError(
            f"{output} holds a run of `crossenc {plan.parts['job']}`, which status does not show: see its log, or"
            f" {output / SUCCESS_FILE}, which is there once it is done"
        )
    holder = lease.last_holder(output)
    shard_ids = [shard.shard_id for shard in plan.shards]
    shards = ledger.read(output, SCORED_FOLDER if plan.is_two_phase else RESULTS_FOLDER, shard_ids, plan.fingerprint)
    counts = add_counts(part.counts for _, part in shards.parts.values())
    num_results, refused = counts.num_results, Counter(counts.refused)
    if plan.is_two_phase:
        ids = [bucket_id(bucket) for bucket in range(plan.num_buckets)]
        buckets = ledger.read(output, RESULTS_FOLDER, ids, plan.fingerprint).parts.values()
        num_results = sum(part.counts.num_results for _, part in buckets)
        duplicates = sum(part.counts.refused.get("duplicate_document", 0) for _, part in buckets)
        refused.update({"duplicate_document": duplicates} if duplicates else {})
    state, detail, rate = _state(exists(output / SUCCESS_FILE), holder)
    return RunStatus(
        state=state,
        detail=detail,
        num_shards=len(plan.shards),
        num_shards_done=len(shards.parts),
        num_candidates_planned=plan.num_candidates,
        num_candidates=counts.num_candidates,
        num_scored=counts.num_candidates - sum(refused.values()),
        num_results=num_results,
        refused=dict(sorted(refused.items())),
        pairs_per_second=rate,
    )


def _state(finished: bool, holder: lease.Holder | None) -> tuple[State, str, float]:
    if finished:
        return "finished", "", 0.0
    if holder is None or holder.state == "released":
        return "resumable", "run the same command again to go on", 0.0
    age = time.time() - holder.beaten_at
    where = f"on {holder.host} (pid {holder.pid}), last heartbeat {age:,.0f} s ago"
    if lease.is_gone(holder) or age > lease.TAKEOVER_SECONDS:
        return "resumable", f"the run {where} seems dead; run the same command again to go on", 0.0
    return "running", where, float(holder.progress.get("pairs_per_second") or 0.0)
