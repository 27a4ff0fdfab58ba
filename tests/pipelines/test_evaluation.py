"""The whole evaluation job: models scored on one shared Ray cluster, rankings read, and what is written about them."""

import io
import json
from pathlib import Path

import ir_measures
import pandas as pd
import pyarrow.parquet as pq
import pytest

from crossenc.errors import ConfigError, InputError, RunConflictError
from crossenc.evaluation.gate import Gate, decide
from pipelines import evaluation, lease, rankings
from pipelines import rerank as reranking
from pipelines.evaluation import Outcome, evaluate, resolve
from pipelines.evaluation_config import EvaluateConfig
from pipelines.evaluation_output import load
from pipelines.records import ShardCounts
from pipelines.storage import locate, put
from pipelines.testing import FakeModel
from tests.support.collections import Collection, make_collection, plain_ranking

MEASURES = ["nDCG@10", "RR@5", "Judged@5"]


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    return make_collection(tmp_path / "in", num_queries=12, depth=10)


def write_qrels(collection: Collection) -> tuple[str, dict[str, dict[str, int]]]:
    rows = collection.pairs[collection.pairs["rank"].isin((2, 5))]
    qrels = {
        query: {r.doc_id: int(r.rank == 2) + 1 for r in group.itertuples()} for query, group in rows.groupby("query_id")
    }
    path = collection.folder / "qrels.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{q} 0 {d} {grade}\n" for q, grades in qrels.items() for d, grade in grades.items()))
    return str(path), qrels


def settings(collection: Collection, tmp_path: Path, layout: str = "ids", **more) -> EvaluateConfig:
    one = {"name": "made-up", "qrels": write_qrels(collection)[0], **collection.write(layout)}
    return EvaluateConfig(
        **{
            "collections": [one],
            "systems": [{"name": "fake", "model": "fake"}],
            "output": str(tmp_path / "out"),
            "measures": MEASURES,
            "depths": (3, 10),
            "scoring": {"cpus_per_actor": 1},
            **more,
        }
    )


def run(config: EvaluateConfig, stream: io.StringIO | None = None, **options) -> Outcome:
    models = {system.name: FakeModel() for system in config.systems if system.model}
    return evaluate(config, connect=lambda _: 2, stream=stream or io.StringIO(), models=models, **options)


def without_ray(_: object) -> int:
    raise AssertionError("nothing is to be scored")


def run_of(pairs: pd.DataFrame) -> dict[str, list[str]]:
    return pairs.groupby("query_id").doc_id.apply(list).to_dict()


def reference(run: dict[str, list[str]], qrels: dict) -> dict[str, float]:
    docs = {query: {doc: -float(i) for i, doc in enumerate(docs)} for query, docs in run.items()}
    measures = [ir_measures.parse_measure(name) for name in MEASURES]
    return {str(m): v for m, v in ir_measures.calc_aggregate(measures, qrels, docs).items()}


