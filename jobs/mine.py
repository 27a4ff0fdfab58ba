"""The mining job: `crossenc mine job.yaml`, or `python -m jobs.mine job.yaml`."""

import sys
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console

from crossenc.mining import LEFT_OUT, RULES
from jobs import config as job_config
from jobs import runtime
from pipelines import mine as mining
from pipelines.mine_config import MineConfig
from pipelines.mine_shard import MineCounts
from pipelines.progress import visible
from pipelines.schemas import REASONS

_DROPPED = {
    "without_text": "neither among the candidates nor in the corpus",
    "without_score": "not among the scored candidates",
    "repeated_text": "its text equals that of a better positive",
}


def run(job: str, overrides: tuple[str, ...] = (), *, dry_run: bool = False, new_run: bool = False) -> int:
    """Runs the job file and returns the exit code."""

    def body(stop: runtime.StopSignal) -> int:
        config = job_config.load(MineConfig, job, overrides)
        if dry_run:
            resolved = mining.resolve(config)
            job_config.show(config, mining.describe(resolved, mining.make_plan(resolved)))
            return runtime.DONE
        stop.drain()
        outcome = mining.mine(config, stream=sys.stderr, should_stop=stop, new_run=new_run)
        _show_outcome(outcome)
        return runtime.RESUMABLE if outcome.state == "stopped" else runtime.DONE

    return runtime.run(body)


def _show_outcome(outcome: mining.Outcome) -> None:
    out = Console(highlight=False, soft_wrap=True)
    out.print(visible(outcome.message), markup=False)
    if outcome.counts is not None:
        _show_counts(out, outcome.counts)


def _show_counts(out: Console, counts: MineCounts) -> None:
    negatives = counts.num_negatives + counts.num_others
    each = f", {negatives / counts.num_mined:.1f} a query" if counts.num_mined else ""
    out.print(
        f"{counts.num_mined:,} of {counts.num_queries:,} queries gave {counts.num_positives:,} positives and"
        f" {negatives:,} negatives{each}: {counts.num_rows:,} rows"
    )
    if counts.num_short:
        out.print(f"{counts.num_short:,} of them have fewer negatives than asked for")
    if counts.num_others:
        out.print(f"{counts.num_others:,} negatives were drawn from other queries")
    show_numbers(
        out, f"of {counts.num_candidates:,} candidates", {"chosen": counts.num_negatives}, {"chosen": "a negative"}
    )
    show_numbers(out, "", {rule: counts.excluded[rule] for rule in RULES if rule in counts.excluded}, RULES)
    show_numbers(out, "refused candidates, see quarantine/", counts.refused, REASONS)
    show_numbers(out, "queries left out, see completeness/", counts.left_out, LEFT_OUT)
    show_numbers(out, "positives left out", counts.dropped_positives, _DROPPED)


def show_numbers(out: Console, heading: str, numbers: Mapping[str, int], meaning: Mapping[str, str]) -> None:
    """A block of the table: how many, which rule or reason, and what that means."""
    if heading and numbers:
        out.print(heading)
    for name, number in numbers.items():
        out.print(f"{number:>14,}  {name:<24}{meaning[name]}")


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings and plan; write nothing.")] = False,
    new_run: job_config.NewRun = False,
) -> None:
    """Mine hard negatives for training from candidates or from a rerank run. Run it again to resume.

    Exit codes: 0 done, 2 bad configuration or input, 75 stopped and resumable, 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run))


if __name__ == "__main__":
    typer.run(command)
