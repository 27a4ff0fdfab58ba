"""`crossenc models`, `promote` and `rollback`: versions out of folders and training outputs, tables, exit codes."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crossenc.evaluation.results import CollectionResult, Difference, Evaluation, Figure, Mean, SystemResult
from jobs.cli import app
from pipelines.registry import history, names, read_version, verify, versions
from pipelines.storage import locate
from tests.support.registry_driver import make_model

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the registry in `models`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSENC_REGISTRY", "models")
    return tmp_path


def call(*words: str, code: int = 0) -> str:
    done = RUNNER.invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def make_training(folder: Path, weights: str = "w", **changes) -> None:
    """What a training job leaves, as far as a registry reads it."""
    make_model(folder / "model", weights)
    paths = sorted(path for path in (folder / "model").iterdir())
    files = [
        {"path": f"model/{path.name}", "bytes": 0, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]
    result = {"best_step": 3, "num_steps": 9, "measure": "nDCG@10", "value": 0.4375, "before": 0.4}
    manifest = {"files": files, "lineage": {"Weights": "ab"}, "result": result}
    manifest |= {"depends_on": {"registered model": "registry://ranker@v1"}} | changes
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()


def test_a_folder_becomes_a_version_and_is_promoted_and_repeating_that_changes_nothing(workplace):
    make_model(workplace / "base", "w")
    said = call("promote", "ranker", "./base", "--reason", "first", "--as", "v1")
    assert "v1 is the current version of ranker now" in said
    assert "nothing to do: v1 is the current version of ranker already" in call(
        "promote", "ranker", "base/", "--reason", "again", "--as", "v1"
    )
    assert "nothing to do" in call("promote", "ranker", "v1", "--reason", "again")
    assert [entry.reason for entry in history(locate("models"), "ranker")] == ["first"]


def test_the_output_of_a_training_is_taken_with_its_result_and_named_by_its_content(workplace):
    make_training(workplace / "trained")
    call("promote", "ranker", "./trained", "--reason", "r")
    call("promote", "ranker", str(workplace / "trained"), "--reason", "r")
    (version,) = versions(locate("models"), "ranker")
    assert version.version.startswith("sha-") and version.parent == "registry://ranker@v1"
    assert version.facts["measure"] == "nDCG@10" and version.facts["gain"] == pytest.approx(0.0375)
    assert version.facts["training"] == {"Weights": "ab"}
    make_training(workplace / "other", weights="other", result={"measure": "", "value": None, "before": None})
    call("promote", "ranker", "./other", "--reason", "r")
    newest = read_version(locate("models"), "ranker", history(locate("models"), "ranker")[-1].version)
    assert newest.version != version.version and "gain" not in newest.facts


def make_evaluation(folder: Path, *models: Path) -> None:
    """What an evaluation job leaves, as far as a registry reads it: the later a model, the better it is."""
    systems = []
    for place, model in enumerate((None, *models)):
        gain = Difference(
            mean=0.1 * place, low=0, high=1, p_t=0.1, p_randomisation=0.1, p_holm=0.1, num_better=1, num_worse=0
        )
        value = Mean(mean=0.3 + 0.1 * place, low=None, high=None)
        systems.append(
            SystemResult(
                system=model.name if model else "first_stage",
                kind="model" if model else "first_stage",
                source="",
                figures=(Figure(measure="RR@10", value=value, difference=gain if model else None),),
                depths=(),
                segments=(),
                num_without_ranking=0,
                pairs_per_second=None,
            )
        )
    numbers = dict.fromkeys(("num_queries", "num_judgements", "num_without_relevant", "num_candidates"), 9)
    one = CollectionResult(collection="clicks", systems=tuple(systems), digests={}, **numbers)
    found = Evaluation(measures=("RR@10",), baseline="first_stage", seed=0, collections=(one,), num_compared=1)
    parts = {
        f"model {model.name} {file}": hashlib.sha256((model / "model" / file).read_bytes()).hexdigest()
        for model in models
        for file in ("config.json", "model.safetensors")
    }
    folder.mkdir()
    body = {"format": 1, "fingerprint": "f", "depends_on": parts, "evaluation": asdict(found)}
    (folder / "evaluation.json").write_text(json.dumps(body))
    for name in ("per_query.parquet", "losses.jsonl", "report.html", "_SUCCESS", "runs/clicks/part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_version_may_bring_the_evaluation_that_judged_its_weights(workplace):
    for name in ("trained", "better", "unjudged"):
        make_training(workplace / name, weights=name)
    make_evaluation(workplace / "evaluation", workplace / "trained", workplace / "better")
    with_it = ("--evaluation", "evaluation", "--reason", "r")
    call("promote", "ranker", "./better", "--as", "v1", *with_it)
    version = read_version(locate("models"), "ranker", "v1")
    kept = {file.path for file in version.files if not file.path.startswith("model/")}
    assert kept == {
        f"evaluation/{name}" for name in ("evaluation.json", "per_query.parquet", "losses.jsonl", "report.html")
    }
    assert version.facts["measure"] == "RR@10" and version.facts["gain_over"] == "first_stage"
    assert version.facts["training"] == {"Weights": "ab"} and version.facts["judged_on"] == ["clicks"]
    assert "0.5000  +0.2000" in call("models", "ranker")
    said = call("promote", "ranker", "./unjudged", *with_it, code=2)
    assert "judged no model with the weights of" in said and "trained, better" in said
    assert "--evaluation are of a version that is made of a folder" in call("promote", "ranker", "v1", *with_it, code=2)
    (workplace / "evaluation/_SUCCESS").unlink()
    assert "is no finished output" in call("promote", "ranker", "./trained", *with_it, code=2)
    assert "holds another content" in call("promote", "ranker", "./better", "--as", "v1", "--reason", "r", code=2)


def test_the_output_of_a_distillation_is_taken_by_its_student(workplace):
    make_training(workplace / "distilled/student")
    call("promote", "ranker", "./distilled", "--as", "v1", "--reason", "r")
    assert read_version(locate("models"), "ranker", "v1").facts["training"] == {"Weights": "ab"}


def test_another_content_under_a_known_name_leaves_the_version_as_it_was(workplace):
    make_model(workplace / "base", "w")
    call("promote", "ranker", "./base", "--as", "v1", "--reason", "r")
    (workplace / "base/added.json").write_text("{}")
    assert "take another version name" in call("promote", "ranker", "./base", "--as", "v1", "--reason", "r", code=2)
    verify(locate("models"), read_version(locate("models"), "ranker", "v1"))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda folder: (folder / "_SUCCESS").unlink(), 2, "is not finished"),
        (lambda folder: (folder / "_manifest.json").write_text("{}"), 2, "not that of a training job"),
        (lambda folder: (folder / "model/README.md").write_text("#"), 2, "was altered since the training wrote it"),
        (lambda folder: (folder / "model/config.json").unlink(), 2, "neither a checkpoint"),
    ],
)
def test_a_training_that_is_not_whole_becomes_no_version(workplace, damage, code, message):
    make_training(workplace / "trained")
    damage(workplace / "trained")
    assert message in call("promote", "ranker", "./trained", "--reason", "r", code=code)
    assert names(locate("models")) == ()


def test_the_models_their_versions_and_the_history_are_listed(workplace):
    make_model(workplace / "base", "base")
    make_training(workplace / "trained")
    call("promote", "ranker", "./base", "--reason", "first", "--as", "v1")
    call("promote", "ranker", "./trained", "--reason", "[bold]better[/bold]", "--as", "v2")
    call("promote", "other", "./base", "--reason", "x", "--as", "v1")
    assert "v1 is the current version of ranker now, v2 before" in call("rollback", "ranker", "--reason", "slow")
    lines = [line.split() for line in call("models").splitlines()]
    assert lines[0] == ["model", "current", "since", "(UTC)", "versions"]
    assert [(line[0], line[1], line[-1]) for line in lines[1:]] == [("other", "v1", "1"), ("ranker", "v1", "2")]
    shown = call("models", "ranker")
    first, second = shown.splitlines()[1:3]
    assert first.split()[0] == "v1" and first.rstrip().endswith("current")
    assert second.split()[0] == "v2" and "0.4375  +0.0375  registry://ranker@v1" in second
    assert [line.split()[:3] for line in shown.splitlines()[5:]] == [
        ["3", "rollback", "v1"],
        ["2", "promote", "v2"],
        ["1", "promote", "v1"],
    ]
    assert "[bold]better[/bold]" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("models", "has no models"),
        ("models ranker", "has no model ranker; there are: none"),
        ("promote ranker v1 --reason r", "no version v1 of ranker"),
        ("promote ranker v1 --as v2 --reason r", "write the folder with a slash"),
        ("promote ../ranker ./base --reason r", "cannot be a model name"),
        ("promote ranker ./nowhere --reason r", "neither a checkpoint"),
        ("rollback ranker --reason r", "no version of ranker was ever promoted"),
        ("models --registry https://example.com/x", "scheme that is not allowed"),
    ],
)
def test_what_cannot_be_done_ends_with_code_2_and_says_why(workplace, words, message):
    make_model(workplace / "base", "w")
    assert message in call(*words.split(), code=2)


def test_a_promotion_that_rests_on_an_older_state_is_refused(workplace):
    for version in ("v1", "v2"):
        make_model(workplace / version, version)
        call("promote", "ranker", f"./{version}", "--as", version, "--reason", "r")
    make_model(workplace / "v3", "v3")
    said = call("promote", "ranker", "./v3", "--as", "v3", "--reason", "r", "--expected", "1", code=2)
    assert "ranker was changed since v3 was compared with it" in said
    said = call("promote", "ranker", "v3", "--reason", "r", "--expected", "7", code=2)
    assert "the history of ranker ends with entry 2: there is no entry 7" in said
    call("promote", "ranker", "v3", "--reason", "r", "--expected", "2")
    call("rollback", "ranker", "--to", "v1", "--reason", "r")
    assert [entry.version for entry in history(locate("models"), "ranker")] == ["v1", "v2", "v3", "v1"]


def test_without_a_registry_the_commands_say_where_to_name_it(monkeypatch):
    monkeypatch.delenv("CROSSENC_REGISTRY")
    assert "--registry" in call("models", code=2)


def test_the_commands_work_on_a_bucket(workplace, s3_bucket):
    make_model(workplace / "base", "w")
    place = f"s3://{s3_bucket}/models"
    call("promote", "ranker", "./base", "--as", "v1", "--reason", "r", "--registry", place)
    assert "current" in call("models", "ranker", "--registry", place)
    assert names(locate(place)) == ("ranker",)
