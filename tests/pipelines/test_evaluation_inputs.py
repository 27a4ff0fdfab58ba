"""What an evaluation judges on: which queries count, and their candidates and texts out of every kind of collection."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from crossenc.errors import InputError
from pipelines.config import RerankConfig
from pipelines.evaluation_config import CollectionConfig
from pipelines.evaluation_inputs import Judged, find, read
from pipelines.evaluation_texts import look_up, prepare
from pipelines.inputs import list_candidates, scan
from pipelines.storage import locate
from tests.support.collections import Collection, make_collection


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    return make_collection(tmp_path / "in", num_queries=8, depth=5)


def qrels_file(collection: Collection, *extra: str) -> str:
    """Judges the third candidate of each query as relevant and the first as not."""
    path = collection.folder / "qrels.txt"
    path.parent.mkdir(exist_ok=True)
    lines = [
        f"{row.query_id} 0 {row.doc_id} {int(row.rank == 3)}"
        for row in collection.pairs.itertuples()
        if row.rank in (1, 3)
    ]
    path.write_text("\n".join([*lines, *extra]))
    return str(path)


def judged(collection: Collection, layout: str = "ids", **settings) -> Judged:
    own = {} if "qrels" in settings else {"qrels": qrels_file(collection)}
    settings = {"name": "made-up", **own, **collection.write(layout), **settings}
    return read(find(CollectionConfig(**settings), {}))


def test_malformed_judgements_are_named_when_a_collection_is_looked_up(collection):
    config = CollectionConfig(name="made-up", qrels=qrels_file(collection, "q 0 d high"), **collection.write("ids"))
    with pytest.raises(InputError, match=r"qrels\.txt, line 17: write"):
        find(config, {})


def beir(collection: Collection) -> dict[str, str]:
    """The collection as a BEIR folder, with the first stage as a TREC run."""
    folder = collection.folder / "beir"
    (folder / "qrels").mkdir(parents=True)
    queries = collection.pairs.drop_duplicates("query_id")
    documents = collection.pairs.drop_duplicates("doc_id")
    rows = [{"_id": r.query_id, "text": r.query, "metadata": {"kind": r.query_id[-1]}} for r in queries.itertuples()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": r.doc_id, "title": "a title", "text": r.text} for r in documents.itertuples()]
    rows.append({"_id": "in no ranking", "text": "x"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    lines = [f"{r.query_id}\t{r.doc_id}\t1" for r in collection.pairs[collection.pairs["rank"] == 3].itertuples()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    run = [f"{r.query_id} Q0 {r.doc_id} {r.rank} {r.score!r} bm25" for r in collection.pairs.itertuples()]
    (folder / "bm25.run").write_text("\n".join(run))
    return {"beir": str(folder), "candidates": str(folder / "bm25.run")}


def prepared_rows(found: Judged, folder: Path, depth: int = 100) -> pd.DataFrame:
    """What a rerank job would read, in the layout of pairs."""
    prepared = prepare(found, locate(str(folder)), depth)
    config = RerankConfig(model="m", output="/none", **prepared.settings)
    assert scan(config, list_candidates(config)).is_clustered  # a rerank job accepts it
    if prepared.settings["layout"] == "pairs":
        rows = pd.concat([pq.read_table(uri.removeprefix("file://")).to_pandas() for uri in config.candidate_uris])
        decoded = {name: rows[name].str.decode("utf-8") for name in ("query", "text")}
        return rows.assign(**decoded).sort_values(["query_id", "rank"], ignore_index=True)
    rows, queries, corpus = (
        pq.read_table(uri.removeprefix("file://")).to_pandas()
        if uri.endswith(".parquet")
        else pd.read_json(uri, lines=True)
        for uri in (*config.candidate_uris, config.queries, config.corpus)
    )
    queries, corpus = queries.rename(columns={"_id": "query_id"}), corpus.rename(columns={"_id": "doc_id"})
    rows = rows.merge(queries.rename(columns={"text": "query"}), on="query_id").merge(corpus, on="doc_id")
    return rows.sort_values(["query_id", "rank"], ignore_index=True)


@pytest.mark.parametrize("layout", ["ids", "pairs", "nested"])
def test_every_layout_gives_the_same_queries_candidates_and_texts(collection, layout, tmp_path):
    found = judged(collection, layout)
    expected = collection.pairs.groupby("query_id").doc_id.apply(list).to_dict()
    assert found.first_stage == expected and list(found.qrels) == list(expected) and found.source.has_texts
    rows = prepared_rows(found, tmp_path / "out")
    columns = ["query_id", "query", "doc_id", "text", "rank"]
    pd.testing.assert_frame_equal(rows[columns], collection.pairs[columns], check_dtype=False)


def test_a_beir_folder_and_a_trec_run_give_them_too(collection, tmp_path):
    found = judged(collection, **beir(collection), queries=None, corpus=None, qrels=None, segments=("kind",))
    assert found.first_stage == collection.pairs.groupby("query_id").doc_id.apply(list).to_dict()
    assert found.segments == {"kind": {query: query[-1] for query in found.qrels}}
    rows = prepared_rows(found, tmp_path / "out")
    pd.testing.assert_frame_equal(
        rows[["query_id", "query", "doc_id", "text"]], collection.pairs[["query_id", "query", "doc_id", "text"]]
    )
    prepared = prepare(found, locate(str(tmp_path / "out")), 100)
    row = collection.pairs.iloc[7]
    texts = look_up(prepared, [(row.query_id, row.doc_id)], {}, 1000, 1000)
    assert texts.queries == {row.query_id: row["query"]}
    assert texts.documents == {(row.query_id, row.doc_id): f"a title {row.text}"}


@pytest.mark.parametrize("layout", ["shuffled", "nested", "ids"])
def test_a_model_gets_only_the_top_of_each_list_of_the_queries_that_count(collection, layout, tmp_path):
    found = judged(collection, layout, num_queries=3)
    prepared = prepare(found, locate(str(tmp_path / "out")), 2)
    uris = prepared.settings["candidates"]
    uris = (uris,) if isinstance(uris, str) else uris
    rows = pd.concat([pq.read_table(uri.removeprefix("file://")).to_pandas() for uri in uris])
    assert sorted(zip(rows.query_id, rows["rank"], strict=True)) == [
        (q, r) for q in sorted(found.qrels) for r in (1, 2)
    ]
    assert prepare(found, locate(str(tmp_path / "out")), 2) == prepared  # and again: the same files
    assert prepare(found, locate(str(tmp_path / "out")), 1).digest != prepared.digest


def test_columns_of_queries_choose_queries_and_make_segments(collection, tmp_path):
    table = pd.DataFrame({"qid": [f"q{q:04d}" for q in range(8)], "split": ["test"] * 5 + ["dev"] * 3})
    table["kind"] = [1, 2, None, 1, 2, 1, 1, 1]
    table["is_short"] = [True, False] * 4
    table.astype({"kind": "Int64"}).to_parquet(tmp_path / "columns.parquet")
    settings = {"query_columns": str(tmp_path / "columns.parquet"), "segments": ("kind", "is_short")}
    found = judged(collection, where={"split": "test"}, **settings)
    assert list(found.qrels) == [f"q{q:04d}" for q in range(5)]
    assert found.segments["kind"] == {"q0000": "1", "q0001": "2", "q0003": "1", "q0004": "2"}
    assert found.notes == ("5 of 8 judged queries are chosen by their columns",)
    found = judged(collection, where={"split": ["test", "dev"], "kind": 1, "is_short": True}, **settings)
    assert list(found.qrels) == ["q0000", "q0006"]


def test_queries_are_found_by_ids_of_other_types_or_the_file_is_named(collection, tmp_path):
    table = pd.DataFrame({"qid": [f"q{q:04d}".encode() for q in range(8)], "split": ["test"] * 5 + ["dev"] * 3})
    table.to_parquet(tmp_path / "columns.parquet")
    settings = {"query_columns": str(tmp_path / "columns.parquet"), "where": {"split": "test"}}
    assert list(judged(collection, **settings).qrels) == [f"q{q:04d}" for q in range(5)]
    table.assign(qid=[*map(float, range(7)), None]).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(InputError, match=r"columns.parquet: column 'qid' is double, but ids must be text or integers"):
        judged(collection, **settings)


def test_columns_of_the_candidates_serve_where_there_is_no_table_of_queries(collection, tmp_path):
    with_kind = Collection(collection.pairs.assign(kind=collection.pairs.query_id.str[-1]), collection.folder)
    found = judged(with_kind, "pairs", where={"kind": ["1", "2"]})
    assert list(found.qrels) == ["q0001", "q0002"]


def test_a_drawn_sample_depends_on_the_ids_alone(collection):
    some, more = judged(collection, num_queries=3), judged(collection, num_queries=5)
    assert len(some.qrels) == 3 and set(some.qrels) < set(more.qrels)
    assert some.notes == ("3 of 8 queries are drawn by a hash of their ids",)
    assert judged(collection, num_queries=100).notes == ()


def test_judged_queries_without_candidates_count_as_zero_or_are_left_out(collection):
    qrels = qrels_file(collection, "absent 0 d1 1")
    zero, left_out = (judged(collection, qrels=qrels, missing_queries=how) for how in ("zero", "leave_out"))
    assert "absent" in zero.qrels and zero.notes == ("1 judged queries have no candidates and count as 0",)
    assert "absent" not in left_out.qrels and left_out.notes == (
        "1 judged queries have no candidates and are left out",
    )
    assert zero.digests["qrels"] != left_out.digests["qrels"]


def test_digests_depend_on_content_and_not_on_place(collection, tmp_path):
    first = judged(collection)
    again = judged(Collection(collection.pairs, tmp_path / "elsewhere"))
    assert again.digests == first.digests
    other = make_collection(tmp_path / "other", num_queries=8, depth=5, seed=1)
    assert judged(other).digests["first_stage"] != first.digests["first_stage"]


def test_ids_without_texts_can_be_judged_but_not_scored(collection):
    found = judged(collection, queries=None, corpus=None)
    assert len(found.first_stage) == 8 and not found.source.has_texts


@pytest.mark.parametrize("layout", ["pairs", "ids"])
def test_texts_are_looked_up_and_cut(collection, layout, tmp_path):
    prepared = prepare(judged(collection, layout), locate(str(tmp_path / "out")), 100)
    row = collection.pairs.iloc[7]
    texts = look_up(prepared, [(row.query_id, row.doc_id), (row.query_id, "absent")], {}, 1000, 12)
    assert texts.queries == {row.query_id: row["query"][:12] + " …"}
    assert texts.documents == {(row.query_id, row.doc_id): row.text[:12] + " …"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": {"split": "test"}}, "no column 'split'"),
        ({"where": {"text": "no such"}}, r"none of the 8 judged queries has text in \['no such'\]"),
        ({"qrels": "{qrels-of-others}"}, "none of the 1 judged queries is among the candidates; compare the query ids"),
        ({"candidates": "{two-runs}"}, "name several files"),
        ({"candidates": "{run}", "queries": None, "corpus": None, "segments": ("kind",)}, "as query_columns"),
    ],
)
def test_what_does_not_fit_together_is_named(collection, settings, message, tmp_path):
    (tmp_path / "others.txt").write_text("q 0 d 1\n")
    (tmp_path / "a.run").write_text("q0001 Q0 d 1 1.0 t\n")
    run = str(tmp_path / "a.run")
    places = {"{qrels-of-others}": str(tmp_path / "others.txt"), "{run}": run, "{two-runs}": (run, run)}
    settings = {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(InputError, match=message):
        judged(collection, **settings)


def test_a_column_with_a_value_for_each_query_makes_no_segments(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="column 'text' has 60 values among the judged queries"):
        judged(make_collection(tmp_path / "in", num_queries=60, depth=3), segments=("text",))
