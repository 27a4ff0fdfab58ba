"""What losing nodes costs. Run: `python -m tests.benchmarks.bench_cluster`.

A rerank job on a cluster of three nodes on this machine: a head without work and two workers with a scoring actor each,
whose fake scorer takes a realistic time for a pair. Every so often a worker's processes are all killed and a new
node is added; half-way the driver is killed and the job submitted again. It prints whether the results equal, byte for
byte, those of a run that nobody disturbed, how many shards were begun and scored more than once, and the time. It
ends with 1 where results differ or more than 15 % of the shards were scored twice.
"""

import argparse
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_pipeline import write_pairs
from tests.support.collections import part_bytes, parts, write_job
from tests.support.processes import DriverProcess
from tests.support.ray_nodes import Nodes, ray_nodes
from tests.support.rerank_driver import Drivers, drivers

NUM_ACTORS, NODE_CPUS = 2, 3
MOST_SCORED_AGAIN = 0.15


@dataclass
class Chaos:
    """What was done to the run, and how long it took."""

    seconds: float = 0.0
    nodes_killed: int = 0
    drivers_killed: int = 0
    moments: list[str] = field(default_factory=list)

    def note(self, started: float, text: str) -> None:
        self.moments.append(f"{time.monotonic() - started:4.0f} s  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300_000)
    parser.add_argument("--shard", type=int, default=1_000, help="pairs of a shard")
    parser.add_argument("--seconds-per-pair", type=float, default=0.00125, help="of one actor: 800 pairs a second")
    parser.add_argument("--every", type=float, default=20, help="seconds from one loss of a node to the next")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_pairs(folder / "in" / "pairs.parquet", given.pairs, num_words=12)
        settings = {"candidates": str(folder / "in"), "shard_candidates": given.shard}
        with drivers(folder / "logs") as starter:
            wanted = _undisturbed(folder, settings, starter)
            chaos = _disturbed(folder, settings, starter, given)
        found = part_bytes(folder / "out")
        _show(given, wanted == found, Counter((folder / "scored.txt").read_text().splitlines()), chaos)


def _undisturbed(folder: Path, settings: dict[str, object], starter: Drivers) -> dict[str, bytes]:
    job = write_job(folder / "plain.yaml", output=str(folder / "plain"), **settings)
    driver = starter.run(job, timeout_seconds=1800)
    assert driver.wait(0) == 0, driver.tail()
    return part_bytes(folder / "plain")


def _disturbed(folder: Path, settings: dict[str, object], starter: Drivers, given: argparse.Namespace) -> Chaos:
    scoring = {"actors": NUM_ACTORS, "cpus_per_actor": 1}
    job = write_job(folder / "job.yaml", output=str(folder / "out"), scoring=scoring, **settings)
    num_shards = math.ceil(given.pairs / given.shard)
    with ray_nodes(folder / "nodes", num_cpus=NODE_CPUS) as nodes:
        words = (job, "--seconds-per-pair", str(given.seconds_per_pair), "--score-log", str(folder / "scored.txt"))

        def start() -> DriverProcess:
            return starter.start(*words, **nodes.driver_env)

        driver, chaos = start(), Chaos()
        driver.wait_until(lambda: bool(parts(folder / "out")), 300)
        started = next_loss = time.monotonic()
        while driver.process.poll() is None:
            driver.remember_descendants()
            if time.monotonic() >= next_loss:
                next_loss += given.every
                _replace(nodes, chaos)
                chaos.note(started, f"a node lost and replaced, {len(parts(folder / 'out')):,} shards done")
            if not chaos.drivers_killed and len(parts(folder / "out")) > num_shards / 2:
                driver.kill9()
                driver = start()
                chaos.drivers_killed += 1
                chaos.note(started, "the driver killed and submitted again")
            time.sleep(0.2)
        chaos.seconds = time.monotonic() - started
        assert driver.wait(0) == 0, driver.tail()
    return chaos


def _replace(nodes: Nodes, chaos: Chaos) -> None:
    nodes.remove(nodes.workers[0])  # the older one
    nodes.add(NODE_CPUS)
    chaos.nodes_killed += 1


def _show(given: argparse.Namespace, is_equal: bool, lines: Counter[str], chaos: Chaos) -> None:
    num_shards = math.ceil(given.pairs / given.shard)
    ended = [number for line, number in lines.items() if line.startswith("end ")]
    num_again = sum(number - 1 for number in ended)
    begun = [number for line, number in lines.items() if line.startswith("begin ")]
    table = Table(box=None, show_header=False, pad_edge=False)
    ideal = given.pairs * given.seconds_per_pair / NUM_ACTORS
    rows = {
        "pairs, shards": f"{given.pairs:,}, {num_shards:,}",
        "nodes lost and replaced, drivers killed": f"{chaos.nodes_killed}, {chaos.drivers_killed}",
        "results equal those of an undisturbed run": "yes" if is_equal else "NO",
        "shards scored to the end more than once": _share(num_again, num_shards),
        "shards begun more than once": _share(sum(n - 1 for n in begun), num_shards),
        "seconds, of which scoring alone takes": f"{chaos.seconds:.0f}, {ideal:.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(*chaos.moments, sep="\n")
    console.print(table)
    if not is_equal or len(ended) != num_shards or num_again > MOST_SCORED_AGAIN * num_shards:
        raise SystemExit(1)


def _share(number: int, of: int) -> str:
    return f"{number} of {of:,} ({number / of:.1%})"


if __name__ == "__main__":
    main()
