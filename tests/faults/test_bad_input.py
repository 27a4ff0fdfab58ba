"""Input that cannot be used, and input that looks as if it could not: refused by name before any work, or done.

What is refused runs as the command does, up to the point where it would ask for a cluster. What is accepted runs on
the shared one.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cluster, runtime
from jobs import rerank as rerank_job
from pipelines.config import RerankConfig
from pipelines.rerank import Outcome, rerank
from tests.support.collections import (
    Collection,
    make_collection,
    plain_ranking,
    read_manifest,
    read_quarantine,
    read_results,
    write_job,
)
from tests.support.models import StumblingModel


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run here must end before it asks for a cluster."""

    def connect(*args: object) -> int:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(cluster, "connect", connect)


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return make_collection(tmp_path / "in")


@pytest.fixture
def folder(collection: Collection) -> Path:
    """A folder with two good files: a.parquet and b.parquet."""
    folder = collection.folder / "two"
    folder.mkdir(parents=True)
    collection.pairs[:100].to_parquet(folder / "a.parquet", index=False)
    collection.pairs[100:].to_parquet(folder / "b.parquet", index=False)
    return folder


def run(output: Path, **settings: object) -> Outcome:
    config = RerankConfig(model="fake", output=str(output), scoring={"cpus_per_actor": 1}, **settings)
    return rerank(config, connect=lambda: 2, stream=io.StringIO(), model=StumblingModel())


def refusal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    """The one line in which the command refuses the candidates in `folder`, with exit code 2 and nothing written."""
    job = write_job(tmp_path / "job.yaml", candidates=str(folder), output=str(tmp_path / "out"), **settings)
    assert rerank_job.run(job, model=StumblingModel()) == runtime.BAD_INPUT
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()
    return line


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_broken_footer(data: bytes) -> bytes:
    size = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - size] + b"\xff" * size + data[-8:]


def no_parquet(data: bytes) -> bytes:
    return b"query_id,doc_id\nq1,d1\n"


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, with_broken_footer, no_parquet, empty])
def test_a_damaged_file_is_refused_by_name(folder, tmp_path, no_ray, capsys, damage):
    (folder / "b.parquet").write_bytes(damage((folder / "b.parquet").read_bytes()))
    line = refusal(folder, tmp_path, capsys)
    assert str(folder / "b.parquet") in line and "skip_bad_files: true" in line


def test_files_that_do_not_fit_together_are_refused_with_both_names(collection, folder, tmp_path, no_ray, capsys):
    collection.pairs[100:].drop(columns="text").to_parquet(folder / "b.parquet", index=False)
    line = refusal(folder, tmp_path, capsys)
    assert f"{folder / 'b.parquet'} has no column 'text', but file://{folder / 'a.parquet'} has" in line
    collection.pairs[100:].assign(text=1.5).to_parquet(folder / "b.parquet", index=False)
    line = refusal(folder, tmp_path, capsys)
    assert "column 'text' is" in line and "b.parquet" in line and "a.parquet" in line


def test_a_missing_column_is_named_with_what_is_there_and_what_is_near(collection, folder, tmp_path, no_ray, capsys):
    for name in ("a", "b"):
        pairs = pd.read_parquet(folder / f"{name}.parquet").rename(columns={"query": "qurey"})
        pairs.to_parquet(folder / f"{name}.parquet", index=False)
    line = refusal(folder, tmp_path, capsys)
    assert "a.parquet has no column for query" in line
    assert "query_id, qurey, doc_id, text" in line and "Did you mean 'qurey'?" in line


def test_a_number_as_text_is_refused_with_the_column(collection, folder, tmp_path, no_ray, capsys):
    for name in ("a", "b"):
        collection.pairs.assign(text=7).to_parquet(folder / f"{name}.parquet", index=False)
    line = refusal(folder, tmp_path, capsys)
    assert "a.parquet: column 'text' (document text) is int64, but must be text" in line


