"""Plans: cuts at query boundaries, stable shard ids, storing, and refusing what is not this run's."""

import json
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import RunConflictError
from pipelines import plan as plans
from pipelines.inputs import NULL_HASH, FileScan, Inputs
from pipelines.layout import Columns
from pipelines.storage import FileInfo, locate

PAIRS = Columns(layout="pairs", query_id="query_id", doc_id="doc_id", query="query", text="text")
SCHEMA = pa.schema([("query_id", pa.string()), ("query", pa.string()), ("doc_id", pa.int64()), ("text", pa.string())])


def file_scan(run_lengths, name="a", group_rows=None, hashes=None, candidates=None) -> FileScan:
    """A scanned file whose queries have these numbers of rows; one row group unless `group_rows` cuts it."""
    starts = np.cumsum([0, *run_lengths])
    groups = [int(starts[-1])] if group_rows is None else group_rows
    assert sum(groups) == starts[-1]
    if hashes is None:
        hashes = [zlib.crc32(name.encode()) * 10**6 + i + 1 for i in range(len(run_lengths))]
    return FileScan(
        file=FileInfo(locate(f"/data/{name}.parquet"), 1000 + len(run_lengths), "v1"),
        schema=SCHEMA,
        row_group_starts=np.cumsum([0, *groups]).astype(np.int64),
        run_starts=starts[:-1].astype(np.int64),
        run_hashes=np.array(hashes, dtype=np.uint64),
        num_candidates_before=starts.astype(np.int64) if candidates is None else np.cumsum([0, *candidates]),
    )


def make(*scans, target=100, columns=PAIRS, parts=None, force_two_phase=False) -> plans.Plan:
    return plans.make(
        Inputs(columns, scans, ()), parts or {"format": "1"}, shard_candidates=target, force_two_phase=force_two_phase
    )


def spans(plan: plans.Plan) -> list[tuple[int, int]]:
    return [(shard.row_start, shard.row_end) for shard in plan.shards]


@st.composite
def scanned_files(draw):
    scans = []
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        runs = draw(st.lists(st.integers(1, 30), max_size=40))
        cuts = sorted(draw(st.sets(st.integers(0, sum(runs)), max_size=6)) | {0, sum(runs)})
        scans.append(file_scan(runs, name, group_rows=np.diff(cuts).tolist()))
    return scans


