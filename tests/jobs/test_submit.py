"""`crossenc submit` on a real Ray head with its dashboard, tokens on: runs, locks, stops, exit codes, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from crossenc.testing import tiny_checkpoint
from jobs import submit
from pipelines import status
from tests.pipelines.test_train import largest_difference, write_lists
from tests.support.collections import make_collection, part_bytes, parts, read_results
from tests.support.ray_head import CROSSENC, ROOT, Head, ray_head
from tests.support.retraining import make_world

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    pytest.importorskip("aiohttp_cors", reason="needs ray[default], whose dashboard takes jobs")
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    """A tiny model, 300 candidates as pairs, and labelled lists."""
    folder = tmp_path_factory.mktemp("data")
    tiny_checkpoint(folder / "model", max_length=512)
    collection = make_collection(folder / "in", num_queries=30)
    write_lists(folder / "train.parquet", 80)
    return SimpleNamespace(folder=folder, model=str(folder / "model"), pairs=collection.write("pairs")["candidates"])


def rerank_job(data: SimpleNamespace, folder: Path, **more: object) -> str:
    settings = {"candidates": data.pairs, "model": data.model, "output": str(folder / "out"), "shard_candidates": 100}
    return write(folder / "rerank.yaml", settings | more)


def write(path: Path, settings: object) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def details(head: Head, submission_id: str) -> dict:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/{submission_id}", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def wait_for(condition, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def submitted_id(done: subprocess.CompletedProcess) -> str:
    match = re.search(r"^submitted (\S+)$", done.stdout, re.MULTILINE)
    assert match, done.stdout + done.stderr
    return match[1]


def test_a_rerank_is_submitted_followed_and_says_where_to_look(head, data, tmp_path):
    done = head.submit("rerank", rerank_job(data, tmp_path), "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_results(tmp_path / "out")) == 300
    assert "done; see" in done.stdout  # the driver's own last line
    submission_id = submitted_id(done)
    assert submission_id == submit.submission_prefix("rerank", f"file://{tmp_path / 'out'}") + "1"
    assert (
        f"{head.address}/#/jobs/{submission_id}" in done.stdout and f"crossenc status {tmp_path / 'out'}" in done.stdout
    )
    known = details(head, submission_id)
    assert (known["status"], known["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert known["entrypoint"] == f"{sys.executable} -m jobs.rerank rerank.yaml"
    assert known["metadata"]["crossenc_verb"] == "rerank"
    assert known["metadata"]["crossenc_output"] == f"file://{tmp_path / 'out'}"
    assert len(known["metadata"]["crossenc_job_sha256"]) == 64
    assert known["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "90"
    assert head.token not in done.stdout + done.stderr + json.dumps(known)


@pytest.mark.parametrize(("ip", "is_here"), [("127.0.0.1", True), ("192.0.2.77", False)])
def test_a_head_that_has_just_begun_is_waited_for_until_it_is_listed(ip, is_here, monkeypatch):
    answers = iter([[], [], [SimpleNamespace(node_ip=ip)]])
    monkeypatch.setattr(submit, "list_nodes", lambda **_: next(answers))
    assert submit._head_is_here("http://127.0.0.1:8265") == is_here


@pytest.mark.faults
def test_a_wrong_token_is_refused_and_not_shown(head, data, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 48)
    refused = head.submit("rerank", rerank_job(data, tmp_path), "--follow", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 2 and "refuses this token" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert wrong.read_text() not in refused.stdout + refused.stderr


@pytest.mark.faults
def test_no_token_at_all_is_refused_with_what_to_set(head, data, tmp_path):
    env = {**os.environ, "RAY_ADDRESS": head.address, "HOME": str(tmp_path)}
    command = [*CROSSENC, "submit", "rerank", rerank_job(data, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.faults
def test_a_stopped_rerank_drains_ends_resumable_and_the_next_submission_ends_like_an_undisturbed_one(head, tmp_path):
    tiny_checkpoint(tmp_path / "model", max_length=512, hidden_size=256, num_layers=8)
    candidates = make_collection(tmp_path / "in", num_queries=100).write("pairs")["candidates"]
    settings = {"candidates": candidates, "model": str(tmp_path / "model"), "shard_candidates": 20}
    for name in ("oracle", "stopped"):
        write(tmp_path / f"{name}.yaml", {**settings, "output": str(tmp_path / name)})
    output, job = tmp_path / "stopped", str(tmp_path / "stopped.yaml")

    first = head.submit("rerank", job)
    assert first.returncode == 0, first.stderr
    wait_for(lambda: len(parts(output)) >= 2)
    second = head.submit("rerank", job)
    assert second.returncode == 2
    assert f"{submitted_id(first)} already works on {output} (running)" in second.stderr
    stopped = head.submit("rerank", job, "--stop")
    assert stopped.returncode == 0 and f"stopping {submitted_id(first)}" in stopped.stdout, stopped.stderr
    known = details(head, submitted_id(first))
    assert known["status"] == "STOPPED"
    before = parts(output)
    assert 2 <= len(before) < 50 and status.look(str(output)).state == "resumable"
    log = urllib.request.Request(
        f"{head.address}/api/jobs/{submitted_id(first)}/logs", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(log, timeout=10) as response:
        text = json.load(response)["logs"]
    assert "shards in work are finished first" in text and "stopped; run the same command again" in text

    resumed = head.submit("rerank", job, "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert submitted_id(resumed) == submitted_id(first)[:-1] + "2"
    assert {name: parts(output)[name] for name in before} == before
    assert head.submit("rerank", str(tmp_path / "oracle.yaml"), "--follow").returncode == 0
    assert part_bytes(output) == part_bytes(tmp_path / "oracle")


@pytest.mark.faults
def test_who_follows_a_job_that_is_stopped_gets_75(head, data, tmp_path):
    tiny_checkpoint(tmp_path / "model", max_length=512, hidden_size=256, num_layers=8)
    candidates = make_collection(tmp_path / "in", num_queries=100).write("pairs")["candidates"]
    settings = {"candidates": candidates, "model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    job = write(tmp_path / "job.yaml", {**settings, "shard_candidates": 20})
    command, env = [*CROSSENC, "submit", "rerank", job, "--follow"], {**os.environ, **head.env}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as follower:
        wait_for(lambda: len(parts(tmp_path / "out")) >= 1)
        assert head.submit("rerank", job, "--stop").returncode == 0
        out, _ = follower.communicate(timeout=60)
    assert follower.returncode == 75, out


def training(data: SimpleNamespace, folder: Path) -> dict:
    return {
        "train": str(data.folder / "train.parquet"),
        "validation": 0.2,
        "model": data.model,
        "output": str(folder / "out"),
        "batch_lists": 4,
        "epochs": 20,
        "learning_rate": 0.001,
        "checkpoint_minutes": 0,
    }


def last_step(output: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in output.glob("checkpoints/step-*.json")), default=0)


@pytest.mark.faults
def test_a_stopped_training_goes_on_from_its_checkpoint_and_ends_with_the_weights_of_an_undisturbed_one(
    head, data, tmp_path
):
    from safetensors.torch import load_file

    job = write(tmp_path / "train.yaml", training(data, tmp_path))
    assert head.submit("train", job).returncode == 0
    wait_for(lambda: last_step(tmp_path / "out") >= 3)
    stopped = head.submit("train", job, "--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    done = head.submit("train", job, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after step" in done.stdout
    (tmp_path / "plain").mkdir()
    plain = write(tmp_path / "plain" / "train.yaml", training(data, tmp_path / "plain"))
    assert head.submit("train", plain, "--follow", "--working-dir", str(tmp_path / "plain")).returncode == 0
    weights = [load_file(folder / "out" / "model" / "model.safetensors") for folder in (tmp_path, tmp_path / "plain")]
    assert largest_difference(*weights) < 1e-6


@pytest.mark.faults
def test_a_stopped_retraining_goes_on_and_promotes_its_model(head, tmp_path):
    world = make_world(tmp_path)
    world.week(1, num_lists=64)
    training = world.settings()["train"] | {"checkpoint_minutes": 0}
    job = write(tmp_path / "retrain.yaml", world.settings(train=training))
    assert head.submit("retrain", job).returncode == 0
    wait_for(lambda: bool(list((tmp_path / "out").glob("retrainings/*/trained/checkpoints/step-*.json"))))
    stopped = head.submit("retrain", job, "--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not list((tmp_path / "registry").rglob("model/config.json"))
    done = head.submit("retrain", job, "--follow")
    assert done.returncode == 0 and "promoted" in done.stdout, done.stdout + done.stderr
    again = head.submit("retrain", job, "--follow")
    assert again.returncode == 0 and "nothing new" in again.stdout, again.stdout + again.stderr


@pytest.mark.faults
def test_mining_in_several_processes_is_stopped_without_an_error(head, tmp_path):
    collection = make_collection(tmp_path / "in", num_queries=3000)
    judged = collection.pairs.groupby("query_id").first().reset_index()[["query_id", "doc_id"]]
    judged.assign(relevance=1).to_parquet(tmp_path / "qrels.parquet", index=False)
    settings = {"candidates": collection.write("pairs")["candidates"], "qrels": str(tmp_path / "qrels.parquet")}
    settings |= {"output": str(tmp_path / "out"), "workers": 2, "shard_candidates": 20}
    job = write(tmp_path / "mine.yaml", settings)
    first = head.submit("mine", job)
    wait_for(lambda: len(list((tmp_path / "out").glob("data/part-*"))) >= 1)
    assert head.submit("mine", job, "--stop").returncode == 0
    assert details(head, submitted_id(first))["status"] == "STOPPED"
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert head.submit("mine", job, "--follow").returncode == 0


@pytest.mark.faults
def test_an_evaluation_and_a_distillation_are_submitted_and_followed_to_their_end(head, data, tmp_path):
    pairs = pd.read_parquet(data.pairs)
    judged = pairs.groupby("query_id").first().reset_index()[["query_id", "doc_id"]]
    judged.assign(relevance=1).to_parquet(tmp_path / "qrels.parquet", index=False)
    collection = {"name": "words", "candidates": data.pairs, "qrels": str(tmp_path / "qrels.parquet")}
    evaluation = {"collections": [collection], "systems": [data.model], "output": str(tmp_path / "evaluated")}
    done = head.submit("evaluate", write(tmp_path / "evaluate.yaml", evaluation), "--follow")
    assert done.returncode == 0 and "nDCG@10" in done.stdout, done.stdout + done.stderr
    distillation = {"teachers": data.model, "candidates": data.pairs, "output": str(tmp_path / "distilled")}
    job = write(tmp_path / "distill.yaml", distillation | {"student_layers": 1})
    done = head.submit("distill", job, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "distilled" / "student" / "model" / "model.safetensors").exists()


@pytest.mark.faults
def test_the_exit_code_is_the_drivers_own(head, data, tmp_path):
    job = rerank_job(data, tmp_path, candidates=str(tmp_path / "nothing"))
    done = head.submit("rerank", job, "--follow")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stdout and details(head, submitted_id(done))["driver_exit_code"] == 2
    missing = head.submit("rerank", rerank_job(data, tmp_path), "--follow", "--python", "/no/such/python")
    assert missing.returncode == 127


@pytest.mark.faults
def test_a_checkout_is_shipped_as_working_directory(head, data, tmp_path):
    """The job file lies in the shipped folder, and so does the code that runs."""
    checkout = tmp_path / "checkout"
    for name in ("crossenc", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (checkout / "jobs" / "__init__.py").open("a") as file:
        file.write("print('this is the shipped code', flush=True)\n")
    job = rerank_job(data, checkout, output=str(tmp_path / "out"))
    done = head.submit("rerank", job, "--follow", "--working-dir", str(checkout))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is the shipped code" in done.stdout
    assert len(read_results(tmp_path / "out")) == 300


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"output": "out"}, {}, "relative to a folder that Ray deletes"),
        ({"outptu": "/x"}, {}, "did you mean output?"),
        ({}, {"env": ("HF_TOKEN=hf_abc",)}, "--env HF_TOKEN"),
        ({}, {"env": ("NOTHING",)}, "write NAME=VALUE"),
        ({}, {"overrides": ("storage_options.key=abcdefgh",)}, "--set storage_options"),
        ({}, {"working_dir": "."}, "outside --working-dir"),
        ({}, {"address": "head:6379"}, "give --address http://HOST:8265"),
        ({}, {"address": ""}, "give --address http://HOST:8265"),
        ({}, {"address": "http://someone:pass-phrase@head:8265"}, "give --address http://HOST:8265"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(
    tmp_path, monkeypatch, capsys, settings, words, message
):
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: SimpleNamespace(list_jobs=lambda: []))
    base = {"candidates": "/in", "model": "m", "output": "/out"}
    job = write(tmp_path / "job.yaml", base | settings)
    given = {"address": "http://127.0.0.1:1", **words}
    assert submit.run(submit.Submission(verb="rerank", job=job, **given)) == 2
    error = capsys.readouterr().err
    assert message in error and "abc" not in error and "pass-phrase" not in error


@pytest.mark.parametrize("verb", list(submit.CONFIGS))
def test_a_submission_points_to_the_status_command_where_that_knows_the_job(capsys, verb):
    submission = submit.Submission(verb=verb, job="job.yaml", address="http://head:8265")
    submit._show("crossenc-1", submission, "s3://b/out")
    shown = capsys.readouterr().out
    assert ("crossenc status s3://b/out" in shown) == (verb in ("rerank", "train", "retrain"))
    assert "ray job logs --follow --address http://head:8265 crossenc-1" in shown


def test_a_cluster_that_does_not_answer_is_said_so(tmp_path, capsys):
    job = write(tmp_path / "job.yaml", {"candidates": "/in", "model": "m", "output": "/out"})
    assert submit.run(submit.Submission(verb="rerank", job=job, address="http://127.0.0.1:1")) == 1
    assert "the cluster at http://127.0.0.1:1 did not do as asked" in (error := capsys.readouterr().err)
    assert "look at its dashboard, or at the tunnel to it" in error
