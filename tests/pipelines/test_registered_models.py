"""Jobs that name registry://name: which version they use, what they note of it, and what a promotion meanwhile does."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crossenc import CrossEncoder
from crossenc.errors import CheckpointError, ConfigError, InputError, RunConflictError
from crossenc.testing import tiny_checkpoint
from pipelines import distill, estimate, evaluation, train
from pipelines import plan as plans
from pipelines import rerank as reranking
from pipelines.config import RerankConfig
from pipelines.distill_config import DistillConfig
from pipelines.evaluation_config import EvaluateConfig
from pipelines.inputs import scan
from pipelines.registry import PLAN_PART, promote, rollback, store_version
from pipelines.storage import Location, locate
from pipelines.train_config import TrainConfig
from tests.support.collections import make_collection, part_bytes, read_manifest, read_results

NEEDED = {"model": "registry://ranker", "scoring": {"cpus_per_actor": 0.5}}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """Two versions of a model, and candidates with judgements."""
    folder = tmp_path_factory.mktemp("registered")
    for seed, version in enumerate(("v1", "v2")):
        tiny_checkpoint(folder / version, seed=seed, max_length=48)
    pairs = make_collection(folder, num_queries=8).pairs
    pairs.to_parquet(folder / "pairs.parquet", index=False)
    judged = pairs.groupby("query_id").first().reset_index().assign(relevance=1)
    judged[["query_id", "doc_id", "relevance"]].to_parquet(folder / "qrels.parquet", index=False)
    return folder


@pytest.fixture
def models(scene, tmp_path) -> Location:
    """A registry with both versions of `ranker`, of which v1 is the current one."""
    place = locate(str(tmp_path / "models"))
    for version in ("v1", "v2"):
        store_version(place, "ranker", version, {"model": locate(str(scene / version))}, parent=None, facts={})
    promote(place, "ranker", "v1", reason="first", key="v1")
    return place


def job(scene: Path, models: Location, output: Path, **more) -> RerankConfig:
    settings = {"candidates": str(scene / "pairs.parquet"), "registry": models.uri, "output": str(output)}
    return RerankConfig.model_validate(NEEDED | settings | more)


def run(config: RerankConfig, **more) -> tuple[reranking.Outcome, list[str]]:
    stream = io.StringIO()
    outcome = reranking.rerank(config, **{"connect": lambda: 2, "stream": stream} | more)
    return outcome, [json.loads(line).get("text", "") for line in stream.getvalue().splitlines()]


def die() -> int:
    """What happens in place of the start of Ray."""
    raise KeyboardInterrupt


def is_ranked_by(model: Path, output: Path, scene: Path) -> bool:
    """Whether the results have the scores that a checkpoint gives by itself."""
    pairs = pd.read_parquet(scene / "pairs.parquet")[["query_id", "doc_id", "query", "text"]]
    results = read_results(output)[["query_id", "doc_id", "score"]].merge(pairs, on=["query_id", "doc_id"])
    assert len(results) == len(pairs)
    scores = CrossEncoder(model, device="cpu").predict(list(zip(results["query"], results.text, strict=True)))
    return bool(np.allclose(results.score, scores, atol=1e-5))


def test_a_run_stays_with_its_version_and_the_next_one_follows_promotion_and_rollback(
    scene, models, tmp_path, ray_cluster
):
    with pytest.raises(KeyboardInterrupt):
        run(job(scene, models, tmp_path / "first"), connect=die)  # planned, and dead
    promote(models, "ranker", "v2", reason="better", key="v2")
    outcome, said = run(job(scene, models, tmp_path / "first"))
    assert outcome.state == "done"
    assert said[0].startswith("this run was planned with registry://ranker@v1 and stays with it; the current version")
    manifest = read_manifest(tmp_path / "first")
    assert manifest["model"] == manifest["depends_on"][PLAN_PART] == "registry://ranker@v1"
    assert "registry://ranker@v1" in (tmp_path / "first" / "report.html").read_text()
    assert is_ranked_by(scene / "v1", tmp_path / "first", scene)
    before = part_bytes(tmp_path / "first")
    outcome, said = run(job(scene, models, tmp_path / "first"))
    assert outcome.state == "already done" and "the current version is v2" in said[0]

    with pytest.raises(KeyboardInterrupt):
        run(job(scene, models, tmp_path / "second"), connect=die)
    assert plans.load(locate(str(tmp_path / "second"))).parts[PLAN_PART] == "registry://ranker@v2"
    rollback(models, "ranker", reason="slow", key="back")
    outcome, said = run(job(scene, models, tmp_path / "third"))
    assert said[0] == "the model is registry://ranker@v1"
    assert part_bytes(tmp_path / "third") != {} and is_ranked_by(scene / "v1", tmp_path / "third", scene)
    assert part_bytes(tmp_path / "first") == before


@pytest.mark.faults
def test_a_promotion_while_a_run_is_stopped_half_way_mixes_nothing(scene, models, tmp_path, ray_cluster):
    output = tmp_path / "out"
    stopped, _ = run(
        job(scene, models, output, shard_candidates=20), should_stop=lambda: any((output / "results").glob("*.parquet"))
    )
    assert stopped.state == "stopped" and part_bytes(output)
    promote(models, "ranker", "v2", reason="better", key="v2")
    assert run(job(scene, models, output, shard_candidates=20))[0].state == "done"
    assert is_ranked_by(scene / "v1", output, scene)
    assert run(job(scene, models, output, shard_candidates=20), new_run=True)[0].state == "done"
    assert is_ranked_by(scene / "v2", output, scene)


def test_a_new_run_a_dry_run_and_a_named_version_take_what_they_say(scene, models, tmp_path):
    config = job(scene, models, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(config, connect=die)
    promote(models, "ranker", "v2", reason="better", key="v2")
    assert reranking.resolve(config).model.name == "registry://ranker@v1"
    assert reranking.resolve(config, new_run=True).model.name == "registry://ranker@v2"
    assert any("stays with it" in line for line in estimate.estimate(config).lines())
    pinned = reranking.resolve(job(scene, models, tmp_path / "out", model="registry://ranker@v2"))
    assert (pinned.model.name, pinned.note) == ("registry://ranker@v2", "")
    plain = reranking.resolve(job(scene, models, tmp_path / "out", model=str(scene / "v2")))
    assert pinned.parts == plain.parts | {PLAN_PART: "registry://ranker@v2"}


def test_another_version_on_the_same_output_is_refused_by_name(scene, models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(job(scene, models, tmp_path / "out"), connect=die)
    message = r"registered model: was registry://ranker@v1, is registry://ranker@v2"
    with pytest.raises(RunConflictError, match=message):
        run(job(scene, models, tmp_path / "out", model="registry://ranker@v2"), connect=die)


def test_a_version_with_altered_files_is_not_loaded(scene, models, tmp_path):
    weights = Path(models.path) / "ranker/versions/v1/model/model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of registry://ranker@v1 was altered"):
        reranking.resolve(job(scene, models, tmp_path / "out"))


def test_a_model_of_a_registry_needs_a_registry_that_has_it(scene, models, tmp_path):
    with pytest.raises(ConfigError, match="say where the registry is, by `registry: "):
        reranking.resolve(job(scene, models, tmp_path / "out", registry=None))
    with pytest.raises(InputError, match=r"no current version of other: .* there are: ranker"):
        reranking.resolve(job(scene, models, tmp_path / "out", model="registry://other"))
    with pytest.raises(InputError, match="no version v9 of ranker; there are: v1, v2"):
        reranking.resolve(job(scene, models, tmp_path / "out", model="registry://ranker@v9"))


def test_a_registry_in_a_bucket_serves_a_model(scene, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    place = locate(f"s3://{s3_bucket}/models")
    store_version(place, "ranker", "v1", {"model": locate(str(scene / "v1"))}, parent=None, facts={})
    promote(place, "ranker", "v1", reason="first", key="v1")
    found = reranking.resolve(job(scene, place, tmp_path / "out"))
    local = reranking.resolve(job(scene, place, tmp_path / "out", model=str(scene / "v1")))
    assert found.model.name == "registry://ranker@v1"
    assert found.model.digests() == local.model.digests()


def test_training_stays_with_the_version_that_it_began_with(scene, models, tmp_path):
    labels = {"files": str(scene / "pairs.parquet"), "columns": {"label": "rank", "document": "text"}}
    settings = {"train": labels, "model": "registry://ranker", "registry": models.uri, "output": str(tmp_path / "out")}
    config = TrainConfig.model_validate(settings)
    begun = train.resolve(config)
    assert begun.config.model == begun.parts[PLAN_PART] == "registry://ranker@v1"
    train._begin(begun)
    promote(models, "ranker", "v2", reason="better", key="v2")
    resumed = train.resolve(config)
    assert resumed.parts == begun.parts and "stays with it" in resumed.note
    assert train.resolve(config, new_run=True).parts[PLAN_PART] == "registry://ranker@v2"


def test_an_evaluation_judges_what_is_current_when_it_is_called(scene, models, tmp_path):
    collection = {"name": "c", "candidates": str(scene / "pairs.parquet"), "qrels": str(scene / "qrels.parquet")}
    settings = {"collections": [collection], "systems": ["registry://ranker"], "registry": models.uri}
    config = EvaluateConfig.model_validate(settings | {"output": str(tmp_path / "out")})
    before = evaluation.resolve(config)
    promote(models, "ranker", "v2", reason="better", key="v2")
    after = evaluation.resolve(config)
    assert [before.models["ranker"].name, after.models["ranker"].name] == [
        "registry://ranker@v1",
        "registry://ranker@v2",
    ]
    assert before.config.systems[0].model == "registry://ranker@v1"
    assert plans.fingerprint(before.parts) != plans.fingerprint(after.parts)


def test_distillation_stays_with_the_teacher_that_it_began_with(scene, models, tmp_path):
    settings = {"candidates": str(scene / "pairs.parquet"), "registry": models.uri, "output": str(tmp_path / "out")}
    config = DistillConfig.model_validate(settings | {"teachers": "registry://ranker", "student_layers": 1})
    begun, _ = distill._with_versions(config)
    assert begun.teacher_names == ("registry://ranker@v1",)
    scoring = distill._rerank_config(begun, 0)
    work = reranking.resolve(scoring)
    made = plans.make(scan(scoring, work.files), work.parts, shard_candidates=None, force_two_phase=False)
    plans.save(made, work.output)
    promote(models, "ranker", "v2", reason="better", key="v2")
    resumed, notes = distill._with_versions(config)
    assert resumed.teacher_names == ("registry://ranker@v1",) and "stays with it" in notes[0]
    assert distill._with_versions(config, new_run=True)[0].teacher_names == ("registry://ranker@v2",)
    distill.check(resumed)


def test_a_student_of_a_distillation_may_start_from_a_registry(scene, models, tmp_path):
    settings = {"candidates": str(scene / "pairs.parquet"), "registry": models.uri, "output": str(tmp_path / "out")}
    student = {"student": {"model": "registry://ranker"}, "teachers": str(scene / "v2")}
    chosen, notes = distill._with_versions(DistillConfig.model_validate(settings | student))
    assert distill._train_config(chosen).model == "registry://ranker@v1"
    assert notes == ["the model is registry://ranker@v1"]
    with pytest.raises(ValueError, match="registry is given by the distillation job"):
        DistillConfig.model_validate(settings | {"student": {"model": "m", "registry": "r"}, "teachers": "t"})
