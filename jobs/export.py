"""The export job: `crossenc export MODEL OUTPUT`, a checkpoint with an ONNX file that was judged before it was kept."""

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs import runtime
from pipelines.export import ExportSettings, Outcome, export
from pipelines.progress import visible


class Precision(StrEnum):
    """What the file computes in."""

    FLOAT32 = "float32"
    INT8 = "int8"


class Target(StrEnum):
    """Instructions that an int8 file is made for."""

    AVX2 = "avx2"
    AVX512_VNNI = "avx512_vnni"
    ARM64 = "arm64"


def run(settings: ExportSettings) -> int:
    """Runs the export and returns the exit code."""

    def body(_: runtime.StopSignal) -> int:
        outcome = export(settings, lambda text: sys.stderr.write(visible(text) + "\n"))
        _show(outcome)
        return runtime.DONE if outcome.path is not None else runtime.FAILED

    return runtime.run(body)


def _show(outcome: Outcome) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if "quality" in outcome.facts:
        console.print(_table(outcome.facts))
    if outcome.path is not None:
        console.print(f"wrote {visible(str(outcome.path))}", markup=False)
    for problem in outcome.problems:
        console.print(f"refused: {problem}", markup=False)
    if outcome.path is None:
        console.print("nothing was written", markup=False)


def _table(facts: dict[str, Any]) -> Table:
    quality, rates = facts["quality"], facts["pairs_per_second"]
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{quality['num_queries']:,} queries, {quality['num_pairs']:,} pairs")
    table.add_column("torch float32", justify="right")
    table.add_column(f"onnx {facts['precision']}", justify="right")
    if quality["ndcg"] is not None:
        judged = f"nDCG@10 of {quality['num_judged_queries']:,} judged queries"
        table.add_row(judged, f"{quality['reference_ndcg']:.4f}", f"{quality['ndcg']:.4f}")
        if quality["ndcg_drop_error"] is not None:
            table.add_row("standard error of its fall", "", f"{quality['ndcg_drop_error']:.4f}")
    table.add_row("pairs a second", f"{rates['torch']:,.1f}", f"{rates['onnx']:,.1f}")
    table.add_row(
        "largest and mean difference of scores", "", _both(quality["max_difference"], quality["mean_difference"])
    )
    table.add_row("Kendall's tau", "", f"{quality['kendall_tau']:.4f}")
    table.add_row("queries whose top 10 changed", "", f"{quality['top10_changed']:.1%}")
    table.add_row("documents that left a top 10", "", f"{quality['top10_swapped']:.1%}")
    if facts["precision"] == "int8":
        num_left = len(facts["layers_left_in_float32"])
        table.add_row("layers in int8, and left in float32", "", f"{facts['num_int8_layers']}, {num_left}")
    return table


def _both(largest: float, mean: float) -> str:
    return f"{largest:.2g}, {mean:.2g}"


def command(  # noqa: PLR0913 - the flags of a command
    model: Annotated[str, typer.Argument(help="Folder, URI, or hub id with @revision.", show_default=False)],
    output: Annotated[str, typer.Argument(help="Local folder; the model's own will do.", show_default=False)],
    precision: Annotated[Precision, typer.Option(help="What the file computes in.")] = Precision.FLOAT32,
    data: Annotated[str | None, typer.Option(help="Candidates to judge the file by, as rerank takes them.")] = None,
    queries: Annotated[str | None, typer.Option(help="Table of queries, for candidates given as ids.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Table of documents, for candidates given as ids.")] = None,
    qrels: Annotated[str | None, typer.Option(help="Judgements, for nDCG@10.")] = None,
    num_queries: Annotated[int, typer.Option(min=2, help="Queries to judge by, spread over the data.")] = 200,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens a pair may have; more are cut.")] = None,
    target: Annotated[Target | None, typer.Option(help="Instructions for int8; this machine's by default.")] = None,
    max_ndcg_drop: Annotated[float, typer.Option(help="How far nDCG@10 may fall.")] = 0.002,
    max_difference: Annotated[
        float | None, typer.Option(help="How far scores may differ: 1e-4 for float32, without limit for int8.")
    ] = None,
    min_tau: Annotated[float, typer.Option(help="Kendall's tau with torch's rankings, at least.")] = 0.9,
) -> None:
    """Export a model to ONNX for backend onnx, and keep the file only if it ranks as well.

    Exit codes: 0 done, 1 refused or failed, 2 bad configuration or input.
    """
    from crossenc.onnx.quality import Limits

    difference = 1e-4 if max_difference is None and precision is Precision.FLOAT32 else max_difference
    settings = ExportSettings(
        model=model,
        output=output,
        precision=precision.value,
        limits=Limits(ndcg_drop=max_ndcg_drop, max_difference=difference, kendall_tau=min_tau),
        target=None if target is None else target.value,
        data=data,
        queries=queries,
        corpus=corpus,
        qrels=qrels,
        max_length=max_length,
        num_queries=num_queries,
    )
    raise typer.Exit(run(settings))


if __name__ == "__main__":
    typer.run(command)
