"""Runs shards through the stages on a Ray cluster and hands their results to the driver, one by one.

Knows Ray Data and the order of the stages; knows nothing of what was done before or what happens to the results.
"""

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crossenc.errors import CrossEncError
from pipelines import metrics
from pipelines.config import RerankConfig
from pipelines.control import RunControl
from pipelines.stages import (
    Commit,
    ContextRef,
    Item,
    Result,
    RunContext,
    ScoreShards,
    Tasks,
    parse_result,
)
from pipelines.storage import redact

#: How often the driver looks up from waiting: at signals, at the lease, at the clock.
POLL_SECONDS = 0.2
#: How long Ray Data may take to let go of its work when a run ends early.
_END_SECONDS = 10.0
_COMMIT_CPUS = 0.25
#: Shards, or buckets, in one Ray dataset.
_WAVE_ITEMS = 10_000


@dataclass(frozen=True, slots=True)
class Cluster:
    """A run's objects on the cluster."""

    context: ContextRef
    control: Any

    @classmethod
    def prepare(cls, context: RunContext) -> "Cluster":
        """Puts the context into the object store and starts the control actor.

        The actor lives on the driver's node, where it dies no sooner than the run itself: a node of scorers may go.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
        start = ray.remote(**options)(RunControl).remote
        control = start(metrics.run_tag(context.commit.fingerprint))
        return cls(ContextRef(ray.put(context)), control)

    def stop(self) -> set[str]:
        """Lets no more shards begin; returns the ids of those that have begun."""
        begun: set[str] = ray.get(self.control.stop.remote())
        return begun


def cpus_and_threads(given: float | None, gpus: float, share: int) -> tuple[float, int]:
    """CPUs that a process with a model reserves, and its torch threads: as given, one beside a GPU, or its share."""
    if given is not None:
        return given, max(1, int(given))
    threads = 1 if gpus > 0 else max(1, share)
    return float(threads), threads


def actor_cpus(config: RerankConfig, cores: int) -> tuple[float, int]:
    """The CPUs each scoring actor reserves and the torch threads it uses."""
    scoring = config.scoring
    return cpus_and_threads(scoring.cpus_per_actor, scoring.gpus_per_actor, cores // scoring.actors)


def needs(config: RerankConfig, cores: int) -> dict[str, float]:
    """The CPUs and GPUs that the job's stages hold at once: every scoring actor, one reading and one writing task."""
    scoring = config.scoring
    cpus_per_actor, _ = actor_cpus(config, cores)
    return {
        "CPU": scoring.actors * cpus_per_actor + config.cpus_per_tokeniser + _COMMIT_CPUS,
        "GPU": scoring.actors * scoring.gpus_per_actor,
    }


def describe_shortage(needs: Mapping[str, float]) -> str:
    """What the cluster as it is now lacks of these CPUs and GPUs, in words; empty where it lacks nothing."""
    have = ray.cluster_resources()
    lacking = [
        f"{wanted:g} {kind}s are needed and Ray has {have.get(kind, 0):g}"
        for kind, wanted in needs.items()
        if wanted > have.get(kind, 0)
    ]
    return "; ".join(lacking)


def run(
    items: Sequence[Item], cluster: Cluster, config: RerankConfig, cpus_per_actor: float
) -> Generator[Result | None]:
    """Runs shards, or with numbers as items buckets, and yields results as they come, None now and then between.

    Items run in waves, because a dataset gets slower with their number. Close the generator to end early: what is in
    work is dropped then.
    """
    for start in range(0, len(items), _WAVE_ITEMS):
        yield from _run_wave(items[start : start + _WAVE_ITEMS], cluster, config, cpus_per_actor)


def _run_wave(
    items: Sequence[Item], cluster: Cluster, config: RerankConfig, cpus_per_actor: float
) -> Generator[Result | None]:
    are_buckets = bool(items) and isinstance(items[0], int)
    dataset = _dataset(items, cluster, config, cpus_per_actor, are_buckets)
    with contextlib.closing(rows_of(dataset)) as rows:
        for row in rows:
            yield None if row is None else parse_result(row)


def rows_of(dataset: "ray.data.Dataset") -> Generator[dict[str, Any] | None]:
    """Runs `dataset` and yields its rows as they come, None now and then between.

    Close the generator to end early. Raises CrossEncError where the cluster cannot go on.
    """
    dataset.set_name(f"crossenc-{uuid.uuid4().hex}")
    results: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def consume() -> None:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    results.put(row)
        except BaseException as error:
            results.put(error)
        finally:
            results.put(None)

    thread = threading.Thread(target=consume, name="shard-results", daemon=True)
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise _cluster_error(result) from result
            yield result
    finally:
        _end(dataset, thread)


def _end(dataset: "ray.data.Dataset", consumer: threading.Thread) -> None:
    """Ends the execution of `dataset`, so that nothing of it calls Ray after Ray was shut down.

    Ray Data has no public way to do it from outside; its executor is a thread, known by the dataset's name.
    """
    deadline = time.monotonic() + _END_SECONDS
    while consumer.is_alive() and time.monotonic() < deadline:
        for thread in threading.enumerate():
            if thread.name.startswith(f"StreamingExecutor-{dataset.name}"):
                thread.shutdown(force=False)  # type: ignore[attr-defined]
        consumer.join(POLL_SECONDS)


def _dataset(
    items: Sequence[Item],
    cluster: Cluster,
    config: RerankConfig,
    cpus_per_actor: float,
    are_buckets: bool,
) -> "ray.data.Dataset":
    configure_ray_data()
    dataset = ray.data.read_datasource(
        Tasks(items, cluster.context),
        override_num_blocks=len(items),
        num_cpus=config.cpus_per_tokeniser,
    )
    if not are_buckets:
        dataset = dataset.map_batches(
            ScoreShards,
            fn_constructor_kwargs={"context": cluster.context, "control": cluster.control},
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=config.scoring.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus_per_actor,
            num_gpus=config.scoring.gpus_per_actor or None,
            # Asked for by this stage alone: Ray fuses stages of equal needs, and reading would run in the actor.
            memory=1,
        )
    return dataset.map_batches(
        Commit(cluster.context, is_bucket=are_buckets),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_COMMIT_CPUS,
    )


def configure_ray_data() -> None:
    """Settings for one block per shard, and for waiting as long as it takes for preempted nodes to come back."""
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.issue_detectors_config.detectors = []
    context.execution_no_progress_timeout_s = -1


def _cluster_error(error: BaseException) -> CrossEncError:
    lines = [line for line in redact(str(error)).splitlines() if line.strip()]
    reason = lines[-1][:300] if lines else type(error).__name__
    return CrossEncError(
        f"the Ray cluster could not go on ({type(error).__name__}: {reason}); run the same command again to resume"
    )
