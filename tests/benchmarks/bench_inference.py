"""Scoring speed side by side: this library against sentence-transformers, in alternating runs on the same pairs.

Run: `python -m tests.benchmarks.bench_inference --model FOLDER --data FOLDER`. The data folder has `candidates`,
`queries` and `corpus` as Parquet, in the ids layout of a rerank job. Each contender predicts all pairs from texts,
once a round; the table has medians, and the differences to the first contender's scores, which are float32. MFU is the
share of the rate that matrix products of the model's size reach in the same run, in the contender's number format.
Seconds of processor time are worth more than those of the clock where other programs share the machine; with one
thread (OMP_NUM_THREADS=1) they count what was computed. Needs no Ray.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from crossenc import CrossEncoder
from crossenc.engine import default_batch_tokens, default_device
from crossenc.precision import DTYPES

SHARED = Path(__file__).parents[3] / "shared"
CPU_DEFAULTS = {"pairs": 256, "batch_sizes": [8], "dtypes": ["float32"]}
CUDA_DEFAULTS = {"pairs": 20_000, "batch_sizes": [128, 512], "dtypes": ["bfloat16"]}

Pairs = list[tuple[str, str]]
Predict = Callable[[Pairs], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way of scoring. `padded_share` is what it adds to the tokens, `dtype` the format of its matrix products."""

    predict: Predict
    dtype: torch.dtype
    padded_share: float


@dataclass(frozen=True, slots=True)
class Timing:
    """What a contender took, per round by the clock and of processor time, and its last scores."""

    seconds: list[float]
    cpu_seconds: list[float]
    scores: NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_model = str(SHARED / "models" / "minilm-ce")
    parser.add_argument("--model", nargs="+", default=[default_model], help="checkpoint folders, one table for each")
    parser.add_argument("--data", default=str(SHARED / "data" / "medquad"), help="a folder of three tables")
    parser.add_argument("--pairs", type=int, help="256 by default, 20,000 on CUDA")
    parser.add_argument("--per-query", type=int, default=20, help="documents of each query")
    parser.add_argument("--onnx", nargs="*", default=[], help="ONNX files of the checkpoint, made by crossenc export")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=default_device(), help="the fastest by default")
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="further token budgets of packed batches")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", help="of sentence-transformers, beside 32: 8 by default, 128 512 on CUDA"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="of the contenders: float32 by default, bfloat16 on CUDA"
    )
    given = parser.parse_args()
    for name, value in (CUDA_DEFAULTS if given.device.type == "cuda" else CPU_DEFAULTS).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    queries, pairs = read_pairs(Path(given.data), given.pairs, given.per_query)
    for model in given.model:
        compare(model, given, queries, pairs)


def compare(path: str, given: argparse.Namespace, queries: list[str], pairs: Pairs) -> None:
    """Time all ways of scoring with one model, and show them."""
    model = CrossEncoder(path, device=given.device)
    lengths = model.pair_tokenizer().encode(*map(list, zip(*pairs, strict=True))).lengths
    contenders = make_contenders(path, given, pairs, lengths)
    load = os.getloadavg()[0]
    timings = race({name: contender.predict for name, contender in contenders.items()}, pairs, given.rounds)
    peaks = {c.dtype: peak(c.dtype, model.config.hidden_size, model.device) for c in contenders.values()}
    title = (
        f"{path}: {len(pairs)} pairs of {len(set(queries))} queries, {lengths.mean():.0f} tokens each;"
        f" {torch.get_num_threads()} threads; load before {load:.1f}; "
        + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {str(dtype)[6:]}" for dtype, rate in peaks.items())
    )
    show(contenders, timings, queries, operations(model, lengths), peaks, int(lengths.sum()), title)


def operations(model: CrossEncoder, lengths: NDArray[np.int64]) -> float:
    """Floating point operations of a forward pass over sequences of these lengths: products, and attention."""
    weights = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * float((lengths.astype(float) ** 2).sum())
    return 2.0 * weights * float(lengths.sum()) + attention


