"""The end of a run: counts that add up, a manifest of what is stored, and a later look at it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import CrossEncError, RunConflictError
from pipelines import finish as finishes
from pipelines import ledger
from pipelines.commit import commit_bucket, commit_shard
from pipelines.config import RerankConfig
from pipelines.finish import FinishedRun, confirm, finish
from pipelines.layout import Columns
from pipelines.merge import read_bucket
from pipelines.plan import InputFile, Plan, Shard
from pipelines.records import ShardRecord, StageSeconds, add_counts
from pipelines.storage import Location, locate
from tests.pipelines.thin import SETTINGS, commit_settings, refused, scored, thin_rows, with_tokens

IDS = ("000000-aaaaaaaa", "000001-bbbbbbbb")
RANK = replace(SETTINGS, trec_run=True)


def shard_rows(number: int) -> list[dict]:
    first, second = f"q{2 * number}", f"q{2 * number + 1}"
    return [
        scored(first, "a", 0.25, rank=1),
        scored(first, "b", 0.75, rank=2),
        refused(second, "a", "document_empty", row=77),
        refused(None, "c", "query_id_missing", detail="null"),
    ]


def commit(output: Location, part_id: str, rows: list[dict], num_buckets: int = 0) -> ShardRecord:
    settings = commit_settings(output, num_buckets=num_buckets, rank=RANK)
    seconds, kind = StageSeconds(read=1, score=3), f"as {part_id[-1]}"
    return commit_shard(part_id, with_tokens(thin_rows(*rows)), 8, seconds, settings, kind)


def plan(num_rows: int, num_buckets: int = 0, layout: str = "pairs") -> Plan:
    return Plan(
        fingerprint="f" * 64,
        parts={"model m": "abc"},
        columns=Columns(layout=layout, query_id="query_id", doc_id="doc_id"),
        inputs=(InputFile("file:///in/a", 100, "v", num_rows),),
        skipped=(("file:///in/bad", "damaged"),),
        num_buckets=num_buckets,
        query_id_type="string",
        doc_id_type="string",
        shards=tuple(Shard(part_id, 0, i, i + 1, 4) for i, part_id in enumerate(IDS)),
    )


def finished_run(output: Location, records: dict[str, ShardRecord], **changes) -> FinishedRun:
    run = FinishedRun(
        config=RerankConfig(candidates="c", model="m", output="o", price_per_hour=2.0),
        plan=plan(num_rows=sum(record.counts.num_candidates for record in records.values())),
        output=output,
        model_name="m",
        score_range=(0.0, 1.0),
        records=records,
        shard_records=records,
        interpolation="",
        elapsed_seconds=1800.0,
    )
    return replace(run, **changes)


def say(text: str) -> None:
    pass


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path))


@pytest.fixture
def records(output: Location) -> dict[str, ShardRecord]:
    return {part_id: commit(output, part_id, shard_rows(i)) for i, part_id in enumerate(IDS)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def manifest(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "_manifest.json").read_text(), parse_constant=refuse)


def test_a_finished_run_has_a_manifest_a_report_and_the_mark(output, tmp_path, records):
    counts = finish(finished_run(output, records), say)
    assert {"_manifest.json", "report.html", "_SUCCESS"} <= files(tmp_path)
    assert (counts.num_candidates, counts.num_scored, counts.num_results, counts.num_queries) == (8, 4, 4, 4)
    assert counts.refused == {"document_empty": 2, "query_id_missing": 2}
    body = manifest(tmp_path)
    assert body["counts"]["num_scored"] == 4
    assert body["depends_on"] == {"model m": "abc"}
    assert body["skipped_files"] == [["file:///in/bad", "damaged"]]
    assert (body["cost_of_last_process"], body["elapsed_seconds"]) == (1.0, 1800.0)
    assert body["padding_share"] == 0.25
    assert body["time_share"]["score"] > 0.5


def test_the_manifest_lists_every_part_with_its_true_digest(output, tmp_path, records):
    finish(finished_run(output, records), say)
    parts = manifest(tmp_path)["parts"]
    assert {part["path"] for part in parts} == {f"results/part-{part_id}.parquet" for part_id in IDS}
    for part in parts:
        data = (tmp_path / part["path"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert part["rows"] == pq.read_table(tmp_path / part["path"]).num_rows == 2
        assert all((tmp_path / side).exists() for side in part["sides"])


def test_the_rate_in_the_manifest_leaves_out_what_an_earlier_process_did(output, tmp_path, records):
    first, second = records.items()
    earlier = (first[0], replace(first[1], finished_at=second[1].finished_at - 9000))
    finish(finished_run(output, dict([earlier, second]), elapsed_seconds=10.0), say)
    assert manifest(tmp_path)["pairs_per_second"] == 0.2  # 2 pairs in 10 s


def test_parts_of_an_earlier_driver_are_listed_with_their_true_digests(output, tmp_path, records):
    found = ledger.recorded(output, "results", ledger.read(output, "results", IDS, "f" * 64))
    finish(finished_run(output, found), say)
    digests = {part["path"]: part["sha256"] for part in manifest(tmp_path)["parts"]}
    assert digests == {record.path: record.sha256 for record in records.values()}


def test_lost_rows_are_noticed_before_anything_is_written(output, tmp_path, records):
    with pytest.raises(CrossEncError, match="the input has 9 rows but 8 came out"):
        finish(finished_run(output, records, plan=plan(num_rows=9)), say)
    assert not {"_manifest.json", "_SUCCESS"} & files(tmp_path)


def test_the_rows_of_nested_input_are_queries_and_need_not_equal_the_candidates(output, records):
    assert finish(finished_run(output, records, plan=plan(4, layout="nested")), say).num_candidates == 8


def test_scored_and_refused_must_add_up_to_the_candidates(output, records):
    broken = replace(records[IDS[0]], counts=replace(records[IDS[0]].counts, num_scored=1))
    with pytest.raises(CrossEncError, match="scored and refused do not add up"):
        finish(finished_run(output, records | {IDS[0]: broken}), say)


def two_phases(output: Location) -> FinishedRun:
    settings = commit_settings(output, num_buckets=2, rank=RANK)
    repeated = [*shard_rows(0), scored("q0", "b", 0.5, rank=9)]
    scored_parts = {IDS[0]: commit(output, IDS[0], repeated, 2), IDS[1]: commit(output, IDS[1], shard_rows(1), 2)}
    buckets = {
        f"b{b:05d}": commit_bucket(f"b{b:05d}", read_bucket(output, "f" * 64, b), StageSeconds(), settings)
        for b in range(2)
    }
    return finished_run(output, buckets, shard_records=scored_parts, plan=plan(9, num_buckets=2))


def test_two_phases_count_queries_once_and_tokens_where_they_were_scored(output, tmp_path):
    counts = finish(two_phases(output), say)
    assert (counts.num_queries, counts.num_candidates, counts.num_scored) == (4, 9, 4)
    assert counts.refused == {"document_empty": 2, "duplicate_document": 1, "query_id_missing": 2}
    assert (counts.num_tokens, counts.num_padded_tokens) == (15, 16)
    assert counts.forward_kinds == {"as a": 3, "as b": 2}
    assert [part["path"] for part in manifest(tmp_path)["parts"]] == [
        "results/part-b00000.parquet",
        "results/part-b00001.parquet",
    ]


def test_a_candidate_lost_between_two_phases_is_noticed(output):
    run = two_phases(output)
    with pytest.raises(CrossEncError, match=r"9 candidates were scored but [1-8] were ranked"):
        finish(replace(run, records=dict([next(iter(run.records.items()))])), say)


def test_side_files_that_no_part_names_are_removed_and_others_are_not(output, tmp_path, records):
    before = files(tmp_path)
    commit(output, IDS[0], [scored("q0", "a", 0.1)])  # loses against the part that is there
    (tmp_path / "results/.part-000001-bbbbbbbb.parquet.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "quarantine/.part-000001-bbbbbbbb-aa.parquet.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("somebody's")
    assert len(files(tmp_path)) == len(before) + 5
    finish(finished_run(output, records), say)
    assert files(tmp_path) == before | {"_manifest.json", "report.html", "_SUCCESS", "notes.txt"}


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("name", ["put_new", "_remove_orphans", "put"])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_while_finishing_is_finished_by_the_next_attempt(
    output, tmp_path, records, monkeypatch, name, after
):
    real = getattr(finishes, name)

    def dying(*args):
        if after:
            real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finishes, name, dying)
        with pytest.raises(Killed):
            finish(finished_run(output, records), say)
    assert not (tmp_path / "_SUCCESS").exists()
    finish(finished_run(output, records, elapsed_seconds=5.0), say)
    assert confirm(output).state == "already done"


def test_a_run_that_was_overtaken_deletes_nothing_and_leaves_no_mark(output, tmp_path, records):
    foreign = tmp_path / "quarantine" / "part-of-the-other-run.parquet"
    foreign.write_bytes(b"")
    assert finish(finished_run(output, records), say, lambda: True) is None
    assert foreign.exists() and not {"_manifest.json", "report.html", "_SUCCESS"} & files(tmp_path)
    answers = [True, False]  # after the manifest
    assert finish(finished_run(output, records), say, lambda: answers.pop()) is None
    assert foreign.exists() and "_manifest.json" in files(tmp_path) and "report.html" not in files(tmp_path)
    answers = [True, False, False]  # before the mark
    assert finish(finished_run(output, records), say, lambda: answers.pop()) is None
    assert "report.html" in files(tmp_path) and "_SUCCESS" not in files(tmp_path)


def test_the_first_manifest_stays(output, tmp_path, records):
    finish(finished_run(output, records), say)
    first = (tmp_path / "_manifest.json").read_bytes()
    finish(finished_run(output, records, elapsed_seconds=5.0), say)
    assert (tmp_path / "_manifest.json").read_bytes() == first


def test_a_manifest_that_lists_other_parts_is_refused(output, tmp_path, records):
    finish(finished_run(output, records), say)
    (tmp_path / "_SUCCESS").unlink()
    part = tmp_path / records[IDS[0]].path
    part.unlink()
    changed = commit(output, IDS[0], [*shard_rows(0)[:-1], scored("q0", "d", 0.1)])
    with pytest.raises(RunConflictError, match=r"_manifest\.json lists other parts than are stored now; delete it"):
        finish(finished_run(output, records | {IDS[0]: changed}), say)
    assert not (tmp_path / "_SUCCESS").exists()


def test_a_side_file_that_vanished_is_noticed_before_the_mark_and_made_again_by_a_rerun(output, tmp_path, records):
    side = tmp_path / records[IDS[0]].side_paths[0]
    before = side.read_bytes()
    side.unlink()
    with pytest.raises(RunConflictError, match="was removed or changed meanwhile; run the same command again"):
        finish(finished_run(output, records), say)
    (damaged,) = ledger.read(output, "results", IDS, "f" * 64).damaged
    assert damaged == output / records[IDS[0]].path
    Path(damaged.path).unlink()
    again = commit(output, IDS[0], shard_rows(0))
    assert side.read_bytes() == before
    finish(finished_run(output, records | {IDS[0]: again}), say)
    assert (tmp_path / "_SUCCESS").exists()


@pytest.mark.parametrize(
    "change", [lambda part: part.unlink(), lambda part: part.write_bytes(part.read_bytes()[:-1])], ids=["gone", "cut"]
)
def test_a_part_that_changed_after_its_commit_is_noticed_before_the_mark(output, tmp_path, records, change):
    change(tmp_path / records[IDS[1]].path)
    with pytest.raises(RunConflictError, match=r"part-000001-bbbbbbbb\.parquet was removed or changed meanwhile"):
        finish(finished_run(output, records), say)
    assert not (tmp_path / "_SUCCESS").exists()


def test_confirming_a_finished_run_gives_its_counts_and_writes_nothing(output, tmp_path, records):
    counts = finish(finished_run(output, records), say)
    before = files(tmp_path)
    outcome = confirm(output)
    assert (outcome.state, outcome.counts) == ("already done", counts)
    assert files(tmp_path) == before


def test_a_finished_run_is_confirmed_in_an_object_store(s3_bucket):
    output = locate(f"s3://{s3_bucket}/out")
    records = {part_id: commit(output, part_id, shard_rows(i)) for i, part_id in enumerate(IDS)}
    counts = finish(finished_run(output, records), say)
    assert confirm(output).counts == counts


def damages() -> list[tuple[str, Callable[[Path], object]]]:
    def part(folder: Path) -> Path:
        return folder / f"results/part-{IDS[0]}.parquet"

    def side(folder: Path) -> Path:
        return next((folder / "quarantine").iterdir())

    return [
        (rf"part-{IDS[0]}\.parquet is missing or changed", lambda folder: part(folder).unlink()),
        (rf"part-{IDS[0]}\.parquet is missing or changed", lambda folder: part(folder).write_bytes(b"cut")),
        (r"quarantine/.* is missing or changed", lambda folder: side(folder).unlink()),
        (r"_manifest\.json is missing or changed", lambda folder: (folder / "_manifest.json").unlink()),
        (r"is not a manifest of this version", lambda folder: (folder / "_manifest.json").write_bytes(b"{")),
        (r"is not a manifest of this version", lambda folder: (folder / "_manifest.json").write_bytes(b"{}")),
    ]


@pytest.mark.parametrize(("message", "damage"), damages())
def test_a_finished_run_that_was_damaged_since_is_not_confirmed(output, tmp_path, records, message, damage):
    finish(finished_run(output, records), say)
    damage(tmp_path)
    with pytest.raises(RunConflictError, match=f"{message}.*--new-run"):
        confirm(output)


def test_counts_of_shards_add_up(records):
    counts = [record.counts for record in records.values()]
    total = add_counts(counts)
    assert total.num_tokens == sum(one.num_tokens for one in counts)
    assert sum(total.score_histogram) == sum(sum(one.score_histogram) for one in counts) == 4
    assert total.refused == {"document_empty": 2, "query_id_missing": 2}
    assert add_counts([]).num_candidates == 0


def test_the_report_shows_examples_of_every_reason_by_place_and_without_text(output, tmp_path, records):
    finish(finished_run(output, records), say)
    page = (tmp_path / "report.html").read_text()
    assert "document_empty" in page and "query_id_missing" in page
    assert "77" in page and "file:///in/a" in page


def test_a_rare_reason_behind_many_common_ones_still_has_an_example(output, tmp_path):
    rows = [refused("q", f"d{i}", "document_empty", row=i) for i in range(3000)]
    records = {IDS[0]: commit(output, IDS[0], [*rows, refused("q", "x", "scoring_crash", row=4321)])}
    examples = finishes._examples(finished_run(output, records))
    assert [(e.reason, e.row) for e in examples] == [
        ("document_empty", 0),
        ("document_empty", 1),
        ("document_empty", 2),
        ("scoring_crash", 4321),
    ]


def test_what_could_not_be_computed_is_null_in_the_manifest(output, tmp_path, records):
    candidates = tmp_path.parent / f"{tmp_path.name}-in.parquet"
    names = ["query_id", "doc_id", "query", "text"]
    pq.write_table(pa.table([["q0"] * 2, ["a", "b"], ["x"] * 2, ["t"] * 2], names=names), candidates)
    qrels = tmp_path.parent / f"{tmp_path.name}-qrels.txt"
    qrels.write_text("q0 0 a 1\n")
    run = finished_run(output, records)
    columns = replace(run.plan.columns, query="query", text="text")
    inputs = (InputFile(f"file://{candidates}", candidates.stat().st_size, "v", 8),)
    run = replace(
        run,
        plan=replace(run.plan, columns=columns, inputs=inputs),
        config=run.config.model_copy(update={"qrels": str(qrels)}),
    )
    finish(run, say)
    ndcg = manifest(tmp_path)["evaluation"][0]
    assert (ndcg["measure"], ndcg["num_queries"], ndcg["p_t"]) == ("nDCG@10", 1, None)
