"""The README is true: its commands run as they stand, its job file is valid, its tree is the tree."""

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from crossenc.evaluation.gate import Gate
from crossenc.testing import tiny_checkpoint
from jobs import config as job_config
from jobs.cli import app
from jobs.export import Target
from pipelines.config import RerankConfig, ScoringConfig
from pipelines.distill_config import DistillConfig
from pipelines.evaluation_config import CollectionConfig, EvaluateConfig
from pipelines.mine_config import MineConfig
from pipelines.retrain_config import RetrainConfig
from pipelines.train_config import TrainConfig, WorkersConfig
from tests.support.checkpoints import make_backbone
from tests.support.collections import make_collection, read_results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
#: One job of each kind is a process that starts its own Ray; the others are run here, on the Ray of all tests.
IN_PROCESS = ("models", "promote", "rollback", "evaluate", "distill", "retrain")
#: What these do takes minutes: in the quick test they only show their plan, and nothing looks at their output.
LONG = {"crossenc distill distill.yaml": "--dry-run", "crossenc retrain retrain.yaml --refused-ok": "--dry-run"}
AFTER_LONG = ("crossenc status retrained",)
#: Groups of settings that a commented job file shows as a whole, where it shows them in lines of their own.
WHOLE_BLOCKS = {
    "scoring": set(ScoringConfig.model_fields),
    "workers": set(WorkersConfig.model_fields),
    "gate": {field.name for field in dataclasses.fields(Gate)},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(prefix: str) -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith(prefix)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as the README assumes it: candidates, a model and the job file."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_checkpoint(folder / "my-model", max_length=512, num_layers=4)
    make_backbone(folder / "my-backbone")
    pairs = make_collection(folder, num_queries=40).pairs
    pairs.to_parquet(folder / "candidates.parquet", index=False)
    judged = pairs.groupby("query_id").first().reset_index()[["query_id", "doc_id"]]
    judged.assign(relevance=1).to_parquet(folder / "qrels.parquet", index=False)
    unseen = pairs.assign(query="unseen " + pairs["query"], document=pairs.text, label=(pairs["rank"] == 1) * 1)
    (folder / "labels").mkdir()
    unseen[["query", "document", "label"]].to_parquet(folder / "labels" / "week-1.parquet", index=False)
    for block in blocks("yaml"):
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    bin_folder = Path(sys.executable).parent
    words = command.split()
    words[0] = str(bin_folder / words[0])
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)


