"""The ledger: which parts are committed, which are damaged or foreign, and what the journal adds."""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import RunConflictError
from pipelines import ledger
from pipelines.commit import commit_shard
from pipelines.ledger import Journal, read_journal, recorded
from pipelines.records import ShardRecord, StageSeconds
from pipelines.storage import Location, locate
from tests.pipelines.thin import commit_settings, scored, thin_rows, with_tokens

FINGERPRINT = "f" * 64
IDS = [f"{number:06d}-aaaaaaaa" for number in range(4)]


def commit(output: Location, part_id: str, **changes) -> ShardRecord:
    rows = with_tokens(thin_rows(scored("q", f"d-{part_id}", 0.5)))
    return commit_shard(part_id, rows, 3, StageSeconds(score=2.0), replace(commit_settings(output), **changes))


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path))


def read(output: Location) -> ledger.Ledger:
    return ledger.read(output, "results", IDS, FINGERPRINT)


def part_path(tmp_path: Path, part_id: str) -> Path:
    return tmp_path / f"results/part-{part_id}.parquet"


def test_nothing_is_committed_where_there_is_nothing(output):
    assert read(output) == ledger.Ledger({}, ())
    assert recorded(output, "results", read(output)) == {}


def test_committed_parts_are_found_with_what_their_footers_say(output):
    records = {part_id: commit(output, part_id) for part_id in IDS[:2]}
    found = read(output)
    assert set(found.parts) == set(IDS[:2])
    assert found.damaged == ()
    for part_id, (file, part) in found.parts.items():
        assert (file.num_bytes, part.counts) == (records[part_id].num_bytes, records[part_id].counts)


def test_committed_parts_are_found_in_an_object_store(s3_bucket):
    output = locate(f"s3://{s3_bucket}/out")
    record = commit(output, IDS[0])
    commit(locate(f"s3://{s3_bucket}/out/results-of-others"), IDS[1])
    found = read(output)
    assert set(found.parts) == {IDS[0]}
    assert recorded(output, "results", found)[IDS[0]].sha256 == record.sha256


def damaged_footer(data: bytes) -> bytes:
    """`data` with a footer of the stated length that is not one."""
    return data[:-40] + b"\xff" * 32 + data[-8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        damaged_footer,
        lambda data: b"<html>not found</html>",
    ],
    ids=["zero bytes", "half", "tail lost", "footer length of 2 GB", "footer undecodable", "another format"],
)
def test_a_damaged_part_is_reported_and_not_counted(output, tmp_path, damage):
    for part_id in IDS[:2]:
        commit(output, part_id)
    part = part_path(tmp_path, IDS[0])
    part.write_bytes(damage(part.read_bytes()))
    found = read(output)
    assert set(found.parts) == {IDS[1]}
    assert found.damaged == (output / f"results/part-{IDS[0]}.parquet",)


def test_a_part_without_our_footer_or_under_another_name_is_damaged(output, tmp_path):
    commit(output, IDS[0])
    shutil.copy(part_path(tmp_path, IDS[0]), part_path(tmp_path, IDS[1]))
    pq.write_table(pa.table({"a": [1]}), part_path(tmp_path, IDS[2]))
    found = read(output)
    assert set(found.parts) == {IDS[0]}
    assert [location.name for location in found.damaged] == [f"part-{IDS[1]}.parquet", f"part-{IDS[2]}.parquet"]


def test_a_part_of_another_fingerprint_is_refused(output):
    commit(output, IDS[0], fingerprint="e" * 64)
    with pytest.raises(RunConflictError, match=r"belongs to another run; .*--new-run"):
        read(output)


@pytest.mark.parametrize(
    "name", ["part-000099-aaaaaaaa.parquet", "my-table.parquet", f"sub/part-{IDS[0]}.parquet", "part-000000.csv"]
)
def test_files_that_are_no_parts_of_the_plan_are_refused(output, tmp_path, name):
    commit(output, IDS[0])
    (tmp_path / "results" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "results" / name).write_bytes(b"x")
    with pytest.raises(RunConflictError, match=f"{name} is not part of this run"):
        read(output)


