"""Processes on a registry in a local folder: killed at each step of their work, or racing each other.

`python -m tests.support.registry_driver kill FOLDER` and `... race FOLDER`; both print what they found as JSON. A
process of its own, so that it can fork: it has no threads and no Ray.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import registry, storage
from pipelines.storage import Location, locate

_KILLED = 99
NUM_RACERS, NUM_ROUNDS = 4, 5


def make_model(folder: Path, weights: str) -> Location:
    """A folder that the registry takes for a checkpoint; nothing loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    (folder / "README.md").write_text(f"# {weights}\n")
    return locate(str(folder))


def work(place: Location, model: Location) -> None:
    """A life of a model: a version more, its promotion, and back."""
    registry.store_version(place, "ranker", "v2", {"model": model}, parent="v1", facts={})
    registry.promote(place, "ranker", "v2", reason="better", key="promote v2")
    registry.rollback(place, "ranker", reason="slow", key="rollback v2")


def die_at(step: int) -> None:
    """From now on this process ends at its so-manyeth step, as kill -9 would end it."""
    left = step

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            nonlocal left
            for is_after in (False, True):
                result = function(*args, **options) if is_after else None
                left -= 1
                if left == 0:
                    os._exit(_KILLED)
            return result

        return stepped

    for module, name in ((storage.os, "link"), (storage.os, "replace"), (registry, "put_new"), (registry, "put_if")):
        setattr(module, name, stepping(getattr(module, name)))


def forked(function: Callable[[], None]) -> int:
    """The pid of a process that does this and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def kill_at_each_step(folder: Path) -> list[dict[str, Any]]:
    """Begins the same work in new registries, killed one step later each time, and does it again to its end."""
    found = []
    models = [make_model(folder / name, name) for name in ("v1", "v2")]
    for step in range(1, 1000):
        place = locate(f"{folder}/registry-{step}")
        registry.store_version(place, "ranker", "v1", {"model": models[0]}, parent=None, facts={})
        registry.promote(place, "ranker", "v1", reason="first", key="promote v1")

        def killed(place: Location = place, step: int = step) -> None:
            die_at(step)
            work(place, models[1])

        code = os.waitstatus_to_exitcode(os.waitpid(forked(killed), 0)[1])
        if code == 0:
            return found
        seen = registry.current(place, "ranker")
        work(place, models[1])
        found.append({"code": code, "current_after_kill": seen.version if seen else None} | state(place))
    raise AssertionError("the work has no end")


def race(folder: Path) -> dict[str, Any]:
    """Several processes promote versions of their own, as often as they can."""
    place = locate(f"{folder}/registry")
    model = make_model(folder / "model", "w")
    for racer in range(NUM_RACERS):
        registry.store_version(place, "ranker", f"v{racer}", {"model": model}, parent=None, facts={})

    def run(racer: int) -> None:
        told = [
            registry.promote(place, "ranker", f"v{racer}", reason="race", key=f"{racer}-{number}")
            for number in range(NUM_ROUNDS)
        ]
        (folder / f"told-{racer}.json").write_text(json.dumps([asdict(entry) for entry in told]))

    pids = [forked(lambda racer=racer: run(racer)) for racer in range(NUM_RACERS)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    told = [entry for racer in range(NUM_RACERS) for entry in json.loads((folder / f"told-{racer}.json").read_text())]
    stored = [asdict(entry) for entry in registry.history(place, "ranker")]
    return {"codes": codes, "num_told": len(told), "num_lost": sum(e not in stored for e in told)} | state(place)


def state(place: Location) -> dict[str, Any]:
    """What other programs see of the registry."""
    entries = registry.history(place, "ranker")
    for version in registry.versions(place, "ranker"):
        registry.verify(place, version)
    pointer = json.loads((Path(place.path) / "ranker" / "current.json").read_text())
    return {
        "numbers": [entry.number for entry in entries],
        "entries": [[entry.action, entry.previous, entry.version] for entry in entries],
        "pointer": pointer["number"],
    }


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # what is killed here are processes, not the machine
    found = {"kill": kill_at_each_step, "race": race}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
