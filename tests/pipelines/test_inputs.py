"""Input files are looked at before any work: damage and misfits are refused by name, queries are found."""

import gzip
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.errors import InputError
from pipelines import inputs
from pipelines.inputs import NULL_HASH, hash_ids, list_candidates, read_batches, read_footer, scan
from pipelines.storage import info, locate, open_input
from tests.pipelines.support import Doc, Query, as_nested_lists, as_nested_structs, as_pairs, job, write

TWO_QUERIES = [
    Query("q1", "first", (Doc("a", "text a"), Doc("b", "text b"), Doc("c", "text c"))),
    Query("q2", "second", (Doc("a", "text a"), Doc("d", "text d"))),
]


def _scan(candidates, **settings):
    config = job(candidates, **settings)
    return scan(config, list_candidates(config))


def _sound() -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(as_pairs(TWO_QUERIES), buffer, write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def _with_footer_length(data: bytes, num_bytes: int) -> bytes:
    return data[:-8] + struct.pack("<I", num_bytes) + data[-4:]


NOT_PARQUET = {
    "empty": lambda data: b"",
    "three bytes": lambda data: data[:3],
    "only the magic": lambda data: b"PAR1",
    "magic twice": lambda data: b"PAR1PAR1",
    "tail lost": lambda data: data[:-5],
    "half": lambda data: data[: len(data) // 2],
    "head lost": lambda data: data[len(data) // 2 :],
    "web page": lambda data: b"<html><body>503 Service Unavailable</body></html>" * 9,
    "gzip": gzip.compress,
    "csv": lambda data: b"query_id,doc_id\nq1,d1\n" * 9,
    "garbage after it": lambda data: data + b"garbage!",
    "encrypted footer": lambda data: data[:-4] + b"PARE",
    "footer of 2 GB": lambda data: _with_footer_length(data, 2**31 - 1),
    "footer of 4 GB": lambda data: _with_footer_length(data, 2**32 - 1),
    "footer of zeros": lambda data: data[:-200] + bytes(192) + data[-8:],
}


@pytest.mark.parametrize("spoil", NOT_PARQUET.values(), ids=NOT_PARQUET.keys())
def test_a_file_that_is_not_sound_parquet_is_refused_by_name_or_skipped(tmp_path, spoil):
    write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES))
    bad = tmp_path / "b.parquet"
    bad.write_bytes(spoil(_sound()))
    with pytest.raises(InputError, match=r"b\.parquet is (not a sound|empty).*restore the file") as refused:
        _scan(str(tmp_path))
    assert "\n" not in str(refused.value)
    found = _scan(str(tmp_path), skip_bad_files=True)
    assert [s.file.location.name for s in found.scans] == ["a.parquet"]
    reason, _, remedy = str(refused.value).partition(" (skip_bad_files: true")
    assert found.skipped == ((f"file://{bad}", reason),) and "goes on without bad candidates files" in remedy


def test_an_encrypted_file_is_called_encrypted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(_sound()[:-4] + b"PARE")
    with pytest.raises(InputError, match="encrypted"):
        _scan(str(tmp_path))


def test_when_every_file_is_bad_nothing_is_left_to_skip_to(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR")
    with pytest.raises(InputError, match=r"none of the candidates files can be read.*a\.parquet"):
        _scan(str(tmp_path), skip_bad_files=True)


def test_a_file_that_may_not_be_read_is_refused_as_that(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES))

    def forbid(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs, "open_input", forbid)
    with pytest.raises(InputError, match=r"a\.parquet.*Permission denied.*check its rights"):
        _scan(path)


def test_a_disk_that_fails_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES))

    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(inputs, "open_input", fail)
    with pytest.raises(OSError, match="Input/output error"):
        _scan(path, skip_bad_files=True)


def test_damage_in_the_ids_is_found_while_planning(tmp_path):
    write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES))
    path = tmp_path / "b.parquet"
    write(path, as_pairs(TWO_QUERIES), compression="none")
    start = path.read_bytes().index(b"q1")
    path.write_bytes(path.read_bytes().replace(b"q1", b"q3", 1))
    assert path.read_bytes()[start : start + 2] == b"q3"
    with pytest.raises(InputError, match=r"b\.parquet: column 'query_id' cannot be read .*restore the file"):
        _scan(str(tmp_path))
    [(skipped, why)] = _scan(str(tmp_path), skip_bad_files=True).skipped
    assert skipped == f"file://{path}"
    assert "query_id" in why