def test_files_that_a_killed_writer_left_and_marks_of_other_tools_are_passed_over(output, tmp_path):
    commit(output, IDS[0])
    (tmp_path / f"results/.part-{IDS[1]}.parquet.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "results/_SUCCESS").write_bytes(b"")
    assert set(read(output).parts) == {IDS[0]}


def test_a_part_whose_side_files_are_gone_is_damaged(output, tmp_path):
    for part_id in IDS[:2]:
        commit(output, part_id)
    next((tmp_path / "completeness").glob(f"*{IDS[0]}*")).unlink()
    found = read(output)
    assert set(found.parts) == {IDS[1]}
    assert found.damaged == (output / f"results/part-{IDS[0]}.parquet",)


def test_a_part_that_vanishes_while_the_ledger_is_read_is_not_committed(output, tmp_path, monkeypatch):
    commit(output, IDS[0])
    listed = ledger.list_files(output / "results")
    part_path(tmp_path, IDS[0]).unlink()
    monkeypatch.setattr(ledger, "list_files", lambda folder: listed if folder.name == "results" else [])
    assert read(output).parts == {}


def test_a_part_that_may_not_be_read_is_no_damage(output, monkeypatch):
    commit(output, IDS[0])

    def refuse(file):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(ledger, "open_input", refuse)
    with pytest.raises(PermissionError):
        read(output)


def test_the_journal_gives_back_times_and_digests(output):
    journal = Journal(output, epoch=3)
    records = {part_id: commit(output, part_id) for part_id in IDS[:3]}
    for record in list(records.values())[:2]:
        journal.add(record)
    journal.flush()
    journal.add(records[IDS[2]])
    journal.flush()
    assert read_journal(output) == records
    assert recorded(output, "results", read(output)) == records


def test_a_journal_without_news_stores_nothing(output, tmp_path):
    Journal(output, epoch=1).flush()
    assert list(tmp_path.iterdir()) == []


def test_the_journal_is_stored_now_and_then_without_being_asked(output, monkeypatch):
    monkeypatch.setattr(ledger, "_FLUSH_SECONDS", 0.0)
    record = commit(output, IDS[0])
    Journal(output, epoch=1).add(record)
    assert read_journal(output) == {IDS[0]: record}


def test_of_two_journals_the_later_epoch_counts(output):
    record = commit(output, IDS[0])
    for epoch in (2, 10, 1):
        journal = Journal(output, epoch)
        journal.add(replace(record, finished_at=float(epoch)))
        journal.flush()
    assert read_journal(output)[IDS[0]].finished_at == 10.0


def test_a_part_that_no_journal_knows_is_measured(output, tmp_path):
    record = commit(output, IDS[0])
    measured = recorded(output, "results", read(output))[IDS[0]]
    assert measured == replace(record, seconds=StageSeconds(), finished_at=0.0)
    assert measured.sha256 == hashlib.sha256(part_path(tmp_path, IDS[0]).read_bytes()).hexdigest()


@pytest.mark.parametrize("stale", [{"num_bytes": 1}, {"path": "_run/scored/part-000000-aaaaaaaa.parquet"}])
def test_a_journaled_record_of_another_object_is_not_believed(output, stale):
    record = commit(output, IDS[0])
    journal = Journal(output, epoch=1)
    journal.add(replace(record, sha256="0" * 64, **stale))
    journal.flush()
    assert recorded(output, "results", read(output))[IDS[0]].sha256 == record.sha256


def test_a_torn_journal_costs_only_its_torn_lines(output, tmp_path, caplog):
    journal = Journal(output, epoch=1)
    records = {part_id: commit(output, part_id) for part_id in IDS[:3]}
    for record in records.values():
        journal.add(record)
    journal.flush()
    (file,) = (tmp_path / "_run/journal").iterdir()
    lines = file.read_bytes().splitlines()
    other = json.dumps({"shard_id": IDS[1], "more": 1}).encode()
    file.write_bytes(b"\n".join([lines[0], b"\xff\xfe", b"[]", b"", other, lines[2][: len(lines[2]) // 2]]))
    with caplog.at_level("WARNING", "pipelines.ledger"):
        assert read_journal(output) == {IDS[0]: records[IDS[0]]}
    resumed = recorded(output, "results", read(output))
    assert {part_id: r.sha256 for part_id, r in resumed.items()} == {k: r.sha256 for k, r in records.items()}
    assert "line that is no record" in caplog.text


def test_ten_thousand_parts_are_read_in_seconds(tmp_path):
    output = locate(str(tmp_path))
    ids = [f"{number:06d}-aaaaaaaa" for number in range(10_000)]
    record = commit(output, ids[0])
    for path in (record.path, *record.side_paths):
        template = (tmp_path / path).read_bytes()
        for part_id in ids[1:]:  # ids of one length, so that the footer stays sound
            data = template.replace(ids[0].encode(), part_id.encode())
            (tmp_path / path.replace(ids[0], part_id)).write_bytes(data)
    started = time.perf_counter()
    found = ledger.read(output, "results", ids, FINGERPRINT)
    seconds = time.perf_counter() - started
    assert (len(found.parts), found.damaged) == (10_000, ())
    assert seconds < 30
