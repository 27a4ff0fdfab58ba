"""A Ray head with its dashboard on loopback, started by `ray start` with tokens on: what jobs are submitted to.

It has ports and a folder of its own and ends with its own processes, so other clusters of the machine are left alone.
"""

import os
import secrets
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.processes import DriverProcess, run_driver

ROOT = Path(__file__).resolve().parents[2]
CROSSENC = [sys.executable, "-c", "from jobs.cli import main; main()"]
_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
)


@dataclass(frozen=True)
class Head:
    """A running head. `token` is its secret, `env` what a client of it has in its environment."""

    address: str
    token: str
    env: dict[str, str]
    process: DriverProcess

    def submit(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs `crossenc submit words`."""
        return self.run("submit", *words, **env)

    def run(self, *words: str, timeout_seconds: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs `crossenc words` as a client of this head."""
        return subprocess.run(
            [*CROSSENC, *words],
            cwd=ROOT,
            env={**os.environ, **self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )


@contextmanager
def ray_head(logs: Path, num_cpus: int = 4) -> Iterator[Head]:
    """A head until the end of the block."""
    with ExitStack() as stack:
        # pytest's own folders are too long for the names of Ray's sockets.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        token = secrets.token_hex(24)
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(token)
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
        command += [f"--num-cpus={num_cpus}", f"--object-store-memory={150 << 20}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        # The code of this checkout is what drivers and workers import.
        process = run_driver(command, {**os.environ, **auth, "PYTHONPATH": str(ROOT)}, ROOT, logs)
        stack.callback(process.cleanup)
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        process.wait_until(lambda: _answers(f"{address}/api/jobs/", token), 120)
        yield Head(address, token, {**auth, "RAY_ADDRESS": address}, process)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
