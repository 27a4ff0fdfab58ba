"""Collecting queries from scored parts."""

import pyarrow as pa
import pytest

from pipelines.commit import commit_shard
from pipelines.merge import read_bucket, read_queries
from pipelines.records import StageSeconds
from pipelines.storage import locate
from tests.pipelines.thin import commit_settings, scored, thin_rows, with_tokens

FINGERPRINT = "f" * 64


def commit(settings, number: int, rows: list[dict]) -> None:
    commit_shard(f"{number:06d}-aaaaaaaa", with_tokens(thin_rows(*rows)), 0, StageSeconds(), settings)


def test_queries_come_in_input_order_from_all_parts_with_all_columns(tmp_path):
    settings = commit_settings(tmp_path, num_buckets=4)
    for number in (1, 0):
        commit(settings, number, [scored(f"q{i % 3}", f"d{i}", 0.5, file=1 - number, row=9 - i) for i in range(9)])
    rows = read_queries(settings.output, FINGERPRINT, ["q0", "q2", "q9"])
    places = list(zip(rows.column("file").to_pylist(), rows.column("row").to_pylist(), strict=True))
    assert places == [(file, 9 - i) for file in (0, 1) for i in (8, 6, 5, 3, 2, 0)]
    assert set(rows.column("query_id").to_pylist()) == {"q0", "q2"}
    assert rows.schema == thin_rows().schema


def test_items_of_one_nested_row_keep_their_order(tmp_path):
    settings = commit_settings(tmp_path, num_buckets=1)
    commit(settings, 0, [scored("q", f"d{i}", 0.5, row=3, item=item) for i, item in enumerate((2, 0, 1))])
    assert read_bucket(settings.output, FINGERPRINT, 0).column("item").to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("num_buckets", [1, 8])
def test_buckets_are_read_from_an_object_store(s3_bucket, num_buckets):
    settings = commit_settings(locate(f"s3://{s3_bucket}/out"), num_buckets=num_buckets)
    for number in range(2):
        commit(settings, number, [scored(f"q{i}", "d", 0.5, row=number * 20 + i) for i in range(20)])
    tables = [read_bucket(settings.output, FINGERPRINT, bucket) for bucket in range(num_buckets)]
    rows = pa.concat_tables(tables)
    assert sorted(rows.column("row").to_pylist()) == list(range(40))
