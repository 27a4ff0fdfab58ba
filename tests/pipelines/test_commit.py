"""Commits: one create-only PUT per part, equal bytes for equal rows, and every state that a kill can leave."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import RunConflictError, StorageError
from crossenc.testing import FakeScorer, FakeTokenizer
from pipelines import commit as commits
from pipelines.commit import SCORED_FOLDER, commit_bucket, commit_shard, parse_footer, trec_lines
from pipelines.merge import read_bucket
from pipelines.records import ShardRecord, StageSeconds
from pipelines.storage import locate
from tests.pipelines.thin import SETTINGS, commit_settings, refused, scored, thin_rows, with_tokens

SECONDS = StageSeconds(read=1.0, tokenise=2.0, score=3.0)
TREC = replace(SETTINGS, trec_run=True)


def some_rows() -> pa.Table:
    return thin_rows(
        scored("q1", "a", 0.25, rank=1),
        scored("q1", "b", 0.75, rank=2),
        refused("q1", "c", "document_empty"),
        scored("q2", "a", 0.5, rank=1),
        scored("q2", "a", 0.5, rank=2),
    )


def commit(output, rows: pa.Table | None = None, shard_id="000000-aaaaaaaa", **changes) -> ShardRecord:
    where = commit_settings(output, rank=TREC)
    rows = some_rows() if rows is None else rows
    return commit_shard(shard_id, with_tokens(rows), 30, SECONDS, replace(where, **changes), "packed")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_shard_becomes_a_part_and_side_files_named_by_its_footer(tmp_path):
    record = commit(tmp_path)
    stored = files(tmp_path)
    assert set(stored) == {record.path, *record.side_paths}
    assert record.path == "results/part-000000-aaaaaaaa.parquet"
    assert {path.partition("/")[0] for path in record.side_paths} == {"completeness", "quarantine", "trec"}
    part = parse_footer(pq.read_metadata(io.BytesIO(stored[record.path])))
    assert part is not None
    assert (part.shard_id, part.fingerprint) == ("000000-aaaaaaaa", "f" * 64)
    assert (part.side_paths, part.counts) == (record.side_paths, record.counts)
    assert record.num_bytes == len(stored[record.path])


def test_a_record_counts_queries_candidates_tokens_and_keeps_the_times(tmp_path):
    record = commit(tmp_path)
    counts = record.counts
    assert (counts.num_queries, counts.num_candidates, counts.num_scored, counts.num_results) == (2, 5, 3, 3)
    assert counts.refused == {"document_empty": 1, "duplicate_document": 1}
    assert (counts.num_tokens, counts.num_padded_tokens, counts.num_truncated) == (12, 30, 0)
    assert sum(counts.score_histogram) == sum(counts.length_histogram) == 4  # the duplicate was scored, too
    assert counts.score_histogram[20] == counts.score_histogram[60] == 1
    assert counts.length_histogram[0] == 4
    assert counts.forward_kinds == {"packed": 4}
    assert (record.seconds.read, record.seconds.tokenise, record.seconds.score) == (1.0, 2.0, 3.0)
    assert record.seconds.write > 0
    assert record.finished_at > 0


def test_equal_rows_give_equal_files_however_they_are_chunked(tmp_path):
    rows = some_rows()
    commit(tmp_path / "one", rows)
    commit(tmp_path / "two", pa.concat_tables([rows.slice(0, 2), rows.slice(2)]))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_shard_without_refusals_or_rows_has_no_side_files_for_them(tmp_path):
    assert commit(tmp_path / "empty", thin_rows()).side_paths == ()
    clean = commit(tmp_path / "clean", thin_rows(scored("q", "a", 0.5)))
    assert [path.partition("/")[0] for path in clean.side_paths] == ["completeness", "trec"]
    assert pq.read_table(tmp_path / "empty" / "results").num_rows == 0


def test_the_loser_of_a_race_reports_the_part_that_is_stored(tmp_path):
    winner = commit(tmp_path)
    before = files(tmp_path)[winner.path]
    loser = commit(tmp_path, thin_rows(scored("q1", "a", 0.1)))
    assert files(tmp_path)[winner.path] == before
    assert (loser.sha256, loser.counts, loser.side_paths) == (winner.sha256, winner.counts, winner.side_paths)


def test_side_files_of_both_sides_of_a_race_keep_apart(tmp_path):
    winner = commit(tmp_path)
    sides = {path: files(tmp_path)[path] for path in winner.side_paths}
    commit(tmp_path, thin_rows(scored("q1", "a", 0.1)))
    assert sides.items() <= files(tmp_path).items()
    assert len(list((tmp_path / "completeness").iterdir())) == 2


def test_a_part_of_another_run_is_refused(tmp_path):
    commit(tmp_path, fingerprint="e" * 64)
    with pytest.raises(RunConflictError, match=r"part-000000-aaaaaaaa\.parquet was written by another run.*--new-run"):
        commit(tmp_path)


def test_a_parquet_file_that_is_no_part_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "results/part-000000-aaaaaaaa.parquet")
    with pytest.raises(RunConflictError, match="another run"):
        commit(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>sorry</html>"])
def test_a_damaged_part_in_the_way_is_named(tmp_path, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/part-000000-aaaaaaaa.parquet").write_bytes(content)
    with pytest.raises(StorageError, match=r"part-000000-aaaaaaaa\.parquet came back damaged .*run the command again"):
        commit(tmp_path)


def test_a_part_and_its_side_files_are_committed_to_an_object_store(s3_bucket, moto):
    record = commit(locate(f"s3://{s3_bucket}/out"))
    stored = moto.list(f"{s3_bucket}/out/")
    assert {key.removeprefix(f"{s3_bucket}/") for key in stored} == {
        f"out/{path}" for path in (record.path, *record.side_paths)
    }
    assert commit(locate(f"s3://{s3_bucket}/out")).sha256 == record.sha256


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> list[str]:
    """Lets the committing process die at PUT `number`, before or after it took effect."""
    calls: list[str] = []
    for name in ("put", "put_new"):
        real = getattr(commits, name)

        def dying(location, data, real=real):
            calls.append(location.name)
            if len(calls) == number and not after:
                raise Killed
            stored = real(location, data)
            if len(calls) == number:
                raise Killed
            return stored

        monkeypatch.setattr(commits, name, dying)
    return calls


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_after_a_kill_at_any_put_a_rerun_ends_with_the_same_files(tmp_path, monkeypatch, number, after):
    record = commit(tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        calls = kill_at(patch, number, after)
        with pytest.raises(Killed):
            commit(tmp_path / "killed")
    assert len(calls) == number
    is_committed = (tmp_path / "killed" / record.path).exists()
    assert is_committed == (number == 4 and after)
    again = commit(tmp_path / "killed")
    assert (again.sha256, again.counts) == (record.sha256, record.counts)
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


def test_the_part_is_the_last_thing_that_is_stored(tmp_path, monkeypatch):
    calls = kill_at(monkeypatch, 99, after=False)
    commit(tmp_path)
    assert calls[-1] == "part-000000-aaaaaaaa.parquet"
    assert len(calls) == 4


def test_lines_of_a_trec_run_have_six_fields_even_for_ids_with_white_space():
    rows = thin_rows(scored("q 1", "a\tb", 0.5), scored("q 1", "c\u00a0\n", 0.25), scored("ü", "100%", 0.125))
    results = commits.rank_rows(rows, SETTINGS).results
    assert trec_lines(results).decode().splitlines() == [
        "q%201 Q0 a%09b 1 0.5 crossenc",
        "q%201 Q0 c%C2%A0%0A 2 0.25 crossenc",
        "ü Q0 100% 1 0.125 crossenc",
    ]


@pytest.mark.parametrize("num_buckets", [1, 5, 64])
def test_a_scored_part_has_one_row_group_for_each_bucket_even_empty_ones(tmp_path, num_buckets):
    rows = thin_rows(*(scored(f"q{i % 7}", f"d{i}", 0.5) for i in range(50)), refused(None, "x", "query_id_missing"))
    record = commit(tmp_path, rows, num_buckets=num_buckets)
    assert record.path == f"{SCORED_FOLDER}/part-000000-aaaaaaaa.parquet"
    assert (record.counts.num_queries, record.counts.num_scored, record.side_paths) == (0, 50, ())
    assert record.counts.refused == {"query_id_missing": 1}
    assert pq.read_metadata(tmp_path / record.path).num_row_groups == num_buckets


def test_a_scored_part_without_rows_has_all_its_buckets(tmp_path):
    record = commit(tmp_path, thin_rows(), num_buckets=3)
    assert pq.read_metadata(tmp_path / record.path).num_row_groups == 3
    assert read_bucket(locate(str(tmp_path)), "f" * 64, 2).num_rows == 0


def test_buckets_of_another_run_are_refused(tmp_path):
    commit(tmp_path, num_buckets=2, fingerprint="e" * 64)
    with pytest.raises(RunConflictError, match="belongs to another run"):
        read_bucket(locate(str(tmp_path)), "f" * 64, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e", None]), max_size=30),
    st.integers(1, 4),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_buckets_give_back_every_row_once_in_input_order_with_queries_whole(tmp_path_factory, queries, buckets, cuts):
    output = tmp_path_factory.mktemp("out")
    rows = thin_rows(
        *(scored(q, f"d{i}", 0.5) if q else refused(q, f"d{i}", "query_id_missing") for i, q in enumerate(queries))
    )
    bounds = sorted({0, len(queries), *(min(cut, len(queries)) for cut in cuts)})
    for number, (start, end) in enumerate(zip(bounds, bounds[1:] or [0], strict=False)):
        commit(output, rows.slice(start, end - start), f"{number:06d}-aaaaaaaa", num_buckets=buckets)
    read = [read_bucket(locate(str(output)), "f" * 64, bucket) for bucket in range(buckets)]
    assert sorted(row for table in read for row in table.column("row").to_pylist()) == list(range(len(queries)))
    assert all(table.column("row").to_pylist() == sorted(table.column("row").to_pylist()) for table in read)
    homes = [set(table.column("query_id").drop_null().to_pylist()) for table in read]
    assert sum(map(len, homes)) == len({q for q in queries if q})


def test_two_phases_over_shuffled_pairs_give_the_results_of_one_phase_over_clustered_ones(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(f"q{q}", f"d{d}", float(rng.random())) for q in range(12) for d in rng.integers(0, 40, 15)]
    encoded = FakeTokenizer().encode([q for q, _, _ in pairs], [d for _, d, _ in pairs])
    scores = FakeScorer().score(encoded).tolist()
    rows = [
        scored(q, d, score, rank=i, stage_score=first)
        for i, ((q, d, first), score) in enumerate(zip(pairs, scores, strict=True))
    ]
    rank = replace(SETTINGS, top_k=8, weight=0.6)

    one = commit_settings(tmp_path / "one", rank=rank)
    for number in range(4):
        shard = with_tokens(thin_rows(*rows[number * 45 : (number + 1) * 45]))
        commit_shard(f"{number:06d}-aaaaaaaa", shard, 0, SECONDS, one)

    two = commit_settings(tmp_path / "two", num_buckets=3, rank=rank)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    for number in range(5):
        shard = with_tokens(thin_rows(*shuffled[number * 36 : (number + 1) * 36]))
        commit_shard(f"{number:06d}-aaaaaaaa", shard, 0, SECONDS, two)
    records = []
    for bucket in range(3):
        thin = read_bucket(two.output, two.fingerprint, bucket)
        records.append(commit_bucket(f"b{bucket:05d}", thin, StageSeconds(), two))

    def read(run: str, table: str, *keys: str) -> pa.Table:
        return pq.read_table(tmp_path / run / table).sort_by([(key, "ascending") for key in keys])

    assert read("two", "results", "query_id", "rank").equals(read("one", "results", "query_id", "rank"))
    assert read("two", "completeness", "query_id").equals(read("one", "completeness", "query_id"))
    duplicates = sum(record.counts.refused["duplicate_document"] for record in records)
    assert duplicates == pq.read_table(tmp_path / "one/quarantine").num_rows > 0
    assert sum(record.counts.num_candidates for record in records) == len(rows)
