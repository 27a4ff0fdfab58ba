"""`make demo`: a collection from docstrings, a fine-tuned cross-encoder, a rerank job, and an honest evaluation."""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from crossenc.evaluation.metrics import per_query
from jobs import rerank, runtime, train
from jobs.demo.collection import Collection, build_collection
from jobs.demo.finetune import write_training_job
from pipelines.evaluate import read_qrels
from pipelines.train_finish import MODEL_FOLDER

_MEASURE = "nDCG@10"


def command(
    model: Annotated[str | None, typer.Option(help="A checkpoint to take instead of fine-tuning one.")] = None,
    folder: Annotated[Path, typer.Option(help="Where everything is written; what is there is replaced.")] = Path(
        "demo"
    ),
) -> None:
    """Build a collection from the standard library's docstrings, rerank it, and compare with BM25."""
    console = Console(highlight=False)
    started = time.monotonic()
    if folder.exists():
        if not (folder / "rerank.yaml").exists() and any(folder.iterdir()):
            console.print(f"{folder} holds something else than a demo; choose another --folder")
            raise typer.Exit(runtime.BAD_INPUT)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    console.rule("1/3  collection")
    collection = build_collection(folder / "collection")
    _show_collection(console, collection)
    console.rule("2/3  model")
    checkpoint = model or _train(console, collection, folder)
    console.print(f"model {checkpoint}", soft_wrap=True)
    console.rule("3/3  rerank")
    job = _write_job(collection, checkpoint, folder)
    console.print(f"crossenc rerank {job}")
    code = rerank.run(str(job))
    if code == runtime.DONE:
        _show_result(console, folder, collection)
        console.print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    raise typer.Exit(code)


def _train(console: Console, collection: Collection, folder: Path) -> str:
    """Runs the training job; returns where the model is."""
    job = write_training_job(collection, folder)
    console.print(f"crossenc train {job}")
    code = train.run(str(job))
    if code != runtime.DONE:
        raise typer.Exit(code)
    return str(folder / "trained" / MODEL_FOLDER)


def _show_collection(console: Console, collection: Collection) -> None:
    console.print(
        f"{collection.num_documents:,} documents; {collection.num_training_pairs:,} training pairs,"
        f" {collection.num_dev_queries:,} dev and {collection.num_test_queries:,} test queries, from disjoint modules"
        f" of Python {sys.version.split()[0]}",
        soft_wrap=True,
    )


def _write_job(collection: Collection, checkpoint: str, folder: Path) -> Path:
    settings = {
        "candidates": str(collection.candidates),
        "queries": str(collection.queries),
        "corpus": str(collection.corpus),
        "model": checkpoint,
        "output": str(folder / "reranked"),
        "interpolate": {"fit": str(collection.qrels_dev)},
        "qrels": str(collection.qrels_test),
    }
    path = folder / "rerank.yaml"
    path.write_text("# The demo's job. The weight is fitted on the dev queries, the report is on the test queries.\n")
    with path.open("a") as file:
        yaml.safe_dump(settings, file, sort_keys=False)
    return path


def _show_result(console: Console, folder: Path, collection: Collection) -> None:
    output = folder / "reranked"
    manifest = json.loads((output / "_manifest.json").read_text())
    table = Table(title=f"unseen test queries: {manifest['evaluation_note']}")
    for name in ("measure", "BM25", "reranked", "difference, 95 % interval", "p (t test)", "better", "worse"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in manifest["evaluation"]:
        table.add_row(
            row["measure"],
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['after'] - row['before']:+.4f} ({row['low']:+.3f} … {row['high']:+.3f})",
            f"{row['p_t']:.4f}" if row["p_t"] >= 0.0001 else "< .0001",
            str(row["num_better"]),
            str(row["num_worse"]),
        )
    console.print(table)
    console.print(f"interpolation: {manifest['interpolation']}", soft_wrap=True)
    console.print(f"the model alone, without BM25's score: {_MEASURE} {_model_alone(output, collection):.4f}")
    main = next(row for row in manifest["evaluation"] if row["measure"] == _MEASURE)
    console.print(_verdict(main), soft_wrap=True)
    console.print(f"{pq.read_table(output / 'results').num_rows:,} ranked documents in {output / 'results'}")
    console.print(f"report: {(output / 'report.html').resolve()}", soft_wrap=True)


def _model_alone(output: Path, collection: Collection) -> float:
    """The measure on the test queries for the order by the model's own score."""
    results = pq.read_table(output / "results").to_pandas()
    results = results.sort_values(["query_id", "model_score", "first_stage_rank"], ascending=[True, False, True])
    runs = {query_id: group.tolist() for query_id, group in results.groupby("query_id")["doc_id"]}
    qrels = read_qrels(str(collection.qrels_test), {})
    values = per_query([_MEASURE], {query_id: qrels[query_id] for query_id in qrels if query_id in runs}, runs)
    return statistics.mean(values[_MEASURE].values())


def _verdict(row: dict[str, float]) -> str:
    significant = row["p_t"] < 0.05
    if row["after"] > row["before"]:
        return "The new order is better than BM25's" + (
            ", significantly." if significant else ", but not significantly: more queries or training would tell."
        )
    return "The new order is not better than BM25's." + (" It is significantly worse." if significant else "")


if __name__ == "__main__":
    typer.run(command)