@given(scanned_files(), st.integers(1, 200))
def test_shards_cover_every_row_once_and_never_split_a_query(scans, target):
    plan = make(*scans, target=target)
    for index, scan in enumerate(scans):
        shards = [shard for shard in plan.shards if shard.file == index and shard.num_candidates]
        assert [shard.row_start for shard in shards] == [0, *(shard.row_end for shard in shards)][: len(shards)]
        assert (shards[-1].row_end if shards else 0) == scan.num_rows
        assert {shard.row_start for shard in shards} <= set(scan.run_starts.tolist())
        assert all(shard.num_candidates == shard.row_end - shard.row_start for shard in shards)
    longest = max((int(np.diff(scan.num_candidates_before).max(initial=1)) for scan in scans), default=1)
    assert all(shard.num_candidates <= max(longest, target + target // 2) for shard in plan.shards)
    assert plan.num_candidates == sum(scan.num_rows for scan in scans)


@given(scanned_files(), st.integers(1, 200))
def test_two_phase_shards_cover_every_row_once_and_hold_about_the_target(scans, target):
    plan = make(*scans, target=target, force_two_phase=True)
    for index, scan in enumerate(scans):
        rows = [row for shard in plan.shards if shard.file == index for row in range(shard.row_start, shard.row_end)]
        assert rows == list(range(scan.num_rows))
    assert all(shard.num_candidates <= target + target // 2 for shard in plan.shards)


def test_a_cut_moves_to_a_row_group_bound_that_is_near():
    scan = file_scan([10] * 30, group_rows=[130, 170])
    assert spans(make(scan, target=100)) == [(0, 130), (130, 230), (230, 300)]


def test_a_cut_ignores_a_row_group_bound_that_is_far_or_inside_a_query():
    assert spans(make(file_scan([10] * 30, group_rows=[30, 270]), target=100))[0] == (0, 100)
    assert spans(make(file_scan([10] * 30, group_rows=[95, 205]), target=100))[0] == (0, 100)


def test_a_query_longer_than_the_target_is_a_shard_of_its_own():
    assert spans(make(file_scan([5, 500, 5]), target=10)) == [(0, 5), (5, 505), (505, 510)]


def test_a_two_phase_plan_cuts_inside_a_query():
    plan = make(file_scan([5, 500, 5]), target=100, force_two_phase=True)
    assert spans(plan)[:2] == [(0, 100), (100, 200)]
    assert plan.is_two_phase


def test_nested_rows_are_cut_by_the_candidates_in_them_and_not_by_rows():
    nested = replace(PAIRS, layout="nested", text="documents", doc_id="doc_ids")
    schema = pa.schema([("query_id", pa.string()), ("doc_ids", pa.list_(pa.int32()))])
    scan = replace(file_scan([1] * 6, candidates=[50, 50, 0, 50, 50, 0]), schema=schema)
    plan = make(scan, target=100, columns=nested)
    assert spans(plan) == [(0, 3), (3, 6)]
    assert plan.doc_id_type == "int32"


def test_an_input_without_rows_gives_one_empty_shard():
    plan = make(file_scan([]), file_scan([], "b"))
    assert spans(plan) == [(0, 0)]
    assert plan.num_candidates == 0


def test_ids_keep_integer_types_and_everything_else_becomes_string():
    plan = make(file_scan([3]))
    assert (plan.query_id_type, plan.doc_id_type) == ("string", "int64")


def test_shards_hold_more_candidates_in_larger_inputs_up_to_a_limit():
    sizes = [plans.default_shard_candidates(n) for n in (0, 10_000, 1_000_000, 10**9)]
    assert sizes == [512, 512, 3906, 32_768]


def test_buckets_hold_about_a_million_candidates():
    def num_buckets(total: int) -> int:
        scan = replace(file_scan([1]), num_candidates_before=np.array([0, total]))
        return make(scan, target=10**9, force_two_phase=True).num_buckets

    assert [num_buckets(n) for n in (1, 1_000_000, 1_000_001, 10**10)] == [1, 1, 2, 256]


def test_shard_ids_are_the_same_for_the_same_input():
    scans = [file_scan([10] * 20), file_scan([7] * 30, "b")]
    assert make(*scans).shards == make(*scans).shards


def test_shard_ids_tell_other_files_versions_sizes_and_rows_apart():
    scan = file_scan([10] * 20)
    others = [
        file_scan([10] * 20, "b"),
        replace(scan, file=replace(scan.file, version="v2")),
        replace(scan, file=replace(scan.file, num_bytes=1)),
        replace(file_scan([5] * 40), file=scan.file),
    ]
    ids = [{shard.shard_id for shard in make(other, target=95).shards} for other in (scan, *others)]
    assert sum(map(len, ids)) == len(set().union(*ids))


@given(st.dictionaries(st.text(), st.text(), min_size=1), st.text())
def test_a_fingerprint_changes_with_any_part(parts, other):
    name = next(iter(parts))
    assert plans.fingerprint(parts) == plans.fingerprint(dict(reversed(parts.items())))
    assert (plans.fingerprint(parts | {name: other}) == plans.fingerprint(parts)) == (other == parts[name])


def test_a_plan_comes_back_as_it_was_stored(tmp_path):
    columns = replace(PAIRS, pass_through=("lang", "shop"))
    inputs = Inputs(columns, (file_scan([10] * 20), file_scan([3])), (("file:///bad", "why"),))
    made = plans.make(inputs, {"format": "1", "model": "ü"}, shard_candidates=50, force_two_phase=True)
    assert plans.save(made, locate(str(tmp_path))) == made
    assert plans.load(locate(str(tmp_path))) == made


def test_a_plan_comes_back_from_an_object_store(s3_bucket):
    made = make(file_scan([10] * 20))
    assert plans.save(made, locate(f"s3://{s3_bucket}/out")) == made


def test_where_nothing_is_stored_there_is_no_plan(tmp_path):
    assert plans.load(locate(str(tmp_path))) is None


def test_the_first_stored_plan_stays(tmp_path):
    output = locate(str(tmp_path))
    first, second = make(file_scan([10])), make(file_scan([20]), parts={"format": "1", "more": "2"})
    plans.save(first, output)
    assert plans.save(second, output) == first


def test_saving_again_after_a_crash_between_shards_and_plan_succeeds(tmp_path):
    output, made = locate(str(tmp_path)), make(file_scan([10]))
    plans.save(made, output)
    (tmp_path / "_run/plan.json").unlink()
    assert plans.save(made, output) == made


def damage(tmp_path: Path, how: str) -> None:
    stored = tmp_path / "_run/plan.json"
    body = json.loads(stored.read_text())
    shards = tmp_path / body["shards_file"]
    if how == "flipped shards":
        shards.write_bytes(shards.read_bytes()[:-1] + b"X")
    elif how == "missing shards":
        shards.unlink()
    elif how == "truncated":
        stored.write_bytes(stored.read_bytes()[:100])
    elif how == "empty":
        stored.write_bytes(b"")
    elif how == "not ours":
        stored.write_text("[1, 2]")
    elif how == "other format":
        stored.write_text(json.dumps(body | {"format": 99}))
    elif how == "unknown field":
        stored.write_text(json.dumps(body | {"more": 1}))
    elif how == "missing field":
        del body["inputs"]
        stored.write_text(json.dumps(body))
    elif how == "other parts":
        stored.write_text(json.dumps(body | {"parts": {"format": "1", "model": "other"}}))
    else:
        assert how == "path outside the run"
        stored.write_text(json.dumps(body | {"shards_file": "../elsewhere.parquet"}))


@pytest.mark.parametrize(
    "how",
    [
        *("flipped shards", "missing shards", "truncated", "empty", "not ours", "other format", "unknown field"),
        *("missing field", "other parts", "path outside the run"),
    ],
)
def test_a_plan_that_cannot_be_trusted_is_refused_with_a_way_out(tmp_path, how):
    output = locate(str(tmp_path))
    plans.save(make(file_scan([10] * 5)), output)
    damage(tmp_path, how)
    with pytest.raises(RunConflictError, match=r"plan\.json is not a plan of this version .*--new-run"):
        plans.load(output)


def test_an_unchanged_run_is_accepted():
    plans.check_unchanged({"a": "1"}, {"a": "1"}, locate("/out"))


def test_a_changed_run_is_refused_naming_what_changed():
    stored = {"option top_k": "10", "model m": "aa", "input a": "x"}
    wanted = {"option top_k": "20", "model m": "aa", "input b": "y"}
    with pytest.raises(RunConflictError) as caught:
        plans.check_unchanged(stored, wanted, locate("/out"))
    message = str(caught.value)
    for line in ("input a: was x, is absent", "input b: was absent, is y", "option top_k: was 10, is 20", "--new-run"):
        assert line in message
    assert "model m" not in message


def test_a_long_list_of_changes_is_cut():
    with pytest.raises(RunConflictError, match="… and 90 more"):
        plans.check_unchanged({}, {f"input {i}": "x" for i in range(100)}, locate("/out"))


def test_parts_name_files_models_and_options():
    file = FileInfo(locate("/in/a.parquet"), 12, "v7")
    parts = plans.describe_parts([file], {"model.safetensors": "ab"}, {"top_k": 10, "columns": {"b": 1, "a": 2}})
    assert parts == {
        "format": "1",
        "input file:///in/a.parquet": "12 bytes, version v7",
        "model model.safetensors": "ab",
        "option top_k": "10",
        "option columns": '{"a": 2, "b": 1}',
    }


def test_a_hundred_thousand_shards_are_planned_stored_and_loaded_in_seconds(tmp_path):
    scans = [file_scan([100] * 10_000, f"file-{i:02d}", group_rows=[50_000] * 20) for i in range(20)]
    started = time.perf_counter()
    made = make(*scans, target=200)
    assert len(made.shards) == 100_000
    assert plans.save(made, locate(str(tmp_path))) == made
    assert time.perf_counter() - started < 30


def inputs(*scans: FileScan) -> Inputs:
    return Inputs(PAIRS, scans, ())


def test_candidates_are_clustered_when_each_query_is_one_run_of_rows_of_one_file():
    assert inputs(file_scan([2, 3], hashes=[1, 2]), file_scan([4], "b", hashes=[3])).is_clustered
    assert inputs(file_scan([])).is_clustered
    assert not inputs(file_scan([2, 3], hashes=[1, 2]), file_scan([4], "b", hashes=[2])).is_clustered
    assert not inputs(file_scan([2, 3, 1], hashes=[1, 2, 1])).is_clustered


def test_rows_with_a_null_query_id_belong_to_no_query():
    null = int(NULL_HASH)
    assert inputs(file_scan([2, 1, 3, 1], hashes=[1, null, 2, null])).is_clustered
    assert not inputs(file_scan([2, 1, 3], hashes=[1, null, 1])).is_clustered


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_spread_queries_are_planned_in_two_phases(runs):
    spread = make(file_scan(runs, hashes=[i + 1 for i in range(len(runs) - 1)] + [1]), target=3)
    assert spread.is_two_phase == (len(runs) > 1)
