"""What a job would do and cost, without doing or writing any of it: the plan, and an estimate from a sample."""

import os
import time
from dataclasses import dataclass

import numpy as np

from pipelines import plan as plans
from pipelines.config import RerankConfig
from pipelines.execute import actor_cpus
from pipelines.inputs import scan
from pipelines.isolation import select
from pipelines.model import Model
from pipelines.plan import Plan
from pipelines.prepare import prepare
from pipelines.rerank import Job, read_settings, resolve
from pipelines.stages import good_pairs

_SAMPLE_PAIRS = 256
_SAMPLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plan in figures. What could not be estimated here is None."""

    plan: Plan
    tokens_per_pair: float
    pairs_per_second: float | None
    hours: float | None
    cost: float | None
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        plan = self.plan
        lines = [
            f"layout       {plan.columns.layout}" + (", queries spread: ranked in a second phase" * plan.is_two_phase),
            f"input        {len(plan.inputs):,} files, {sum(file.num_rows for file in plan.inputs):,} rows",
            f"work         {plan.num_candidates:,} pairs in {len(plan.shards):,} shards",
            f"tokens       {plan.num_candidates * self.tokens_per_pair:,.0f} ({self.tokens_per_pair:.0f} a pair)",
        ]
        if self.pairs_per_second is not None and self.hours is not None:
            lines += [
                f"rate         {self.pairs_per_second:,.0f} pairs/s, measured here on a sample",
                f"time         {self.hours:.2f} hours",
            ]
        if self.cost is not None:
            lines.append(f"cost         {self.cost:,.2f}")
        return lines + [f"note         {remark}" for remark in self.remarks]


def estimate(config: RerankConfig, model: Model | None = None) -> Estimate:
    """Plans the job, tokenises a sample of it and, where this machine has the right kind of device, scores it."""
    job = resolve(config, model)
    remarks = [job.note] if job.note else []
    plan = plans.load(job.output)
    if plan is not None:
        plans.check_unchanged(plan.parts, job.parts, job.output)
        remarks.append("the output holds this run already: it would be resumed")
    else:
        force = bool(config.interpolate and config.interpolate.fit)
        plan = plans.make(
            scan(config, job.files), job.parts, shard_candidates=config.shard_candidates, force_two_phase=force
        )
    tokens_per_pair, rate = _measure(job, plan)
    if rate is None:
        remarks.append("this machine has no GPU to measure the rate on; try a small job on the cluster")
    projected = None if rate is None else projection(plan.num_candidates, rate, config.scoring.actors)
    return Estimate(
        plan=plan,
        tokens_per_pair=tokens_per_pair,
        pairs_per_second=None if projected is None else projected.pairs_per_second,
        hours=None if projected is None else projected.hours,
        cost=None if projected is None else projected.cost(config.price_per_hour),
        remarks=tuple(remarks),
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """What a measured rate makes of a number of pairs: every scorer is as fast as the measured one, all the time."""

    pairs_per_second: float
    hours: float

    def cost(self, price_per_hour: float | None) -> float | None:
        """At a price of the whole cluster; None without one."""
        return None if price_per_hour is None else self.hours * price_per_hour


def projection(num_pairs: int, pairs_per_second_each: float, num_scorers: int) -> Projection:
    """How long `num_scorers` take together."""
    rate = pairs_per_second_each * num_scorers
    return Projection(rate, num_pairs / rate / 3600)


def _measure(job: Job, plan: Plan) -> tuple[float, float | None]:
    """Mean tokens per pair, and the pairs per second of one scorer, from the start of the middle shard."""
    shard = plan.shards[len(plan.shards) // 2]
    prepared = prepare(shard, plan.inputs[shard.file], read_settings(job, plan), job.model.load_tokenizer())
    pairs = good_pairs(prepared.rows)
    if len(pairs) == 0:
        return 0.0, None
    tokens = pairs.num_tokens / len(pairs)
    if job.config.scoring.gpus_per_actor > 0:
        import torch

        if not torch.cuda.is_available():
            return tokens, None
    sample = np.linspace(0, len(pairs) - 1, min(_SAMPLE_PAIRS, len(pairs))).astype(np.int64)
    _, threads = actor_cpus(job.config, len(os.sched_getaffinity(0)))
    scorer = job.model.load_scorer(threads)
    done, started = 0, time.perf_counter()
    while done < len(sample) and time.perf_counter() - started < _SAMPLE_SECONDS:
        scorer.score(select(pairs, sample[done : done + 32]))
        done += 32
    return tokens, min(done, len(sample)) / max(time.perf_counter() - started, 1e-9)
