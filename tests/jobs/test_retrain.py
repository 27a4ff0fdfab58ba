"""The retrain command: what it prints, what it refuses, and its exit codes. Whole retrainings: tests/pipelines."""

from pathlib import Path

import pytest
import yaml

from jobs import retrain
from pipelines import retrain as retraining
from pipelines.train_data import NothingToLearnError
from tests.support.retraining import World, quick_world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return quick_world(tmp_path, monkeypatch)


@pytest.fixture
def job(world: World) -> str:
    path = world.folder / "retrain.yaml"
    path.write_text(yaml.safe_dump(world.settings(storage_options={"secret": "my-secret-key"})))
    return str(path)


def test_promoted_and_nothing_new_exit_with_0_and_refused_with_3_unless_a_scheduler_minds(world, job, capsys):
    world.week(1)
    assert retrain.run(job) == 0
    out = capsys.readouterr().out
    assert "holds  one-sided p" in out and "promoted: promote" in out and "by entry 1" in out
    assert retrain.run(job) == 0
    assert "nothing new: nothing to do" in capsys.readouterr().out
    world.week(2, num_lists=50, share_right=0.1)
    assert retrain.run(job) == 3
    out = capsys.readouterr().out
    assert "fails  one-sided p" in out and "refused: refuse" in out and "report.html" in out
    assert retrain.run(job) == 0
    world.week(3, num_lists=50, share_right=0.1)
    assert retrain.run(job, refused_ok=True) == 0


def test_what_is_stopped_or_overtaken_exits_with_75(world, job, monkeypatch):
    world.week(1)
    for state in ("stopped", "void"):
        outcome = retraining.Outcome(state, "run it again")
        monkeypatch.setattr(retraining, "retrain", lambda *_, outcome=outcome, **__: outcome)
        assert retrain.run(job) == 75


def test_labels_that_give_no_list_exit_with_2_as_readme_and_help_say(world, job, monkeypatch):
    world.week(1)

    def without_lists(*_: object, **__: object) -> None:
        raise NothingToLearnError("labels have no list for train")

    monkeypatch.setattr(retraining.training, "train", without_lists)
    assert retrain.run(job) == 2
    says = "2 bad configuration or input, with labels that give no list to train on"
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(says in " ".join(text.split()) for text in (readme, retrain.command.__doc__ or ""))


def test_a_dry_run_shows_settings_and_steps_and_writes_nothing(world, job, capsys):
    world.week(1)
    before = sorted(world.folder.rglob("*"))
    assert retrain.run(job, ("train.epochs=3",), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "epochs: 3" in out and "max_p: 0.05" in out and "my-secret-key" not in out
    assert "week-1.parquet" in out and "to do        train" in out
    assert [path for path in sorted(world.folder.rglob("*")) if "cache" not in path.parts] == before


def test_refusals_exit_with_2_and_name_the_remedy(world, job, capsys):
    world.week(1, queries=["JUDGED of 1"])
    for override, says in (
        ("leaking=refuse", "set leaking: drop"),
        ("leakin=drop", "did you mean leaking?"),
        ("train.epoch=2", "did you mean epochs?"),
        ("gate={max_pp: 1}", "did you mean max_p?"),
        ("labels=absent.parquet", "absent.parquet: check the path"),
        (f"output={world.folder}/labels/out", "choose another output"),
    ):
        assert retrain.run(job, (override,)) == 2, override
        assert says in capsys.readouterr().err
