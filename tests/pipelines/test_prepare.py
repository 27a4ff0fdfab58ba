"""A shard is read whole, once and within bounds, and what is wrong in it is accounted for row by row."""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import InputError, StorageError
from crossenc.records import TokenizedPairs
from crossenc.testing import FakeTokenizer
from pipelines import storage
from pipelines.prepare import prepare
from pipelines.schemas import TOKEN_FIELDS, thin_schema
from tests.pipelines.support import (
    Doc,
    Query,
    as_ids,
    as_nested_lists,
    as_nested_structs,
    as_pairs,
    job,
    make_plan,
    prepared,
    read_settings,
    write,
)
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.s3 import set_s3_env

LAYOUTS = {"pairs": as_pairs, "lists": as_nested_lists, "structs": as_nested_structs}


def _queries(lengths: list[int]) -> list[Query]:
    return [
        Query(f"q{q}", f"query {q}", tuple(Doc(f"d{d}", f"text {d}", rank=d, score=-d / 2) for d in range(length)))
        for q, length in enumerate(lengths)
    ]


def _files(folder: Path, layout: str, queries: list[Query], **options: object) -> dict[str, str]:
    """Writes the candidates; returns the settings that name them."""
    if layout != "ids":
        return {"candidates": write(folder / "c.parquet", LAYOUTS[layout](queries), **options)}
    tables = dict(zip(("candidates", "queries", "corpus"), as_ids(queries), strict=True))
    return {name: write(folder / f"{name}.parquet", table, **options) for name, table in tables.items()}


# --- every candidate once


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    layout=st.sampled_from(["pairs", "lists", "structs", "ids"]),
    row_group_size=st.integers(1, 30),
    shard_candidates=st.integers(1, 40),
)
def test_every_candidate_is_in_one_shard_once_however_files_and_shards_are_cut(
    tmp_path_factory, lengths, layout, row_group_size, shard_candidates
):
    folder = tmp_path_factory.mktemp("prepare")
    queries = _queries(lengths)
    config = job(**_files(folder, layout, queries, row_group_size=row_group_size))
    rows = prepared(config, folder, shard_candidates)
    nested = layout in ("lists", "structs")
    wanted = [(q, d) for q, length in enumerate(lengths) for d in range(length)]
    assert rows.column("query_id").to_pylist() == [f"q{q}" for q, _ in wanted]
    assert rows.column("doc_id").to_pylist() == [f"d{d}" for _, d in wanted]
    assert rows.column("stage_rank").to_pylist() == [d for _, d in wanted]
    assert rows.column("stage_score").to_pylist() == [-d / 2 for _, d in wanted]
    assert rows.column("row").to_pylist() == ([q for q, _ in wanted] if nested else list(range(len(wanted))))
    assert rows.column("item").to_pylist() == [d if nested else None for _, d in wanted]
    assert rows.column("reason").null_count == rows.num_rows
    pairs = FakeTokenizer().encode([f"query {q}" for q, _ in wanted], [f"text {d}" for _, d in wanted])
    assert pc.list_flatten(rows.column("input_ids")).to_pylist() == pairs.input_ids.tolist()
    assert pc.list_value_length(rows.column("input_ids")).to_pylist() == pairs.lengths.tolist()


@pytest.mark.parametrize("layout", ["pairs", "lists", "structs", "ids"])
def test_a_shard_may_begin_and_end_inside_row_groups(tmp_path, layout):
    config = job(**_files(tmp_path, layout, _queries([3] * 40), row_group_size=7))
    plan = make_plan(config)
    [whole] = plan.shards
    unit = whole.row_end // 40
    shard = replace(whole, row_start=5 * unit, row_end=23 * unit, num_candidates=54)
    rows = prepare(shard, plan.inputs[0], read_settings(config, plan, tmp_path), FakeTokenizer()).rows
    assert rows.column("query_id").to_pylist() == [f"q{q}" for q in range(5, 23) for _ in range(3)]


def test_an_empty_shard_has_the_schema_and_no_rows(tmp_path):
    config = job(write(tmp_path / "c.parquet", as_pairs([])))
    rows = prepared(config, tmp_path)
    assert rows.num_rows == 0
    assert rows.schema == pa.schema([*thin_schema(()), *TOKEN_FIELDS])


