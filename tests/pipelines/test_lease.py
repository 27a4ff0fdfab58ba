"""The lease: one driver at a time, takeover of dead ones, and zombies that learn of it."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from crossenc.errors import RunConflictError, StorageError
from pipelines import lease
from pipelines.lease import Holder, last_holder
from pipelines.storage import Location, locate


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 0.5)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path))


def ignore(message: str) -> None:
    pass


@contextmanager
def hold(output: Location, on_lost=ignore, say=ignore, progress=dict):
    with lease.hold(output, progress, on_lost, say) as epoch:
        yield epoch


def write_holder(output: Location, **changes) -> Holder:
    """Leaves the traces of a run that was killed in its first epoch."""
    me = {"machine": lease._machine(), "pid": os.getpid(), "pid_started": lease._started(os.getpid())}
    body = {"owner": "another", **me, "beat": 7, "state": "running", "beaten_at": 0.0, "progress": {}} | changes
    folder = Path(output.path) / lease.LEASE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("epoch", "heartbeat"):
        (folder / f"{kind}-000001.json").write_text(json.dumps(body))
    return Holder(epoch=1, **body)


def wait_for(condition, timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_an_output_that_was_never_used_has_no_holder(output):
    assert last_holder(output) is None


def test_the_holder_can_be_seen_with_its_progress(output):
    with hold(output, progress=lambda: {"pairs": 5}) as epoch:
        assert epoch == 1
        wait_for(lambda: last_holder(output).progress == {"pairs": 5})
        holder = last_holder(output)
        assert (holder.epoch, holder.pid, holder.state) == (1, os.getpid(), "running")
        assert holder.host == os.uname().nodename
        beat = holder.beat
        wait_for(lambda: last_holder(output).beat > beat)
    assert last_holder(output).state == "released"


def test_a_second_run_is_refused_while_the_first_beats(output, monkeypatch):
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 30.0)
    said = []
    with hold(output):
        message = rf"another run is active .*pid {os.getpid()}.*its log"
        with pytest.raises(RunConflictError, match=message), hold(output, say=said.append):
            raise AssertionError("both hold the lease")
        assert last_holder(output).epoch == 1
    assert len(said) == 1 and "still alive" in said[0]


def test_a_released_lease_is_free_at_once_in_the_next_epoch(output, monkeypatch):
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 600.0)
    for epoch in (1, 2, 3):
        with hold(output) as held:
            assert held == epoch


def test_a_run_that_fails_releases_the_lease(output):
    with pytest.raises(ZeroDivisionError), hold(output):
        raise ZeroDivisionError
    assert last_holder(output).state == "released"


def end_of_a_process() -> tuple[int, int]:
    """The pid of a process that is over, and when it had started."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    started = lease._started(process.pid)
    process.kill()
    process.join()
    return process.pid, started


def test_the_lease_of_a_dead_process_on_this_machine_is_free_at_once(output, monkeypatch):
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 600.0)
    pid, started = end_of_a_process()
    assert started > 0
    write_holder(output, pid=pid, pid_started=started)
    with hold(output) as epoch:
        assert epoch == 2


def test_a_pid_that_belongs_to_another_process_now_is_not_taken_for_the_dead_holder(output, monkeypatch):
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 600.0)
    write_holder(output, pid=os.getpid(), pid_started=1)
    with hold(output) as epoch:
        assert epoch == 2


def test_the_lease_of_a_dead_run_elsewhere_is_taken_when_its_heartbeat_stands_still(output):
    write_holder(output, machine="elsewhere/boot/pid:[1]", pid=1)
    started = time.monotonic()
    with hold(output) as epoch:
        assert epoch == 2
        assert time.monotonic() - started >= 0.5


def test_a_run_elsewhere_that_releases_while_one_waits_makes_way(output, monkeypatch):
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 600.0)
    write_holder(output, machine="elsewhere/boot/pid:[1]")
    released = threading.Timer(0.3, lambda: write_holder(output, machine="elsewhere/boot/pid:[1]", state="released"))
    released.start()
    with hold(output) as epoch:
        assert epoch == 2
    released.join()


def test_a_run_that_died_before_its_first_heartbeat_is_waited_for(output):
    write_holder(output, machine="elsewhere/boot/pid:[1]", beat=0)
    (Path(output.path) / lease.LEASE_FOLDER / "heartbeat-000001.json").unlink()
    assert last_holder(output).host == "elsewhere"
    with hold(output) as epoch:
        assert epoch == 2


