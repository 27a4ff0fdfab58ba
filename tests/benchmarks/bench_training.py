"""Training speed side by side: crossenc's training loop against sentence-transformers' CrossEncoderTrainer.

Run: `python -m tests.benchmarks.bench_training --model FOLDER --data FOLDER`. The data folder has `candidates`,
`queries`, `corpus` and `qrels` as Parquet. Both sides begin with the checkpoint's weights each time, and go once
through the same labelled pairs in the same batches, from texts, with binary cross-entropy, AdamW and the same learning
rates. Rounds alternate, the table has medians. The losses of the first and the last quarter of the steps should agree
but for dropout. Needs accelerate and datasets, no Ray.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, SequentialSampler

from crossenc import CrossEncoder
from crossenc.loop.learner import Learner, LearnerSettings
from crossenc.loop.lists import TokenizedLists
from crossenc.loop.optimizer import parameter_groups, rate_factor
from crossenc.losses import objective
from tests.benchmarks.bench_inference import SHARED, Pairs, read_pairs

LEARNING_RATE = 2e-5


@dataclass(frozen=True, slots=True)
class Trained:
    """One way through the data: the loss of each step, seconds by the clock and of processor time."""

    losses: list[float]
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "minilm-ce"), help="a checkpoint folder")
    parser.add_argument("--data", default=str(SHARED / "data" / "medquad"), help="a folder of four tables")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--per-query", type=int, default=8, help="documents of each query")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    pairs, labels = read_labelled(Path(given.data), given.pairs, given.per_query)
    order = np.random.default_rng(0).permutation(len(pairs))
    pairs, labels = [pairs[i] for i in order], [labels[i] for i in order]
    sides: dict[str, Callable[[], Trained]] = {
        "sentence-transformers": lambda: train_theirs(given, pairs, labels),
        "crossenc": lambda: train_ours(given, pairs, labels),
    }
    load = os.getloadavg()[0]
    found: dict[str, list[Trained]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, side in sides.items():
            found[name].append(side())
    title = (
        f"{len(pairs)} pairs in batches of {given.batch}, at most {given.max_length} tokens, {given.dtype}; "
        f"{torch.get_num_threads()} threads; load before {load:.1f}"
    )
    show(found, len(pairs), title)


def read_labelled(folder: Path, num_pairs: int, per_query: int) -> tuple[Pairs, list[float]]:
    """Candidates of some queries, and whether each is judged relevant."""
    queries, pairs = read_pairs(folder, num_pairs, per_query)
    qrels = pq.read_table(folder / "qrels.parquet").to_pylist()
    texts = dict(
        zip(*(pq.read_table(folder / "corpus.parquet")[c].to_pylist() for c in ("doc_id", "text")), strict=True)
    )
    relevant = {(row["query_id"], texts[row["doc_id"]]) for row in qrels if row["relevance"] > 0}
    return pairs, [float((query, text) in relevant) for query, (_, text) in zip(queries, pairs, strict=True)]


def in_order(dataset: Sized, batch_size: int, drop_last: bool, **_: object) -> BatchSampler:
    """Batches of neighbours."""
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def train_theirs(given: argparse.Namespace, pairs: Pairs, labels: list[float]) -> Trained:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder as Theirs
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = Theirs(given.model, device=given.device, max_length=given.max_length, model_kwargs={"dtype": "float32"})
    columns = {"query": [q for q, _ in pairs], "document": [d for _, d in pairs], "label": labels}
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=given.batch,
            learning_rate=LEARNING_RATE,
            batch_sampler=in_order,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=given.dtype == "bfloat16",
            use_cpu=given.device == "cpu",
        )
        trainer = CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=BinaryCrossEntropyLoss(model)
        )
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Trained([row["loss"] for row in trainer.state.log_history if "loss" in row], seconds, cpu_seconds)


def train_ours(given: argparse.Namespace, pairs: Pairs, labels: list[float]) -> Trained:
    model = CrossEncoder(given.model, device=given.device, max_length=given.max_length)
    model.train()
    num_pairs = len(pairs)
    started, cpu_started = time.perf_counter(), time.process_time()
    lists = TokenizedLists(
        pairs=model.pair_tokenizer().encode([q for q, _ in pairs], [d for _, d in pairs]),
        sizes=np.ones(num_pairs, np.int64),
        labels=np.array(labels, np.float32),
        weights=np.ones(num_pairs, np.float32),
        origins=("",) * num_pairs,
    )
    batches = np.split(np.arange(num_pairs), np.arange(given.batch, num_pairs, given.batch))

    def optimizer(model: CrossEncoder) -> torch.optim.Optimizer:
        groups = parameter_groups(model, learning_rate=LEARNING_RATE, head_learning_rate=None, weight_decay=0.0)
        return torch.optim.AdamW(groups, fused=True)

    settings = LearnerSettings(max_tokens=65_536, dtype=getattr(torch, given.dtype))
    learner = Learner(model, objective("binary_cross_entropy"), optimizer, settings, lists.take(np.arange(1)))
    losses = []
    for step, batch in enumerate(batches):
        rate = rate_factor(step, len(batches), 0, "linear")
        losses.append(learner.step(step, lists.take(batch), len(batch), rate=rate).loss)
    return Trained(losses, time.perf_counter() - started, time.process_time() - cpu_started)


def show(found: dict[str, list[Trained]], num_pairs: int, title: str) -> None:
    table = Table(title=title)
    for column in ("", "pairs/s", "ratio", "pairs per CPU second", "ratio", "loss, first quarter", "last quarter"):
        table.add_column(column, justify="left" if not column else "right")
    first = next(iter(found.values()))
    base = statistics.median(one.seconds for one in first), statistics.median(one.cpu_seconds for one in first)
    for name, rounds in found.items():
        seconds, cpu = (statistics.median(getattr(one, kind) for one in rounds) for kind in ("seconds", "cpu_seconds"))
        quarter = max(1, len(rounds[0].losses) // 4)
        ends = [np.mean([one.losses[part] for one in rounds]) for part in (slice(quarter), slice(-quarter, None))]
        figures = (num_pairs / seconds, base[0] / seconds, num_pairs / cpu, base[1] / cpu, *ends)
        formats = ("{:,.1f}", "{:.2f}", "{:,.1f}", "{:.2f}", "{:.4f}", "{:.4f}")
        table.add_row(name, *(shape.format(figure) for shape, figure in zip(formats, figures, strict=True)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