@pytest.mark.usefixtures("ray_cluster")
def test_models_and_rankings_are_judged_together_stopped_resumed_and_written_about(collection, tmp_path):
    qrels = write_qrels(collection)[1]
    by_hand = plain_ranking(collection.pairs)
    backwards = {query: docs[::-1] for query, docs in run_of(collection.pairs).items()}
    (tmp_path / "reversed.run").write_bytes(rankings.trec_run(backwards))
    systems = [{"name": "fake", "model": "fake"}, {"ranking": str(tmp_path / "reversed.run")}]
    config = settings(collection, tmp_path, systems=systems, trec_run=True, drain_seconds=0)
    out = tmp_path / "out"
    stopped = run(config, should_stop=lambda: True)
    assert stopped.state == "stopped" and stopped.evaluation is None and "run the same command again" in stopped.message
    assert not (out / "_SUCCESS").exists()
    outcome = run(config)
    assert outcome.state == "done" and (out / "_SUCCESS").exists() and "report.html" in outcome.message
    found = load(locate(str(out)))
    assert found == outcome.evaluation
    result = found.collection("made-up")
    assert [system.system for system in result.systems] == ["first_stage", "fake", "reversed.run"]
    for name, expected in (("first_stage", run_of(collection.pairs)), ("fake", run_of(by_hand))):
        figures = {figure.measure: figure.value.mean for figure in result.system(name).figures}
        assert figures == reference(expected, qrels)
        assert rankings.read(rankings.find(str(out / f"trec/made-up/{name}.run"), {}), qrels, {}) == expected
    assert [point.depth for point in result.system("fake").depths] == [3, 10]
    assert result.system("fake").pairs_per_second and not result.system("reversed.run").pairs_per_second
    table = pq.read_table(out / "per_query.parquet").to_pandas()
    assert len(table) == 3 * 12 and set(table.num_ranked) == {10} and set(table.num_relevant) == {2}
    assert table[table.system == "fake"]["nDCG@10"].mean() == pytest.approx(result.system("fake").figures[0].value.mean)
    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    texts = dict(zip(collection.pairs.query_id, collection.pairs["query"], strict=True))
    assert losses and all(loss["query"] == texts[loss["query_id"]] for loss in losses)
    assert all(document["text"] for loss in losses for document in (*loss["risen"], *loss["fallen"]))
    assert "reversed.run" in (out / "report.html").read_text()
    assert decide(Gate(min_queries=2), found, "fake").checks  # a gate reads what was stored

    again = evaluate(config, connect=without_ray, stream=io.StringIO(), models={"fake": FakeModel()})
    assert again.state == "already done" and again.evaluation == found
    more = config.model_copy(update={"measures": ("AP",), "seed": 1})  # other figures of what was scored already
    anew = evaluate(more, connect=without_ray, stream=io.StringIO(), models={"fake": FakeModel()})
    assert anew.state == "done" and anew.evaluation is not None and anew.evaluation.measures == ("AP",)

    folder = next((out / "runs/made-up").iterdir())  # a rerank run is a ranking, too
    last_week = [{"name": "last-week", "ranking": str(folder)}]
    judged = run(settings(collection, tmp_path, systems=last_week, output=str(tmp_path / "other"))).evaluation
    assert judged is not None
    found_depths, made_depths = judged.collections[0].system("last-week").depths, result.system("fake").depths
    assert [point.mean for point in found_depths] == [point.mean for point in made_depths]
    (folder / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="not the output of a finished rerank run"):
        run(settings(collection, tmp_path, systems=last_week, output=str(tmp_path / "other")))


def test_candidates_that_scoring_failed_for_are_counted_and_those_that_no_model_could_score_are_not(
    collection, tmp_path, monkeypatch
):
    refused = {"document_empty": 2, "score_not_finite": 2, "scoring_crash": 1}
    numbers = dict.fromkeys(("num_queries", "num_scored", "num_results", "num_tokens"), 0)
    numbers |= {"num_candidates": 120, "num_padded_tokens": 0, "num_truncated": 0}
    counts = ShardCounts(**numbers, refused=refused, score_histogram=(), length_histogram=())
    monkeypatch.setattr(
        evaluation, "rerank", lambda config, **_: reranking.Outcome("done", locate(config.output), "done", counts)
    )
    found = run(settings(collection, tmp_path)).evaluation
    assert found is not None and found == load(locate(str(tmp_path / "out")))
    assert [system.num_failed for system in found.collections[0].systems] == [0, 3]
    assert "scoring failed for 3 candidates" in "; ".join(decide(Gate(), found, "fake").reasons)


def reading(collection: Collection, tmp_path: Path, **more) -> EvaluateConfig:
    """A job that only reads rankings, and so needs no Ray."""
    orders = {query: docs[::-1] for query, docs in run_of(collection.pairs).items()}
    (tmp_path / "a.run").write_bytes(rankings.trec_run(orders))
    return settings(collection, tmp_path, **{"systems": [{"name": "a", "ranking": str(tmp_path / "a.run")}], **more})


def test_a_changed_input_gives_new_figures_and_new_run_starts_over(collection, tmp_path):
    config = reading(collection, tmp_path)
    before = run(config).evaluation
    (tmp_path / "a.run").write_bytes(rankings.trec_run(run_of(collection.pairs)))
    after = run(config)
    assert after.state == "done" and after.evaluation is not None and after.evaluation != before
    (tmp_path / "out/collections/left-over").write_text("x")
    assert run(config, new_run=True).state == "done" and not (tmp_path / "out/collections/left-over").exists()