def test_rows_have_one_schema_whatever_kind_of_text_the_file_holds(tmp_path):
    queries = _queries([2, 3])
    expected = prepared(job(write(tmp_path / "c.parquet", as_pairs(queries))), tmp_path)
    for kind in (pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())):
        table = as_pairs(queries)
        for name in ("query_id", "query", "doc_id", "text", "title"):
            at = table.column_names.index(name)
            column = table.column(name).combine_chunks()
            column = (column.dictionary_encode() if pa.types.is_dictionary(kind) else column).cast(kind)
            table = table.set_column(at, name, column)
        assert prepared(job(write(tmp_path / "k.parquet", table)), tmp_path).equals(expected)


# --- what the rows hold


def test_refused_candidates_have_a_reason_and_no_tokens(tmp_path):
    docs = (Doc("a", "good text"), Doc("b", None), Doc("c", "x" * 100), Doc("d", "also good"))
    config = job(write(tmp_path / "c.parquet", as_pairs([Query("q", "query", docs)])), max_text_bytes=50)
    rows = prepared(config, tmp_path)
    assert rows.column("reason").to_pylist() == [None, "document_missing", "document_too_large", None]
    assert rows.column("detail").to_pylist() == [None, None, "100 bytes", None]
    assert [len(ids) for ids in rows.column("input_ids").to_pylist()] == [6, 0, 0, 6]
    assert rows.column("doc_id").to_pylist() == ["a", "b", "c", "d"]


class _TypedTokenizer:
    """Token types as BERT has them, and the first pair of each call truncated."""

    def encode(self, queries: list[str], documents: list[str]) -> TokenizedPairs:
        pairs = FakeTokenizer().encode(queries, documents)
        types = (np.arange(pairs.num_tokens) % 2).astype(np.uint8)
        return TokenizedPairs(pairs.input_ids, pairs.offsets, types, np.arange(len(pairs)) == 0)


def test_token_types_and_truncation_stand_beside_their_tokens(tmp_path):
    docs = (Doc("a", None), Doc("b", "x"), Doc("c", "y"))
    config = job(write(tmp_path / "c.parquet", as_pairs([Query("q", "z", docs)])))
    rows = prepared(config, tmp_path, tokenizer=_TypedTokenizer())
    assert rows.column("token_type_ids").to_pylist() == [[], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert rows.column("truncated").to_pylist() == [False, True, False]
    assert prepared(config, tmp_path).column("token_type_ids").null_count == 3


def test_categories_of_more_kinds_than_one_byte_counts_are_passed_through_as_their_values(tmp_path):
    kinds = [f"kind {i}" for i in range(200)]
    table = as_pairs(_queries([100, 100]))
    halves = [table[i : i + 100].append_column("kind", _categories(kinds[i : i + 100])) for i in (0, 100)]
    with pq.ParquetWriter(tmp_path / "c.parquet", halves[0].schema) as file:
        for half in halves:
            file.write_table(half)
    rows = prepared(job(str(tmp_path / "c.parquet"), pass_through=("kind",)), tmp_path)
    assert rows.column("pass:kind").to_pylist() == kinds and rows.schema.field("pass:kind").type == pa.string()


def _categories(values: list[str]) -> pa.Array:
    """As pandas writes its categories."""
    encoded = pa.array(values).dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int8()), encoded.dictionary)


def test_columns_are_passed_through_with_their_types(tmp_path):
    queries = _queries([2, 1])
    own = {
        "lang": pa.array(["en", "en", "ru"]),
        "big": pa.array([2**64 - 1, None, 0], pa.uint64()),
        "tags": pa.array([["a"], [], None]),
        "text_view": pa.array(["x", "y", None], pa.string_view()),
    }
    table = as_pairs(queries)
    for name, array in own.items():
        table = table.append_column(name, array)
    config = job(write(tmp_path / "c.parquet", table, row_group_size=2), pass_through=(*own, "text"))
    rows = prepared(config, tmp_path, shard_candidates=2)
    for name, array in own.items():
        assert rows.column(f"pass:{name}").to_pylist() == array.to_pylist()
        assert rows.schema.field(f"pass:{name}").type == array.type
    assert rows.column("pass:text").to_pylist() == table.column("text").to_pylist()


