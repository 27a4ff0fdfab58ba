"""Counts the starts of a run's shards and models outside the processes that may die of them, and passes on stops.

An actor of its own, which lives with the driver; it imports nothing that is slow to start.
"""

from collections.abc import Sequence
from typing import Literal

import ray

from pipelines import metrics

#: Starts of a shard that did not end before its scoring is moved to a child process, and before it is given up.
CAREFUL_AFTER_STARTS = 2
REFUSE_AFTER_STARTS = 5
#: Deaths of an actor's process while it loads the model before the run ends with an error.
GIVE_UP_LOADING_AFTER_DEATHS = 4


class RunControl:
    """An actor that counts starts without an end, outside the processes that may die of them, and passes on stops.

    A start whose node is gone says nothing about the shard or the model: spot nodes are taken back. It does not count.
    Where this actor's own process is lost, as on a node that is short of memory, another one counts from nothing.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._open_loads: dict[str, list[str]] = {}
        self._open_starts: dict[str, list[str]] = {}
        self._begun: set[str] = set()
        self._stopping = False

    def begin_loading(self, actor_id: str, node_id: str) -> int:
        """Called before an actor loads its model; tells how often its process has died of that."""
        deaths = _on_living_nodes(self._open_loads.get(actor_id, []))
        self._open_loads[actor_id] = [*deaths, node_id]
        return len(deaths)

    def end_loading(self, actor_id: str) -> None:
        """Called when an actor's model was loaded, or could not be."""
        self._open_loads.pop(actor_id, None)

    def begin(self, shard_id: str, node_id: str) -> Literal["score", "careful", "refuse", "stop"]:
        """Called before a shard is scored; tells how to do it."""
        if self._stopping:
            return "stop"
        before = self._open_starts.get(shard_id, [])
        if before:
            metrics.count("crossenc_shard_retries_total", run=self._run)
        deaths = _on_living_nodes(before)
        self._open_starts[shard_id] = [*deaths, node_id]
        self._begun.add(shard_id)
        if len(deaths) >= REFUSE_AFTER_STARTS:
            return "refuse"
        return "careful" if len(deaths) >= CAREFUL_AFTER_STARTS else "score"

    def end(self, shard_id: str) -> None:
        """Called when a shard was scored."""
        self._open_starts.pop(shard_id, None)

    def stop(self) -> set[str]:
        """No shard is begun from now on; returns those that were."""
        self._stopping = True
        return self._begun


def _on_living_nodes(starts: Sequence[str]) -> list[str]:
    """Those of the starts, each told by its node, whose node is still there."""
    if not starts:
        return []
    living = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [node_id for node_id in starts if node_id in living]
