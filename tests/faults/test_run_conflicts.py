"""Two runs that want one output, runs that come back changed, and what they may tell: nothing secret.

Drivers that work are processes with a Ray of their own; a run that is refused before it needs one runs right here.
"""

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cluster, runtime
from jobs import config as job_config
from jobs import rerank as rerank_job
from pipelines import plan as plans
from pipelines import status, storage
from pipelines.config import RerankConfig
from pipelines.metrics import run_tag
from pipelines.rerank import rerank
from pipelines.storage import locate
from tests.support import rerank_driver
from tests.support.collections import Collection, make_collection, part_bytes, parts, visible_files, write_job
from tests.support.models import StumblingModel
from tests.support.rerank_driver import Drivers, drivers

pytestmark = pytest.mark.timeout(900)
SLOW = ("--seconds-per-pair", "0.025")
SHARD = {"shard_candidates": 20, "scoring": {"cpus_per_actor": 1}}
NUM_SHARDS = 10


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return make_collection(tmp_path_factory.mktemp("conflicts") / "in")


@pytest.fixture(scope="module")
def settings(collection: Collection) -> dict[str, object]:
    """Everything in a job but its output. Written once: a file that is written again is another input."""
    return collection.write("pairs") | SHARD


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The output of a run that nothing disturbs."""
    return rerank_driver.undisturbed(make_job(tmp_path_factory.mktemp("oracle"), settings))


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run here must end before it asks for a cluster."""

    def connect(*args: object) -> int:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(cluster, "connect", connect)


def make_job(folder: Path, settings: dict[str, object], **more: object) -> str:
    return write_job(folder / "job.yaml", **{"output": str(folder / "out"), **settings, **more})


@pytest.mark.faults
def test_a_second_run_is_refused_while_the_first_works_and_takes_over_when_it_is_dead(
    settings, undisturbed, starter, tmp_path, no_ray, capsys
):
    job, output = make_job(tmp_path, settings), tmp_path / "out"
    first = starter.start(job, "--seconds-per-pair", "0.1")
    first.wait_until(lambda: len(parts(output)) >= 1, 200)
    assert rerank_job.run(job, model=StumblingModel()) == runtime.BAD_INPUT
    error = capsys.readouterr().err
    assert f"another run is active on file://{output} (host {os.uname().nodename}, pid {first.pid})" in error
    assert "let it finish or stop it" in error
    before = parts(output)
    first.wait_until(lambda: len(parts(output)) > len(before), 60)  # the first run works on
    first.kill9()
    second = starter.start(job)
    assert second.wait(200) == 0, second.tail()
    assert "looking whether it is still alive" not in second.stderr_path.read_text()
    assert part_bytes(output) == part_bytes(undisturbed)


@pytest.mark.faults
def test_a_frozen_run_is_taken_over_and_does_no_harm_when_it_comes_back(settings, undisturbed, starter, tmp_path):
    job, output = make_job(tmp_path, settings), tmp_path / "out"
    quick = ("--constant", "pipelines.lease.HEARTBEAT_SECONDS=1", "--constant", "pipelines.lease.TAKEOVER_SECONDS=6")
    zombie = starter.start(job, "--seconds-per-pair", "0.1", *quick)
    zombie.wait_until(lambda: len(parts(output)) >= 1, 200)
    zombie.process.send_signal(signal.SIGSTOP)
    before = parts(output)
    second = starter.start(job, *quick)
    assert second.wait(200) == 0, second.tail()
    assert "looking whether it is still alive" in second.stderr_path.read_text()
    finished = {path: (output / path).read_bytes() for path in visible_files(output)}
    zombie.process.send_signal(signal.SIGCONT)
    assert zombie.wait(120) == runtime.RESUMABLE, zombie.tail()
    assert f"(pid {second.pid}) took this output over; this one stops" in zombie.tail()
    assert {name: parts(output)[name] for name in before} == before
    assert part_bytes(output) == part_bytes(undisturbed)
    # The zombie's last heartbeat and its journal lie apart from the other's, under its own epoch.
    changed = {path for path in visible_files(output) if (output / path).read_bytes() != finished.get(path)}
    assert changed <= {path for path in visible_files(output) if path.startswith("_run/") and "-000001" in path}
    assert status.look(str(output)).state == "finished"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": 3}, "option top_k: was null, is 3"),
        ({"scoring": {"cpus_per_actor": 1, "max_length": 64}}, "option max_length: was null, is 64"),
        ({"trec_run": True}, "option trec_run: was false, is true"),
    ],
)
def test_a_changed_option_is_refused_and_named(settings, undisturbed, tmp_path, no_ray, capsys, change, named):
    before = part_bytes(undisturbed)
    job = make_job(tmp_path, settings, output=str(undisturbed), **change)
    assert rerank_job.run(job, model=StumblingModel()) == runtime.BAD_INPUT
    error = capsys.readouterr().err
    assert named in error and "--new-run" in error
    assert part_bytes(undisturbed) == before


def test_a_changed_model_is_refused_and_named(settings, undisturbed, tmp_path, no_ray, capsys):
    job = make_job(tmp_path, settings, output=str(undisturbed))
    assert rerank_job.run(job, model=StumblingModel(max_length=64)) == runtime.BAD_INPUT
    assert "model stumbling: was max_length 512, is max_length 64" in capsys.readouterr().err


