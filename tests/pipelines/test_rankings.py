"""Rankings read from TREC runs and tables, and written: the order, and so the figures, are trec_eval's."""

from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import InputError
from crossenc.evaluation.metrics import per_query
from pipelines import rankings
from pipelines.rankings import find, read, trec_run

MEASURES = ["nDCG@10", "RR", "AP", "P@5"]  # of trec_eval: RR@10 is not, and breaks ties the other way


def run_file(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def read_file(path: str, *queries: str) -> dict[str, list[str]]:
    return read(find(path, {}), queries, {})


def test_figures_of_a_run_with_ties_equal_those_of_ir_measures_to_the_last_digit(tmp_path):
    rng = np.random.default_rng(0)
    lines, qrels = [], {}
    for q in range(10):
        # equal scores, scores equal only in single precision, and ranks that mean nothing
        scores = rng.integers(0, 4, 30) + rng.choice([0, 1e-9, 0.25], 30)
        lines += [f"q{q} Q0 d{d} {rng.integers(1, 99)} {float(score)!r} tag" for d, score in enumerate(scores)]
        qrels[f"q{q}"] = {f"d{d}": int(grade) for d, grade in enumerate(rng.integers(0, 3, 40))}
    path = run_file(tmp_path / "bm25.run", *lines)
    ours = per_query(MEASURES, qrels, read_file(path, *qrels))
    judged = [ir_measures.Qrel(q, d, grade) for q, grades in qrels.items() for d, grade in grades.items()]
    for metric in ir_measures.iter_calc(
        [ir_measures.parse_measure(name) for name in MEASURES], judged, ir_measures.read_trec_run(path)
    ):
        assert ours[str(metric.measure)][metric.query_id] == metric.value


def test_only_the_wanted_queries_are_kept_and_a_query_may_be_absent(tmp_path):
    path = run_file(tmp_path / "a.run", "\ufeffq1 Q0 a 1 2.5 t", "", "q2\tQ0\tb\t1\t1e3\tt", "q1 Q0 ü 2 3 t")
    assert read_file(path, "q1", "q3") == {"q1": ["ü", "a"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 a 1 2.0", "line 2: write `query-id Q0 doc-id rank score name`"),
        ("q Q0 a 1 high tag", "line 2: write"),
        ("q Q0 a 1 nan tag", "line 2: write"),
        ("q Q0 a 1 1e99 tag", "line 2: write"),
        ("q Q0 b 1 2.0 tag", "line 2: query 'q' has 'b' twice"),
    ],
)
def test_a_line_that_is_none_of_a_run_is_named(tmp_path, line, message):
    path = run_file(tmp_path / "bad.run", "q Q0 b 1 3.0 tag", line)
    with pytest.raises(InputError, match=rf"bad\.run, {message}"):
        read_file(path, "q")


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    (tmp_path / "bad.run").write_bytes(b"q Q0 b 1 3.0 tag\nq Q0 \xff 1 2.0 tag\n")
    with pytest.raises(InputError, match=r"bad\.run, line 2: not text in UTF-8"):
        read_file(str(tmp_path / "bad.run"), "q")


def test_a_table_is_ordered_by_rank_and_without_one_by_score(tmp_path):
    by_score = pa.table({"qid": [1, 1, 2], "docno": ["a", "b", "a"], "score": [0.5, 0.7, 0.1]})
    pq.write_table(by_score, tmp_path / "a.parquet")
    assert read_file(str(tmp_path / "a.parquet"), "1") == {"1": ["b", "a"]}
    pq.write_table(by_score.append_column("rank", pa.array([1, 2, 1])), tmp_path / "b.parquet")
    assert read_file(str(tmp_path / "b.parquet"), "1", "2") == {"1": ["a", "b"], "2": ["a"]}


def test_an_exported_run_gives_every_tool_the_same_figures(tmp_path):
    run = {"q1": ["b", "c", "a"], "q2": ["z"]}
    path = tmp_path / "out.run"
    path.write_bytes(trec_run(run))
    assert path.read_text().splitlines()[0] == "q1 Q0 b 1 3 crossenc"
    assert read_file(str(path), *run) == run
    qrels = {"q1": {"a": 2, "c": 1}, "q2": {"z": 1}}
    expected = per_query(["nDCG@10"], qrels, run)["nDCG@10"]
    judged = [ir_measures.Qrel(q, d, grade) for q, grades in qrels.items() for d, grade in grades.items()]
    found = ir_measures.iter_calc([ir_measures.nDCG @ 10], judged, ir_measures.read_trec_run(str(path)))
    assert {metric.query_id: metric.value for metric in found} == expected
    assert trec_run({}) == b""


def test_what_is_no_ranking_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no \.parquet file at"):
        find(str(tmp_path / "absent.run"), {})
    pq.write_table(pa.table({"query_id": ["q"], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column for doc_id"):
        read_file(str(tmp_path / "a.parquet"), "q")
    run_file(tmp_path / "b.parquet.run", "q Q0 b 1 3.0 tag")
    with pytest.raises(InputError, match="mixes Parquet and other files"):
        find(str(tmp_path / "*"), {})


def test_a_damaged_table_is_refused_and_not_read_in_part(tmp_path):
    table = pa.table({"query_id": ["q"] * 1000, "doc_id": [f"d{i}" for i in range(1000)], "rank": range(1000)})
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = data.index(b"d500")
    data[place : place + 400] = b"\xff" * 400
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet"):
        read_file(str(tmp_path / "a.parquet"), "q")
    assert rankings.is_parquet(find(str(tmp_path / "a.parquet"), {}).files[0])
