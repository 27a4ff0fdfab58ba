"""The retraining job: `crossenc retrain job.yaml`, or `python -m jobs.retrain job.yaml`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs import cluster, runtime
from jobs import config as job_config
from pipelines.progress import visible
from pipelines.retrain_config import RetrainConfig

if TYPE_CHECKING:
    from pipelines.retrain import Outcome

#: Exit code: the candidate was not promoted, by the gate's rules.
REFUSED = 3
_CODES = {
    "promoted": runtime.DONE,
    "nothing new": runtime.DONE,
    "refused": REFUSED,
    "void": runtime.RESUMABLE,
    "stopped": runtime.RESUMABLE,
}


def run(
    job: str,
    overrides: tuple[str, ...] = (),
    *,
    dry_run: bool = False,
    new_run: bool = False,
    refused_ok: bool = False,
) -> int:
    """Runs the job file and returns the exit code. With `refused_ok` a refusal is 0, too."""

    def body(stop: runtime.StopSignal) -> int:
        # Imported here because it imports torch, which --help need not wait for.
        from pipelines.retrain import describe, needs, resolve, retrain

        config = job_config.load(RetrainConfig, job, overrides)
        if dry_run:
            job_config.show(config, describe(resolve(config)))
            return runtime.DONE
        with cluster.disconnected_at_end():
            outcome = retrain(
                config,
                connect=lambda: cluster.connect(config.ray_address, lambda cores: needs(config, cores), stop),
                stream=sys.stderr,
                should_stop=stop,
                new_run=new_run,
            )
        _show_outcome(outcome)
        return runtime.DONE if refused_ok and outcome.state == "refused" else _CODES[outcome.state]

    return runtime.run(body)


def _show_outcome(outcome: "Outcome") -> None:
    out = Console(highlight=False, soft_wrap=True)
    if outcome.decision is not None:
        for check in outcome.decision.checks:
            out.print(f"{'holds' if check.holds else 'fails'}  {visible(check.words)}", markup=False)
    out.print(f"{outcome.state}: {visible(outcome.message)}", markup=False)


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings and steps; write nothing.")] = False,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Give an unfinished retraining up and begin another one.")
    ] = False,
    refused_ok: Annotated[
        bool, typer.Option("--refused-ok", help="Exit with 0 where the gate refuses, for schedulers that try again.")
    ] = False,
) -> None:
    """Train on new labels, compare with the version in use, and promote what is better. Run it again to resume.

    Exit codes: 0 promoted or nothing new, 3 refused by the gate, 2 bad configuration or input, with labels that give no
    list to train on, 75 stopped or overtaken by another promotion (run it again), 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run, refused_ok=refused_ok))


if __name__ == "__main__":
    typer.run(command)