def test_a_ranking_that_lacks_candidates_is_judged_but_not_by_depths(collection, tmp_path):
    short = {query: docs[:4] for query, docs in list(run_of(collection.pairs).items())[:11]}
    config = reading(collection, tmp_path)
    (tmp_path / "a.run").write_bytes(rankings.trec_run(short))
    found = run(config).evaluation
    assert found is not None
    system = found.collections[0].system("a")
    assert system.depths == () and system.num_without_ranking == 1
    assert "76 of 120 candidates are not in this ranking" in system.notes


def test_an_evaluation_that_was_overtaken_writes_nothing(collection, tmp_path, monkeypatch):
    folder, judge = tmp_path / "out" / lease.LEASE_FOLDER, evaluation._judge

    def overtaken(*arguments):
        (folder / "epoch-000002.json").write_bytes((folder / "epoch-000001.json").read_bytes())
        return judge(*arguments)

    monkeypatch.setattr(evaluation, "_judge", overtaken)
    outcome = run(reading(collection, tmp_path))
    assert outcome.state == "stopped" and "took this output over" in outcome.message
    assert not (tmp_path / "out" / "evaluation.json").exists() and not (tmp_path / "out" / "_SUCCESS").exists()


def test_several_collections_have_their_own_rankings(collection, tmp_path):
    config = reading(collection, tmp_path)
    (first,) = config.collections
    both = [first, first.model_copy(update={"name": "again", "num_queries": 5})]
    systems = [{"name": "a", "ranking": {"made-up": str(tmp_path / "a.run"), "again": str(tmp_path / "a.run")}}]
    found = run(EvaluateConfig(**{**config.model_dump(), "collections": both, "systems": systems})).evaluation
    assert found is not None and [one.num_queries for one in found.collections] == [12, 5]
    assert found.num_compared == 4


def test_an_evaluation_reads_from_and_writes_to_an_object_store(collection, tmp_path, s3_bucket):
    local = run(reading(collection, tmp_path)).evaluation
    base = f"s3://{s3_bucket}/in"
    for path in [tmp_path / "a.run", *(path for path in (tmp_path / "in").rglob("*") if path.is_file())]:
        put(locate(f"{base}/{path.relative_to(tmp_path)}"), path.read_bytes())
    folder = f"{base}/in/ids"
    one = {"name": "made-up", "qrels": f"{base}/in/qrels.txt", "candidates": f"{folder}/candidates"}
    one |= {"queries": f"{folder}/queries.parquet", "corpus": f"{folder}/corpus.parquet"}
    systems = [{"name": "a", "ranking": f"{base}/a.run"}]
    config = reading(collection, tmp_path, collections=[one], systems=systems, output=f"s3://{s3_bucket}/out")
    found = run(config).evaluation
    assert local is not None and found is not None and load(locate(f"s3://{s3_bucket}/out")) == found
    for here, there in zip(local.collections[0].systems, found.collections[0].systems, strict=True):
        assert (here.figures, here.depths) == (there.figures, there.depths)
    assert run(config).state == "already done"


def test_a_damaged_or_foreign_record_is_named(collection, tmp_path):
    config = reading(collection, tmp_path)
    run(config)
    (tmp_path / "out/evaluation.json").write_text('{"format": 99}')
    with pytest.raises(RunConflictError, match=r"evaluation\.json is no evaluation of this version"):
        run(config)
    assert run(config, new_run=True).state == "done"
    with pytest.raises(RunConflictError, match="is no evaluation"):
        load(locate(str(tmp_path / "absent")))


def test_what_cannot_be_evaluated_is_refused_before_any_work(collection, tmp_path):
    with pytest.raises(ConfigError, match="made-up has no texts for a model to read: name its queries and corpus"):
        config = settings(collection, tmp_path)
        bare = config.collections[0].model_copy(update={"queries": None, "corpus": None})
        resolve(config.model_copy(update={"collections": (bare,)}), {"fake": FakeModel()})
    with pytest.raises(ConfigError, match="lie inside each other"):
        resolve(reading(collection, tmp_path, output=str(tmp_path / "in/ids/candidates/out")))
    config = reading(collection, tmp_path)
    (tmp_path / "a.run").write_text("other Q0 d 1 1.0 t\n")
    with pytest.raises(InputError, match=r"a\.run ranks none of the judged queries of made-up"):
        run(config)
    assert not (tmp_path / "out/_SUCCESS").exists()
