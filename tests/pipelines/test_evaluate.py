"""Before and after on judged queries: reading judgements, both orders, and figures equal to ir_measures'."""

from dataclasses import replace
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ir_measures import RR, R, nDCG

from crossenc.errors import InputError, StorageError
from pipelines import plan as plans
from pipelines.commit import commit_shard
from pipelines.config import RerankConfig
from pipelines.evaluate import compare, first_stage_runs, read_qrels, reranked_runs
from pipelines.inputs import list_candidates, scan
from pipelines.plan import Plan
from pipelines.records import StageSeconds
from pipelines.storage import Location, locate
from tests.pipelines.thin import SETTINGS, commit_settings, refused, scored, thin_rows, with_tokens

QRELS = {"q1": {"a": 2, "c": 1}, "q2": {"b": 1, "z": 3}}


def plan_of(*files: Path, **settings) -> Plan:
    config = RerankConfig(candidates=tuple(map(str, files)), model="m", output="/none", **settings)
    inputs = scan(config, list_candidates(config))
    return plans.make(inputs, {}, shard_candidates=None, force_two_phase=False)


def pairs(path: Path, rows: list[tuple], **kinds: pa.DataType) -> Path:
    """A candidates file of rows (query_id, doc_id, rank, score)."""
    names = ["query_id", "doc_id", "rank", "score"]
    columns = [pa.array(column, kinds.get(name)) for name, column in zip(names, zip(*rows, strict=True), strict=True)]
    table = pa.table(columns, names=names)
    texts = pa.array(["text"] * len(rows))
    pq.write_table(table.append_column("query", texts).append_column("text", texts), path)
    return path


def commit(output: Location, *rows: dict, part="000000-aaaaaaaa", **rank) -> None:
    settings = commit_settings(output, rank=replace(SETTINGS, **rank))
    commit_shard(part, with_tokens(thin_rows(*rows)), 0, StageSeconds(), settings)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"))


def test_trec_judgements_are_read_with_three_or_four_fields_and_a_heading(tmp_path):
    three = tmp_path / "three.tsv"
    three.write_bytes("query-id\tcorpus-id\tscore\r\nq1\tü\t1\r\n\r\nq1\tb\t0\r\n".encode())
    assert read_qrels(str(three), {}) == {"q1": {"ü": 1, "b": 0}}
    four = tmp_path / "four.txt"
    four.write_bytes(b"\xef\xbb\xbfq1 0 a 2\nq2 0 b -1\nq2 Q0 c +1")
    assert read_qrels(str(four), {}) == {"q1": {"a": 2}, "q2": {"b": -1, "c": 1}}


def test_ids_with_spaces_are_read_from_lines_with_tabs(tmp_path):
    spaced = tmp_path / "spaced.tsv"
    spaced.write_text("my query\t0\ta document\t1\nq2\tb c\t2\n")
    assert read_qrels(str(spaced), {}) == {"my query": {"a document": 1}, "q2": {"b c": 2}}
    plain = tmp_path / "plain.tsv"
    plain.write_text("q1 0 a 2\n")
    assert read_qrels(str(plain), {}) == {"q1": {"a": 2}}
    for line in ("my query\ta document\t0\tb\t1", "q\t\t1", "q d\t1"):
        spaced.write_text(f"q\td\t1\n{line}\n")
        with pytest.raises(InputError, match=r"spaced\.tsv, line 2: write"):
            read_qrels(str(spaced), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q 0 a 1.0\nq 0 b 1\n", "line 1: write `query-id 0 doc-id relevance`, a whole number last"),
        (b"q 0 b\n", "has no judgements; give qrels with a row a judgement"),
        (b"q 0 a 1\nq 0 b\n", "line 2: write `query-id 0 doc-id relevance`"),
        (b"q 0 a 1\n\nq 0 b one\n", "line 3: write"),
        (b"q 0 a 1\nq 0 b 1.5\n", "line 2: write"),
        ("q 0 a 1\nq 0 b ²\n".encode(), "line 2: write"),
        (b"q 0 a 1\nq 0 b --1\n", "line 2: write"),
        (b"q 0 a 1\nq 0 \xff 1\n", "line 2: not a qrels file in UTF-8"),
        (b"\x1f\x8b\x08gzip", "line 1: not a qrels file in UTF-8"),
        (b"a heading only\n", "has no judgements"),
        (b"", "has no judgements"),
    ],
)
def test_trec_judgements_that_cannot_be_understood_are_named_by_file_and_line(tmp_path, content, message):
    file = tmp_path / "qrels.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"qrels\.txt.*{message}"):
        read_qrels(str(file), {})


