"""Whole training jobs on one local Ray: what they leave behind, taken up again, shared among workers, gone wrong."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file

from crossenc import CrossEncoder
from crossenc.errors import ConfigError, CrossEncError, RunConflictError
from crossenc.testing import WORDS, tiny_checkpoint
from jobs import status as status_job
from pipelines import lease
from pipelines import train as training
from pipelines.silence import Silence
from pipelines.status import look_at_training
from pipelines.train import describe, resolve, train
from pipelines.train_config import TrainConfig
from pipelines.train_data import StoppedError

pytestmark = pytest.mark.timeout(300)


def write_lists(path: Path, num_lists: int, seed: int = 0) -> str:
    """Lists whose relevant document, the first of four, holds the word that is the query."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_lists):
        query = str(random.choice(WORDS))
        others = [word for word in WORDS if word != query]
        texts = [" ".join(random.choice(others, size=random.integers(2, 9))) for _ in range(4)]
        rows.append({"query": query, "docs": [f"{texts[0]} {query}", *texts[1:]], "labels": [1.0, 0.0, 0.0, 0.0]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_checkpoint(folder / "dropout")
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    CrossEncoder(folder / "dropout", config_kwargs=dropouts, device="cpu").save_pretrained(folder / "model")
    write_lists(folder / "train.parquet", 48)
    write_lists(folder / "dev.parquet", 20, seed=1)
    return folder


def config(scene, output, **more) -> TrainConfig:
    settings = {
        "train": str(scene / "train.parquet"),
        "validation": str(scene / "dev.parquet"),
        "model": str(scene / "model"),
        "output": str(output),
        "batch_lists": 8,
        "epochs": 2,
        "learning_rate": 3e-3,
        "log_steps": 3,
        "workers": {"cpus": 0.5},
        "drain_seconds": 600,
    }
    return TrainConfig.model_validate(settings | more)


@pytest.fixture
def run(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

    def call(settings, **arguments):
        stream = io.StringIO()
        outcome = train(settings, connect=lambda: 2, stream=stream, **arguments)
        return outcome, [json.loads(line) for line in stream.getvalue().splitlines()]

    return call


@pytest.fixture(scope="module")
def undisturbed(scene, ray_cluster, tmp_path_factory):
    """The output of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    outcome = train(config(scene, output), connect=lambda: 2, stream=io.StringIO())
    assert outcome.state == "done"
    return output


def weights(output: Path) -> dict:
    return load_file(output / "model" / "model.safetensors")


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def records(output: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((output / "checkpoints").glob("step-*.json"))]


def test_a_finished_run_leaves_a_model_with_a_card_a_report_and_a_manifest(scene, undisturbed):
    manifest = json.loads((undisturbed / "_manifest.json").read_text())
    result = manifest["result"]
    judged = [point for point in records(undisturbed)[-1]["logs"] if "nDCG@10" in point["values"]]
    assert [point["step"] for point in judged] == [0, 6, 12]
    best = max(judged, key=lambda point: point["values"]["nDCG@10"])
    assert (result["best_step"], result["value"]) == (best["step"], best["values"]["nDCG@10"])
    assert result["before"] == judged[0]["values"]["nDCG@10"]
    model = CrossEncoder(undisturbed / "model", device="cpu")
    base = CrossEncoder(scene / "model", device="cpu")
    pair = [("water", "the water of the river")]
    assert model.predict(pair) != base.predict(pair)
    card = (undisturbed / "model" / "README.md").read_text()
    for fact in (
        "BinaryCrossEntropyLoss",
        "Size: 48 samples",
        "0.003",
        "Training Loss",
        manifest["lineage"]["Parent"],
    ):
        assert fact in card, fact
    assert "nDCG@10" in (undisturbed / "report.html").read_text()
    assert list((undisturbed / "tensorboard").iterdir())
    assert (undisturbed / "_SUCCESS").exists()


def test_sentence_transformers_loads_the_model(undisturbed):
    from sentence_transformers import CrossEncoder as Other

    pairs = [("water", "the water of the river"), ("bread", "stone and bread")]
    theirs = Other(str(undisturbed / "model"), device="cpu").predict(pairs)
    assert np.abs(theirs - CrossEncoder(undisturbed / "model", device="cpu").predict(pairs)).max() < 1e-6


def test_a_finished_run_is_not_run_again_and_another_one_is_refused(scene, undisturbed, run):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    outcome, _ = run(config(scene, undisturbed))
    assert outcome.state == "already done" and outcome.result is not None
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(RunConflictError, match="option learning_rate"):
        run(config(scene, undisturbed, learning_rate=1e-4))
    for name in ("train.parquet", "dev.parquet"):
        at = (scene / name).stat().st_mtime_ns
        os.utime(scene / name, ns=(at, at + 10**9))
        with pytest.raises(RunConflictError, match=rf"input .*{name}: was .* bytes, version"):
            run(config(scene, undisturbed))
        os.utime(scene / name, ns=(at, at))
    assert run(config(scene, undisturbed))[0].state == "already done"


def test_a_training_that_gets_no_further_says_what_its_cluster_lacks(scene, tmp_path, monkeypatch):
    def waits(job, started, display, should_stop):
        display.prepared(1, 2, "")
        assert not should_stop()
        raise StoppedError("stopped")

    monkeypatch.setattr(training, "_prepared", waits)
    monkeypatch.setattr("pipelines.silence.FIRST_SECONDS", 0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    for workers, lacks in (({"count": 3}, True), ({"count": 3, "min_count": 1}, False)):
        stream, output = io.StringIO(), tmp_path / f"out-{lacks}"
        train(config(scene, output, workers={"cpus": 1, **workers}), connect=lambda: 2, stream=stream)
        assert "no part of the data was prepared and no step taken for 0 s" in stream.getvalue()
        assert ("3 CPUs are needed and Ray has 1; add a node, or" in stream.getvalue()) is lacks


def test_a_run_that_was_overtaken_does_not_finish(scene, tmp_path, monkeypatch):
    folder = tmp_path / "out" / lease.LEASE_FOLDER

    def overtaken(*_):
        (folder / "epoch-000002.json").write_bytes((folder / "epoch-000001.json").read_bytes())
        return training.Ending("done")

    monkeypatch.setattr(training, "_prepared", lambda *_: SimpleNamespace(fingerprint="0" * 64))
    monkeypatch.setattr(training, "_fit", overtaken)
    outcome = train(config(scene, tmp_path / "out"), connect=lambda: 2, stream=io.StringIO())
    assert outcome.state == "stopped" and "took this output over" in outcome.message
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_silence_is_complained_of_again_when_it_has_doubled_and_progress_ends_it(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("pipelines.silence.time.monotonic", lambda: now)
    silence = Silence("no shard has finished for", "add a node", lambda: "1 GPU is needed")
    told = {}
    for now in range(1000, 2000, 10):
        complaint = silence.complaint(progress=now >= 1600)
        told |= {now: complaint} if complaint else {}
    assert list(told) == [1120, 1240, 1480, 1720, 1840]
    assert told[1240] == "no shard has finished for 240 s: 1 GPU is needed; add a node"


@pytest.mark.faults
def test_a_run_that_was_stopped_goes_on_to_the_weights_of_an_undisturbed_one(scene, undisturbed, run, tmp_path):
    output = tmp_path / "out"
    settings = config(scene, output, checkpoint_minutes=0, keep_checkpoints=50)
    prepared = output / "_run/data/validation/prepared.json"
    outcome, _ = run(settings, should_stop=prepared.exists)  # the wish is there before the first step
    assert outcome.state == "stopped" and "run the same command again" in outcome.message
    stopped_at = records(output)[-1]["step"]
    assert 0 < stopped_at < 12
    outcome, events = run(settings)
    assert outcome.state == "done"
    assert any(event.get("text") == f"going on after step {stopped_at}" for event in events)
    assert largest_difference(weights(output), weights(undisturbed)) == 0.0
    logs, wanted = records(output)[-1]["logs"], records(undisturbed)[-1]["logs"]
    assert [(p["step"], p["values"].get("loss")) for p in logs] == [
        (p["step"], p["values"].get("loss")) for p in wanted
    ]


@pytest.mark.faults
def test_two_workers_with_less_memory_learn_what_one_does(scene, undisturbed, run, tmp_path):
    """Key biases have no gradient but rounding, which Adam makes steps of, so scores are compared, not weights."""
    output = tmp_path / "out"
    outcome, _ = run(config(scene, output, workers={"count": 2, "cpus": 0.5, "max_tokens": 100}))
    assert outcome.state == "done"
    pairs = [(word, f"{word} of the river") for word in WORDS]
    scores = [CrossEncoder(folder / "model", device="cpu").predict(pairs) for folder in (output, undisturbed)]
    assert np.abs(scores[0] - scores[1]).max() < 1e-3
    figures = [
        [
            (point["step"], point["values"].get("loss"), point["values"].get("nDCG@10"))
            for point in records(folder)[-1]["logs"]
        ]
        for folder in (output, undisturbed)
    ]
    for (step, loss, measure), (other_step, other_loss, other_measure) in zip(*figures, strict=True):
        assert step == other_step
        assert loss == (None if other_loss is None else pytest.approx(other_loss, abs=1e-3))
        assert measure == (None if other_measure is None else pytest.approx(other_measure, abs=1e-3))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_lists(scene, run, tmp_path):
    settings = config(scene, tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30, validation=None)
    with pytest.raises(CrossEncError, match=r"not a finite number at step .* lower learning_rate"):
        run(settings)
    [kept] = (tmp_path / "out" / "failed-batch").iterdir()
    lists = json.loads(kept.read_text())
    assert len(lists) == 8 and lists[0]["labels"] == [1, 0, 0, 0]
    assert "train.parquet, row" in lists[0]["origin"] and "[SEP]" in lists[0]["texts"][0]


def test_what_cannot_work_is_said_before_anything_is_written(scene, tmp_path):
    for more, words in (
        ({"loss": {"name": "binary_crossentropy"}}, "did you mean 'binary_cross_entropy'"),
        ({"loss": {"name": "mse", "temprature": 1}}, "no parameter 'temprature'"),
        ({"freeze_layers": 9}, "2 layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(config(scene, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_data_model_and_loss(scene, tmp_path):
    lines = "\n".join(describe(resolve(config(scene, tmp_path / "out", validation=0.2))))
    assert "lists, 1 files" in lines and "20.0% of the queries" in lines and "binary_cross_entropy" in lines


def test_status_tells_of_a_training_run(undisturbed, capsys):
    assert status_job.run(str(undisturbed)) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and "after step 12 of 12 steps" in shown
    assert look_at_training(str(undisturbed)).last_step == 12


def test_checkpoints_are_kept_as_asked(undisturbed):
    steps = [record["step"] for record in records(undisturbed)]
    best = json.loads((undisturbed / "_manifest.json").read_text())["result"]["best_step"]
    assert set(steps) == {6, 12} and best in steps
    named = {file["path"] for record in records(undisturbed) for file in (record["weights"], record["optimizer"])}
    stored = {path.relative_to(undisturbed).as_posix() for path in (undisturbed / "checkpoints").rglob("*.safetensors")}
    assert named == stored