def peak(dtype: torch.dtype, width: int, device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of the model's own largest product, a batch's tokens by the inner layer."""
    sizes = (default_batch_tokens(device), 4 * width)
    tokens, weights = (torch.randn(size, width, device=device).to(dtype) for size in sizes)
    # Products wait in the device's queue: one that is waited for would be timed with its launch.
    num_queued = 20 if device.type == "cuda" else 1
    started, num_runs = 0.0, -num_queued  # the first ones warm up
    while num_runs <= 0 or time.perf_counter() - started < seconds:
        for _ in range(num_queued):
            tokens @ weights.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        num_runs += num_queued
        started = started or time.perf_counter()
    return 2.0 * num_runs * sizes[0] * sizes[1] * width / (time.perf_counter() - started)


def read_pairs(folder: Path, num_pairs: int, per_query: int) -> tuple[list[str], Pairs]:
    """The first stage's best `per_query` documents of queries spread over the collection, and their queries' ids."""
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("candidates", "queries", "corpus")}
    queries = dict(zip(*(tables["queries"][c].to_pylist() for c in ("query_id", "text")), strict=True))
    documents = dict(zip(*(tables["corpus"][c].to_pylist() for c in ("doc_id", "text")), strict=True))
    found: dict[str, list[str]] = {}
    best = tables["candidates"].filter(pc.field("rank") <= per_query)
    for query_id, doc_id in zip(*(best[c].to_pylist() for c in ("query_id", "doc_id")), strict=True):
        found.setdefault(query_id, []).append(doc_id)
    chosen = sorted(found)[:: max(1, len(found) * per_query // num_pairs)]
    rows = [(q, d) for q in chosen for d in found[q]][:num_pairs]
    return [q for q, _ in rows], [(queries[q], documents[d]) for q, d in rows]


def make_contenders(
    path: str, given: argparse.Namespace, pairs: Pairs, lengths: NDArray[np.int64]
) -> dict[str, Contender]:
    """Ways of scoring, by name; the first is the reference."""
    from sentence_transformers import CrossEncoder as Reference

    total = int(lengths.sum())
    contenders: dict[str, Contender] = {}
    device = str(given.device)
    as_stored = Reference(path, device=device)
    stored = next(as_stored.parameters()).dtype
    dtypes = [DTYPES[name] for name in given.dtypes]
    theirs_by = {torch.float32: Reference(path, device=device, model_kwargs={"dtype": torch.float32})}
    theirs_by |= {stored: as_stored} if stored != torch.float32 else {}
    theirs_by |= {
        dtype: Reference(path, device=device, model_kwargs={"dtype": dtype})
        for dtype in dtypes
        if dtype not in theirs_by
    }
    for dtype, theirs in theirs_by.items():
        for batch_size in (32, *(given.batch_sizes if dtype in dtypes else ())):
            note = " (its default)" if dtype == stored and batch_size == 32 else ""
            name = f"sentence-transformers {str(dtype)[6:]}, batch {batch_size}{note}"
            order = np.argsort([-sum(map(len, pair)) for pair in pairs])
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
            contenders[name] = Contender(_theirs(theirs, batch_size), dtype, padded / total - 1)
    for dtype in dtypes:
        ours = CrossEncoder(path, device=device, dtype=dtype)
        own = ours.engine.max_batch_tokens
        padded = replace(ours.engine, may_pack=False).num_fed_tokens(lengths) / total - 1
        contenders[f"crossenc {str(dtype)[6:]}, padded"] = Contender(_ours(ours, may_pack=False), dtype, padded)
        for budget in (own, *given.budgets):
            share = replace(ours.engine, max_batch_tokens=budget).num_fed_tokens(lengths) / total - 1
            name = f"crossenc {str(dtype)[6:]}, {ours.engine.forward_kind}, budget {budget}"
            contenders[name] = Contender(_ours(ours, budget), dtype, share)
    for file_name in given.onnx:
        network = CrossEncoder(path, backend="onnx", model_kwargs={"file_name": file_name})
        share = network.engine.num_fed_tokens(lengths) / total - 1
        contenders[f"crossenc onnx/{file_name}"] = Contender(_ours(network), torch.float32, share)
    return contenders


def _theirs(model: Any, batch_size: int) -> Predict:
    return lambda pairs: model.predict(pairs, batch_size=batch_size, show_progress_bar=False)


def _ours(model: CrossEncoder, budget: int | None = None, may_pack: bool = True) -> Predict:
    def predict(pairs: Pairs) -> NDArray[np.float32]:
        engine = replace(model.engine, may_pack=may_pack)
        engine = engine if budget is None else replace(engine, max_batch_tokens=budget)
        return engine.score(model.pair_tokenizer().encode([query for query, _ in pairs], [text for _, text in pairs]))

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


def show(
    contenders: Mapping[str, Contender],
    timings: Mapping[str, Timing],
    queries: list[str],
    num_operations: float,
    peaks: Mapping[torch.dtype, float],
    num_tokens: int,
    title: str,
) -> None:
    reference = next(iter(timings.values()))
    slowest, slowest_cpu = statistics.median(reference.seconds), statistics.median(reference.cpu_seconds)
    columns = ("pairs/s", "tokens/s", "ratio", "seconds", "CPU s", "ratio", "MFU", "padding")
    table = Table("contender", *columns, "max diff", "mean", "tau", "top 10", title=title)
    for name, timing in timings.items():
        median, contender = statistics.median(timing.seconds), contenders[name]
        difference = np.abs(timing.scores - reference.scores)
        table.add_row(
            name,
            f"{len(timing.scores) / median:.1f}",
            f"{num_tokens / median:,.0f}",
            f"{slowest / median:.2f}",
            f"{min(timing.seconds):.2f}-{max(timing.seconds):.2f}",
            f"{min(timing.cpu_seconds):.2f}-{max(timing.cpu_seconds):.2f}",
            f"{slowest_cpu / statistics.median(timing.cpu_seconds):.2f}",
            f"{num_operations / median / peaks[contender.dtype]:.0%}",
            f"{contender.padded_share:.1%}",
            f"{difference.max():.1e}",
            f"{difference.mean():.1e}",
            f"{stats.kendalltau(timing.scores, reference.scores).statistic:.4f}",
            f"{changed_top_tens(queries, timing.scores, reference.scores):.0%}",
        )
    Console(width=220).print(table)


def changed_top_tens(queries: list[str], scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The share of queries whose ten best documents are other ones."""
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        rows.setdefault(query, []).append(row)
    best = [[set(np.argsort(-values[r], kind="stable")[:10]) for values in (scores, reference)] for r in rows.values()]
    return sum(ours != theirs for ours, theirs in best) / len(best)


if __name__ == "__main__":
    main()