def test_lists_to_pass_through_give_each_candidate_its_item(tmp_path):
    table = as_nested_lists(_queries([2, 1]))
    table = table.append_column("langs", pa.array([["en", "ru"], ["de"]])).append_column("group", pa.array([1, 2]))
    rows = prepared(job(write(tmp_path / "c.parquet", table), pass_through=("langs", "group")), tmp_path)
    assert rows.column("pass:langs").to_pylist() == ["en", "ru", "de"]
    assert rows.column("pass:group").to_pylist() == [1, 1, 2]


def test_integer_ids_in_the_candidates_find_text_ids_in_the_tables_and_the_other_way_round(tmp_path):
    queries = [Query(2**53 + 1, "query", (Doc(7, "text"), Doc(8, "other")))]
    for candidates_type, tables_type in ((pa.uint64(), pa.string()), (pa.string(), pa.int64())):
        tables = [
            table.set_column(0, table.column_names[0], table.column(0).cast(kind))
            for table, kind in zip(
                as_ids(queries, pa.int64()), [candidates_type, tables_type, tables_type], strict=True
            )
        ]
        tables[0] = tables[0].set_column(1, "doc_id", tables[0].column("doc_id").cast(candidates_type))
        paths = [write(tmp_path / f"{i}.parquet", table) for i, table in enumerate(tables)]
        config = job(paths[0], queries=paths[1], corpus=paths[2])
        rows = prepared(config, tmp_path / str(candidates_type))
        assert rows.column("reason").to_pylist() == [None, None]
        assert rows.column("query_id").to_pylist() == ["9007199254740993"] * 2


def test_ids_without_a_text_of_their_own_are_refused(tmp_path):
    candidates = pa.table({"query_id": ["q", "q", "q", "no"], "doc_id": ["a", "no", "two", "a"]})
    queries = pa.table({"query_id": ["q"], "text": ["query"]})
    corpus = pa.table({"doc_id": ["a", "two", "two"], "text": ["text", "1", "2"]})
    config = job(
        write(tmp_path / "c.parquet", candidates),
        queries=write(tmp_path / "q.parquet", queries),
        corpus=write(tmp_path / "d.parquet", corpus),
    )
    reasons = prepared(config, tmp_path).column("reason").to_pylist()
    assert reasons == [None, "document_unknown", "document_ambiguous", "query_unknown"]


# --- damage and change


def _spoil(path: str, old: bytes) -> None:
    data = Path(path).read_bytes()
    assert old in data
    Path(path).write_bytes(data.replace(old, bytes(b ^ 1 for b in old), 1))


@pytest.mark.parametrize("layout", ["pairs", "lists", "structs"])
def test_all_rows_of_a_shard_with_a_damaged_page_are_refused_as_unreadable(tmp_path, layout):
    settings = _files(tmp_path, layout, _queries([5] * 20), row_group_size=10, compression="none")
    _spoil(settings["candidates"], b"text 3")
    config = job(**settings)
    plan = make_plan(config, shard_candidates=10)
    read = read_settings(config, plan, tmp_path)
    tables = [prepare(shard, plan.inputs[0], read, FakeTokenizer()).rows for shard in plan.shards]
    damaged = [table for table in tables if "unreadable" in table.column("reason").to_pylist()]
    assert 0 < len(damaged) < len(tables)
    for table in damaged:
        assert set(table.column("reason").to_pylist()) == {"unreadable"}
        assert all(table.column("detail").to_pylist())
        assert table.column("query_id").null_count == table.num_rows
        assert pc.sum(pc.list_value_length(table.column("input_ids"))).as_py() in (0, None)
    rows = pa.concat_tables(tables).column("row").to_pylist()
    assert sorted(set(rows)) == list(range(plan.inputs[0].num_rows))


def test_a_file_without_its_head_gives_unreadable_rows_where_its_ids_are_sound(tmp_path):
    table = as_pairs(_queries([5] * 20)).select(["text", "query", "query_id", "doc_id"])
    path = write(tmp_path / "c.parquet", table, compression="none")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:4] + bytes(60) + data[64:])
    rows = prepared(job(path), tmp_path)
    assert rows.column("reason").to_pylist() == ["unreadable"] * 100


