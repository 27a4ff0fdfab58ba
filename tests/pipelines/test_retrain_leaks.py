"""Queries that are learned from and judged on: found in every layout of labels and of the fixed set, and taken out."""

import gzip
import json
import tracemalloc
from array import array
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation_config import CollectionConfig
from pipelines.evaluation_inputs import find
from pipelines.retrain_leaks import (
    FixedQueries,
    Judged,
    Query,
    find_leaks,
    fixed_queries,
    label_queries,
    normalised,
    without_rows,
)
from pipelines.train_data_config import LabelledData
from pipelines.train_files import list_files

LIMIT = 1000
JUDGED = [("q1", "What is a shard?"), ("q2", "Wie heißt der Fluß")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fixed(tmp_path: Path) -> FixedQueries:
    return fixed_of(tmp_path, "pairs")


def fixed_of(folder: Path, layout: str) -> FixedQueries:
    rows = [{"query_id": id_, "query": text, "doc_id": "d", "text": "t"} for id_, text in [*JUDGED, ("q3", "unjudged")]]
    (folder / "qrels.txt").write_text("".join(f"{id_} 0 d 1\n" for id_, _ in JUDGED))
    settings = {"name": "set", "qrels": str(folder / "qrels.txt")}
    if layout == "pairs":
        pq.write_table(pa.Table.from_pylist(rows), folder / "fixed.parquet")
        settings |= {"candidates": str(folder / "fixed.parquet")}
    else:
        pq.write_table(pa.Table.from_pylist(rows).select(["query_id", "doc_id"]), folder / "ids.parquet")
        settings |= {"candidates": str(folder / "ids.parquet")}
        if layout == "tables":
            queries = [{"query_id": row["query_id"], "text": row["query"]} for row in rows]
            pq.write_table(pa.Table.from_pylist(queries), folder / "fq.parquet")
            pq.write_table(pa.table({"doc_id": ["d"], "text": ["t"]}), folder / "fc.parquet")
            settings |= {"queries": str(folder / "fq.parquet"), "corpus": str(folder / "fc.parquet")}
        else:
            lines = [json.dumps({"_id": row["query_id"], "text": row["query"]}) for row in rows]
            (folder / "queries.jsonl").write_text("\n".join(lines))
            (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "t"}')
            (folder / "qrels").mkdir()
            (folder / "qrels/test.tsv").write_text((folder / "qrels.txt").read_text())
            settings = {"name": "set", "candidates": settings["candidates"], "beir": str(folder)}
    return fixed_queries([find(CollectionConfig.model_validate(settings), {})], LIMIT)


def leaks(data: LabelledData, fixed: FixedQueries) -> list[tuple[str, int, str]]:
    found = find_leaks(label_queries(data, list_files(data, {}), {}, LIMIT), fixed)
    assert found.num_rows == len(found.first), "each judged query leaks once here"
    return [(leak.query.file.location.name, leak.query.row, leak.judged.query_id) for leak in found.first.values()]


@pytest.mark.parametrize("layout", ["pairs", "tables", "beir"])
def test_the_queries_of_the_fixed_set_are_those_that_are_judged_whatever_its_layout(tmp_path, layout):
    fixed = fixed_of(tmp_path, layout)
    assert set(fixed.by_id) == {"q1", "q2"} and set(fixed.by_text) == {"what is a shard?", "wie heisst der fluss"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is", "  what\tIS\n"),
        ("ﬁne", "FINE"),
        ("Å", "Å"),
        ("Straße", "STRASSE"),
        ("\uff11\uff12", "12"),
    ],
)
def test_texts_are_one_but_for_case_white_space_and_unicode_form(one, other):
    assert normalised(one) == normalised(other)
    assert normalised("what is") != normalised("whatis")


SHARD, OTHER = "WHAT  is a shard?", "what is a whale"