def test_a_changed_input_is_refused_and_named(collection, settings, undisturbed, tmp_path, no_ray, capsys):
    file = Path(str(settings["candidates"])) / "pairs.parquet"
    original, times = file.read_bytes(), file.stat()
    try:
        collection.pairs.head(100).to_parquet(file, index=False)
        job = make_job(tmp_path, settings, output=str(undisturbed))
        assert rerank_job.run(job, model=StumblingModel()) == runtime.BAD_INPUT
        assert f"input file://{file}: was {len(original)} bytes" in capsys.readouterr().err
    finally:
        file.write_bytes(original)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_deletions", [0, 1, 2, 3])
def test_a_new_run_that_dies_while_it_deletes_the_old_one_leaves_a_run_to_resume(
    settings, undisturbed, tmp_path, no_ray, monkeypatch, num_deletions
):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    real, done = storage.delete, []

    def delete(locations):
        if len(done) == num_deletions:
            raise KeyboardInterrupt
        done.append(real(locations))

    job = make_job(tmp_path, settings)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.rerank.delete", delete)
        assert rerank_job.run(job, model=StumblingModel(), new_run=True) == runtime.RESUMABLE
    config = job_config.load(RerankConfig, job)
    rerank(config, connect=lambda: 2, stream=io.StringIO(), model=StumblingModel())
    assert part_bytes(output) == part_bytes(undisturbed)
    assert (output / "_SUCCESS").exists()


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "env/secret+of/the+machine0123456789",
    "AWS_SESSION_TOKEN": "env-session-token-0123456789",
    "HF_TOKEN": "hf_env0123456789abcdefgh",
}
OPTION_SECRET = "option/secret+of/the+job0123456789"


def leaks(*places: Path) -> list[str]:
    """The files below `places` that hold one of the secrets."""
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    words = [secret.encode() for secret in (*SECRETS.values(), OPTION_SECRET)]
    return [str(file) for file in files if any(word in file.read_bytes() for word in words)]


def test_secrets_of_job_and_environment_are_in_nothing_that_a_run_writes_nor_in_json_logs(settings, starter, tmp_path):
    options = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": OPTION_SECRET}
    job = make_job(tmp_path, settings, storage_options=options)
    driver = starter.start(job, CROSSENC_LOG_FORMAT="json", **SECRETS)
    assert driver.wait(200) == 0, driver.tail()
    logs = [file for kind in ("*.log", "*.err", "*.out") for file in starter.ray_folder.rglob(kind)]
    assert logs
    assert leaks(tmp_path / "out", driver.stdout_path, driver.stderr_path, *logs) == []

    run = run_tag(plans.load(locate(str(tmp_path / "out"))).fingerprint)
    told = [json.loads(line) for line in driver.stderr_path.read_text().splitlines()]
    assert {event["event"] for event in told} == {"progress"}
    assert all(event["run"] == run and event["time"] for event in told)
    lines = [line for log in logs if log.suffix == ".err" for line in log.read_text().splitlines()]
    worked = [json.loads(line) for line in lines if line.startswith("{")]
    for stage in ("read", "score", "write"):
        assert len({event["shard"] for event in worked if event["stage"] == stage}) == NUM_SHARDS, stage
    assert all((event["run"], event["level"]) == (run, "INFO") for event in worked)


@pytest.mark.parametrize(
    "text",
    [
        "storage_options: {secret: %s",  # a bracket that is never closed
        "storage_options:\n  secret: %s: and more",
        "storage_options: %s",
        "storage_options:\n  - %s",
        "candidates: [1, 2]\nstorage_option: {secret: %s}",
        "candidates: s3://key:%s@bucket/candidates\nmodel: m\noutput: out",
        "candidates: s3://bucket/candidates\nmodel: m\noutput: s3://key:%s@bucket/out",
    ],
)
def test_a_broken_job_file_does_not_show_its_secrets(tmp_path, no_ray, capsys, text):
    job = tmp_path / "job.yaml"
    job.write_text(text % OPTION_SECRET)
    assert rerank_job.run(str(job)) == runtime.BAD_INPUT
    shown = "".join(capsys.readouterr())
    assert shown.startswith("error: ") and OPTION_SECRET not in shown and "secret+of" not in shown


@pytest.mark.parametrize("override", ["storage_options.secret=[%s", "storage_options.secret.deeper.=%s", "output.x=%s"])
def test_a_broken_override_does_not_show_its_secrets(tmp_path, no_ray, capsys, override):
    job = tmp_path / "job.yaml"
    job.write_text("candidates: c\nmodel: m\noutput: out\n")
    assert rerank_job.run(str(job), (override % OPTION_SECRET,)) == runtime.BAD_INPUT
    shown = "".join(capsys.readouterr())
    assert shown.startswith("error: --set") and OPTION_SECRET not in shown


def test_a_dry_run_shows_the_settings_without_their_secrets(settings, tmp_path, no_ray, capsys):
    job = make_job(tmp_path, settings, storage_options={"key": "AKIAIOSFODNN7EXAMPLE", "secret": OPTION_SECRET})
    assert rerank_job.run(job, dry_run=True, model=StumblingModel()) == runtime.DONE
    shown = "".join(capsys.readouterr())
    assert "secret: '***'" in shown and OPTION_SECRET not in shown
    assert not (tmp_path / "out").exists()