@pytest.fixture
def proxy(moto, monkeypatch):
    with FaultProxy(moto.endpoint_url) as proxy:
        set_s3_env(monkeypatch, {**moto.env, "AWS_ENDPOINT_URL": proxy.url})
        yield proxy


@pytest.fixture
def stored(moto, proxy, tmp_path):
    """A job whose candidates are in a bucket behind the proxy, and its plan."""
    bucket = moto.make_bucket(f"test-{uuid.uuid4().hex[:12]}")
    path = write(tmp_path / "c.parquet", as_pairs(_queries([5] * 20)), compression="none")
    moto.put(f"{bucket}/in/a b+%2Fü.parquet", Path(path).read_bytes())
    config = job(f"s3://{bucket}/in/")
    return config, make_plan(config)


def _prepare_stored(stored, tmp_path):
    config, plan = stored
    return prepare(plan.shards[0], plan.inputs[0], read_settings(config, plan, tmp_path), FakeTokenizer()).rows


@pytest.mark.parametrize("fault", ["corrupt", "truncate", "short", "reset_before", "duplicate"])
def test_a_fault_on_the_way_is_read_again_and_leaves_no_trace(stored, proxy, tmp_path, fault):
    expected = _prepare_stored(stored, tmp_path)
    assert expected.column("reason").null_count == 100
    # the page is damaged in the answer to the third GET; the two before are those of the footer
    proxy.clear()
    proxy.add(Rule(fault, method="GET", skip=2))
    assert _prepare_stored(stored, tmp_path).equals(expected)
    assert [seen.fault for seen in proxy.requests].count(fault) == 1


def test_a_store_that_always_damages_the_pages_ends_in_unreadable_rows(stored, proxy, tmp_path):
    proxy.add(Rule("corrupt", method="GET", path="in/", skip=2, times=None))
    reasons = _prepare_stored(stored, tmp_path).column("reason").to_pylist()
    assert reasons == ["unreadable"] * 100


def test_a_store_that_does_not_answer_is_no_damage(stored, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    proxy.add(Rule("truncate", method="GET", skip=1, times=None))
    with pytest.raises(StorageError, match=r"could not read s3://.*run the same command again"):
        _prepare_stored(stored, tmp_path)


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path):
    path = write(tmp_path / "c.parquet", as_pairs(_queries([5])))
    config = job(path)
    plan = make_plan(config)
    read = read_settings(config, plan, tmp_path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"c\.parquet has changed since the run was planned; restore it"):
        prepare(plan.shards[0], plan.inputs[0], read, FakeTokenizer())
    os.remove(path)
    with pytest.raises(InputError, match=r"c\.parquet is gone since the run was planned"):
        prepare(plan.shards[0], plan.inputs[0], read, FakeTokenizer())


def test_an_object_that_changes_while_it_is_read_is_refused(stored, moto, tmp_path):
    config, plan = stored

    class Overwriting(FakeTokenizer):
        def encode(self, queries: list[str], documents: list[str]) -> TokenizedPairs:
            moto.put(plan.inputs[0].uri.removeprefix("s3://"), b"other content")
            return super().encode(queries, documents)

    with pytest.raises(InputError, match="has changed since the run was planned"):
        prepare(plan.shards[0], plan.inputs[0], read_settings(config, plan, tmp_path), Overwriting())


# --- files made to harm

_REPORT_PEAK = """
import json, sys
from pathlib import Path
from tests.support.processes import peak_memory_bytes
from tests.pipelines.support import job, prepared
rows = prepared(job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
reasons = rows.column("reason").to_pylist()
peak = peak_memory_bytes()
print(json.dumps({"num_rows": len(reasons), "reasons": sorted(set(map(str, reasons))), "peak_bytes": peak}))
"""


def _in_subprocess(code: str, *args: str) -> str:
    command = [sys.executable, "-c", code, *args]
    # A single thread each, as arenas of malloc for many threads would blur the figure.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _bomb(num_rows: int, num_bytes: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array(["x" * num_bytes]))


def _nested_bomb(values: pa.Array, num_per_row: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, num_per_row), pa.int32()), values)


N = 2000


