"""What a run tells Prometheus, by Ray's own metrics. Every name is here, and Ray puts `ray_` before it.

The driver counts what is committed: one process that sees every shard once. What only a worker knows (a shard begun
again, memory that ran out) is counted there. It knows nothing of storage or of people; without Ray nothing is counted.
"""

from functools import lru_cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from pipelines.records import ShardRecord

#: Name -> meaning and tags. `run` is the start of the plan's fingerprint.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "crossenc_pairs_scored_total": ("Pairs that were scored and committed.", ("run",)),
    "crossenc_tokens_total": ("Tokens of those pairs.", ("run",)),
    "crossenc_pairs_refused_total": ("Pairs that went to quarantine when their shard was scored.", ("run", "reason")),
    "crossenc_shards_committed_total": ("Shards, and buckets of the second phase, that were committed.", ("run",)),
    "crossenc_stage_seconds_total": (
        "Seconds that committed shards spent in read, tokenise, score and write.",
        ("run", "stage"),
    ),
    "crossenc_shard_retries_total": ("Shards begun again, because a process died while scoring them.", ("run",)),
    "crossenc_out_of_memory_total": ("Batches that did not fit the device and were halved.", ()),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "crossenc_shards_remaining": ("Shards of the phase that have not come back yet, while its driver lives.", ("run",)),
    "crossenc_training_step": ("Steps that a training run has taken, while its driver lives.", ("run",)),
    "crossenc_training_loss": ("Loss of the last of these steps.", ("run",)),
}


@lru_cache
def _metric(name: str) -> Any:
    kind, (meaning, tags) = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
    return kind(name, description=meaning, tag_keys=tags)


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Adds to a counter of COUNTERS."""
    if amount > 0 and ray.is_initialized():
        _metric(name).inc(amount, tags)


def run_tag(fingerprint: str) -> str:
    """How metrics name the run of that fingerprint."""
    return fingerprint[:12]


def remaining(run: str, num_shards: int) -> None:
    """Says how many shards are still to come. Said again and again: what is silent for seconds, Ray exports no more."""
    if ray.is_initialized():
        _metric("crossenc_shards_remaining").set(num_shards, {"run": run})


def trained(run: str, step: int, loss: float | None) -> None:
    """Says how far a training run is. Said again and again, as with `remaining`."""
    if ray.is_initialized():
        _metric("crossenc_training_step").set(step, {"run": run})
        if loss is not None:
            _metric("crossenc_training_loss").set(loss, {"run": run})


def committed(run: str, record: ShardRecord, *, is_bucket: bool) -> None:
    """Counts a committed shard. A bucket's pairs were counted with the shards that scored them."""
    count("crossenc_shards_committed_total", run=run)
    for stage in ("read", "tokenise", "score", "write"):
        count("crossenc_stage_seconds_total", getattr(record.seconds, stage), run=run, stage=stage)
    if is_bucket:
        return
    count("crossenc_pairs_scored_total", record.counts.num_scored, run=run)
    count("crossenc_tokens_total", record.counts.num_tokens, run=run)
    for reason, number in record.counts.refused.items():
        count("crossenc_pairs_refused_total", number, run=run, reason=reason)


def out_of_memory() -> None:
    """Counts a batch that did not fit."""
    count("crossenc_out_of_memory_total")