def test_a_head_of_zeros_is_found_while_planning_though_the_footer_is_sound(tmp_path):
    path = tmp_path / "a.parquet"
    data = _sound()
    path.write_bytes(data[:4] + bytes(40) + data[44:])
    with pytest.raises(InputError, match=r"a\.parquet: column 'query_id' cannot be read"):
        _scan(str(path))


def test_zero_rows_and_zero_row_groups_are_files_without_queries(tmp_path):
    table = as_pairs(TWO_QUERIES)
    write(tmp_path / "a.parquet", table.slice(0, 0))
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema):
        pass
    write(tmp_path / "c.parquet", table)
    found = _scan(str(tmp_path))
    assert [s.num_rows for s in found.scans] == [0, 0, 5]
    assert [s.num_candidates for s in found.scans] == [0, 0, 5]
    assert found.is_clustered


def test_an_empty_row_group_between_others_changes_nothing(tmp_path):
    table = as_pairs(TWO_QUERIES)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for piece in (table.slice(0, 2), table.slice(0, 0), table.slice(2)):
            writer.write_table(piece)
    [found] = _scan(str(tmp_path)).scans
    assert found.row_group_starts.tolist() == [0, 2, 2, 5]
    assert found.run_starts.tolist() == [0, 3]


def test_files_are_taken_once_each_however_often_they_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES))
    assert len(list_candidates(job([path, str(tmp_path), f"{tmp_path}/*.parquet"]))) == 1


# --- files that do not fit together


@pytest.mark.parametrize("build", [as_pairs, as_nested_lists, as_nested_structs])
def test_ids_of_another_type_in_one_file_are_refused(tmp_path, build):
    numbers = [Query(1, "first", (Doc(7, "text"),))]
    write(tmp_path / "a.parquet", build(TWO_QUERIES))
    write(tmp_path / "b.parquet", build(numbers, pa.int64()))
    with pytest.raises(InputError, match=r"column '\w+' is .*string.* in .*a\.parquet but .*int64.* in .*b\.parquet"):
        _scan(str(tmp_path))


def test_a_column_that_only_some_files_have_is_refused_whichever_comes_first(tmp_path):
    table = as_pairs(TWO_QUERIES)
    for place, first, second in (("x", table, table.drop_columns("rank")), ("y", table.drop_columns("rank"), table)):
        write(tmp_path / place / "a.parquet", first)
        write(tmp_path / place / "b.parquet", second)
        with pytest.raises(InputError, match=r"has no column 'rank', but .* has: make"):
            _scan(str(tmp_path / place))


def test_duplicate_columns_are_refused_in_whichever_file_they_are(tmp_path):
    table = as_pairs(TWO_QUERIES)
    write(tmp_path / "a.parquet", table)
    write(tmp_path / "b.parquet", table.append_column("text", table.column("text")))
    with pytest.raises(InputError, match=r"b\.parquet has two columns named 'text'"):
        _scan(str(tmp_path))


def test_an_unused_column_may_differ(tmp_path):
    table = as_pairs(TWO_QUERIES)
    write(tmp_path / "a.parquet", table.append_column("note", pa.array(["x"] * 5)))
    write(tmp_path / "b.parquet", table.append_column("note", pa.array(range(5))))
    assert len(_scan(str(tmp_path)).scans) == 2


def test_a_type_nested_a_thousand_deep_is_refused_without_a_crash(tmp_path):
    deep = pa.string()
    for _ in range(1000):
        deep = pa.list_(deep)
    table = as_pairs(TWO_QUERIES)
    write(tmp_path / "a.parquet", table.append_column("deep", pa.nulls(5, deep)))
    with pytest.raises(InputError, match=r"a\.parquet is not a sound Parquet file .*nested"):
        _scan(str(tmp_path))


def test_a_type_nested_ninety_deep_that_is_not_read_is_no_problem(tmp_path):
    deep = pa.string()
    for _ in range(90):
        deep = pa.struct([("x", deep)])
    write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES).append_column("deep", pa.nulls(5, deep)))
    assert len(_scan(str(tmp_path)).scans) == 1


def test_a_stored_schema_of_garbage_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, as_pairs(TWO_QUERIES))
    stored = pq.read_metadata(path).metadata[b"ARROW:schema"]
    path.write_bytes(path.read_bytes().replace(stored, b"x" * len(stored)))
    with pytest.raises(InputError, match=r"a\.parquet is not a sound Parquet file"):
        _scan(str(tmp_path))