def _bombs(folder: Path, name: str) -> dict[str, str]:
    """A file of a few KB with texts of gigabytes, by the place of the text."""
    q, ids = pa.array(["q"] * N), pa.array([str(i) for i in range(N)])
    options = {"compression": "zstd", "store_schema": False}
    bomb = _bomb(N, 1_000_000)
    flat = {"query_id": q, "query": q, "doc_id": ids, "text": q}
    if name == "ids":
        tables = {
            "candidates": pa.table({"query_id": q, "doc_id": ids}),
            "queries": pa.table({"query_id": ["q"], "text": ["query"]}),
            "corpus": pa.table({"doc_id": ids, "text": bomb, "title": ids}),
        }
        return {role: write(folder / f"{role}.parquet", table, **options) for role, table in tables.items()}
    if name in ("text", "query"):
        table = pa.table(flat | {name: bomb})
    elif name == "title":
        table = pa.table(flat | {"title": bomb})
    else:
        owners = {"query_id": [str(i) for i in range(2)], "query": ["x"] * 2}
        doc_ids = _nested_bomb(ids, N // 2)
        if name == "lists":
            table = pa.table(owners | {"doc_ids": doc_ids, "documents": _nested_bomb(bomb, N // 2)})
        elif name == "structs":
            structs = pa.StructArray.from_arrays([ids, bomb], ["doc_id", "text"])
            table = pa.table(owners | {"documents": _nested_bomb(structs, N // 2)})
        else:
            owners["query"] = _bomb(2, 1_000_000)
            table = pa.table(owners | {"doc_ids": doc_ids, "documents": _nested_bomb(q, N // 2)})
    return {"candidates": write(folder / "c.parquet", table, **options)}


@pytest.mark.parametrize("place", ["text", "query", "title", "lists", "structs", "query of lists", "ids"])
def test_a_text_that_a_small_file_repeats_a_thousand_times_does_not_fill_the_memory(tmp_path, place):
    files = _bombs(tmp_path, place)
    assert sum(Path(path).stat().st_size for path in files.values()) < 100_000
    limit = {"max_text_bytes": 900_000}  # below the text, which is 2 GB in all rows together
    report = json.loads(_in_subprocess(_REPORT_PEAK, json.dumps(files | limit), str(tmp_path)))
    kind = "query" if place.startswith("query") else "document"
    assert report["num_rows"] == N
    assert report["reasons"] == [f"{kind}_too_large"]
    assert report["peak_bytes"] < 800e6


def test_repeated_texts_below_the_limit_do_not_fill_the_memory_either(tmp_path):
    report = json.loads(_in_subprocess(_REPORT_PEAK, json.dumps(_bombs(tmp_path, "text")), str(tmp_path)))
    assert (report["num_rows"], report["reasons"]) == (N, ["None"])
    assert report["peak_bytes"] < 800e6


def test_a_cell_of_60_mb_is_refused_without_becoming_a_text(tmp_path):
    table = as_pairs(_queries([3]))
    texts = pa.chunked_array([pa.array(["good", "x" * 60_000_000, "good"])])
    path = write(tmp_path / "c.parquet", table.set_column(3, "text", texts), compression="zstd")
    report = json.loads(_in_subprocess(_REPORT_PEAK, json.dumps({"candidates": path}), str(tmp_path)))
    assert report["reasons"] == ["None", "document_too_large"]
    assert report["peak_bytes"] < 800e6  # Arrow alone holds about five copies while it reads


_SCAN_BESIDE_RAY = """
import sys
import ray.data
from pipelines.inputs import list_candidates, scan
from crossenc.errors import InputError
from tests.pipelines.support import job
config = job(sys.argv[1])
try:
    scan(config, list_candidates(config))
except InputError as error:
    print(error)
"""


def test_a_pickle_in_a_column_is_refused_and_never_run(tmp_path):
    marker = tmp_path / "was run"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    import pickle

    field = pa.field("text", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    payload = pa.array([pickle.dumps(Payload())] * 2, pa.binary())
    table = as_pairs(_queries([2])).set_column(3, field, payload)
    for name, bad in (("c", table), ("d", as_pairs(_queries([2])).append_column(field.with_name("unused"), payload))):
        path = write(tmp_path / f"{name}.parquet", bad)
        assert "ray.data.arrow_pickled_object" in _in_subprocess(_SCAN_BESIDE_RAY, path)
        assert not marker.exists()
    pickle.loads(payload[0].as_py())
    assert marker.exists()  # the payload works
