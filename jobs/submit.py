"""The submit command: `crossenc submit rerank job.yaml`, any job as a Ray job of a cluster that is there already.

It talks to the cluster's dashboard and knows nothing of what a job does. A submission's id follows from verb and
output, so it is the lock of a run on its cluster; across clusters the lease in the output holds.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import typer
from pydantic import BaseModel
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from rich.console import Console

from crossenc.errors import ConfigError, CrossEncError, RunConflictError
from jobs import config as job_config
from jobs import runtime
from pipelines.config import RerankConfig
from pipelines.distill_config import DistillConfig
from pipelines.evaluation_config import EvaluateConfig
from pipelines.mine_config import MineConfig
from pipelines.progress import visible
from pipelines.retrain_config import RetrainConfig
from pipelines.storage import info, locate, read_bytes, redact, redact_options
from pipelines.train_config import TrainConfig

CONFIGS: dict[str, type[BaseModel]] = {
    "rerank": RerankConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "mine": MineConfig,
    "distill": DistillConfig,
    "retrain": RetrainConfig,
}
#: From SIGTERM to SIGKILL a job has its drain_seconds, and these to end in: Ray lets go, leases are released.
ENDING_SECONDS = 60
#: A cluster that has just begun answers before it lists its head node.
HEAD_LISTED_SECONDS = 10
#: Never shipped with a working directory, beside what its .gitignore names.
EXCLUDES = ["/.git/", "/.venv/", "/data/", "__pycache__/"]
#: The jobs whose output `crossenc status` shows.
_WITH_STATUS = ("rerank", "train", "retrain")
_ALIVE = (JobStatus.PENDING, JobStatus.RUNNING)
_POLL_SECONDS = 0.5
#: How long a cluster that is being followed may be silent.
_SILENT_SECONDS = 60.0

Verb = StrEnum("Verb", list(CONFIGS))  # type: ignore[misc]
Then = Literal["leave", "follow", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is to run where. `job` is the job file, `python` the interpreter on the head, chosen where it is empty."""

    verb: str
    job: str
    address: str
    overrides: tuple[str, ...] = ()
    new_run: bool = False
    working_dir: str | None = None
    env: tuple[str, ...] = ()
    python: str = ""


def run(submission: Submission, then: Then = "leave") -> int:
    """Submits the job, or stops it, and returns the exit code: of the job itself where it is followed."""

    def body(_: runtime.StopSignal) -> int:
        for override in submission.overrides:
            if override.strip().startswith("storage_options"):
                raise ConfigError("--set storage_options would show in the dashboard; write it into the job file")
        config = job_config.load(CONFIGS[submission.verb], submission.job, submission.overrides)
        prefix = submission_prefix(submission.verb, _output(config))
        with _explained(submission.address):
            client = _client(submission.address)
            if then == "stop":
                return _stop(client, prefix, submission)
            submission_id = _submit(client, prefix, submission, config)
            return _follow(client, submission_id, submission) if then == "follow" else runtime.DONE

    return runtime.run(body)


def submission_prefix(verb: str, output: str) -> str:
    """What the ids of all submissions of a run begin with; the attempt's number follows."""
    return f"crossenc-{verb}-{hashlib.sha256(f'{verb} {output}'.encode()).hexdigest()[:12]}-"


def _output(config: Any) -> str:
    """The output's URI. A relative path is refused: on the cluster it would lie in a folder that Ray deletes."""
    output: str = config.output
    if "://" not in output and not os.path.isabs(output):
        raise ConfigError(
            f"output {output!r} is relative to a folder that Ray deletes after the job; give a URI, or an absolute path"
            " that all nodes share"
        )
    return locate(output, config.storage_options).uri