def test_parquet_judgements_are_read_under_the_usual_names(tmp_path):
    pq.write_table(pa.table({"qid": [1, 2**53 + 1], "docno": ["a", "b"], "label": [1.0, 0.0]}), tmp_path / "a.parquet")
    assert read_qrels(str(tmp_path / "a.parquet"), {}) == {"1": {"a": 1}, str(2**53 + 1): {"b": 0}}


def test_ids_of_categories_and_grades_beyond_what_a_float_holds_are_read_as_they_are(tmp_path):
    queries, documents = (pa.array(ids).dictionary_encode() for ids in ([7, 7], ["a", "b"]))
    table = pa.table({"query_id": queries, "doc_id": documents, "relevance": [2**53 + 1, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_qrels(str(tmp_path / "a.parquet"), {}) == {"7": {"a": 2**53 + 1, "b": 0}}


def test_a_folder_of_judgements_is_read_whole(tmp_path):
    for name, query in (("a", "q1"), ("b", "q2")):
        table = pa.table({"query_id": [query], "doc_id": ["d"], "relevance": [True]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert read_qrels(str(tmp_path), {}) == {"q1": {"d": 1}, "q2": {"d": 1}}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query_id": ["q"], "doc_id": ["d"], "relevance": [0.5]}, "row 0: a judgement needs two ids"),
        ({"query_id": ["q"], "doc_id": ["d"], "relevance": [float("nan")]}, "row 0: a judgement needs"),
        ({"query_id": ["q", None], "doc_id": ["d", "e"], "relevance": [1, 1]}, "row 1: a judgement needs"),
        ({"query_id": ["q"], "doc_id": [b"\xff"], "relevance": [1]}, "row 0: a judgement needs two ids in UTF-8"),
        (
            {"query_id": ["q"], "doc_id": ["d"], "relevance": ["1"]},
            "column 'relevance' is string, but must be a number",
        ),
        ({"query_id": ["q"], "doc_id": ["d"], "points": [1]}, "no column for the relevance .*query_id, doc_id, points"),
        ({"query": ["q"], "doc_id": ["d"], "relevance": [1]}, "no column for query_id"),
        ({"query_id": [1.0, None], "doc_id": ["d", "e"], "relevance": [1, 1]}, "column 'query_id' is double, but ids"),
        ({"query_id": ["q"], "doc_id": [[1]], "relevance": [1]}, "column 'doc_id' is list<.*, but ids must be text"),
    ],
)
def test_parquet_judgements_that_cannot_be_understood_are_named_by_file_and_row(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "qrels.parquet")
    with pytest.raises(InputError, match=rf"qrels\.parquet.*{message}"):
        read_qrels(str(tmp_path / "qrels.parquet"), {})


def test_damaged_parquet_judgements_are_named(tmp_path):
    file = tmp_path / "qrels.parquet"
    table = pa.table({"query_id": ["q"] * 1000, "doc_id": [f"d{i}" for i in range(1000)], "relevance": [1] * 1000})
    pq.write_table(table, file, write_page_checksum=True, use_dictionary=False)
    damaged = bytearray(file.read_bytes())
    damaged[500] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=r"qrels\.parquet cannot be read"):
        read_qrels(str(file), {})


def test_the_first_stage_order_is_by_rank_then_score_then_position(tmp_path):
    rows = [
        ("q1", "by-rank-2", 2, 9.0),
        ("q1", "by-rank-1", 1, 0.0),
        ("q2", "low", None, 1.0),
        ("q2", "high", None, 2.0),
        ("q2", "none", None, None),
        ("q2", "low-later", None, 1.0),
        ("q3", "unjudged", 1, 1.0),
    ]
    runs, damaged = first_stage_runs(plan_of(pairs(tmp_path / "a.parquet", rows)), QRELS, {})
    assert runs == {"q1": ["by-rank-1", "by-rank-2"], "q2": ["high", "low", "low-later", "none"]}
    assert damaged == []


def test_the_first_stage_order_of_a_query_spread_over_files_is_one_order(tmp_path):
    first = pairs(tmp_path / "a.parquet", [("q1", "x", 3, 1.0), ("q2", "y", 1, 1.0)])
    second = pairs(tmp_path / "b.parquet", [("q1", "z", 1, 1.0), ("q1", "x", 2, 1.0), ("q1", None, 4, 1.0)])
    runs, _ = first_stage_runs(plan_of(first, second), QRELS, {})
    assert runs == {"q1": ["z", "x"], "q2": ["y"]}


def test_integer_ids_meet_judgements_in_text(tmp_path):
    rows = [(7, 2**53 + 1, 1, 1.0), (7, 5, 2, 0.5), (8, 5, 1, 1.0)]
    plan = plan_of(pairs(tmp_path / "a.parquet", rows, query_id=pa.int32(), doc_id=pa.uint64()))
    assert first_stage_runs(plan, {"7": {"5": 1}}, {})[0] == {"7": [str(2**53 + 1), "5"]}


def nested_table(kind: str) -> pa.Table:
    queries = {"query_id": ["q1", "q2", "q3"], "query": ["x", "y", "z"]}
    ids, ranks = [["a", "b"], ["c", "d", "e"], []], [[2, 1], [1, 2, 3], []]
    if kind == "lists":
        texts = [["t"] * len(docs) for docs in ids]
        return pa.table(queries | {"doc_ids": ids, "documents": texts, "ranks": ranks})
    structs = [
        [{"text": "t" * 1000, "doc_id": doc, "rank": rank} for doc, rank in zip(docs, by, strict=True)]
        for docs, by in zip(ids, ranks, strict=True)
    ]
    return pa.table(queries | {"documents": structs})


@pytest.mark.parametrize("kind", ["lists", "structs"])
def test_nested_candidates_give_the_first_stage_order_without_reading_texts(tmp_path, kind, monkeypatch):
    file = tmp_path / "nested.parquet"
    pq.write_table(nested_table(kind), file)
    plan = plan_of(file)
    read: list[str] = []
    real = pq.ParquetFile.iter_batches

    def noting(self, batch_size, columns):
        read.extend(columns)
        return real(self, batch_size=batch_size, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    assert first_stage_runs(plan, QRELS, {})[0] == {"q1": ["b", "a"], "q2": ["c", "d", "e"]}
    assert not any(name.endswith(("text", "query", "documents")) for name in read)


def test_a_damaged_file_is_left_out_of_the_first_stage_and_told(tmp_path, output):
    good = pairs(tmp_path / "a.parquet", [("q1", "a", 1, 1.0)])
    bad = pairs(tmp_path / "b.parquet", [("q2", "b", 1, 1.0)])
    plan = plan_of(good, bad)
    data = bytearray(bad.read_bytes())
    data[4:200] = b"\xff" * 196
    bad.write_bytes(data)
    runs, damaged = first_stage_runs(plan, QRELS, {})
    assert (runs, damaged) == ({"q1": ["a"]}, [f"file://{bad}"])
    commit(output, scored("q1", "a", 0.5))
    assert "1 damaged files are left out" in compare(plan, output, QRELS, None, {}).note


def test_the_reranked_order_is_the_order_of_the_results_over_all_parts(output, monkeypatch):
    commit(output, scored("q1", "a", 0.1), scored("q1", "c", 0.9), scored("q3", "x", 0.5))
    commit(output, scored("q2", "b", 0.2), refused("q2", "z", "document_empty"), part="000001-aaaaaaaa")
    (Path(output.path) / "results/.part-000002-aaaaaaaa.parquet.0a.tmp").write_bytes(b"half")
    assert reranked_runs(output, QRELS) == {"q1": ["c", "a"], "q2": ["b"]}


def test_a_damaged_part_is_named_with_what_to_do(output):
    commit(output, *(scored("q1", f"d{i}", i / 1000) for i in range(1000)))
    part = Path(output.path) / "results/part-000000-aaaaaaaa.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(StorageError, match=r"part-000000-aaaaaaaa\.parquet is damaged .*delete it and run"):
        reranked_runs(output, QRELS)


def test_results_are_read_in_batches_and_not_whole(output, monkeypatch):
    commit(output, *(scored(f"q{i % 50}", f"d{i}", i / 5000) for i in range(5000)))
    monkeypatch.setattr("pipelines.evaluate._BATCH_ROWS", 512)
    largest = 0
    real = pq.ParquetFile.iter_batches

    def noting(self, **options):
        nonlocal largest
        for batch in real(self, **options):
            largest = max(largest, batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    assert len(reranked_runs(output, QRELS)["q1"]) == 100
    assert 0 < largest <= 512


def reference(run: dict[str, list[str]], qrels: dict) -> dict[str, float]:
    judged = [ir_measures.Qrel(q, d, grade) for q, docs in qrels.items() for d, grade in docs.items()]
    docs = [ir_measures.ScoredDoc(q, d, -float(i)) for q, order in run.items() for i, d in enumerate(order)]
    values = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, R @ 10, R @ 100], judged, docs)
    return {"M" * (name == "RR@10") + name: value for name, value in ((str(m), v) for m, v in values.items())}


def test_measures_before_and_after_equal_those_of_ir_measures(tmp_path, output):
    rng = np.random.default_rng(0)
    queries = [f"q{q}" for q in range(6)]
    rows = [(q, f"d{d}", rank, 1.0) for q in queries for rank, d in enumerate(rng.permutation(30)[:15])]
    qrels = {q: {f"d{d}": int(rng.integers(0, 3)) for d in rng.permutation(30)[:8]} for q in queries}
    after = [scored(q, d, float(rng.random()), rank) for q, d, rank, _ in rows]
    after[3] = refused(rows[3][0], rows[3][1], "document_empty")
    commit(output, *after)
    plan = plan_of(pairs(tmp_path / "a.parquet", rows))
    found = compare(plan, output, {**qrels, "q99": {"d1": 1}}, None, {})
    before_run = {q: [d for query, d, *_ in rows if query == q] for q in queries}
    expected_before, expected_after = (reference(run, qrels) for run in (before_run, reranked_runs(output, qrels)))
    assert [c.measure for c in found.comparisons] == ["nDCG@10", "MRR@10", "R@10", "R@100"]
    for comparison in found.comparisons:
        assert comparison.before == pytest.approx(expected_before[comparison.measure])
        assert comparison.after == pytest.approx(expected_after[comparison.measure])
        assert comparison.num_queries == 6
    assert found.note == "6 judged queries compared; 1 judged queries have no candidates in this run and are left out"


def test_a_judged_query_whose_candidates_were_all_refused_counts_as_zero(tmp_path, output):
    plan = plan_of(pairs(tmp_path / "a.parquet", [("q1", "a", 1, 1.0), ("q2", "b", 1, 1.0)]))
    commit(output, scored("q1", "a", 0.5), refused("q2", "b", "document_empty"))
    ndcg = compare(plan, output, {"q1": {"a": 1}, "q2": {"b": 1}}, None, {}).comparisons[0]
    assert (ndcg.before, ndcg.after, ndcg.num_worse) == (1.0, 0.5, 1)


def test_recall_deeper_than_what_is_kept_is_not_shown(tmp_path, output):
    plan = plan_of(pairs(tmp_path / "a.parquet", [("q1", "a", 1, 1.0)]))
    commit(output, scored("q1", "a", 0.5))
    shown = {k: [c.measure for c in compare(plan, output, QRELS, k, {}).comparisons] for k in (5, 99, 100, None)}
    assert {k: "R@100" in measures for k, measures in shown.items()} == {5: False, 99: False, 100: True, None: True}


def test_without_a_judged_query_among_the_candidates_nothing_is_compared(tmp_path, output):
    plan = plan_of(pairs(tmp_path / "a.parquet", [("other", "a", 1, 1.0)]))
    found = compare(plan, output, QRELS, None, {})
    assert found.comparisons == ()
    assert found.note == "none of the 2 judged queries is among the candidates"
