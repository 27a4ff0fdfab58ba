"""The status command: `crossenc status OUTPUT`, what a run has done and whether it is at work."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs import runtime
from pipelines.progress import visible
from pipelines.status import RetrainStatus, RunStatus, TrainStatus, look, look_at_retraining, look_at_training


def run(output: str, *, as_json: bool = False) -> int:
    """Shows the run in `output` and returns the exit code."""

    def body(_: runtime.StopSignal) -> int:
        status = look_at_training(output) or look_at_retraining(output) or look(output)
        if as_json:
            Console(soft_wrap=True, highlight=False).print_json(json.dumps(asdict(status)))
        elif isinstance(status, TrainStatus):
            _show_training(status)
        elif isinstance(status, RetrainStatus):
            _show_retraining(status)
        else:
            _show(status)
        return runtime.DONE

    return runtime.run(body)


def _show(status: RunStatus) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{status.state}[/bold]", f"— {visible(status.detail)}" if status.detail else "")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("shards", f"{status.num_shards_done:,} of {status.num_shards:,}")
    table.add_row("candidates", f"{status.num_candidates:,} of {status.num_candidates_planned:,}")
    table.add_row("scored", f"{status.num_scored:,}")
    table.add_row("results", f"{status.num_results:,}")
    if status.pairs_per_second:
        table.add_row("rate", f"{status.pairs_per_second:,.0f} pairs/s")
    table.add_row("refused", f"{sum(status.refused.values()):,}")
    for reason, number in status.refused.items():
        table.add_row("", f"{number:,} {visible(reason)}")
    console.print(table)


def _show_training(status: TrainStatus) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{status.state}[/bold]", f"— {visible(status.detail)}" if status.detail else "")
    table = Table(show_header=False, box=None, pad_edge=False)
    of_all = f" of {status.num_steps:,} steps" if status.num_steps else ""
    table.add_row("checkpoint", f"after step {status.last_step:,}{of_all}" if status.last_step else "none yet")
    for name, value in status.progress.items():
        table.add_row(name.replace("_", " "), "" if value is None else visible(str(value)))
    console.print(table)


def _show_retraining(status: RetrainStatus) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{status.state}[/bold]", f"— {visible(status.detail)}" if status.detail else "")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("retraining", status.retraining)
    for name, steps in (("done", status.steps_done), ("to do", status.steps_to_do)):
        if steps:
            table.add_row(name, ", ".join(steps))
    numbers = {"promoted": status.num_promoted, "refused": status.num_refused, "void": status.num_void}
    table.add_row("so far", ", ".join(f"{number:,} {name}" for name, number in numbers.items()))
    console.print(table)


def command(
    output: Annotated[
        str, typer.Argument(help="The output of a rerank, training or retraining job.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show whether a run is running, resumable or finished, and what it has done so far.

    Of a store the address and credentials are those of the environment, as AWS_ENDPOINT_URL. Exit codes: 0 shown, 2 no
    run that can be shown, 1 anything else.
    """
    raise typer.Exit(run(output, as_json=as_json))


if __name__ == "__main__":
    typer.run(command)
