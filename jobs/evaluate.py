"""The evaluation job: `crossenc evaluate job.yaml`, or `python -m jobs.evaluate job.yaml`."""

import sys
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossenc.evaluation.metrics import display_name
from crossenc.evaluation.results import CollectionResult, Evaluation, Figure
from jobs import cluster, runtime
from jobs import config as job_config
from pipelines import evaluation
from pipelines.evaluation_config import EvaluateConfig
from pipelines.evaluation_report import verdict
from pipelines.execute import needs
from pipelines.model import Model
from pipelines.progress import visible

_STYLES = {"better": "green", "worse": "red"}


def run(
    job: str,
    overrides: tuple[str, ...] = (),
    *,
    dry_run: bool = False,
    new_run: bool = False,
    models: Mapping[str, Model] | None = None,
) -> int:
    """Runs the job file and returns the exit code. `models` replaces those of the systems with these names."""

    def body(stop: runtime.StopSignal) -> int:
        config = job_config.load(EvaluateConfig, job, overrides)
        if dry_run:
            job_config.show(config, evaluation.describe(evaluation.resolve(config, models)))
            return runtime.DONE
        with cluster.disconnected_at_end():
            outcome = evaluation.evaluate(
                config,
                connect=lambda run: cluster.connect(run.ray_address, lambda cores: needs(run, cores), stop),
                stream=sys.stderr,
                should_stop=stop,
                models=models,
                new_run=new_run,
            )
        out = Console(highlight=False, soft_wrap=True)
        if outcome.evaluation is not None:
            _show_figures(out if out.is_terminal else Console(highlight=False, width=200), outcome.evaluation)
        out.print(visible(outcome.message), markup=False)
        return runtime.RESUMABLE if outcome.state == "stopped" else runtime.DONE

    return runtime.run(body)


def _show_figures(out: Console, found: Evaluation) -> None:
    """One table a collection: a row for each system, and below each figure how it differs from the baseline."""
    for collection in found.collections:
        out.print(_table(collection, found))
    if found.num_compared:
        out.print(
            f"below: the difference to {found.baseline}; * where Holm's p < .05 over {found.num_compared:,}"
            " comparisons",
            markup=False,
        )


def _table(collection: CollectionResult, found: Evaluation) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{collection.collection}, {collection.num_queries:,} queries")
    for measure in found.measures:
        table.add_column(display_name(measure), justify="right", no_wrap=True)
    for system in collection.systems:
        table.add_row(system.system, *(_cell(figure) for figure in system.figures))
    return table


def _cell(figure: Figure) -> Text:
    cell = Text(f"{figure.value.mean:.4f} ")
    if figure.difference is not None:
        found = verdict(figure.difference)
        mark = "*" if found in _STYLES else " "
        cell.append(f"\n{figure.difference.mean:+.4f}{mark}", style=_STYLES.get(found, "dim"))
    return cell


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings and plan; write nothing.")] = False,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Delete what models scored in the output folder and start over.")
    ] = False,
) -> None:
    """Compare models and rankings on judged collections. Run it again to resume.

    Exit codes: 0 done, 2 bad configuration or input, 75 stopped and resumable, 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run))


if __name__ == "__main__":
    typer.run(command)