def run_here(command: str, folder: Path) -> subprocess.CompletedProcess:
    """The same in this process."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, command.split()[1:])
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_the_commands_of_the_job_run_in_the_order_of_the_readme(workplace, everything):
    wanted = commands("crossenc ") + commands("python -m jobs.rerank")
    wanted = [command for command in wanted if not command.startswith("crossenc submit")]  # see tests/infra
    assert len(wanted) == 15 and {*LONG, *AFTER_LONG} <= {*wanted}
    if not everything:
        wanted = [f"{command} {LONG.get(command, '')}".strip() for command in wanted if command not in AFTER_LONG]
    for command in wanted:
        is_here = command.split()[1] in IN_PROCESS or "reranked-top3" in command
        done = run_here(command, workplace) if is_here else run(command, workplace)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "--dry-run" in command and "rerank" in command:
            assert "400 pairs" in done.stdout
            assert not (workplace / "reranked").exists()
        if "status" in command:
            assert "finished" in done.stdout and "40 queries" not in done.stderr
    assert len(read_results(workplace / "reranked")) == 400
    assert len(read_results(workplace / "reranked-top3")) == 120
    assert list((workplace / "training" / "data").iterdir())
    assert (workplace / "trained" / "model" / "README.md").exists()
    pointer = json.loads((workplace / "models" / "ranker" / "current.json").read_text())
    assert (pointer["version"], pointer["previous"], pointer["reason"]) == ("v1", "v2", "slow")
    decided = subprocess.run([sys.executable, "-c", blocks("python")[1]], cwd=workplace, capture_output=True, text=True)
    assert decided.returncode == 0 and "on 40 queries of clicks" in decided.stdout, decided.stderr


def test_the_python_example_runs(workplace):
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0] + "\nprint(len(scores), ranking[0]['corpus_id'])"],
        cwd=workplace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1 [01]", done.stdout.strip())


def test_the_install_command_installs_what_the_readme_uses(tmp_path):
    (command,) = commands("pip install")
    words = [sys.executable, "-m", *command.split(), "--no-deps", "--quiet", "--target", str(tmp_path / "site")]
    copy = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "bin" / "crossenc").exists()
    for template in (ROOT / "pipelines").glob("*.jinja"):
        assert (tmp_path / "site" / "pipelines" / template.name).exists()
    assert (tmp_path / "site" / "jobs" / "configs" / "rerank.yaml").exists()


def test_the_recipe_for_int8_is_a_job_of_its_own_beside_the_one_in_float32(tmp_path):
    (recipe,) = re.findall(r"```\n(pip install .*?)```", README, re.DOTALL)
    install, export, rerank = (shlex.split(line) for line in recipe.replace("\\\n", "").splitlines())
    assert install[:4] == ["pip", "install", "--constraint", "constraints.txt"]
    job = tmp_path / "rerank.yaml"
    job.write_text(next(block for block in blocks("yaml") if block.startswith("# rerank.yaml")))
    overrides = [setting for flag, setting in itertools.pairwise(rerank) if flag == "--set"]
    plain, int8 = job_config.load(RerankConfig, str(job)), job_config.load(RerankConfig, str(job), overrides)
    assert int8.output != plain.output
    assert (int8.model, int8.scoring.backend) == (export[3], "onnx")
    assert int8.scoring.onnx_file in {f"model_qint8_{target}.onnx" for target in Target}


@pytest.mark.parametrize("command", commands("make "))
def test_make_targets_exist(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_make_demo_ends_with_a_report_and_an_honest_table(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.demo", "--folder", str(tmp_path / "demo")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "nDCG@10" in done.stdout and "p (t test)" in done.stdout
    assert (tmp_path / "demo" / "reranked" / "report.html").exists()


def test_every_setting_is_explained_and_every_explained_setting_exists():
    table = README.split("| setting | default | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|") for line in table.splitlines()[2:]]
    explained = {name for row in cells for name in re.findall(r"`([a-z_]+)`", row[1])}
    assert explained == set(RerankConfig.model_fields)
    assert set(ScoringConfig.model_fields) <= set(re.findall(r"`([a-z_]+)`", table))


def test_every_setting_of_mining_is_explained_and_every_explained_setting_exists():
    table = README.split("| setting of `mine` | default | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == set(MineConfig.model_fields)


def test_every_setting_of_training_is_explained_and_every_explained_setting_exists():
    table = README.split("| setting of `train` | default | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == set(TrainConfig.model_fields)


def test_every_setting_of_distilling_is_explained_and_every_explained_setting_exists():
    table = README.split("| setting of `distill` | default | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == set(DistillConfig.model_fields)


def test_every_setting_of_evaluation_is_explained_and_every_explained_setting_exists():
    for heading, kind in (("setting of `evaluate`", EvaluateConfig), ("setting of a collection", CollectionConfig)):
        table = README.split(f"| {heading} | default | meaning |")[1].split("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == set(kind.model_fields)


def test_every_setting_of_retraining_is_explained_and_every_explained_setting_exists():
    table = README.split("| setting of `retrain` | default | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == set(RetrainConfig.model_fields)


def test_the_annotated_tree_names_every_module_and_nothing_else():
    tree = README.split("## How it is built")[1].split("```")[1]
    for package in ("crossenc", "pipelines"):
        section = tree.split(f"{package}/ ")[1].split("\njobs/" if package == "pipelines" else "\npipelines/")[0]
        named = set(re.findall(r"([a-z_0-9]+\.py)", section))
        real = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        assert named | {"records.py", "schemas.py", "testing.py"} == real | {"records.py", "schemas.py", "testing.py"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rerank", RerankConfig),
        ("mine", MineConfig),
        ("train", TrainConfig),
        ("distill", DistillConfig),
        ("evaluate", EvaluateConfig),
        ("retrain", RetrainConfig),
    ],
)
def test_the_commented_job_file_is_valid_and_has_every_setting_with_its_default(name, kind):
    text = (ROOT / "jobs" / "configs" / f"{name}.yaml").read_text()
    given = yaml.safe_load(text)
    plain = kind.model_validate(given)
    commented = list(commented_settings(text))
    assert {*given} | {path[0] for path, _, _ in commented} == set(kind.model_fields)
    for block, fields in WHOLE_BLOCKS.items():
        shown = {path[1] for path, _, _ in commented if path[0] == block and len(path) == 2}
        assert shown in (set(), fields)
    for path, value, comment in commented:
        is_example = path[0] in given or (len(path) == 2 and path[0] not in WHOLE_BLOCKS)
        if value is None or is_example or "default" in comment or "…" in f"{value}":
            continue
        changed = kind.model_validate(given | {path[0]: {path[1]: value} if len(path) == 2 else value})
        assert getattr(changed, path[0]) == getattr(plain, path[0]), f"{'.'.join(path)} is not {value} by default"


def commented_settings(text: str) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """Each setting that is commented out, below that which it is a part of, with its value and what is said of it."""
    block = ""
    for indent, name, rest in re.findall(r"^#( | {3})([a-z_]+):(.*)$", text, re.MULTILINE):
        value, _, comment = rest.partition(" # ")
        block = name if indent == " " else block
        yield (name,) if indent == " " else (block, name), yaml.safe_load(value), comment
