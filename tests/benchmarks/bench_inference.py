"""Scoring speed side by side: this library against sentence-transformers, in alternating runs on the same pairs.

Run: `python -m tests.benchmarks.bench_inference --model FOLDER --data FOLDER`. The data folder has `candidates`,
`queries` and `corpus` as Parquet, in the ids layout of a rerank job. Each contender predicts all pairs from texts,
once a round; the table has medians, and the differences to the first contender's scores. Seconds of processor time
are worth more than those of the clock where other programs share the machine; with one thread (OMP_NUM_THREADS=1)
they count what was computed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from crossenc import CrossEncoder

SHARED = Path(__file__).parents[3] / "shared"

Pairs = list[tuple[str, str]]
Predict = Callable[[Pairs], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a contender took, per round by the clock and of processor time, and its last scores."""

    seconds: list[float]
    cpu_seconds: list[float]
    scores: NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "minilm-ce"), help="a checkpoint folder")
    parser.add_argument("--data", default=str(SHARED / "data" / "medquad"), help="a folder of three tables")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="the fastest by default")
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="further token budgets of packed batches")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8], help="of sentence-transformers, beside 32")
    parser.add_argument("--bfloat16", action="store_true", help="in bfloat16 as well")
    given = parser.parse_args()
    pairs = read_pairs(Path(given.data), given.pairs)
    contenders = make_contenders(given)
    lengths = CrossEncoder(given.model, device="cpu")._tokenizer.encode(*map(list, zip(*pairs, strict=True))).lengths
    load = os.getloadavg()[0]
    timings = race(contenders, pairs, given.rounds)
    threads = torch.get_num_threads()
    title = f"{len(pairs)} pairs, {lengths.mean():.0f} tokens each; {threads} threads; load before {load:.1f}"
    show(timings, int(lengths.sum()), title)


def read_pairs(folder: Path, num_pairs: int, per_query: int = 8) -> Pairs:
    """The first stage's best `per_query` documents of queries spread over the collection."""
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("candidates", "queries", "corpus")}
    queries = dict(zip(*(tables["queries"][c].to_pylist() for c in ("query_id", "text")), strict=True))
    documents = dict(zip(*(tables["corpus"][c].to_pylist() for c in ("doc_id", "text")), strict=True))
    found: dict[str, list[str]] = {}
    best = tables["candidates"].filter(pc.field("rank") <= per_query)
    for query_id, doc_id in zip(*(best[c].to_pylist() for c in ("query_id", "doc_id")), strict=True):
        found.setdefault(query_id, []).append(doc_id)
    chosen = sorted(found)[:: max(1, len(found) * per_query // num_pairs)]
    return [(queries[q], documents[d]) for q in chosen for d in found[q]][:num_pairs]


def make_contenders(given: argparse.Namespace) -> dict[str, Predict]:
    """Functions that score pairs, by name; the first is the reference."""
    from sentence_transformers import CrossEncoder as Reference

    contenders: dict[str, Predict] = {}
    for dtype in ("float32", "bfloat16") if given.bfloat16 else ("float32",):
        theirs = Reference(given.model, device=given.device, model_kwargs={"dtype": getattr(torch, dtype)})
        for batch_size in (32, *given.batch_sizes):
            contenders[f"sentence-transformers {dtype}, batch {batch_size}"] = _theirs(theirs, batch_size)
        ours = CrossEncoder(given.model, device=given.device, dtype=dtype)
        contenders[f"crossenc {dtype}, padded"] = _ours(ours, may_pack=False)
        for budget in (ours.engine.max_batch_tokens, *given.budgets):
            contenders[f"crossenc {dtype}, {ours.engine.forward_kind}, budget {budget}"] = _ours(ours, budget)
    return contenders


def _theirs(model: object, batch_size: int) -> Predict:
    return lambda pairs: model.predict(pairs, batch_size=batch_size, show_progress_bar=False)


def _ours(model: CrossEncoder, budget: int | None = None, may_pack: bool = True) -> Predict:
    def predict(pairs: Pairs) -> NDArray[np.float32]:
        engine = replace(model.engine, may_pack=may_pack)
        engine = engine if budget is None else replace(engine, max_batch_tokens=budget)
        return engine.score(model._tokenizer.encode([query for query, _ in pairs], [text for _, text in pairs]))

    return predict


def race(contenders: Mapping[str, Predict], pairs: Pairs, num_rounds: int) -> dict[str, Timing]:
    """Each contender once a round, in turn, after a warm-up on a few pairs."""
    for predict in contenders.values():
        predict(pairs[:16])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    scores = {}
    for _ in range(num_rounds):
        for name, predict in contenders.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            scores[name] = predict(pairs)
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)
    return {name: Timing(seconds[name], cpu_seconds[name], scores[name]) for name in contenders}


def show(timings: Mapping[str, Timing], num_tokens: int, title: str) -> None:
    reference = next(iter(timings.values()))
    slowest, slowest_cpu = statistics.median(reference.seconds), statistics.median(reference.cpu_seconds)
    columns = ("pairs/s", "tokens/s", "ratio", "seconds", "CPU seconds", "ratio", "max difference", "mean")
    table = Table("contender", *columns, title=title)
    for name, timing in timings.items():
        median = statistics.median(timing.seconds)
        difference = np.abs(timing.scores - reference.scores)
        table.add_row(
            name,
            f"{len(timing.scores) / median:.1f}",
            f"{num_tokens / median:,.0f}",
            f"{slowest / median:.2f}",
            f"{min(timing.seconds):.2f}-{max(timing.seconds):.2f}",
            f"{min(timing.cpu_seconds):.2f}-{max(timing.cpu_seconds):.2f}",
            f"{slowest_cpu / statistics.median(timing.cpu_seconds):.2f}",
            f"{difference.max():.1e}",
            f"{difference.mean():.1e}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
