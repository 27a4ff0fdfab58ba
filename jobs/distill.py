"""The distillation job: `crossenc distill job.yaml`, or `python -m jobs.distill job.yaml`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from crossenc.distillation import LEFT_OUT, RULES
from jobs import cluster, runtime
from jobs import config as job_config
from jobs.mine import show_numbers
from jobs.train import show_result
from pipelines.distill_config import DistillConfig
from pipelines.progress import visible
from pipelines.schemas import REASONS

if TYPE_CHECKING:
    from pipelines.distill import Outcome
    from pipelines.distill_lists import ListCounts


def run(job: str, overrides: tuple[str, ...] = (), *, dry_run: bool = False, new_run: bool = False) -> int:
    """Runs the job file and returns the exit code."""

    def body(stop: runtime.StopSignal) -> int:
        # Imported here because it imports torch, which --help need not wait for.
        from pipelines.distill import describe, distill, needs

        config = job_config.load(DistillConfig, job, overrides)
        if dry_run:
            job_config.show(config, describe(config))
            return runtime.DONE
        stop.drain()
        with cluster.disconnected_at_end():
            outcome = distill(
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
    if outcome.lists is not None:
        _show_lists(out, outcome.lists)
    if outcome.kept_layers is not None:
        out.print(f"the student began as the first teacher's layers {', '.join(map(str, outcome.kept_layers))}")
    if outcome.student is not None:
        show_result(out, outcome.student)


def _show_lists(out: Console, counts: "ListCounts") -> None:
    each = f", {counts.num_documents / counts.num_lists:.1f} a list" if counts.num_lists else ""
    out.print(
        f"{counts.num_lists:,} of {counts.num_queries:,} queries gave lists of {counts.num_documents:,} documents{each}"
    )
    if counts.num_short:
        out.print(f"{counts.num_short:,} lists have fewer documents than asked for")
    if counts.num_positives or counts.num_lost_positives:
        out.print(f"{counts.num_positives:,} judged positives are in them, {counts.num_lost_positives:,} are not")
    chosen = {"chosen": counts.num_documents}
    show_numbers(out, f"of {counts.num_candidates:,} candidates", chosen, {"chosen": "in a list"})
    show_numbers(out, "", {rule: counts.excluded[rule] for rule in RULES if rule in counts.excluded}, RULES)
    show_numbers(out, "refused candidates, see lists/quarantine/", counts.refused, REASONS)
    show_numbers(out, "queries left out, see lists/completeness/", counts.left_out, LEFT_OUT)


def command(
    job: job_config.JobFile,
    set_: job_config.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings and an estimate; write nothing.")] = False,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Delete all stages in the output folder and start over.")
    ] = False,
) -> None:
    """Train a small cross-encoder to score like larger ones. Run it again to resume.

    Exit codes: 0 done, 2 bad configuration or input, 75 stopped and resumable, 1 anything else.
    """
    raise typer.Exit(run(job, tuple(set_ or ()), dry_run=dry_run, new_run=new_run))


if __name__ == "__main__":
    typer.run(command)
