"""The whole job on one shared Ray cluster, with a fake model: results, layouts, resume and refusals."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray

from crossenc.errors import ConfigError, InputError, RunConflictError
from crossenc.testing import FakeScorer, FakeTokenizer, tiny_checkpoint
from jobs import cluster
from pipelines.config import RerankConfig
from pipelines.rerank import Outcome, rerank
from pipelines.testing import FakeModel
from tests.support.collections import (
    Collection,
    make_collection,
    part_bytes,
    read_manifest,
    read_quarantine,
    read_results,
)
from tests.support.models import NAN, RAISE, StumblingModel

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(output: Path | str, model=None, new_run=False, **settings) -> Outcome:
    config = RerankConfig(model="fake", output=str(output), scoring={"cpus_per_actor": 1}, **settings)
    stream = io.StringIO()
    return rerank(config, connect=lambda: 2, stream=stream, model=model or FakeModel(), new_run=new_run)


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return make_collection(tmp_path / "in")


def expected(pairs: pd.DataFrame) -> pd.DataFrame:
    """The oracle: every pair scored by itself, ordered by score, then first-stage rank, then doc id."""
    scored = pairs.copy()
    tokens = FakeTokenizer().encode(pairs["query"].tolist(), pairs.text.tolist())
    scored["score"] = FakeScorer().score(tokens)
    scored = scored.sort_values(["query_id", "score", "rank", "doc_id"], ascending=[True, False, True, True])
    scored["new_rank"] = scored.groupby("query_id").cumcount() + 1
    return scored.reset_index(drop=True)


def test_every_layout_gives_the_ranking_of_a_plain_loop(collection, tmp_path):
    oracle = expected(collection.pairs)
    for layout in ("pairs", "shuffled", "nested", "ids"):
        output = tmp_path / layout
        outcome = run(output, **collection.write(layout), shard_candidates=40)
        results = read_results(output)
        assert outcome.state == "done"
        assert results.query_id.tolist() == oracle.query_id.tolist(), layout
        assert results.doc_id.tolist() == oracle.doc_id.tolist(), layout
        np.testing.assert_array_equal(results.score, oracle.score)
        assert results["rank"].tolist() == oracle.new_rank.tolist()
        assert results.first_stage_rank.tolist() == oracle["rank"].tolist()


def test_a_finished_run_is_left_alone_and_says_so(collection, tmp_path):
    settings = collection.write("pairs")
    run(tmp_path / "out", **settings)
    before = part_bytes(tmp_path / "out")
    outcome = run(tmp_path / "out", **settings)
    assert outcome.state == "already done"
    assert outcome.counts is not None and outcome.counts.num_scored == len(collection.pairs)
    assert part_bytes(tmp_path / "out") == before


def test_lost_parts_are_made_again_byte_for_byte(collection, tmp_path):
    settings = collection.write("pairs")
    run(tmp_path / "out", **settings, shard_candidates=40)
    before = part_bytes(tmp_path / "out")
    parts = sorted((tmp_path / "out" / "results").iterdir())
    parts[1].unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "_manifest.json").unlink()
    assert run(tmp_path / "out", **settings, shard_candidates=40).state == "done"
    assert part_bytes(tmp_path / "out") == before


def test_a_changed_option_input_or_model_is_refused_by_name(collection, tmp_path):
    settings = collection.write("pairs")
    run(tmp_path / "out", **settings, top_k=3)
    with pytest.raises(RunConflictError, match="option top_k: was 3, is 4"):
        run(tmp_path / "out", **settings, top_k=4)
    with pytest.raises(RunConflictError, match="model fake: was max_length 512, is max_length 64"):
        run(tmp_path / "out", **settings, top_k=3, model=FakeModel(max_length=64))
    collection.pairs.head(50).to_parquet(tmp_path / "in" / "pairs" / "pairs.parquet", index=False)
    with pytest.raises(RunConflictError, match=r"input file://.*pairs\.parquet: was .* bytes"):
        run(tmp_path / "out", **settings, top_k=3)
    outcome = run(tmp_path / "out", **settings, top_k=3, new_run=True)
    assert outcome.counts is not None and outcome.counts.num_candidates == 50


def test_bad_rows_are_quarantined_with_reason_and_place_and_good_ones_ranked(collection, tmp_path):
    pairs = collection.pairs.copy()
    pairs.loc[3, "text"] = None
    pairs.loc[14, "text"] = "  "
    pairs.loc[25, "text"] = "x" * 2000
    pairs.loc[36, "text"] = f"this gives {NAN}"
    pairs.loc[47, "text"] = f"this {RAISE} raises"
    pairs.loc[58, "doc_id"] = pairs.loc[51, "doc_id"]
    settings = Collection(pairs, tmp_path / "bad").write("pairs")
    outcome = run(tmp_path / "out", model=StumblingModel(), max_text_bytes=1000, shard_candidates=40, **settings)
    quarantine = read_quarantine(tmp_path / "out")
    assert dict(zip(quarantine.row, quarantine.reason, strict=True)) == {
        3: "document_missing",
        14: "document_empty",
        25: "document_too_large",
        36: "score_not_finite",
        47: "scoring_error",
        58: "duplicate_document",
    }
    good = expected(collection.pairs.drop(index=[3, 14, 25, 36, 47, 58]))
    results = read_results(tmp_path / "out")
    assert results.doc_id.tolist() == good.doc_id.tolist()
    counts = outcome.counts
    assert counts is not None
    assert (counts.num_candidates, counts.num_scored, sum(counts.refused.values())) == (200, 194, 6)
    completeness = pq.read_table(tmp_path / "out" / "completeness").to_pandas()
    assert completeness.num_refused.sum() == 6 and completeness.num_candidates.sum() == 200
    report = (tmp_path / "out" / "report.html").read_text()
    assert "document_too_large" in report or "larger than" in report


def test_top_k_pass_through_and_trec_lines(collection, tmp_path):
    pairs = collection.pairs.assign(market="de", price=np.arange(len(collection.pairs)))
    settings = Collection(pairs, tmp_path / "more").write("pairs")
    run(tmp_path / "out", **settings, top_k=2, pass_through=["market", "price"], trec_run=True)
    results = read_results(tmp_path / "out")
    oracle = expected(pairs)
    assert results.price.tolist() == oracle[oracle.new_rank <= 2].price.tolist()
    assert set(results.market) == {"de"}
    lines = [line.split() for path in (tmp_path / "out" / "trec").iterdir() for line in path.read_text().splitlines()]
    assert [(q, d, int(r)) for q, _, d, r, _, _ in lines] == list(
        zip(results.query_id, results.doc_id, results["rank"], strict=True)
    )


def test_interpolation_mixes_scores_and_keeps_the_originals(collection, tmp_path):
    settings = collection.write("pairs")
    run(tmp_path / "first", **settings, interpolate={"weight": 0.0})
    results = read_results(tmp_path / "first")
    by_first_stage = collection.pairs.sort_values(["query_id", "score"], ascending=[True, False])
    assert results.doc_id.tolist() == by_first_stage.doc_id.tolist()
    np.testing.assert_array_equal(results.first_stage_score, by_first_stage.score)
    assert results.model_score.between(0, 1).all()


def test_a_fitted_weight_is_chosen_on_the_given_queries_and_reported(collection, tmp_path):
    pairs = collection.pairs
    judged = pairs[(pairs["rank"] == 1) & (pairs.query_id < "q0010")]
    qrels = pd.DataFrame({"query_id": judged.query_id, "doc_id": judged.doc_id, "relevance": 1})
    qrels.to_parquet(tmp_path / "dev.parquet", index=False)
    run(tmp_path / "out", **collection.write("pairs"), interpolate={"fit": str(tmp_path / "dev.parquet")})
    # The first stage ranks every relevant document first and hashes do not, so some weight keeps them all there.
    assert "the best nDCG@10 (1.0000) on 10 judged queries" in read_manifest(tmp_path / "out")["interpolation"]
    results = read_results(tmp_path / "out").merge(qrels, on=["query_id", "doc_id"])
    assert set(results["rank"]) == {1}


def test_qrels_put_before_and_after_with_a_paired_test_into_the_report(collection, tmp_path):
    top = collection.pairs[collection.pairs["rank"] == 1]
    qrels = pd.DataFrame({"query_id": top.query_id, "doc_id": top.doc_id, "relevance": 1})
    qrels.to_parquet(tmp_path / "qrels.parquet", index=False)
    run(tmp_path / "out", **collection.write("pairs"), qrels=str(tmp_path / "qrels.parquet"))
    (ndcg, *_) = read_manifest(tmp_path / "out")["evaluation"]
    assert ndcg["measure"] == "nDCG@10" and ndcg["before"] == 1.0 and ndcg["after"] < 1.0
    assert ndcg["num_queries"] == 20 and ndcg["p_t"] < 0.01
    assert "nDCG@10" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_in_another_number_format_says_how_it_agrees_with_float32(collection, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    settings = collection.write("pairs") | {"scoring": {"cpus_per_actor": 1, "dtype": "bfloat16"}}
    config = RerankConfig(model=str(folder), output=str(tmp_path / "out"), **settings)
    rerank(config, connect=lambda: 2, stream=io.StringIO())
    found = read_manifest(tmp_path / "out")["agreement_with_float32"]
    assert found["num_queries"] == 20 and found["num_pairs"] == len(collection.pairs)
    kinds = read_manifest(tmp_path / "out")["counts"]["forward_kinds"]
    assert kinds == {"packed, SDPA by groups of equal length": len(collection.pairs)}
    assert 0 < found["mean_difference"] < found["max_difference"] < 0.1
    assert "Agreement with float32" in (tmp_path / "out" / "report.html").read_text()
    run(tmp_path / "exact", **collection.write("pairs"))
    assert read_manifest(tmp_path / "exact")["agreement_with_float32"] is None


def test_no_candidates_at_all_still_give_a_readable_empty_result(collection, tmp_path):
    settings = Collection(collection.pairs.head(0).astype({"rank": int}), tmp_path / "none").write("pairs")
    outcome = run(tmp_path / "out", **settings)
    assert outcome.counts is not None and outcome.counts.num_candidates == 0
    assert pq.read_table(tmp_path / "out" / "results").num_rows == 0


def test_output_inside_the_input_is_refused(collection, tmp_path):
    settings = collection.write("pairs")
    with pytest.raises(ConfigError, match="inside each other"):
        run(Path(settings["candidates"]) / "out", **settings)


def test_an_output_with_foreign_files_is_refused(collection, tmp_path):
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "results" / "part-0.parquet").write_bytes(b"somebody else's")
    with pytest.raises(RunConflictError, match="choose another output"):
        run(tmp_path / "out", **collection.write("pairs"))


def test_a_missing_column_is_named_with_what_is_there(collection, tmp_path):
    pairs = collection.pairs.rename(columns={"text": "txet"})
    with pytest.raises(InputError, match=r"has query_id, query, doc_id, txet.*Did you mean 'txet'"):
        run(tmp_path / "out", **Collection(pairs, tmp_path / "odd").write("pairs"), layout="pairs")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_leaves_a_ray_alone_that_ran_before_it():
    with cluster.disconnected_at_end():
        assert ray.is_initialized()
    assert ray.is_initialized()
