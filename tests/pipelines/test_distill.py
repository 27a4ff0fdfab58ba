"""Whole distillation jobs on one local Ray with tiny teachers: lists, resuming, conflicts; and the settings."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from torch import nn

from crossenc import CrossEncoder
from crossenc.distillation import SampleQuery, ensemble, sample, scale_of
from crossenc.errors import ConfigError, RunConflictError
from crossenc.mining import text_key
from crossenc.testing import WORDS, tiny_checkpoint
from pipelines import units
from pipelines.distill import Outcome, check, distill
from pipelines.distill_config import DistillConfig
from pipelines.distill_lists import list_job
from pipelines.rerank import rerank
from pipelines.storage import locate
from pipelines.testing import FakeModel
from tests.support.collections import make_collection, plain_ranking, read_quarantine

NEEDED = {"teachers": "t", "candidates": "c", "output": "o", "student_layers": 1}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """Two teachers, and twelve queries with ten candidates each; one text is missing, one comes twice."""
    folder = tmp_path_factory.mktemp("distilling")
    tiny_checkpoint(folder / "teacher", max_length=48)
    tiny_checkpoint(folder / "other", "electra", seed=1, max_length=48)
    random = np.random.default_rng(0)
    rows = [
        {
            "query_id": f"q{q:02d}",
            "query": f"what is {WORDS[q]}",
            "doc_id": f"d{q}-{d}",
            "text": " ".join(random.choice(WORDS, size=random.integers(3, 9))) + f" {d}",
        }
        for q in range(12)
        for d in range(10)
    ]
    rows[5]["text"] = None
    rows[17]["text"] = rows[16]["text"].upper()
    pd.DataFrame(rows).to_parquet(folder / "pairs.parquet", index=False)
    pd.DataFrame({"query_id": ["q01", "q01"], "doc_id": ["d1-3", "gone"], "relevance": [1, 1]}).to_parquet(
        folder / "qrels.parquet", index=False
    )
    return folder


def config(scene: Path, output: Path, **more) -> DistillConfig:
    settings = {
        "teachers": [str(scene / "teacher"), str(scene / "other")],
        "candidates": str(scene / "pairs.parquet"),
        "qrels": str(scene / "qrels.parquet"),
        "output": str(output),
        "documents": 5,
        "shard_candidates": 40,
        "student_layers": 1,
        "scoring": {"cpus_per_actor": 0.5},
        "student": {"learning_rate": 1e-3, "batch_lists": 4, "log_steps": 1, "workers": {"cpus": 0.5}},
    }
    return DistillConfig.model_validate(settings | more)


@pytest.fixture
def run(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))

    def call(settings: DistillConfig, **arguments) -> tuple[Outcome, list[str]]:
        stream = io.StringIO()
        outcome = distill(settings, connect=lambda: 2, stream=stream, **arguments)
        return outcome, [json.loads(line).get("text", "") for line in stream.getvalue().splitlines()]

    return call


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below, with its time of writing."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "lease" not in path.parts
    }


def read_lists(output: Path) -> list[dict]:
    return sorted(pq.read_table(output / "lists" / "data").to_pylist(), key=lambda row: row["query"])


@pytest.mark.faults
def test_two_teachers_a_stop_between_stages_and_a_student_half_as_deep(scene, tmp_path, run):
    output = tmp_path / "out"
    stopped, _ = run(config(scene, output), should_stop=lambda: (output / "teachers" / "0" / "_SUCCESS").exists())
    assert stopped.state == "stopped" and not (output / "teachers" / "1").exists()
    stopped, _ = run(config(scene, output), should_stop=lambda: (output / "lists" / "_SUCCESS").exists())
    assert stopped.state == "stopped" and not (output / "student").exists()
    before = files(output)
    outcome, _ = run(config(scene, output))
    assert outcome.state == "done" and outcome.kept_layers == (0,)
    after = files(output)
    assert {name: after[name] for name in before} == before  # no stage was done again

    counts = outcome.lists
    assert counts is not None and counts.num_lists == 12 and counts.num_candidates == 120
    assert counts.num_documents == 60 and counts.refused == {"document_missing": 1}
    assert counts.excluded == {"not_drawn": 58, "repeated_text": 1}
    assert (counts.num_positives, counts.num_lost_positives) == (1, 1)
    assert read_quarantine(output / "lists").row.tolist() == [5]
    account = pq.read_table(output / "lists" / "completeness").to_pandas()
    assert account.num_candidates.sum() == 120 and account.num_documents.sum() == 60

    pairs = pd.read_parquet(scene / "pairs.parquet").dropna()
    logits = [
        CrossEncoder(scene / name, device="cpu", activation_fn=nn.Identity()).predict(
            list(zip(pairs["query"], pairs["text"], strict=True))
        )
        for name in ("teacher", "other")
    ]
    labels = ensemble(np.stack(logits).astype(np.float64), [scale_of(scores) for scores in logits])
    label_of = dict(zip(zip(pairs["query"], pairs["text"], strict=True), labels, strict=True))
    best = pairs.assign(label=labels).sort_values("label").groupby("query").last()
    rows = read_lists(output)
    assert len(rows) == 12
    for row in rows:
        wanted = [label_of[row["query"], document] for document in row["docs"]]
        np.testing.assert_allclose(row["labels"], wanted, rtol=1e-4, atol=1e-4)
        if row["query"] == f"what is {WORDS[1]}":  # the judged positive comes first, then the best
            assert row["docs"][0].endswith(" 3")
            assert best.loc[row["query"]].text in row["docs"]
        else:
            assert row["docs"][0] == best.loc[row["query"]].text
            assert row["labels"] == sorted(row["labels"], reverse=True)

    student = CrossEncoder(output / "student" / "model", device="cpu")
    assert student.config.num_hidden_layers == 1
    again, _ = run(config(scene, output))
    assert again.state == "already done" and again.lists == counts and files(output) == after
    with pytest.raises(RunConflictError, match="option documents: was 5, is 4"):
        run(config(scene, output, documents=4))


@pytest.mark.faults
def test_one_teacher_gives_the_same_lists_with_one_actor_and_two(scene, tmp_path, run):
    lists = []
    for actors in (1, 2):
        output = tmp_path / str(actors)
        settings = config(
            scene,
            output,
            teachers=str(scene / "teacher"),
            scoring={"cpus_per_actor": 0.5, "actors": actors},
            workers=1,
        )
        outcome, _ = run(settings, should_stop=lambda output=output: (output / "lists" / "_SUCCESS").exists())
        assert outcome.state == "stopped"
        lists.append({path.name: path.read_bytes() for path in (output / "lists" / "data").iterdir()})
    assert lists[0] == lists[1] and len(lists[0]) == 3
    scores = pq.read_table(output / "teachers" / "0" / "results").to_pandas().set_index(["query_id", "doc_id"]).score
    assert scores.max() > 1 or scores.min() < 0, "a sigmoid was left on"
    labels = {label for row in read_lists(output) for label in row["labels"]}
    assert labels <= {float(score) for score in scores}


@pytest.mark.faults
def test_a_new_run_leaves_nothing_of_the_old_one(scene, tmp_path, run):
    output = tmp_path / "out"
    until_lists = {"should_stop": lambda: (output / "lists" / "_SUCCESS").exists()}
    run(config(scene, output, qrels=None), **until_lists)
    settings = config(scene, output, teachers=str(scene / "other"), documents=3)
    with pytest.raises(RunConflictError, match="model"):
        run(settings)
    run(settings, new_run=True, **until_lists)
    assert not list((output / "teachers" / "1").rglob("part-*"))
    assert {len(row["docs"]) for row in read_lists(output)} == {3}


def test_what_cannot_work_is_said_before_a_teacher_scores(scene, tmp_path):
    with pytest.raises(ConfigError, match="has 2 layers: it cannot keep 3"):
        check(config(scene, tmp_path, student_layers=3))
    with pytest.raises(ConfigError, match="did you mean 'margin_mse'"):
        check(config(scene, tmp_path, student={"loss": {"name": "margin_mes"}}))
    with pytest.raises(ConfigError, match="lie inside each other"):
        check(config(scene, scene))
    assert not list(tmp_path.iterdir())


def test_lists_need_whole_runs_of_the_same_candidates(scene, tmp_path):
    with pytest.raises(ValueError, match=r"teachers: .* is not the output of a rerank run"):
        list_job(config(scene, tmp_path), locate(str(tmp_path / "lists")), [locate(str(scene))])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teachers": []}, "teachers is empty"),
        ({"teachers": ["a", "a"]}, "twice"),
        ({"student_layers": None}, "give the student's model, or student_layers"),
        ({"student": {"model": "m"}}, "give the student's model, or student_layers"),
        ({"scoring": {"activation": "checkpoint"}}, "learns from raw logits"),
        ({"student": {"train": "x"}}, "train is given by the distillation job"),
        ({"student": {"storage_options": {}}}, "set it beside student"),
        ({"student": {"epoch": 2}}, "epoch"),
        ({"student": {"batch_lists": 1, "batch_tokens": 9}}, "two ways"),
        ({"documents": 1}, "at least 2"),
        ({"queries": "q"}, "queries and corpus go together"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, says):
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate(NEEDED | settings)


def test_each_stage_gets_its_settings():
    student = {"loss": {"temperature": 2.0}, "epochs": 3}
    made = DistillConfig.model_validate(
        NEEDED | {"student": student, "scoring": {"max_length": 96}, "drain_seconds": 5, "storage_options": {"a": "b"}}
    )
    scoring = made.rerank_config("t", "out")
    assert (scoring.model, scoring.scoring.activation, scoring.scoring.max_length) == ("t", "identity", 96)
    assert scoring.qrels is None and scoring.storage_options == {"a": "b"}
    learning = made.train_config("lists", "m", "out")
    assert learning.loss.name == "kl_distillation" and learning.loss.parameters == {"temperature": 2.0}
    assert (learning.epochs, learning.drain_seconds, learning.train.layout) == (3, 5, "lists")
    assert learning.storage_options == {"a": "b"} and "train" not in made.model_dump()["student"]


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("layout", ["shuffled", "ids"])
def test_lists_are_those_that_the_sampling_draws_by_itself_in_any_layout(tmp_path, monkeypatch, layout):
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    collection = make_collection(tmp_path / "in")
    inputs = collection.write(layout)
    settings = DistillConfig.model_validate(NEEDED | inputs | {"documents": 4, "shard_candidates": 40})
    scoring = settings.rerank_config("fake", str(tmp_path / "teacher"))
    assert rerank(scoring, connect=lambda: 2, stream=io.StringIO(), model=FakeModel()).state == "done"
    job = list_job(settings, locate(str(tmp_path / "lists")), [locate(str(tmp_path / "teacher"))])
    outcome = units.run(job, stream=io.StringIO())
    assert outcome.counts is not None and outcome.counts.num_lists == 20

    expected = {}
    for query_id, group in plain_ranking(collection.pairs).groupby("query_id"):
        whole = SampleQuery(
            query_id=str(query_id),
            doc_ids=group.doc_id.tolist(),
            text_keys=[text_key(text) for text in group.text],
            ranks=group["rank"].to_numpy(),
            scores=group.score.to_numpy(dtype=np.float64),
            positive_ids=(),
        )
        drawn = group.iloc[sample(whole, settings.sampling()).chosen]
        expected[group["query"].iloc[0]] = (drawn.text.tolist(), drawn.score.tolist())
    assert {row["query"]: (row["docs"], row["labels"]) for row in read_lists(tmp_path)} == expected