def test_too_many_row_groups_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_ROW_GROUPS", 4)
    write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES), row_group_size=1)
    with pytest.raises(InputError, match=r"a\.parquet has 5 row groups; rewrite it with larger ones"):
        _scan(str(tmp_path))


# --- queries and candidates


def test_runs_of_equal_query_ids_are_found_across_row_groups(tmp_path):
    write(tmp_path / "a.parquet", as_pairs(TWO_QUERIES), row_group_size=2)
    [found] = _scan(str(tmp_path)).scans
    assert found.run_starts.tolist() == [0, 3]
    assert found.num_candidates_before.tolist() == [0, 3, 5]
    assert found.run_hashes.tolist() == hash_ids(pa.array(["q1", "q2"])).tolist()


@pytest.mark.parametrize("build", [as_nested_lists, as_nested_structs])
def test_candidates_of_nested_rows_are_estimated_from_the_footer(tmp_path, build):
    write(tmp_path / "a.parquet", build(TWO_QUERIES * 10))
    [found] = _scan(str(tmp_path)).scans
    assert found.num_candidates == 50
    assert found.num_candidates_before.tolist() == [int(2.5 * row) for row in range(21)]


def test_names_of_columns_may_hold_dots(tmp_path):
    table = as_nested_lists(TWO_QUERIES)
    names = {"query_id": "q.id", "doc_ids": "d.ids", "documents": "d.texts"}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    write(tmp_path / "a.parquet", table)
    assert _scan(str(tmp_path), columns=names).scans[0].num_candidates == 5


@pytest.mark.parametrize(
    ("ids", "is_clustered"),
    [
        ([["a", "a", "b"], ["c"]], True),
        ([["a", "b", "a"]], False),
        ([["a", "a"], ["a"]], False),
        ([["a", None, None, "b", None]], True),
    ],
)
def test_queries_are_clustered_if_each_lies_in_one_run_of_one_file(tmp_path, ids, is_clustered):
    for number, of_file in enumerate(ids):
        rows = [Query(query_id, "text", (Doc("d", "text"),)) for query_id in of_file]
        write(tmp_path / f"{number}.parquet", as_pairs(rows))
    assert _scan(str(tmp_path)).is_clustered is is_clustered


@pytest.mark.parametrize("build", [as_pairs, as_nested_lists, as_nested_structs])
@pytest.mark.parametrize(
    ("kind", "ids"),
    [(pa.int64(), [2**53, 2**53 + 1, -(2**63), 2**63 - 1]), (pa.uint64(), [2**64 - 1, 2**64 - 2, 2**63, 0])],
    ids=str,
)
def test_integer_ids_beyond_what_a_float_holds_stay_apart(tmp_path, build, kind, ids):
    queries = [Query(id_, "text", (Doc(id_, "text"),)) for id_ in ids]
    write(tmp_path / "a.parquet", build(queries, kind))
    found = _scan(str(tmp_path)).scans[0].run_hashes.tolist()
    assert found == hash_ids(pa.array([str(id_) for id_ in ids])).tolist()
    assert len(set(found)) == 4


WEIRD_IDS = ["", " ", "a/b/../c", "line\nbreak", "=1+1", "q" * 10_000, "ü\u202e\x00", "0", "00", "None", "\ufeff"]


def test_odd_ids_are_only_data(tmp_path):
    queries = [Query(id_, "text", (Doc("d", "text"),)) for id_ in WEIRD_IDS]
    write(tmp_path / "a.parquet", as_pairs(queries))
    found = _scan(str(tmp_path))
    assert found.is_clustered
    assert len(found.scans[0].run_starts) == len(WEIRD_IDS)


ID_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint8(), pa.string()),
]


@pytest.mark.parametrize("kind", ID_TYPES, ids=str)
def test_an_id_has_one_hash_in_every_kind_of_column(kind):
    ids = pa.array(["7", None, "-7", "7"], pa.string())
    as_kind = ids.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else ids.cast(kind)
    assert hash_ids(as_kind).tolist() == hash_ids(ids).tolist()
    assert hash_ids(ids.cast(pa.int64())).tolist() == hash_ids(ids).tolist()


def test_hashes_of_ids_never_change():
    assert hash_ids(pa.array(["", "a", "doc-1", "ü", None])).tolist() == [
        1760245841805064774,
        13950350942979735504,
        15875389535068581627,
        6689755093696353227,
        int(NULL_HASH),
    ]