def _client(address: str) -> JobSubmissionClient:
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", address):
        raise ConfigError(
            f"{redact(address)!r} is not the address of a dashboard; give --address http://HOST:8265, or set"
            " RAY_ADDRESS to that"
        )
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray takes them for more than the address that it is given
        os.environ.pop(name, None)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # it tells of each upload
    return JobSubmissionClient(address.rstrip("/"))


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Says in words what is wrong between here and the cluster."""
    try:
        yield
    except AuthenticationError:
        raise ConfigError(
            f"the cluster at {address} refuses this token, or the lack of one: set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the cluster's token"
        ) from None
    except CrossEncError:
        raise
    except (OSError, RuntimeError, ValueError, aiohttp.ClientError, RayStateApiException) as error:
        # Those of requests are OSErrors.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CrossEncError(
            f"the cluster at {address} did not do as asked: {redact(reason)[:300]}; look at its dashboard, or at the"
            " tunnel to it"
        ) from None


# --- submitting


def _submit(client: JobSubmissionClient, prefix: str, submission: Submission, config: Any) -> str:
    attempts = _attempts(client, prefix)
    alive = [number for number, status in attempts.items() if status in _ALIVE]
    if alive:
        raise RunConflictError(
            f"{prefix}{alive[0]} already works on {config.output} ({attempts[alive[0]].lower()}); let it finish, or"
            f" stop it: {_stop_command(submission)}"
        )
    submission_id = f"{prefix}{max(attempts, default=0) + 1}"
    with tempfile.TemporaryDirectory(prefix="crossenc-submit-") as scratch:
        working_dir, job = _shipped(submission, Path(scratch))
        runtime_env: dict[str, Any] = {"env_vars": _env_vars(submission, config)}
        if working_dir is not None:
            runtime_env |= {"working_dir": str(working_dir), "excludes": EXCLUDES}
        try:
            client.submit_job(
                entrypoint=_entrypoint(submission, job, config),
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=_metadata(submission, config),
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            raise RunConflictError(
                f"{submission_id} was submitted by someone else at the same moment; follow that with"
                f" {_log_command(submission, submission_id)}, or wait for its end and submit again"
            ) from None
    _show(submission_id, submission, config.output)
    return submission_id


def _attempts(client: JobSubmissionClient, prefix: str) -> dict[int, JobStatus]:
    """The state of every submission of the run that the cluster knows, by its number."""
    return {
        int(match[1]): job.status
        for job in client.list_jobs()
        if (match := re.fullmatch(rf"{re.escape(prefix)}(\d+)", job.submission_id or ""))
    }


def _shipped(submission: Submission, scratch: Path) -> tuple[Path | None, str]:
    """The folder that goes to the cluster, None where none does, and the job file as it is named there."""
    is_local = "://" not in submission.job
    if submission.working_dir is None:
        if not is_local:
            return None, submission.job
        name = Path(submission.job).name
        shutil.copyfile(submission.job, scratch / name)
        return scratch, name
    folder = Path(submission.working_dir).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {submission.working_dir} is no folder")
    if not is_local:
        return folder, submission.job
    job = Path(submission.job).resolve()
    if not job.is_relative_to(folder):
        raise ConfigError(
            f"{submission.job} lies outside --working-dir, which is what goes to the cluster: put it there"
        )
    return folder, str(job.relative_to(folder))


def _env_vars(submission: Submission, config: Any) -> dict[str, str]:
    """The environment of driver and workers. It can be read in the dashboard, so it holds no secrets."""
    drain_seconds: float = getattr(config, "drain_seconds", 30.0)
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(drain_seconds) + ENDING_SECONDS)}
    for setting in submission.env:
        name, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {name!r}: write NAME=VALUE")
        if redact_options({name: value})[name] != value:
            raise ConfigError(
                f"--env {name}: everybody who sees the dashboard would see it; let the nodes have it from a secret"
            )
        env_vars[name] = value
    return env_vars


def _metadata(submission: Submission, config: Any) -> dict[str, str]:
    file = info(locate(submission.job))
    assert file is not None, "it was read a moment ago"
    return {
        "crossenc_verb": submission.verb,
        "crossenc_output": _output(config),
        "crossenc_job_sha256": hashlib.sha256(read_bytes(file.location)).hexdigest(),
        "crossenc_version": version("crossenc"),
    }


def _entrypoint(submission: Submission, job: str, config: Any) -> str:
    python = submission.python or (sys.executable if _head_is_here(submission.address) else "python")
    words = [python, "-m", f"jobs.{submission.verb}", job]
    words += [word for override in submission.overrides for word in ("--set", override)]
    if getattr(config, "ray_address", None):  # the job's cluster is the one that it is submitted to
        words += ["--set", "ray_address=null"]
    return shlex.join(words + ["--new-run"] * submission.new_run)


def _head_is_here(address: str) -> bool:
    """Whether the head runs on this machine: a tunnel to another one has a local address, too, but not its node."""
    deadline = time.monotonic() + HEAD_LISTED_SECONDS
    heads = [("is_head_node", "=", "True")]
    while not (nodes := list_nodes(address=address, filters=heads)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for node in nodes:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((node.node_ip, 0))
            return True
    return False


def _show(submission_id: str, submission: Submission, output: str) -> None:
    rows = {"dashboard": f"{submission.address.rstrip('/')}/#/jobs/{submission_id}"}
    if submission.verb in _WITH_STATUS:
        rows["progress"] = shlex.join(["crossenc", "status", output])
    rows |= {"log": _log_command(submission, submission_id), "stop": _stop_command(submission)}
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"submitted {submission_id}", markup=False)
    for name, value in rows.items():
        out.print(f"  {name:<10} {visible(value)}", markup=False)


def _log_command(submission: Submission, submission_id: str) -> str:
    return shlex.join(["ray", "job", "logs", "--follow", "--address", submission.address, submission_id])


def _stop_command(submission: Submission) -> str:
    words = ["crossenc", "submit", submission.verb, submission.job, "--address", submission.address]
    words += [word for override in submission.overrides for word in ("--set", override)]
    return shlex.join([*words, "--stop"])


# --- following and stopping


def _follow(client: JobSubmissionClient, submission_id: str, submission: Submission) -> int:
    """Shows the job's log until it ends; returns its driver's exit code, RESUMABLE where it was stopped."""
    try:
        _tail(client, submission_id)
        details = client.get_job_info(submission_id)
    except KeyboardInterrupt:
        sys.stderr.write(f"no longer following {submission_id}, which goes on; stop it: {_stop_command(submission)}\n")
        return runtime.RESUMABLE
    sys.stderr.write(f"{submission_id} {details.status.lower()}\n")
    if details.status == JobStatus.STOPPED:
        return runtime.RESUMABLE
    code = details.driver_exit_code
    if code is None:  # the driver never ran, or died with its supervisor
        raise CrossEncError(
            f"{submission_id} did not run to an end: {redact(str(details.message))[:1000]}; submit it again to go on"
        )
    return code if 0 <= code < 256 else runtime.FAILED


def _tail(client: JobSubmissionClient, submission_id: str) -> None:
    """Writes the log to stdout until the job has ended. A connection that breaks is made again."""
    num_shown = 0

    async def show() -> None:
        nonlocal num_shown
        num_seen = 0
        async for text in client.tail_job_logs(submission_id):
            fresh = text[max(0, num_shown - num_seen) :]  # a new connection tells everything again
            num_seen += len(text)
            num_shown = max(num_shown, num_seen)
            sys.stdout.write(redact(fresh))
            sys.stdout.flush()

    deadline = time.monotonic() + _SILENT_SECONDS
    while True:
        try:
            asyncio.run(show())
            if client.get_job_info(submission_id).status not in _ALIVE:
                return
            deadline = time.monotonic() + _SILENT_SECONDS
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if isinstance(error, AuthenticationError) or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _stop(client: JobSubmissionClient, prefix: str, submission: Submission) -> int:
    """Stops the run's submission that is alive, and waits until it has ended."""
    alive = [f"{prefix}{number}" for number, status in _attempts(client, prefix).items() if status in _ALIVE]
    out = Console(highlight=False, soft_wrap=True)
    if not alive:
        out.print("nothing to stop: no submission of this run is alive", markup=False)
    for submission_id in alive:
        out.print(f"stopping {submission_id}: what it has in work is finished first", markup=False)
        client.stop_job(submission_id)
        while client.get_job_info(submission_id).status in _ALIVE:
            time.sleep(_POLL_SECONDS)
        again = [word for word in shlex.split(_stop_command(submission)) if word != "--stop"]
        out.print(f"stopped; go on with: {shlex.join(again)}", markup=False)
    return runtime.DONE


