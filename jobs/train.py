"""The training job: `crossenc train job.yaml`, or `python -m jobs.train job.yaml`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs import cluster, runtime
from jobs import config as job_config
from pipelines.progress import visible
from pipelines.train_config import TrainConfig

if TYPE_CHECKING:
    from pipelines.train import Outcome
    from pipelines.train_finish import Finished


def run(job: str, overrides: tuple[str, ...] = (), *, dry_run: bool = False, new_run: bool = False) -> int:
    """Runs the job file and returns the exit code."""

    def body(stop: runtime.StopSignal) -> int:
        # Imported here because it imports torch, which --help need not wait for.
        from pipelines.train import describe, needs, resolve, train

        config = job_config.load(TrainConfig, job, overrides)
        if dry_run:
            job_config.show(config, describe(resolve(config)))
            return runtime.DONE
        with cluster.disconnected_at_end():
            outcome = train(
                config,
                connect=lambda: cluster.connect(config.ray_address, lambda cores: needs(config, cores), stop),
                stream=sys.stderr,
                should_stop=stop,
                new_run=new_run,
            )
        _show_outcome(outcome)
        return runtime.RESUMABLE if outcome.state == "stopped" else runtime.DONE

    return runtime.run(body)


def _show_outcome(outcome: "Outcome") -> None:
    out = Console(highlight=False, soft_wrap=True)
    out.print(visible(outcome.message), markup=False)
    if outcome.result is not None:
        show_result(out, outcome.result)


def show_result(out: Console, result: "Finished") -> None:
    """Prints what a run came to."""
    out.print(f"the model is that of step {result.best_step:,} of {result.num_steps:,}")
    if result.value is not None:
        before = "" if result.before is None else f", {result.before:.4f} before training"
        out.print(f"{result.measure} {result.value:.4f}{before}")


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings and data; write nothing.")] = False,
    new_run: job_config.NewRun = False,
) -> None:
    """Train a cross-encoder on labelled lists. Run it again to resume.

    Exit codes: 0 done, 2 bad configuration or input, 75 stopped and resumable, 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run))


if __name__ == "__main__":
    typer.run(command)