def test_candidates_that_do_not_exist_are_refused(tmp_path, no_ray, capsys):
    assert f"there is no .parquet file at file://{tmp_path / 'nothing'}" in refusal(
        tmp_path / "nothing", tmp_path, capsys
    )


@pytest.mark.usefixtures("ray_cluster")
def test_skipping_bad_files_does_the_others_and_names_the_file(collection, folder, tmp_path):
    (folder / "b.parquet").write_bytes(truncated((folder / "b.parquet").read_bytes()))
    run(tmp_path / "out", candidates=str(folder), skip_bad_files=True)
    [[file, why]] = read_manifest(tmp_path / "out")["skipped_files"]
    assert file == f"file://{folder / 'b.parquet'}" and "not a sound Parquet file" in why
    assert read_results(tmp_path / "out").doc_id.tolist() == plain_ranking(collection.pairs[:100]).doc_id.tolist()


@pytest.mark.usefixtures("ray_cluster")
def test_odd_files_and_bad_rows_are_accounted_for_and_all_else_is_ranked(collection, folder, tmp_path):
    pairs = collection.pairs
    texts = [text.encode() for text in pairs.text]
    bad = {3: None, 14: b"", 25: b"x" * (10 << 20), 36: b"na\xefve"}
    for row, text in bad.items():
        texts[row] = text
    doc_ids = pairs.doc_id.tolist()
    doc_ids[58] = doc_ids[51]
    table = pa.table({name: pairs[name] for name in ("query_id", "query", "rank", "score")})
    table = table.append_column("doc_id", pa.array(doc_ids))
    # Claims to be text, as files of careless writers do.
    table = table.append_column("text", pa.array(texts, pa.binary()).view(pa.string()))
    pq.write_table(table.slice(0, 105), folder / "a.parquet")  # the eleventh query lies in both files
    pq.write_table(table.slice(105), folder / "b.parquet")
    pq.write_table(table.slice(0, 0), folder / "c-without-rows.parquet")
    outcome = run(tmp_path / "out", candidates=str(folder), shard_candidates=40)
    quarantine = read_quarantine(tmp_path / "out")
    assert set(quarantine.file) == {f"file://{folder / 'a.parquet'}"}
    assert list(zip(quarantine.row, quarantine.reason, quarantine.detail.fillna(""), strict=True)) == [
        (3, "document_missing", ""),
        (14, "document_empty", ""),
        (25, "document_too_large", "10,485,760 bytes"),
        (36, "document_not_utf8", "byte 2"),
        (58, "duplicate_document", ""),
    ]
    good = plain_ranking(pairs.drop(index=[3, 14, 25, 36, 58]))
    results = read_results(tmp_path / "out")
    assert results.query_id.tolist() == good.query_id.tolist()
    assert results.doc_id.tolist() == good.doc_id.tolist()
    np.testing.assert_array_equal(results.score, good.score)
    assert outcome.counts is not None
    assert (outcome.counts.num_candidates, outcome.counts.num_scored) == (200, 195)


@pytest.mark.usefixtures("ray_cluster")
def test_a_damaged_page_costs_the_rows_of_its_shard_and_nothing_else(collection, tmp_path):
    file = collection.folder / "pairs.parquet"
    file.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pandas(collection.pairs, preserve_index=False)
    pq.write_table(table, file, row_group_size=40, compression="none", use_dictionary=False, write_page_checksum=True)
    group = pq.read_metadata(file).row_group(2)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "text")
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x01  # one letter becomes another
    file.write_bytes(data)
    run(tmp_path / "out", candidates=str(file), shard_candidates=40)
    quarantine = read_quarantine(tmp_path / "out")
    assert quarantine.row.tolist() == list(range(80, 120))
    assert set(quarantine.reason) == {"unreadable"}
    assert "CRC checksum verification failed" in quarantine.detail[0]
    good = plain_ranking(collection.pairs.drop(index=range(80, 120)))
    results = read_results(tmp_path / "out")
    assert results.doc_id.tolist() == good.doc_id.tolist()
    np.testing.assert_array_equal(results.score, good.score)