def test_ids_that_are_not_text_are_hashed_by_their_bytes():
    hashes = hash_ids(pa.array([b"\xff", b"\xfe", b"\xff\x00", b"", None], pa.binary()))
    assert len(set(hashes.tolist())) == 5
    assert hashes[4] == NULL_HASH


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=30))
def test_equal_ids_and_only_they_have_equal_hashes(ids):
    hashes = hash_ids(pa.array(ids, pa.string())).tolist()
    assert [hashes.index(hash_) for hash_ in hashes] == [ids.index(id_) for id_ in ids]
    assert [hash_ == NULL_HASH for hash_ in hashes] == [id_ is None for id_ in ids]


# --- reading in batches


def _batches(path, columns, max_rows=4096):
    file = info(locate(str(path)))
    assert file is not None
    with open_input(file) as source:
        yield from read_batches(source, read_footer(file), columns, columns, max_rows=max_rows)


@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_batches_hold_every_row_once_in_order(tmp_path, use_dictionary, row_group_size):
    table = pa.table({"text": [f"text {i % 10}" for i in range(100)], "other": range(100)})
    write(tmp_path / "a.parquet", table, use_dictionary=use_dictionary, row_group_size=row_group_size)
    batches = list(_batches(tmp_path / "a.parquet", ["text"], max_rows=9))
    assert max(batch.num_rows for batch in batches) <= 9
    read = [text for batch in batches for text in batch.column("text").to_pylist()]
    assert read == table.column("text").to_pylist()


def test_batches_of_long_texts_are_short_however_the_file_packs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_BATCH_BYTES", 100_000)
    repeated = pa.array(["x" * 10_000, "y" * 10_000] * 50)
    lists = pa.ListArray.from_arrays(pa.array(range(0, 101, 4), pa.int32()), repeated)
    structs = pa.ListArray.from_arrays(
        pa.array(range(0, 101, 4), pa.int32()), pa.StructArray.from_arrays([repeated], ["t"])
    )
    distinct = pa.array([f"{i}{'x' * 10_000}" for i in range(100)])
    for name, array, use_dictionary in (
        ("coded", repeated, True),
        ("plain", repeated, False),
        ("distinct", distinct, True),
        ("lists", lists, True),
        ("structs", structs, True),
    ):
        write(tmp_path / name, pa.table({"text": array}), use_dictionary=use_dictionary, compression="zstd")
        batches = list(_batches(tmp_path / name, ["text"]))
        assert sum(batch.num_rows for batch in batches) == len(array)
        for batch in batches:
            in_memory = batch.nbytes if name in ("plain", "distinct") else inputs._decoded_bytes(batch.column("text"))
            assert in_memory <= 150_000 or batch.num_rows == 1


def test_short_texts_are_read_plainly_and_long_repeated_ones_as_a_dictionary(tmp_path):
    write(tmp_path / "short", pa.table({"text": ["a", "b"] * 50}))
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 1_000_000]))
    write(tmp_path / "long", pa.table({"text": bomb}), compression="zstd", store_schema=False)
    assert (tmp_path / "long").stat().st_size < 1000
    [short] = _batches(tmp_path / "short", ["text"])
    assert short.column("text").type == pa.string()
    for batch in _batches(tmp_path / "long", ["text"]):
        assert pa.types.is_dictionary(batch.column("text").type)
        assert batch.num_rows <= 67


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_no_flipped_bit_in_a_file_with_checksums_goes_unnoticed(tmp_path, compression):
    table = pa.table({"text": [f"text number {i}" for i in range(200)] + [None]})
    path = tmp_path / "a.parquet"
    write(path, table, compression=compression, data_page_size=500)
    sound = path.read_bytes()
    end = pq.read_metadata(path).row_group(0).column(0).total_compressed_size + 4
    rng = np.random.default_rng(0)
    num_detected = 0
    for at in rng.integers(4, end, 300).tolist():
        spoilt = bytearray(sound)
        spoilt[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        try:
            read = [text for batch in _batches(path, ["text"]) for text in batch.column("text").to_pylist()]
        except Exception as error:
            assert inputs.is_damage(error), repr(error)
            num_detected += 1
        else:  # bits of a page's own statistics are not data
            assert read == table.column("text").to_pylist()
    assert num_detected > 200


def test_errors_are_cut_to_one_short_line():
    assert inputs.first_line(ValueError("one\ntwo")) == "one"
    assert inputs.first_line(ValueError()) == "ValueError"
    assert len(inputs.first_line(ValueError("x" * 999))) == 200
    assert re.fullmatch("x+", inputs.first_line(ValueError("x" * 999)))
