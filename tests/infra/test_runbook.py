"""infra/README.md is true: figures are the code's, messages exist, commands run or name what is there."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import boto3
import pandas as pd
import pytest
from typer.testing import CliRunner

from crossenc.testing import tiny_checkpoint
from jobs.cli import app
from pipelines.estimate import projection
from pipelines.plan import default_shard_candidates
from pipelines.retrain import retrain
from tests.infra.manifests import INFRA, ROOT, all_manifests
from tests.pipelines.test_rerank import run as rerank
from tests.support.collections import make_collection
from tests.support.ray_head import ray_head
from tests.support.retraining import quick_world

README = (INFRA / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
#: Commands for a cluster that is there already, in this README and in that of the project.
SUBMITTING = [
    line
    for text in (README, (ROOT / "README.md").read_text())
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    if "crossenc submit" in block
    for line in block.splitlines()
]
KINDS = ("docker", "helm", "aws", "kubectl", "ray", "export", "crossenc", "until")


def table(heading):
    """The rows of the table under a header row, as lists of cells."""
    body = README.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in body]


def test_the_sizing_example_is_what_dry_run_computes():
    figures = {what.partition(":")[0]: float(figure.replace(",", "")) for what, figure in table("| what | figure |")}
    pairs, each, scorers = (figures[k] for k in ("pairs", "pairs a second of one scorer", "scorers, and nodes"))
    whole = projection(int(pairs), each, int(scorers))
    assert whole.pairs_per_second == figures["rate, pairs a second"]
    assert round(whole.hours, 2) == figures["hours"]
    price = figures["price of the cluster an hour"]
    assert price == round(32 * 0.53 + 0.24, 2) and scorers == 32
    assert round(whole.cost(price), 2) == figures["cost"]
    shard = default_shard_candidates(int(pairs))
    assert -(-int(pairs) // shard) == figures["shards"]
    assert round(shard / each, 1) == figures["seconds of one scorer for a shard"]


def test_the_job_file_of_the_example_has_its_figures():
    text = (INFRA / "kuberay" / "overlays" / "gpu-prod" / "rerank" / "rerank.yaml").read_text()
    assert "actors: 32" in text and "price_per_hour: 17.20" in text


def test_every_message_in_the_table_of_symptoms_is_one_of_the_program():
    sources = [
        path.read_text() for package in ("crossenc", "pipelines", "jobs") for path in (ROOT / package).rglob("*.py")
    ]
    program = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(sources))
    quoted = 0
    for symptom, *_ in table("| symptom | evidence | first experiment |"):
        if "RayJob" in symptom or "pods refused" in symptom:  # Kubernetes' own
            continue
        for message in re.findall(r"`([^`]+)`", symptom):
            assert message in program, message
            quoted += 1
    assert quoted >= 15


def test_exit_codes_of_symptoms_are_those_of_the_program():
    from jobs import runtime

    named = {int(code) for row in table("| symptom |") for code in re.findall(r"exit (\d+)", row[0])}
    assert named == {runtime.FAILED, runtime.BAD_INPUT, runtime.RESUMABLE}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_whole_and_names_files_that_exist(command):
    words = shlex.split(command)
    assert words[0] in KINDS
    for path in re.findall(r"(?:file://)?(infra/[\w./-]+)", command):
        assert (ROOT / path).exists(), path
    if words[:2] == ["kubectl", "apply"] and "-k" in words:
        assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()
    if words[:2] == ["docker", "build"]:
        versions = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
        own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        variant = re.search(r"VARIANT=(\w+)", command)[1]
        assert f"/crossenc-{variant}:{own}-ray{versions} ." in command
        assert (
            f'"$VARIANT" = {variant}' in (INFRA / "Containerfile").read_text()
            or f"!= {variant}" in (INFRA / "Containerfile").read_text()
        )


def test_every_folder_of_infra_is_explained_and_every_overlay_is_used():
    explained = {cell for row in table("| folder | what it is |") for cell in re.findall(r"`([^`]+)`", row[0])}
    assert {name.split("/")[0] for name in explained} == {path.name for path in INFRA.iterdir()} - {"README.md"}
    for overlay in (INFRA / "kuberay" / "overlays").glob("*/*/kustomization.yaml"):
        if overlay.parent.name != "common" and overlay.parts[-3:-1] != ("cpu-dev", "train"):
            assert str(overlay.parent.relative_to(ROOT)) in README


@pytest.fixture(scope="module")
def bucket(moto):
    """The bucket `search`, empty."""
    client = boto3.client("s3", endpoint_url=moto.env["AWS_ENDPOINT_URL"], **credentials(moto.env))
    client.create_bucket(Bucket="search")
    return client


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "search", f"{prefix}/{path.relative_to(folder)}")


@pytest.fixture(scope="module")
def search(bucket, tmp_path_factory, ray_cluster):
    """The bucket as the runbook assumes it for reranking, with a finished run."""
    folder = tmp_path_factory.mktemp("search")
    tiny_checkpoint(folder / "model", max_length=512)
    make_collection(folder / "in", num_queries=5).pairs.to_parquet(folder / "candidates.parquet", index=False)
    rerank(folder / "out", candidates=str(folder / "candidates.parquet"))
    bucket.upload_file(str(folder / "candidates.parquet"), "search", "candidates/2026-11-20/candidates.parquet")
    upload(bucket, folder / "model", "models/reranker/2026-w46")
    upload(bucket, folder / "out", "reranked/2026-11-20")
    return bucket


@pytest.fixture(scope="module")
def learned(bucket, tmp_path_factory):
    """The bucket as the runbook assumes it for training and retraining, with a trained model and a retraining."""
    with pytest.MonkeyPatch.context() as patch:
        world = quick_world(tmp_path_factory.mktemp("learned"), patch)
        world.week(1)
        outcome = retrain(world.config(), connect=lambda: 1, stream=io.StringIO())
    assert outcome.folder is not None
    # What the stand-in for training leaves out of its manifest.
    place = Path(outcome.folder.path) / "trained" / "_manifest.json"
    told = {"files": [], "depends_on": {}, "result": {"measure": "nDCG@10", "value": 0.5, "before": 0.4}}
    place.write_text(json.dumps(json.loads(place.read_text()) | told))
    for source, prefix in (
        (world.folder / "base", "models/base"),
        (world.folder / "labels", "labels/weekly"),
        (world.folder / "labels", "labels/2026-w47"),
        (world.folder / "labels", "labels/dev"),
        (world.folder / "out", "retrained"),
        (world.folder / "registry", "models/registry"),
        (Path(outcome.folder.path) / "trained", "trained/2026-w47"),
    ):
        upload(bucket, source, prefix)
    bucket.upload_file(str(world.folder / "fixed.parquet"), "search", "candidates/fixed/fixed.parquet")
    qrels = pd.read_csv(world.folder / "qrels.txt", sep=" ", names=["query_id", "0", "doc_id", "relevance"])
    qrels.to_parquet(world.folder / "qrels.parquet", index=False)
    bucket.upload_file(str(world.folder / "qrels.parquet"), "search", "qrels-fixed.parquet")
    return bucket


def credentials(env):
    return {
        "aws_access_key_id": env["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"],
        "region_name": "us-east-1",
    }


ALONE = {command for command in COMMANDS if command.startswith("crossenc")} - {*SUBMITTING}
#: Those on training, retraining and the registry, in the runbook's order, and what each of them says.
LEARNING = {
    "train": "binary_cross_entropy",
    "promote": "is the current version of reranker now",
    "retrain": "none of them new|1 files to train on",
    "status": "promoted",
    "models": "labels of week 47",
    "rollback": "is the current version of reranker now",
}
_ON_LEARNING = [
    command
    for command in COMMANDS
    if command in ALONE and ("train" in command or "registry" in command) and "rerank/" not in command
]


def test_the_commands_on_training_retraining_and_the_registry_run_as_they_stand(learned, s3_env, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path))
    assert [command.split()[1] for command in _ON_LEARNING] == list(LEARNING)
    for command in _ON_LEARNING:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
        assert re.search(LEARNING[command.split()[1]], done.output), f"{command}\n{done.output}"


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A stand-in for kubectl: call it with what a line of the answers, one for each call, is to be."""

    def answers(*lines):
        program = tmp_path / "bin" / "kubectl"
        program.parent.mkdir()
        (tmp_path / "answers").write_text("".join(f"{line}\n" for line in lines))
        take = f'head -n 1 {tmp_path}/answers; sed -i 1d {tmp_path}/answers; echo "$@" >> {tmp_path}/asked'
        program.write_text(f"#!/bin/sh\n{take}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return lambda command: (
            subprocess.run(
                ["bash", "-c", command.replace("sleep 30", "sleep 0")],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout
        )

    return answers


@pytest.mark.parametrize("end", ["Complete SUCCEEDED", "Complete STOPPED", "Failed FAILED", "ValidationFailed "])
def test_waiting_for_a_job_ends_with_it_however_it_ends(kubectl, end):
    (command,) = [command for command in COMMANDS if command.startswith("until")]
    run = kubectl("", "Initializing ", "Running RUNNING", "Retrying ", "Running RUNNING", end)
    assert run(command) == f"{end}\n"


def test_the_token_of_a_cluster_is_written_to_the_file_that_later_commands_read(kubectl, tmp_path):
    (command,) = [command for command in COMMANDS if "auth_token" in command]
    run = kubectl("crossenc-rerank-abc", base64.b64encode(b"the token").decode())
    run(command)
    assert (tmp_path / "token.txt").read_text() == "the token"
    assert "get secret crossenc-rerank-abc" in (tmp_path / "asked").read_text().splitlines()[1]
    assert any("RAY_AUTH_TOKEN_PATH=token.txt" in command for command in COMMANDS)


def test_the_gate_that_is_opened_is_that_of_the_operator_which_was_installed():
    install, upgrade = [shlex.split(command) for command in COMMANDS if re.match("helm (install|upgrade)", command)]
    for option in ("--version", "--namespace"):
        assert install[install.index(option) + 1] == upgrade[upgrade.index(option) + 1]
    assert install[2:4] == upgrade[2:4]
    name, _, gates = upgrade[upgrade.index("--set-json") + 1].partition("=")
    assert (name, json.loads(gates)) == ("featureGates", [{"name": "RayCronJob", "enabled": True}])


def test_jobs_and_crons_that_commands_name_are_those_of_the_manifests():
    names = {manifest["metadata"]["name"] for _, manifest in all_manifests()}
    named = re.findall(r"(?:cronjob/|cronjob |rayjob |job/|cronjob-name=)(crossenc-[a-z-]+)", "\n".join(COMMANDS))
    assert len(named) >= 8 and {*named} <= names


@pytest.mark.parametrize("command", sorted(ALONE - {*_ON_LEARNING}))
def test_a_command_of_crossenc_runs_as_it_stands(search, s3_env, monkeypatch, tmp_path, command):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path))
    if "--dry-run" in command:  # of a run that has not been made yet
        objects = search.list_objects_v2(Bucket="search", Prefix="reranked/")["Contents"]
        kept = {entry["Key"]: search.get_object(Bucket="search", Key=entry["Key"])["Body"].read() for entry in objects}
        for key in kept:
            search.delete_object(Bucket="search", Key=key)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    if "--dry-run" in command:
        assert "actors: 32" in done.output and "50 pairs" in done.output
        assert "Contents" not in search.list_objects_v2(Bucket="search", Prefix="reranked/")
        for key, body in kept.items():
            search.put_object(Bucket="search", Key=key, Body=body)
    else:
        assert "finished" in done.output


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_the_commands_for_a_cluster_that_is_there_already_run_as_they_stand(moto, s3_env, tmp_path):
    pytest.importorskip("aiohttp_cors", reason="needs ray[default], whose dashboard takes jobs")
    job = INFRA / "kuberay" / "overlays" / "cpu-dev" / "rerank" / "rerank.yaml"
    tiny_checkpoint(tmp_path / "model", max_length=512)
    make_collection(tmp_path / "in", num_queries=5).pairs.to_parquet(tmp_path / "candidates.parquet", index=False)
    client = boto3.client("s3", endpoint_url=moto.env["AWS_ENDPOINT_URL"], **credentials(moto.env))
    for bucket in ("search", "search-dev"):
        client.create_bucket(Bucket=bucket)
    client.upload_file(str(job), "search", "jobs/rerank.yaml")
    client.upload_file(str(tmp_path / "candidates.parquet"), "search-dev", "candidates/candidates.parquet")
    for path in (tmp_path / "model").iterdir():
        client.upload_file(str(path), "search-dev", f"models/reranker/{path.name}")
    told = []
    with ray_head(tmp_path / "head") as head:
        for command in SUBMITTING:
            if command.startswith("crossenc"):
                done = head.run(*shlex.split(command)[1:])
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
                told.append(done.stdout)
    for text in ("done; see s3://search-dev/reranked", "nothing to stop", "finished", "nothing to do"):
        assert any(text in one for one in told), text


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("kubectl kustomize")])
def test_kustomize_renders_what_the_runbook_lets_people_look_at(command):
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "kind: RayJob" in done.stdout, done.stderr


def test_settings_that_the_runbook_advises_exist():
    from pipelines.config import RerankConfig, ScoringConfig

    known = set(RerankConfig.model_fields) | {f"scoring.{name}" for name in ScoringConfig.model_fields}
    for name in re.findall(r"--set ([\w.]+)=", README) + re.findall(
        r"`(cpus_per_tokeniser|shard_candidates|max_text_bytes)", README
    ):
        assert name in known
    assert Path(INFRA / "clusters" / "aws.yaml").is_file()