def command(  # noqa: PLR0913 - the flags of a command
    verb: Annotated[Verb, typer.Argument(help="The job.", show_default=False)],
    job: job_config.JobFile,
    address: Annotated[
        str,
        typer.Option(
            help="The cluster's dashboard, as http://HOST:8265.", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"]
        ),
    ] = "",
    set_: job_config.Overrides = None,
    new_run: job_config.NewRun = False,
    working_dir: Annotated[
        str | None,
        typer.Option(help="A folder to ship, as . for this checkout's code; by default the job file alone goes."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", help="NAME=VALUE for driver and workers, not for secrets. Repeatable.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="The interpreter on the head; by default this one if the head is here, else python.")
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Show the log, and exit with the job's exit code.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the run's submission instead; it can be resumed.")] = False,
) -> None:
    """Submit a job to a Ray cluster. Submit it again to resume.

    A cluster with tokens wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN. Exit codes: 0 submitted,
    2 bad configuration or another submission of the run alive, 1 anything else; with --follow those of the job.
    """
    submission = Submission(
        verb=str(verb),
        job=job,
        address=address,
        overrides=tuple(set_ or ()),
        new_run=new_run,
        working_dir=working_dir,
        env=tuple(env or ()),
        python=python,
    )
    raise typer.Exit(run(submission, "stop" if stop else "follow" if follow else "leave"))