@pytest.mark.parametrize("body", ["", "[1]", "{", '{"owner": "x", "more": 1}'])
def test_a_heartbeat_that_cannot_be_read_counts_as_standing_still(output, body):
    write_holder(output)
    for file in (Path(output.path) / lease.LEASE_FOLDER).iterdir():
        file.write_text(body)
    with hold(output) as epoch:
        assert epoch == 2


def test_a_run_that_was_frozen_learns_that_it_lost_before_its_next_heartbeat(output, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 60.0)
    with hold(output) as epoch:
        assert lease.overtaken(output, epoch) == ""
        folder = Path(output.path) / lease.LEASE_FOLDER
        other = json.loads((folder / "epoch-000001.json").read_text()) | {"machine": "elsewhere/0/0", "pid": 7}
        (folder / "epoch-000002.json").write_text(json.dumps(other))
        message = "the run on elsewhere (pid 7) took this output over; this one stops"
        assert lease.overtaken(output, epoch) == message


def test_a_zombie_learns_that_it_lost_and_does_not_release_what_is_not_its_own(output):
    lost = []
    with hold(output, on_lost=lost.append):
        folder = Path(output.path) / lease.LEASE_FOLDER
        other = json.loads((folder / "epoch-000001.json").read_text()) | {"owner": "another", "machine": "elsewhere/x"}
        (folder / "epoch-000002.json").write_text(json.dumps(other))
        wait_for(lambda: lost)
        last_beat = (folder / "heartbeat-000001.json").read_text()
    assert "the run on elsewhere" in lost[0] and "took this output over" in lost[0]
    assert len(lost) == 1
    assert (folder / "heartbeat-000001.json").read_text() == last_beat
    assert last_holder(output).owner == "another"


def test_of_two_runs_that_claim_at_once_one_wins(output):
    write_holder(output, state="released")
    barrier = threading.Barrier(6)

    def claim(_: int) -> int | None:
        with ExitStack() as stack:
            barrier.wait()
            try:
                epoch = stack.enter_context(hold(output))
            except RunConflictError:
                epoch = None
            barrier.wait()
            return epoch

    with ThreadPoolExecutor(6) as pool:
        epochs = list(pool.map(claim, range(6)))
    assert sorted(epoch for epoch in epochs if epoch) == [2]


def test_where_the_store_let_two_runs_claim_one_epoch_one_of_them_stops(output, monkeypatch):
    def claim_anyway(self: lease._Lease) -> bool:
        lease.put(self.output / f"{lease.LEASE_FOLDER}/epoch-{self.epoch:06d}.json", self.body("running", {}))
        return True

    monkeypatch.setattr(lease._Lease, "claim", claim_anyway)
    monkeypatch.setattr(lease, "last_holder", lambda output: None)
    lost: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(hold(output, on_lost=lost.append))
        stack.enter_context(hold(output, on_lost=lost.append))
        monkeypatch.setattr(lease, "last_holder", last_holder)
        wait_for(lambda: lost)


def test_a_store_that_is_away_for_a_while_ends_neither_the_beats_nor_the_run(output, monkeypatch):
    real, failures = lease.put, []

    def failing(location, data):
        if len(failures) < 3:
            failures.append(location)
            raise StorageError("away")
        real(location, data)

    with hold(output):
        monkeypatch.setattr(lease, "put", failing)
        wait_for(lambda: len(failures) == 3)
        beat = last_holder(output).beat
        wait_for(lambda: last_holder(output).beat > beat)
    assert last_holder(output).state == "released"


def test_a_lease_that_cannot_be_released_does_not_hide_how_the_run_ended(output, monkeypatch):
    def failing(location, data):
        raise StorageError("away")

    with pytest.raises(ZeroDivisionError), hold(output):
        monkeypatch.setattr(lease, "put", failing)
        raise ZeroDivisionError


def test_a_lease_works_in_an_object_store(s3_bucket):
    output = locate(f"s3://{s3_bucket}/out")
    with hold(output) as epoch:
        assert epoch == 1
        with pytest.raises(RunConflictError, match="another run is active"), hold(output):
            raise AssertionError("both hold the lease")
    with hold(output) as epoch:
        assert epoch == 2


def test_where_processes_cannot_be_looked_up_only_heartbeats_tell(output, monkeypatch):
    holder = replace(write_holder(output), machine="host", pid_started=0)
    monkeypatch.setattr(lease, "_machine", lambda: "host")
    monkeypatch.setattr(lease, "_started", lambda pid: 0)
    assert not lease.is_gone(holder)
