"""Whole mining jobs: every layout and format, rerank runs as the source, bad rows, kills, conflicts, S3."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from crossenc.errors import InputError, RunConflictError
from pipelines import lease, logs
from pipelines import mine as mining
from pipelines.config import RerankConfig
from pipelines.mine import Outcome, mine
from pipelines.mine_config import MineConfig
from pipelines.mine_shard import MineCounts
from pipelines.rerank import rerank
from pipelines.testing import FakeModel
from pipelines.train_data_config import LabelledData
from pipelines.train_files import cut_slices, find_columns, list_files, read_slice
from pipelines.train_rows import Texts, from_lines, judge
from tests.support.collections import Collection, make_collection, plain_ranking, read_quarantine
from tests.support.processes import children, is_running, wait_for
from tests.support.s3 import S3Server

#: Query -> the first-stage ranks of its positives with their grades; a query that is not here is not judged.
GRADES = {f"q{q:04d}": {q % 10 + 1: 1} for q in range(16)} | {"q0001": {2: 1, 5: 3}, "q0002": {4: 0}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return make_collection(tmp_path / "in")


def judgements(pairs: pd.DataFrame) -> pd.DataFrame:
    wanted = [(query_id, rank, grade) for query_id, ranks in GRADES.items() for rank, grade in ranks.items()]
    judged = pd.DataFrame(wanted, columns=["query_id", "rank", "relevance"])
    return judged.merge(pairs, on=["query_id", "rank"])[["query_id", "doc_id", "relevance"]]


def write_qrels(collection: Collection) -> str:
    path = collection.folder.parent / "qrels.parquet"
    judgements(collection.pairs).to_parquet(path, index=False)
    return str(path)


def run(output: Path | str, new_run: bool = False, should_stop=lambda: False, **settings) -> Outcome:
    config = MineConfig.model_validate({"output": str(output), **settings})
    return mine(config, stream=io.StringIO(), should_stop=should_stop, new_run=new_run)


def counts(outcome: Outcome) -> MineCounts:
    assert outcome.counts is not None
    return outcome.counts


def read(output: Path | str) -> list[dict]:
    """The rows of the training data, by query."""
    rows = pq.read_table(f"{output}/data").to_pylist()
    return sorted(rows, key=lambda row: row.get("query", row.get("query_id")))


def written(output: Path | str) -> dict[str, bytes]:
    """Every file of the output that readers see, but for the times in the manifest."""
    root = Path(output)
    folders = ("data", "completeness", "quarantine")
    return {
        str(p.relative_to(root)): p.read_bytes()
        for folder in folders
        for p in sorted((root / folder).glob("*"))
        if not p.name.startswith(".")
    }


def plain_mining(pairs: pd.DataFrame, num_negatives: int = 5, margin: float | None = None) -> dict[str, dict]:
    """The oracle, by hand: query text -> its positives and its best-scored negatives."""
    positive = judgements(pairs).query("relevance > 0")
    mined = {}
    for query_id, candidates in pairs.groupby("query_id"):
        grades = dict(positive[positive.query_id == query_id][["doc_id", "relevance"]].itertuples(index=False))
        is_positive = candidates.doc_id.isin(grades)
        texts = set(candidates[is_positive].text)
        others = candidates[~is_positive & ~candidates.text.isin(texts)].drop_duplicates("text")
        if margin is not None:
            others = others[others.score < candidates[is_positive].score.min() - margin]
        if not grades or others.empty:
            continue
        by_grade = candidates[is_positive].assign(grade=candidates.doc_id.map(grades))
        by_grade = by_grade.sort_values(["grade", "doc_id"], ascending=[False, True])
        best = others.sort_values("score", ascending=False)[:num_negatives]
        mined[candidates["query"].iloc[0]] = {"query_id": query_id, "positives": by_grade, "negatives": best}
    return mined


def test_every_layout_gives_the_lists_of_a_plain_loop(collection, tmp_path):
    qrels, oracle = write_qrels(collection), plain_mining(collection.pairs)
    assert len(oracle) == 15
    for layout in ("pairs", "shuffled", "nested", "ids"):
        outcome = run(tmp_path / layout, qrels=qrels, shard_candidates=40, **collection.write(layout))
        assert outcome.state == "done"
        rows = read(tmp_path / layout)
        assert [row["query"] for row in rows] == sorted(oracle), layout
        for row in rows:
            wanted = oracle[row["query"]]
            assert row["docs"] == [*wanted["positives"].text, *wanted["negatives"].text], layout
            assert row["labels"] == [1.0] * len(wanted["positives"]) + [0.0] * 5
        found = counts(outcome)
        assert (found.num_queries, found.num_mined, found.left_out) == (20, 15, {"no_positive": 5})
        assert found.num_candidates == 200 and found.num_negatives == 75
        found.check()


def test_shards_of_any_size_give_the_same_data(collection, tmp_path):
    qrels, settings = write_qrels(collection), collection.write("pairs")
    drawn = {"sampling": "random", "num_negatives": 3, "format": "triplets"}
    run(tmp_path / "a", qrels=qrels, **settings, **drawn, shard_candidates=10)
    run(tmp_path / "b", qrels=qrels, **settings, **drawn)
    assert len(list((tmp_path / "a" / "data").iterdir())) > 1
    assert read(tmp_path / "a") == read(tmp_path / "b")


def expected_rows(mined: dict[str, dict], shape: str) -> list[dict]:
    rows = []
    for query, wanted in sorted(mined.items()):
        positives = list(wanted["positives"].itertuples(index=False))
        negatives = list(wanted["negatives"].itertuples(index=False))
        both = [*positives, *negatives]
        grades = [float(p.grade) for p in positives] + [0.0] * len(negatives)
        if shape == "pairs":
            rows += [
                {"query": query, "document": d.text, "label": g, "score": d.score}
                for d, g in zip(both, grades, strict=True)
            ]
        elif shape == "ids":
            rows += [
                {"query_id": wanted["query_id"], "doc_id": d.doc_id, "label": g, "score": d.score}
                for d, g in zip(both, grades, strict=True)
            ]
        elif shape == "triplets":
            rows += [
                {"query": query, "positive": p.text, "negative": n.text, "scores": [p.score, n.score]}
                for p in positives
                for n in negatives
            ]
        elif shape == "tuples":
            for p in positives:
                row = {"query": query, "positive": p.text, "scores": [p.score, *(n.score for n in negatives)]}
                rows.append(row | {f"negative_{i}": n.text for i, n in enumerate(negatives, start=1)})
        elif shape == "lists":
            row = {"query": query, "docs": [d.text for d in both], "labels": grades}
            rows.append(row | {"scores": [d.score for d in both]})
        else:
            row = {"query": query, "pos": [p.text for p in positives], "neg": [n.text for n in negatives]}
            rows.append(row | {"pos_scores": [p.score for p in positives], "neg_scores": [n.score for n in negatives]})
    return sorted(rows, key=lambda row: row.get("query", row.get("query_id")))


@pytest.mark.parametrize("shape", ["pairs", "ids", "triplets", "tuples", "lists", "flagembedding"])
def test_every_format_holds_the_same_negatives_with_their_scores(collection, tmp_path, shape):
    oracle = plain_mining(collection.pairs, num_negatives=2, margin=1.5)
    outcome = run(
        tmp_path / "out",
        qrels=write_qrels(collection),
        **collection.write("nested"),
        format=shape,
        num_negatives=2,
        absolute_margin=1.5,
        scores=True,
        labels="grades",
    )
    if shape == "tuples":  # a tuple is whole or absent
        oracle = {query: wanted for query, wanted in oracle.items() if len(wanted["negatives"]) == 2}
        assert counts(outcome).num_short == 0
    if shape == "flagembedding":
        lines = [line for path in (tmp_path / "out" / "data").iterdir() for line in path.read_text().splitlines()]
        rows = sorted(map(json.loads, lines), key=lambda row: row["query"])
    else:
        rows = read(tmp_path / "out")
    assert 0 < len(oracle) < 15
    assert rows == expected_rows(oracle, shape)
    assert counts(outcome).num_rows == len(rows) and counts(outcome).num_mined == len(oracle)


def test_triples_are_lines_that_training_reads_again(collection, tmp_path):
    pairs = collection.pairs.assign(text="\t" + collection.pairs.text.str.replace(" ", "\r\n", n=1))
    changed = Collection(pairs, collection.folder)
    settings = {"qrels": write_qrels(changed), **changed.write("pairs"), "num_negatives": 2, "shard_candidates": 40}
    run(tmp_path / "tsv", format="triples", **settings)
    run(tmp_path / "parquet", format="triplets", **settings)
    clean = str.maketrans("\t\r\n", "   ")
    expected = [[row[name].translate(clean) for name in row] for row in read(tmp_path / "parquet")]
    data = LabelledData(files=str(tmp_path / "tsv" / "data" / "*.tsv"))
    files = list_files(data, {})
    columns = find_columns(data, files)
    assert columns.layout == "triples" and len(files) > 1
    rows = [
        row
        for entry in cut_slices(files, columns, False, None)
        for batch in read_slice(files[entry.file], entry, [], [])
        for row in from_lines(batch, False, columns, Texts(None, None, 1000))
    ]
    assert all(judge(row, columns) == ([0, 1], []) for row in rows)
    assert sorted([row.query[0], *(text for text, _ in row.documents)] for row in rows) == sorted(expected)
    with pytest.raises(ValueError, match="triples have no place for scores"):
        MineConfig(format="triples", scores=True, output="o", candidates="c", qrels="q")


def reranked(collection: Collection, layout: str, output: Path, **settings) -> tuple[str, dict[str, str]]:
    """A finished rerank run of the collection; its output, and the tables that mining it needs."""
    inputs = collection.write(layout)
    config = RerankConfig(model="fake", output=str(output), scoring={"cpus_per_actor": 1}, **inputs, **settings)
    assert rerank(config, connect=lambda: 2, stream=io.StringIO(), model=FakeModel()).state == "done"
    return str(output), {name: inputs[name] for name in ("queries", "corpus") if name in inputs}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("layout", "interpolate"), [("pairs", None), ("shuffled", None), ("nested", None), ("ids", {"weight": 0.3})]
)
def test_a_rerank_run_s_model_scores_are_what_the_rules_look_at(collection, tmp_path, layout, interpolate):
    settings = {"shard_candidates": 40, "interpolate": interpolate}
    run_folder, tables = reranked(collection, layout, tmp_path / "reranked", **settings)
    outcome = run(
        tmp_path / "out",
        reranked=run_folder,
        qrels=write_qrels(collection),
        **tables,
        absolute_margin=0.5,
        max_rank=8,
        scores=True,
    )
    scored = plain_ranking(collection.pairs)
    near = scored[(scored["rank"] <= 8) | scored.doc_id.isin(judgements(collection.pairs).doc_id)]
    oracle = plain_mining(near, margin=0.5)
    for wanted in oracle.values():  # a document judged for another query may rank below 8
        wanted["negatives"] = wanted["negatives"][wanted["negatives"]["rank"] <= 8]
    oracle = {query: wanted for query, wanted in oracle.items() if len(wanted["negatives"])}
    rows = read(tmp_path / "out")
    assert [row["query"] for row in rows] == sorted(oracle) and rows
    for row in rows:
        both = pd.concat([oracle[row["query"]]["positives"], oracle[row["query"]]["negatives"]])
        assert row["docs"] == list(both.text)
        np.testing.assert_array_equal(row["scores"], both.score)
    assert counts(outcome).num_candidates == 200


def test_the_tables_beside_a_rerank_run_are_read_by_the_names_that_it_had_for_columns(
    collection, tmp_path, monkeypatch
):
    inputs = collection.write("ids")
    for name, column in (("corpus", "abstract"), ("queries", "wording")):
        table = pd.read_parquet(inputs[name])
        table.assign(**{column: table.text}).to_parquet(inputs[name], index=False)
    shared = {"qrels": write_qrels(collection), "output": str(tmp_path / "out")}
    named = MineConfig(**inputs, **shared, columns={"text": "abstract", "query": "wording"})
    plan = mining.make_plan(mining.resolve(named))
    monkeypatch.setattr(mining, "finished_rerank", lambda *_: (plan, {}))
    tables = {name: inputs[name] for name in ("queries", "corpus")}
    job = mining.resolve(MineConfig(reranked=str(tmp_path / "reranked"), **tables, **shared))
    assert job.queries is not None and job.queries.text_column == "wording"
    assert job.corpus is not None and job.corpus.text_column == "abstract"


@pytest.mark.usefixtures("ray_cluster")
def test_candidates_below_a_rerank_run_s_top_k_have_no_score(collection, tmp_path):
    run_folder, _ = reranked(collection, "pairs", tmp_path / "reranked", top_k=4)
    outcome = run(tmp_path / "out", reranked=run_folder, qrels=write_qrels(collection), max_score=1e9)
    assert counts(outcome).excluded["no_score"] > 0
    kept = plain_ranking(collection.pairs).groupby("query_id").head(4)
    for row in read(tmp_path / "out"):
        negatives = [doc for doc, label in zip(row["docs"], row["labels"], strict=True) if not label]
        assert set(negatives) <= set(kept[kept["query"] == row["query"]].text)


@pytest.mark.usefixtures("ray_cluster")
def test_a_rerank_run_that_is_not_whole_is_refused(collection, tmp_path):
    qrels = write_qrels(collection)
    run_folder, _ = reranked(collection, "pairs", tmp_path / "reranked", shard_candidates=40)
    next((tmp_path / "reranked" / "results").iterdir()).unlink()
    with pytest.raises(InputError, match="lacks the part"):
        run(tmp_path / "out", reranked=run_folder, qrels=qrels)
    (tmp_path / "reranked" / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="not finished"):
        run(tmp_path / "out", reranked=run_folder, qrels=qrels)
    with pytest.raises(InputError, match="not the output of a rerank run"):
        run(tmp_path / "out", reranked=str(tmp_path / "in"), qrels=qrels)


def test_a_positive_that_is_no_candidate_comes_from_the_corpus_or_is_counted(collection, tmp_path):
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("q0000 0 extra 1\nq0001 0 extra 2\nq0001 0 nowhere 1\n")
    corpus = tmp_path / "corpus.parquet"
    text = collection.pairs.text[0]  # equal to the text of q0000's first candidate
    pq.write_table(pa.table({"doc_id": ["extra"], "text": [f"  {text.upper()} "]}), corpus)
    settings = {"qrels": str(qrels), **collection.write("nested")}
    without = run(tmp_path / "without", **settings)
    assert counts(without).left_out == {"no_positive": 18, "positive_without_text": 2}
    found = counts(run(tmp_path / "with", **settings, corpus=str(corpus)))
    assert (found.num_mined, found.num_positives) == (2, 2)
    assert found.dropped_positives == {"without_text": 1}
    assert found.excluded["equals_positive"] >= 1
    assert all(row["docs"][0] == f"  {text.upper()} " and text not in row["docs"] for row in read(tmp_path / "with"))
    scored = counts(run(tmp_path / "scored", **settings, corpus=str(corpus), scores=True))
    assert scored.left_out == {"no_positive": 18, "positive_without_score": 2}


def test_known_positives_are_no_negatives_of_their_query_and_are_not_learned(collection, tmp_path):
    pairs, settings = collection.pairs, collection.write("ids")
    top = pairs[pairs.query_id == "q0000"].sort_values("score", ascending=False)
    top = top[~top.text.duplicated(keep=False)]
    (tmp_path / "new.txt").write_text(f"q0000 0 {top.doc_id.iloc[0]} 1\n")
    known = f"q0000 0 {top.doc_id.iloc[1]} 1\nq0001 0 {pairs.doc_id.iloc[10]} 1\n"
    elsewhere = pairs[~pairs.text.isin(top.text)].iloc[0]
    (tmp_path / "known.txt").write_text(f"{known}q0000 0 {elsewhere.doc_id} 1\n")
    settings |= {"qrels": str(tmp_path / "new.txt"), "num_negatives": 2}
    run(tmp_path / "plain", **settings)
    assert read(tmp_path / "plain")[0]["docs"] == top.text.iloc[:3].tolist()
    found = counts(run(tmp_path / "out", **settings, known_positives=str(tmp_path / "known.txt")))
    [row] = read(tmp_path / "out")
    assert row["docs"] == top.text.iloc[[0, 2, 3]].tolist() and row["labels"] == [1.0, 0.0, 0.0]
    assert (found.num_mined, found.num_positives, found.excluded["positive"]) == (1, 1, 2)
    with pytest.raises(RunConflictError, match="option known_positives"):
        run(tmp_path / "out", **settings)


def test_of_positives_with_one_text_the_one_of_the_best_grade_is_learned(collection, tmp_path):
    pairs = collection.pairs[collection.pairs.query_id == "q0000"].copy()
    pairs["text"] = ["One text", "another text", "one  TEXT", *pairs.text[3:]]
    grades = zip(pairs.doc_id[:3], (1, 2, 3), strict=True)
    (tmp_path / "qrels.txt").write_text("".join(f"q0000 0 {doc_id} {grade}\n" for doc_id, grade in grades))
    inputs = Collection(pairs, collection.folder).write("pairs")
    found = counts(run(tmp_path / "out", qrels=str(tmp_path / "qrels.txt"), **inputs, num_negatives=1))
    assert read(tmp_path / "out")[0]["docs"][:2] == ["one  TEXT", "another text"]
    assert (found.num_positives, found.dropped_positives) == (2, {"repeated_text": 1})


def test_bad_rows_are_quarantined_with_their_place_and_everything_else_is_mined(collection, tmp_path):
    pairs = collection.pairs.copy()
    pairs.loc[13, "text"] = None
    pairs.loc[range(20, 30), "query"] = " "
    pairs.loc[42, "doc_id"] = pairs.loc[41, "doc_id"]
    bad = Collection(pairs, collection.folder)
    found = counts(run(tmp_path / "out", qrels=write_qrels(collection), **bad.write("pairs")))
    refused = read_quarantine(tmp_path / "out")
    assert found.refused == {"document_missing": 1, "duplicate_document": 1, "query_empty": 10}
    assert refused.row.tolist() == [13, *range(20, 30), 42]
    assert refused.reason.tolist() == ["document_missing", *["query_empty"] * 10, "duplicate_document"]
    assert found.left_out == {"no_candidates": 1, "no_positive": 4}
    account = pq.read_table(tmp_path / "out" / "completeness").to_pandas().set_index("query_id")
    assert account.loc["q0002"].tolist() == [10, 10, 0, 0, "no_candidates"]
    assert account.loc["q0001"].tolist()[:4] == [10, 1, 2, 5] and pd.isna(account.loc["q0001"].left_out)
    assert account.num_candidates.sum() == 200 and account.num_refused.sum() == 12


def test_a_damaged_page_costs_the_rows_of_its_shard_only(collection, tmp_path):
    path = Path(collection.write("pairs")["candidates"]) / "pairs.parquet"
    pq.write_table(
        pa.Table.from_pandas(collection.pairs), path, row_group_size=100, write_page_checksum=True, compression="none"
    )
    place = path.read_bytes().index(collection.pairs.text[5].encode()[:40])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"#")
    found = counts(run(tmp_path / "out", qrels=write_qrels(collection), candidates=str(path), shard_candidates=100))
    assert found.refused == {"unreadable": 100}
    assert found.num_candidates == 200 and found.num_queries == 10


def test_others_come_from_other_queries_and_are_counted_apart(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("ids")}
    drawn = {"random_share": 0.4, "random_from": "others", "format": "ids"}
    found = counts(run(tmp_path / "out", **settings, **drawn))
    assert (found.num_negatives, found.num_others) == (45, 30)
    own = set(zip(collection.pairs.query_id, collection.pairs.doc_id, strict=True))
    rows = [(row["query_id"], row["doc_id"]) for row in read(tmp_path / "out") if not row["label"]]
    assert len(set(rows)) == len(rows) == 75 and sum(row not in own for row in rows) == 30


def test_a_run_that_was_overtaken_does_not_finish(collection, tmp_path):
    folder = tmp_path / "out" / lease.LEASE_FOLDER

    def overtaken() -> bool:
        (folder / "epoch-000002.json").write_bytes((folder / "epoch-000001.json").read_bytes())
        return False

    settings = {"qrels": write_qrels(collection), **collection.write("pairs")}
    outcome = run(tmp_path / "out", should_stop=overtaken, **settings)
    assert outcome.state == "stopped" and "took this output over" in outcome.message
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_a_finished_run_is_left_alone_and_says_so(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("pairs")}
    first = run(tmp_path / "out", **settings)
    before = written(tmp_path / "out")
    again = run(tmp_path / "out", **settings)
    assert (again.state, again.counts) == ("already done", first.counts)
    assert written(tmp_path / "out") == before


def test_a_change_of_rules_or_judgements_is_refused_by_name_and_new_run_starts_over(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("pairs")}
    run(tmp_path / "out", **settings)
    with pytest.raises(RunConflictError, match="option max_rank: was null, is 4"):
        run(tmp_path / "out", **settings, max_rank=4)
    fewer = judgements(collection.pairs).iloc[:3]
    fewer.to_parquet(settings["qrels"], index=False)
    with pytest.raises(RunConflictError, match=r"input .*qrels\.parquet"):
        run(tmp_path / "out", **settings)
    found = counts(run(tmp_path / "out", new_run=True, **settings, max_rank=4))
    assert found.num_mined <= 3
    assert len(read(tmp_path / "out")) == found.num_mined


def test_a_file_that_is_removed_from_a_finished_run_is_noticed(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("pairs")}
    run(tmp_path / "out", **settings)
    next((tmp_path / "out" / "data").iterdir()).unlink()
    with pytest.raises(RunConflictError, match=r"data/part-.* is missing or changed"):
        run(tmp_path / "out", **settings)


def test_a_part_that_is_lost_from_an_unfinished_run_is_made_again(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("pairs"), "shard_candidates": 40}
    run(tmp_path / "out", **settings)
    before = written(tmp_path / "out")
    for name in ("_SUCCESS", "_manifest.json", next(iter(before))):
        (tmp_path / "out" / name).unlink()
    assert run(tmp_path / "out", **settings).state == "done"
    assert written(tmp_path / "out") == before


def test_a_foreign_file_under_a_part_s_name_is_never_overwritten(collection, tmp_path):
    settings = {"qrels": write_qrels(collection), **collection.write("pairs"), "shard_candidates": 40}
    calls = iter([False, False, True])
    assert run(tmp_path / "out", **settings, should_stop=lambda: next(calls)).state == "stopped"
    names = [path.name for path in (tmp_path / "out" / "data").iterdir()]
    assert len(names) == 2
    plan = pq.read_table(next((tmp_path / "out" / "_run").glob("shards-*.parquet"))).to_pylist()
    foreign = tmp_path / "out" / "data" / f"part-{plan[2]['shard_id']}.parquet"
    foreign.write_bytes(b"somebody else's")
    with pytest.raises(RunConflictError, match="holds something else"):
        run(tmp_path / "out", **settings)
    assert foreign.read_bytes() == b"somebody else's"


@pytest.mark.parametrize("layout", ["ids", "shuffled"])
def test_several_processes_write_the_bytes_of_one_and_a_line_for_each_unit(collection, tmp_path, layout, capfd):
    settings = {"qrels": write_qrels(collection), **collection.write(layout), "shard_candidates": 10}
    run(tmp_path / "one", **settings)
    before = logs.current()
    logs.begin(logs.Logs(is_json=True))
    try:
        outcome = run(tmp_path / "two", **settings, workers=2)
    finally:
        logs.begin(before)
    assert outcome.state == "done"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    fingerprint = json.loads((tmp_path / "two" / "_manifest.json").read_text())["fingerprint"]
    assert {line["run"] for line in lines} == {fingerprint[:12]}
    records = (tmp_path / "two" / "_run" / "records").glob("[!.]*.json")
    assert sorted(line["shard"] for line in lines) == sorted(path.stem for path in records)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    collection = make_collection(tmp_path / "in", num_queries=300)
    settings = {"qrels": write_qrels(collection), **collection.write("pairs"), "shard_candidates": 10, "workers": 2}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "out")}))
    driver = start(job)
    wait_for(lambda: list((tmp_path / "out" / "_run" / "records").glob("[!.]*")) != [], 60, "a unit")
    workers = children(driver.pid)
    assert len(workers) >= 2
    driver.kill()
    driver.communicate(timeout=60)
    wait_for(lambda: not any(is_running(worker.pid) for worker in workers), 20, "the end of the workers")


def start(job: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.mine", str(job)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ))


@pytest.mark.faults
@pytest.mark.parametrize(("layout", "folder"), [("pairs", "records"), ("shuffled", "gathered")])
def test_drivers_killed_again_and_again_end_with_the_bytes_of_an_undisturbed_run(tmp_path, layout, folder):
    collection = make_collection(tmp_path / "in", num_queries=300)
    collection.pairs.loc[13, "text"] = None
    settings = {"qrels": write_qrels(collection), **collection.write(layout), "shard_candidates": 10}
    settings |= {"sampling": "random", "random_share": 0.4}
    run(tmp_path / "undisturbed", **settings)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "out")}))
    done = tmp_path / "out" / "_run" / folder
    for num_done in (50, 150):
        driver = start(job)
        while driver.poll() is None and len(list(done.glob("[!.]*"))) < num_done:
            time.sleep(0.005)
        assert driver.poll() is None, "the driver was not killed in time"
        driver.kill()
        driver.communicate(timeout=60)
    driver = start(job)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors.decode()
    assert written(tmp_path / "out") == written(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / "_run").glob("gathered/*"))


def test_a_driver_told_to_stop_exits_as_resumable_and_leaves_whole_units(tmp_path):
    collection = make_collection(tmp_path / "in", num_queries=300)
    settings = {"qrels": write_qrels(collection), **collection.write("pairs"), "shard_candidates": 10}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "out")}))
    driver = start(job)
    while driver.poll() is None and not list((tmp_path / "out" / "_run" / "records").glob("*.json")):
        time.sleep(0.005)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 75, errors.decode()
    data, records = (len(list((tmp_path / "out").glob(f"{folder}/*"))) for folder in ("data", "_run/records"))
    assert 0 < data <= records < 300
    assert all(line.startswith("{") for line in errors.decode().splitlines())


def test_a_job_on_s3_gives_the_files_of_one_on_disk(collection, tmp_path, moto: S3Server, s3_bucket):
    local = {"qrels": write_qrels(collection), **collection.write("ids")}
    run(tmp_path / "out", **local, shard_candidates=40)
    remote = {}
    for role, path in local.items():
        files = sorted(Path(path).rglob("*.parquet")) if Path(path).is_dir() else [Path(path)]
        for file in files:
            moto.put(f"{s3_bucket}/in/{role}/{file.name}", file.read_bytes())
        remote[role] = f"s3://{s3_bucket}/in/{role}"
    outcome = run(f"s3://{s3_bucket}/out", **remote, shard_candidates=40)
    assert outcome.state == "done"
    here, there = (
        sorted(written(tmp_path / "out").values()),
        sorted(
            moto.get(f"{s3_bucket}/{key.removeprefix(s3_bucket + '/')}")
            for key in moto.list(f"{s3_bucket}/out/")
            if "/data/" in key or "/completeness/" in key
        ),
    )
    assert here == there  # shards have other names, their contents are equal
    assert run(f"s3://{s3_bucket}/out", **remote, shard_candidates=40).state == "already done"