def test_leaks_are_found_in_every_layout_and_kind_of_file(tmp_path, fixed):
    lists = [{"query": text, "docs": ["d"], "labels": [1.0]} for text in (OTHER, SHARD, None, "x" * 2000)]
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "lists.parquet")
    lines = [json.dumps({"query": text, "pos": ["p"], "neg": ["n"]}) for text in (OTHER, SHARD)]
    (tmp_path / "flag.jsonl.gz").write_bytes(gzip.compress(("\n".join([lines[0], "", lines[1]]) + "\n").encode()))
    (tmp_path / "t.tsv").write_text(f"{SHARD}\tp\tn\n{OTHER}\tp\tn\nbroken\n")
    table = pa.table({"query": [OTHER, OTHER, SHARD], "document": ["a", "b", "c"], "label": [1, 0, 1]})
    with pa.OSFile(str(tmp_path / "pairs.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name, expected in (
        ("lists.parquet", [("lists.parquet", 1, "q1")]),
        ("flag.jsonl.gz", [("flag.jsonl.gz", 2, "q1")]),
        ("t.tsv", [("t.tsv", 0, "q1")]),
        ("pairs.arrow", [("pairs.arrow", 2, "q1")]),
    ):
        assert leaks(LabelledData(files=str(tmp_path / name)), fixed) == expected


def test_labels_given_as_ids_leak_by_their_texts_and_by_ids_whose_text_is_not_known(tmp_path, fixed):
    pq.write_table(pa.table({"query_id": ["a", "b", "q1"], "text": [OTHER, SHARD, OTHER]}), tmp_path / "q.parquet")
    pq.write_table(pa.table({"doc_id": ["d"], "text": ["t"]}), tmp_path / "c.parquet")
    pq.write_table(
        pa.table({"query_id": ["a", "q2", "b", "q1"], "doc_id": ["d"] * 4, "label": [1] * 4}), tmp_path / "l.parquet"
    )
    tables = {"queries": str(tmp_path / "q.parquet"), "corpus": str(tmp_path / "c.parquet")}
    data = LabelledData(files=str(tmp_path / "l.parquet"), **tables)
    assert leaks(data, fixed) == [("l.parquet", 1, "q2"), ("l.parquet", 2, "q1")]
    by_id, by_text = find_leaks(label_queries(data, list_files(data, {}), {}, LIMIT), fixed).first.values()
    assert str(by_id).endswith("is q2 of set by its id") and str(by_text).endswith("is q1 of set")


def test_an_id_beside_a_text_counts_where_the_judged_text_is_not_known(tmp_path, fixed):
    known = FixedQueries(fixed.by_text, fixed.by_id, {"7": Judged("set", "7", "id"), "qx": Judged("set", "qx", "id")})
    pairs = {"query": [OTHER, OTHER, SHARD, OTHER], "document": ["d"] * 4, "label": [1] * 4}
    pq.write_table(pa.table(pairs | {"qid": [7, 8, 9, 1]}), tmp_path / "l.parquet")
    assert leaks(LabelledData(files=str(tmp_path / "l.parquet")), known) == [
        ("l.parquet", 0, "7"),
        ("l.parquet", 2, "q1"),
    ]
    rows = [{"query": OTHER, "pos": ["p"], "neg": ["n"], "number": id_} for id_ in ("qx", "q1", None)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = LabelledData(files=str(tmp_path / "l.jsonl"), columns={"query_id": "number"})
    assert leaks(data, known) == [("l.jsonl", 0, "qx")]


def test_memory_does_not_grow_with_queries_and_leaks(tmp_path, fixed):
    [file] = list_files(LabelledData(files=str(tmp_path / "fixed.parquet")), {})
    texts = (f"{SHARD}{' ' * 1000}" if row % 2 else f"{row}{OTHER * 50}" for row in range(4000))
    tracemalloc.start()
    found = find_leaks((Query(file, row, str(row), text) for row, text in enumerate(texts)), fixed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(found.rows.items()) == [(file.location.uri, array("q", range(1, 4000, 2)))]
    assert [leak.query.row for leak in found.first.values()] == [1] and peak < 200_000


def test_a_judged_query_without_a_text_is_known_by_its_id(tmp_path):
    rows = [{"query_id": id_, "query": text, "doc_id": "d", "text": "t"} for id_, text in (("q1", None), ("q2", "x"))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "fixed.parquet")
    (tmp_path / "qrels.txt").write_text("q1 0 d 1\nq2 0 d 1\n")
    settings = {"name": "set", "qrels": str(tmp_path / "qrels.txt"), "candidates": str(tmp_path / "fixed.parquet")}
    found = fixed_queries([find(CollectionConfig.model_validate(settings), {})], LIMIT)
    assert set(found.without_text) == {"q1"} and set(found.by_id) == {"q1", "q2"}


def test_a_file_without_its_leaking_rows_keeps_the_others_as_they_are(tmp_path):
    rows = pa.table({"query": ["a", "b", "c"], "docs": [["d"], ["e"], None], "labels": [[1.0], [0.5], [1.0]]})
    pq.write_table(rows, tmp_path / "w.parquet")
    (tmp_path / "w.tsv.gz").write_bytes(gzip.compress(b"a\tp\tn\n\nb\tp\tn\nc\tp\tn\n"))
    parquet, lines = (list_files(LabelledData(files=str(tmp_path / name)), {})[0] for name in ("w.parquet", "w.tsv.gz"))
    name, body = without_rows(parquet, {1})
    assert name == "w.parquet" and body is not None
    assert pq.read_table(pa.BufferReader(body)).to_pylist() == [rows.to_pylist()[0], rows.to_pylist()[2]]
    assert without_rows(lines, {2}) == ("w.tsv", b"a\tp\tn\n\nc\tp\tn\n")
    assert without_rows(parquet, {0, 1, 2}) == ("w.parquet", None)
    assert without_rows(lines, {0, 2, 3}) == ("w.tsv", None)
