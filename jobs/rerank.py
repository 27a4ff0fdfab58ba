"""The rerank job: `crossenc rerank job.yaml`, or `python -m jobs.rerank job.yaml`."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from jobs import cluster, runtime
from jobs import config as job_config
from pipelines.config import RerankConfig
from pipelines.estimate import estimate
from pipelines.execute import needs
from pipelines.model import Model
from pipelines.progress import visible
from pipelines.rerank import Outcome, rerank


def run(
    job: str,
    overrides: tuple[str, ...] = (),
    *,
    dry_run: bool = False,
    new_run: bool = False,
    model: Model | None = None,
) -> int:
    """Runs the job file and returns the exit code. `model` replaces the one that the file names."""

    def body(stop: runtime.StopSignal) -> int:
        config = job_config.load(RerankConfig, job, overrides)
        if dry_run:
            job_config.show(config, estimate(config, model).lines())
            return runtime.DONE
        with cluster.disconnected_at_end():
            outcome = rerank(
                config,
                connect=lambda: cluster.connect(config.ray_address, lambda cores: needs(config, cores), stop),
                stream=sys.stderr,
                should_stop=stop,
                model=model,
                new_run=new_run,
            )
        _show_outcome(outcome)
        return runtime.RESUMABLE if outcome.state == "stopped" else runtime.DONE

    return runtime.run(body)


def _show_outcome(outcome: Outcome) -> None:
    out = Console(highlight=False, soft_wrap=True)
    out.print(visible(outcome.message), markup=False)
    if outcome.counts is not None:
        counts = outcome.counts
        refused = sum(counts.refused.values())
        out.print(
            f"{counts.num_queries:,} queries, {counts.num_candidates:,} candidates:"
            f" {counts.num_scored:,} scored, {refused:,} refused, {counts.num_results:,} in the results"
        )
        for reason, number in counts.refused.items():
            out.print(f"  refused {number:,}: {reason}", markup=False)


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, plan and an estimate; write nothing.")
    ] = False,
    new_run: job_config.NewRun = False,
) -> None:
    """Rerank candidates with a cross-encoder, exactly once. Run it again to resume.

    Exit codes: 0 done, 2 bad configuration or input, 75 stopped and resumable, 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run))


if __name__ == "__main__":
    typer.run(command)
