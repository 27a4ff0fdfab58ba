"""One writer at a time on an output folder: a lease with numbered epochs and a heartbeat.

The lease saves double work and tells people that another run is active. Results are right without it: nothing about
exactly-once rests on it, nor on any clock but one's own monotonic one.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crossenc.errors import RunConflictError
from pipelines.plan import RUN_FOLDER
from pipelines.storage import Location, list_files, put, put_new, read_bytes

LEASE_FOLDER = f"{RUN_FOLDER}/lease"
HEARTBEAT_SECONDS = 5.0
#: A heartbeat that does not change for this long belongs to a dead run.
TAKEOVER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds, or held, the lease, from its last heartbeat."""

    epoch: int
    owner: str
    machine: str
    pid: int
    pid_started: int
    beat: int
    state: str  # "running" or "released"
    beaten_at: float  # Unix time on the holder's clock, for people
    progress: Mapping[str, Any]

    @property
    def host(self) -> str:
        return self.machine.partition("/")[0]


def last_holder(output: Location) -> Holder | None:
    """The holder of the newest epoch, or None where there was never one."""
    names = [file.location.name for file in list_files(output / LEASE_FOLDER)]
    epochs = [int(match[1]) for name in names if (match := re.fullmatch(r"epoch-(\d{6})\.json", name))]
    if not epochs:
        return None
    epoch = max(epochs)
    for kind in ("heartbeat", "epoch"):  # a run that died between the two left only its epoch
        try:
            body = json.loads(read_bytes(output / f"{LEASE_FOLDER}/{kind}-{epoch:06d}.json"))
            return Holder(epoch=epoch, **body)
        except (FileNotFoundError, ValueError, TypeError):
            continue
    return Holder(epoch, "", "", 0, 0, 0, "running", 0.0, {})


@contextlib.contextmanager
def hold(
    output: Location,
    progress: Callable[[], Mapping[str, Any]],
    on_lost: Callable[[str], None],
    say: Callable[[str], None],
) -> Iterator[int]:
    """Holds the lease for the length of a `with` block, which gets the epoch.

    `progress()` is stored with each heartbeat; `on_lost(message)` is called, from another thread, when another run
    took the lease over. Raises RunConflictError where another run is active.
    """
    lease = _acquire(output, say)
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_SECONDS):
            # Without the store the stages fail at their own deadline, and safety needs no beat.
            with contextlib.suppress(OSError):
                other = lease.other_holder()
                if other is None:
                    lease.write("running", progress())
                else:
                    stopped.set()
                    on_lost(_taken_by(other))

    beater = threading.Thread(target=beat, name="lease-heartbeat", daemon=True)
    beater.start()
    try:
        yield lease.epoch
    finally:
        is_mine = not stopped.is_set()
        stopped.set()
        beater.join(HEARTBEAT_SECONDS * 2)
        if is_mine:
            # A lease that cannot be released runs out by itself, and another error may be on its way.
            with contextlib.suppress(OSError):
                lease.write("released", progress())


def overtaken(output: Location, epoch: int) -> str:
    """What to say where another run has taken over from `epoch`, else "".

    It asks storage: a run that ends right after it was frozen has not had its next heartbeat yet.
    """
    holder = last_holder(output)
    return _taken_by(holder) if holder is not None and holder.epoch > epoch else ""


def _taken_by(holder: Holder) -> str:
    return f"the run on {holder.host} (pid {holder.pid}) took this output over; this one stops"


class _Lease:
    def __init__(self, output: Location, epoch: int) -> None:
        self.output, self.epoch = output, epoch
        self.owner = uuid.uuid4().hex
        self._beats = 0

    def body(self, state: str, progress: Mapping[str, Any]) -> bytes:
        body = {
            "owner": self.owner,
            "machine": _machine(),
            "pid": os.getpid(),
            "pid_started": _started(os.getpid()),
        }
        body |= {"beat": self._beats, "state": state, "beaten_at": time.time(), "progress": dict(progress)}
        return json.dumps(body).encode()

    def write(self, state: str, progress: Mapping[str, Any]) -> None:
        self._beats += 1
        put(self.output / f"{LEASE_FOLDER}/heartbeat-{self.epoch:06d}.json", self.body(state, progress))

    def other_holder(self) -> Holder | None:
        """Whoever holds the lease instead of this one.

        A newer epoch, or, in a store where two runs can claim the same one, whoever wrote its heartbeat last.
        """
        holder = last_holder(self.output)
        return holder if holder is not None and holder.owner != self.owner else None

    def claim(self) -> bool:
        """Creates the epoch; False where another run was quicker."""
        mine = self.body("running", {})
        return put_new(self.output / f"{LEASE_FOLDER}/epoch-{self.epoch:06d}.json", mine) == mine


def _acquire(output: Location, say: Callable[[str], None]) -> _Lease:
    holder = last_holder(output)
    if holder is not None and not is_gone(holder):
        say(f"a run on {holder.host} (pid {holder.pid}) used this output last; looking whether it is still alive …")
        _wait_until_dead(output, holder)
    lease = _Lease(output, holder.epoch + 1 if holder else 1)
    if not lease.claim():
        raise RunConflictError(f"another run on {output} started at the same moment; let it finish")
    lease.write("running", {})
    return lease


def is_gone(holder: Holder) -> bool:
    """Whether the holder released the lease, or its process on this very machine is over."""
    if holder.state == "released":
        return True
    return holder.machine == _machine() and _started(holder.pid) != holder.pid_started


def _wait_until_dead(output: Location, holder: Holder) -> None:
    deadline = time.monotonic() + TAKEOVER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 2))
        now = last_holder(output)
        if now is not None and is_gone(now):
            return
        if now is None or (now.owner, now.beat) != (holder.owner, holder.beat):
            active = now or holder
            raise RunConflictError(
                f"another run is active on {output} (host {active.host}, pid {active.pid}); let it finish or stop it:"
                " its log says how far it is"
            )


def _machine() -> str:
    """This host, boot and process namespace: where they are equal, a pid means the same process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: _started knows no process there, and only heartbeats tell
        return socket.gethostname()


def _started(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 where there is none (a zombie counts as none)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
