"""A Ray cluster of several nodes on this machine, whose nodes can be killed, drained and replaced.

The nodes belong to a process of their own (`python -m tests.support.ray_nodes`, told by lines of JSON what to do), so
everything ends with it. The head takes no work; drivers run on it, as processes of their own. Who has not its
token is refused.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from tests.support.processes import _kill, _title, children, is_running, wait_for

ROOT = Path(__file__).resolve().parents[2]
#: A node is found dead within a few seconds instead of half a minute.
_HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}


@dataclass(frozen=True)
class WorkerNode:
    """A node, by Ray's id and its raylet's process."""

    node_id: str
    raylet_pid: int

    def actors(self, name_contains: str) -> list[psutil.Process]:
        """Processes of this node whose title holds `name_contains`."""
        return [process for process in children(self.raylet_pid) if name_contains in _title(process)]

    def kill_raylet(self) -> None:
        """SIGKILL the raylet; its workers end by themselves."""
        psutil.Process(self.raylet_pid).kill()
        wait_for(lambda: not is_running(self.raylet_pid), 10, "the end of a raylet")


@dataclass
class Nodes:
    """The cluster."""

    host: subprocess.Popen[str]
    env: dict[str, str]
    gcs_pid: int
    object_store_mb: int
    workers: list[WorkerNode] = field(default_factory=list)

    @property
    def driver_env(self) -> dict[str, str]:
        """What drivers of this cluster need in their environment."""
        return {
            name: self.env[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", *_HEALTH)
        }

    def add(self, num_cpus: int = 2) -> WorkerNode:
        """A new node with so many CPUs."""
        reply = self._ask({"do": "add", "num_cpus": num_cpus, "object_store_mb": self.object_store_mb})
        node = WorkerNode(reply["node_id"], reply["raylet_pid"])
        self.workers.append(node)
        return node

    def remove(self, node: WorkerNode) -> None:
        """SIGKILL all processes of the node, as when its machine is gone."""
        self.workers.remove(node)
        below = children(node.raylet_pid)
        self._ask({"do": "remove", "node_id": node.node_id})
        for process in below:
            _kill(process)

    def drain(self, node: WorkerNode, seconds: int) -> None:
        """Announces that the node will be taken back after so many seconds, as a cloud does for spot nodes."""
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.env["RAY_ADDRESS"]]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "a spot node is taken back", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.env, check=True, capture_output=True, text=True, timeout=60)

    def kill_gcs(self) -> None:
        """SIGKILL the head's control service."""
        psutil.Process(self.gcs_pid).kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.host.stdin and self.host.stdout
        self.host.stdin.write(json.dumps(request) + "\n")
        self.host.stdin.flush()
        line = self.host.stdout.readline()
        assert line, "the process of the nodes has ended; see its log"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """Ends every process of every node."""
        below = children(self.host.pid)
        _kill(psutil.Process(self.host.pid))
        self.host.wait()
        for pipe in (self.host.stdin, self.host.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for process in below:
            for child in (*children(process.pid), process):
                _kill(child)


@contextmanager
def ray_nodes(logs: Path, num_workers: int = 2, num_cpus: int = 2, object_store_mb: int = 150) -> Iterator[Nodes]:
    """A head without CPUs and workers with `num_cpus` each, until the end of the block."""
    logs.mkdir(parents=True, exist_ok=True)
    # pytest's own folders are too long for the names of Ray's sockets.
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, (logs / "nodes.txt").open("w") as log:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
        env = {**os.environ, **_HEALTH, **auth, "RAY_TMPDIR": folder}
        command = [sys.executable, "-m", "tests.support.ray_nodes", str(object_store_mb)]
        host = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
        nodes = Nodes(host, env, 0, object_store_mb)
        try:
            begun = nodes._ask({"do": "begin"})
            nodes.env["RAY_ADDRESS"], nodes.gcs_pid = begun["address"], begun["gcs_pid"]
            for _ in range(num_workers):
                nodes.add(num_cpus)
            yield nodes
        finally:
            nodes.close()


def main(object_store_mb: int) -> None:
    """Owns the nodes; reads requests and answers each with a line."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints what it likes
    cluster, nodes = None, {}
    for line in sys.stdin:
        request, reply = json.loads(line), {}
        if request["do"] == "begin":
            head = {"num_cpus": 0, "object_store_memory": object_store_mb << 20, "include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            reply = {"address": cluster.address, "gcs_pid": _pid(cluster.head_node, "gcs_server")}
        elif request["do"] == "add":
            size = {"num_cpus": request["num_cpus"], "object_store_memory": request["object_store_mb"] << 20}
            node = cluster.add_node(**size)
            nodes[node.node_id] = node
            reply = {"node_id": node.node_id, "raylet_pid": _pid(node, "raylet")}
        elif request["do"] == "remove":
            cluster.remove_node(nodes.pop(request["node_id"]), allow_graceful=False)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    if cluster is not None:  # whoever asked is gone
        cluster.shutdown()


def _pid(node: Any, name: str) -> int:
    (info,) = node.all_processes[name]
    pid: int = info.process.pid
    return pid


if __name__ == "__main__":
    main(int(sys.argv[1]))
