"""Retrainings that are killed, overtaken and fed with wrong labels: one promotion, one entry of the history."""

import io
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from pipelines import registry
from pipelines.retrain import retrain
from pipelines.retrain_records import read_all
from pipelines.status import look_at_retraining
from pipelines.storage import locate
from tests.pipelines.test_train import largest_difference
from tests.support.processes import wait_for
from tests.support.rerank_driver import Drivers, drivers
from tests.support.retraining import World, make_world

pytestmark = [pytest.mark.timeout(1500), pytest.mark.faults]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    return make_world(tmp_path)


@pytest.fixture
def starter(tmp_path: Path):
    with drivers(tmp_path) as starter:
        yield starter


def write_job(world: World, name: str = "job", **more: object) -> str:
    path = world.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(world.settings(**more)))
    return str(path)


def history(world: World, folder: str = "registry") -> tuple[registry.Entry, ...]:
    return registry.history(locate(str(world.folder / folder)), "reranker")


def weights(world: World, folder: str = "registry") -> dict:
    [entry] = history(world, folder)
    return load_file(world.folder / folder / f"reranker/versions/{entry.version}/model/model.safetensors")


def killed_until_done(starter: Drivers, job: str, output: Path, waits: Iterator[float], most: int) -> list[str]:
    """Runs the job until it ends well, killed after each of the waits but `most` times; what it was about to do."""
    at: list[str] = []
    while len(at) < most:
        driver = starter.start(job, module="jobs.retrain")
        try:
            assert driver.wait(next(waits)) == 0, driver.tail()
            return at
        except TimeoutError:
            driver.kill9()
        status = look_at_retraining(str(output))
        at.append(status.steps_to_do[0] if status and status.steps_to_do else "begin or end")
        driver.cleanup()
    driver = starter.start(job, module="jobs.retrain")
    assert driver.wait(300) == 0, driver.tail()
    return at


def test_killed_at_ten_random_moments_it_ends_with_one_promotion_and_the_same_weights(world, starter):
    """What ends before its tenth kill is begun anew in other folders, until there were ten."""
    world.week(1, num_lists=64)
    train = {"workers": {"cpus": 1}, "learning_rate": 5e-3, "epochs": 20, "batch_lists": 4, "checkpoint_minutes": 0}
    quiet = write_job(world, "quiet", registry=str(world.folder / "quiet"), output=str(world.folder / "q"), train=train)
    started = time.monotonic()
    driver = starter.start(quiet, module="jobs.retrain")
    assert driver.wait(300) == 0, driver.tail()
    undisturbed_seconds = time.monotonic() - started
    random = np.random.default_rng(6)
    waits = (random.uniform(0.2, 0.7) * undisturbed_seconds for _ in count())
    at: list[str] = []
    while len(at) < 10:
        name = f"after-{len(at)}"
        output = world.folder / f"{name}-out"
        job = write_job(world, name, registry=str(world.folder / name), output=str(output), train=train)
        at += killed_until_done(starter, job, output, waits, most=10 - len(at))
        [entry] = history(world, name)
        [(one, ending)] = read_all(locate(str(output)))
        assert entry.key == one.key and ending is not None and ending.state == "promoted"
        place = locate(str(world.folder / name))
        [version] = registry.versions(place, "reranker")
        registry.verify(place, version)
        assert largest_difference(weights(world, name), weights(world, "quiet")) < 1e-5
    print(f"undisturbed {undisturbed_seconds:.0f} s; killed while it was to", ", ".join(at))


def test_sigterm_stops_it_with_75_and_the_same_command_goes_on(world, starter):
    world.week(1, num_lists=64)
    train = {"workers": {"cpus": 1}, "learning_rate": 5e-3, "epochs": 60, "batch_lists": 4, "checkpoint_minutes": 0}
    job = write_job(world, train=train)
    driver = starter.start(job, module="jobs.retrain")
    driver.wait_until(lambda: bool(list(world.folder.glob("out/retrainings/*/trained/checkpoints/step-*.json"))), 200)
    driver.terminate()
    assert driver.wait(200) == 75, driver.tail()
    assert "run the same command again to resume" in driver.stdout_path.read_text() and not history(world)
    second = starter.start(job, module="jobs.retrain")
    assert second.wait(300) == 0 and len(history(world)) == 1, second.tail()


def test_a_second_one_on_the_same_output_is_refused_while_the_first_works(world, starter):
    world.week(1, num_lists=64)
    job = write_job(world)
    first = starter.start(job, module="jobs.retrain")
    first.wait_until(lambda: bool(list(world.folder.glob("out/retrainings/*/retraining.json"))), 200)
    second = starter.start(job, module="jobs.retrain")
    assert second.wait(200) == 2 and "another run is active" in second.stderr_path.read_text()
    wait_for(lambda: first.process.poll() is not None, 300, "the end of the first")
    assert first.process.returncode == 0 and len(history(world)) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_wrong_labels_are_refused_after_a_promotion_and_the_old_version_stays(world, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    world.week(1, num_lists=64)
    assert retrain(world.config(use="new"), connect=lambda: 2, stream=io.StringIO()).state == "promoted"
    world.week(2, num_lists=64, share_right=0.0)
    refused = retrain(world.config(use="new"), connect=lambda: 2, stream=io.StringIO())
    assert refused.state == "refused" and refused.decision is not None, refused.message
    assert any("below 0.05" in reason for reason in refused.decision.reasons)
    assert len(history(world)) == 1 and refused.folder is not None
    assert Path(refused.folder.path, "trained/model/model.safetensors").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_retraining_that_mines_by_the_current_version_and_distils(world, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    pairs = pd.read_parquet(world.folder / "fixed.parquet")
    pairs = pairs.assign(query_id="t" + pairs.query_id, query="training " + pairs["query"])
    pairs.to_parquet(world.folder / "candidates.parquet", index=False)
    names = {"query": "text"}
    pairs[["query_id", "query"]].drop_duplicates().rename(columns=names).to_parquet(world.folder / "queries.parquet")
    pairs[["doc_id", "text"]].drop_duplicates().to_parquet(world.folder / "corpus.parquet")
    (world.folder / "labels").mkdir()
    judged = pairs[pairs["rank"] == 5].assign(label=1)[["query_id", "doc_id", "label"]]
    tables = {"queries": str(world.folder / "queries.parquet"), "corpus": str(world.folder / "corpus.parquet")}
    more = {
        "labels": {"files": str(world.folder / "labels"), **tables},
        "mine": {"candidates": str(world.folder / "candidates.parquet"), "num_negatives": 3},
        "distill": {
            "teachers": str(world.folder / "base"),
            "candidates": str(world.folder / "candidates.parquet"),
            "student": {"workers": {"cpus": 0.5}},
        },
        "train": {"workers": {"cpus": 0.5}, "learning_rate": 5e-3, "epochs": 30, "batch_lists": 4},
    }
    for week in (1, 2):
        judged.iloc[week::2].to_parquet(world.folder / f"labels/week-{week}.parquet", index=False)
        outcome = retrain(world.config(**more), connect=lambda: 2, stream=io.StringIO())
        assert outcome.folder is not None and outcome.decision is not None
        lists = pq.read_table(Path(outcome.folder.path, "mined/data")).to_pylist()
        assert len(lists) == (20 if week == 1 else 39) and np.mean([len(row["docs"]) for row in lists]) == 4
        assert Path(outcome.folder.path, "distilled/student/model/config.json").exists()
    current = history(world)[0].version
    assert outcome.decision.baseline == current and Path(outcome.folder.path, "reranked/_SUCCESS").exists()
