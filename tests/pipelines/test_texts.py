"""Texts are copied once per node and found by id; what has no text, or two, is told apart."""

import gzip
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import InputError
from pipelines import texts
from pipelines.storage import expand, locate
from pipelines.texts import (
    MAX_ID_BYTES,
    TextStore,
    TextTable,
    as_binary,
    default_cache,
    distinct_texts,
    find_table,
    id_bytes,
    open_store,
)
from tests.pipelines.support import write

LIMIT = 1000


def _table(folder: Path, kind: str = "document", **columns: object) -> TextTable:
    write(folder / "t.parquet", pa.table(columns))
    return find_table(kind, str(folder / "t.parquet"), "doc_id" if kind == "document" else "query_id", {}, {})


def _store(folder: Path, **columns: object) -> TextStore:
    return open_store(_table(folder, **columns), folder / "cache", LIMIT)


# --- looking up


def test_each_id_has_its_text_or_a_reason_for_none(tmp_path):
    store = _store(
        tmp_path,
        doc_id=["a", "b", "twice", "twice", "same", "same", "null", "empty", "long", None],
        text=["text a", "ü", "one", "two", "equal", "equal", None, "", "x" * 1001, "of nobody"],
    )
    assert len(store) == 10
    assert store.lookup(["b", "a", "none", "twice", "same", "null", "empty", "long", "a"]) == [
        ("ü".encode(), None),
        (b"text a", None),
        (None, "unknown"),
        (None, "ambiguous"),
        (b"equal", None),
        (None, None),
        (b"", None),
        (1001, None),
        (b"text a", None),
    ]
    assert store.lookup([]) == []


def test_a_row_without_an_id_belongs_to_nobody(tmp_path):
    assert _store(tmp_path, doc_id=pa.array([None, "a"]), text=["x", "y"]).lookup([""]) == [(None, "unknown")]


def test_an_empty_id_is_an_id(tmp_path):
    assert _store(tmp_path, doc_id=["", "a"], text=["x", "y"]).lookup([""]) == [(b"x", None)]


def test_an_empty_table_knows_nothing(tmp_path):
    store = _store(tmp_path, doc_id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    assert store.lookup(["a"]) == [(None, "unknown")]


def test_ids_of_equal_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "hash_ids", lambda ids: np.full(len(ids), 7, np.uint64))
    store = _store(tmp_path, doc_id=["a", "b"], text=["text a", "text b"])
    assert store.lookup(["b", "c", "a"]) == [(b"text b", None), (None, "unknown"), (b"text a", None)]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.string(), pa.large_binary(), pa.string_view()], ids=str)
def test_integer_and_text_ids_that_read_alike_are_the_same_id(tmp_path, kind):
    store = _store(tmp_path, doc_id=pa.array(["7", "9007199254740993"]).cast(kind), text=["seven", "large"])
    assert store.lookup(["9007199254740993", "7", "07"]) == [(b"large", None), (b"seven", None), (None, "unknown")]


def test_titles_come_before_their_texts(tmp_path):
    store = _store(
        tmp_path,
        doc_id=["both", "no title", "empty title", "no text", "too long together"],
        title=["Title", None, "", "Title", "T" * 500],
        text=["text", "text", "text", None, "x" * 500],
    )
    assert store.lookup(["both", "no title", "empty title", "no text", "too long together"]) == [
        (b"Title text", None),
        (b"text", None),
        (b"text", None),
        (None, None),
        (1001, None),
    ]


ROWS = st.lists(
    st.tuples(st.one_of(st.none(), st.text(max_size=3)), st.one_of(st.none(), st.text(max_size=8))), max_size=30
)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, batch_rows=st.integers(1, 8), row_group_size=st.integers(1, 40), use_dictionary=st.booleans())
def test_what_is_found_does_not_depend_on_batches(tmp_path_factory, rows, batch_rows, row_group_size, use_dictionary):
    folder = tmp_path_factory.mktemp("texts")
    table = pa.table({"doc_id": pa.array([r[0] for r in rows], "str"), "text": pa.array([r[1] for r in rows], "str")})
    path = write(folder / "t.parquet", table, row_group_size=row_group_size, use_dictionary=use_dictionary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_BATCH_ROWS", batch_rows)
        store = open_store(find_table("document", path, "doc_id", {}, {}), folder, LIMIT)
    ids = sorted({id_ for id_, _ in rows if id_ is not None} | {"absent id"})
    for id_, (text, problem) in zip(ids, store.lookup(ids), strict=True):
        stored = {text for row_id, text in rows if row_id == id_}
        assert problem == (None if len(stored) == 1 else "ambiguous" if stored else "unknown")
        if len(stored) == 1:
            assert text == (None if stored == {None} else stored.pop().encode())


# --- building


def test_several_files_are_one_table(tmp_path):
    write(tmp_path / "corpus" / "a.parquet", pa.table({"doc_id": ["a"], "text": ["text a"]}))
    write(tmp_path / "corpus" / "b.parquet", pa.table({"doc_id": ["b"], "text": ["text b"]}))
    table = find_table("document", str(tmp_path / "corpus"), "doc_id", {}, {})
    store = open_store(table, tmp_path, LIMIT)
    assert store.lookup(["b", "a"]) == [(b"text b", None), (b"text a", None)]


QUERIES = [("q1", "red fox"), ("2", 'ü\\ "')]
CORPUS = [("d1", "Fox", "a red fox"), ("2", "", "the sky"), ("3", "Title", None)]


def lines_of(folder: Path, suffix: str, rows: list[Any]) -> str:
    """A file of JSON objects, or of fields with tabs between, with a blank line at its end."""
    lines = [json.dumps(row) if isinstance(row, dict) else "\t".join(row) for row in rows]
    body = "".join(f"{line}\n" for line in [*lines, ""]).encode()
    (folder / f"t{suffix}").write_bytes(gzip.compress(body) if suffix.endswith(".gz") else body)
    return str(folder / f"t{suffix}")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_beirs_json_lines_are_tables(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(texts, "_BATCH_ROWS", 2)
    rows: list[Any] = [{"_id": id_, "title": title, "text": text} for id_, title, text in CORPUS]
    rows += [{"_id": 4, "text": "no title"}, {"_id": "5", "title": None, "text": "null", "metadata": {"a": 1}}]
    path = lines_of(tmp_path, suffix, rows)
    store = open_store(find_table("document", path, "doc_id", {}, {}), tmp_path, LIMIT)
    expected = [b"Fox a red fox", b"the sky", None, b"no title", b"null"]
    assert store.lookup(["d1", "2", "3", "4", "5"]) == [(text, None) for text in expected]
    rows = [{"_id": id_, "text": text, "title": "none of a query's"} for id_, text in QUERIES]
    path = lines_of(tmp_path, suffix, rows)
    store = open_store(find_table("query", path, "query_id", {"query_id": "of candidates"}, {}), tmp_path, LIMIT)
    assert store.lookup(["q1", "2"]) == [(text.encode(), None) for _, text in QUERIES]


def test_json_lines_may_have_other_names(tmp_path):
    path = lines_of(tmp_path, ".jsonl", [{"docno": 1, "contents": "x"}, {"docno": 2, "contents": "y"}])
    assert open_store(find_table("document", path, "doc_id", {}, {}), tmp_path, LIMIT).lookup(["2"]) == [(b"y", None)]
    path = lines_of(tmp_path, ".jsonl", [{"sku": "a", "words": "z", "text": "no"}])
    table = find_table("document", path, "doc_id", {"doc_id": "sku", "text": "words"}, {})
    assert open_store(table, tmp_path, LIMIT).lookup(["a"]) == [(b"z", None)]


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_ms_marcos_lines_of_id_and_text_are_tables(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(texts, "_BATCH_BYTES", 1)
    path = lines_of(tmp_path, suffix, [*QUERIES, ("long", "x" * (LIMIT + 1)), ("empty", "")])
    for kind, role in (("query", "query_id"), ("document", "doc_id")):
        store = open_store(find_table(kind, path, role, {"text": "of candidates"}, {}), tmp_path, LIMIT)
        expected = [*(text.encode() for _, text in QUERIES), LIMIT + 1, b""]
        assert store.lookup(["q1", "2", "long", "empty"]) == [(text, None) for text in expected]
        assert store.lookup(["3"]) == [(None, "unknown")]


@pytest.mark.parametrize(
    ("suffix", "bad", "says"),
    [
        (".jsonl", "{", r"t\.jsonl, line 3: not a JSON object \(Expecting"),
        (".jsonl", "[1]", r"t\.jsonl, line 3: not a JSON object"),
        (".jsonl", '{"text": "x"}', r"t\.jsonl, line 3: no _id; a line has an id and a text"),
        (".jsonl", '{"_id": true, "text": "x"}', r"t\.jsonl, line 3: no _id"),
        (".jsonl", '{"_id": "a", "text": 3}', r"t\.jsonl, line 3: text and title must be text, or null"),
        (".tsv", "an id alone", r"t\.tsv, line 3: 1 fields; a line is an id, a tab and a text"),
        (".tsv", "a\tb\tc", r"t\.tsv, line 3: 3 fields"),
    ],
)
def test_a_line_of_a_table_that_is_none_is_named(tmp_path, suffix, bad, says):
    row: Any = {"_id": "x", "text": "y"} if suffix == ".jsonl" else ("x", "y")
    path = Path(lines_of(tmp_path, suffix, [row]))
    table = find_table("document", str(path), "doc_id", {}, {})
    path.write_text(f"{path.read_text()}{bad}\n")
    table = replace(table, files=tuple(expand(locate(str(path)), "")))
    with pytest.raises(InputError, match=says):
        open_store(table, tmp_path / "cache", LIMIT)


def test_a_table_is_of_one_kind_of_file(tmp_path):
    lines_of(tmp_path, ".tsv", [("a", "x")])
    write(tmp_path / "t.parquet", pa.table({"doc_id": ["a"], "text": ["x"]}))
    with pytest.raises(InputError, match=r"t\.parquet and .*t\.tsv are of different kinds: name files of one kind"):
        find_table("document", str(tmp_path), "doc_id", {}, {})
    assert find_table("document", str(tmp_path / "*.tsv"), "doc_id", {}, {}).columns == ["0", "1"]
    with pytest.raises(InputError, match=r"t\.jsonl has no JSON object"):
        find_table("document", lines_of(tmp_path, ".jsonl", []), "doc_id", {}, {})


def test_another_content_another_column_and_another_limit_are_other_stores(tmp_path):
    cache = tmp_path / "cache"
    one = _table(tmp_path, doc_id=["a"], text=["1"], body=["2"])
    assert open_store(one, cache, LIMIT).lookup(["a"]) == [(b"1", None)]
    other_column = find_table("document", str(tmp_path / "t.parquet"), "doc_id", {"text": "body"}, {})
    assert open_store(other_column, cache, LIMIT).lookup(["a"]) == [(b"2", None)]
    changed = _table(tmp_path, doc_id=["a"], text=["123"], body=["2"])
    assert open_store(changed, cache, LIMIT).lookup(["a"]) == [(b"123", None)]
    assert open_store(changed, cache, 2).lookup(["a"]) == [(3, None)]
    assert len([path for path in (cache / "texts").iterdir() if path.is_dir()]) == 4


def test_texts_are_mapped_not_loaded(tmp_path):
    store = _store(tmp_path, doc_id=[str(i) for i in range(1000)], text=["x" * 900] * 1000)
    maps = Path("/proc/self/maps").read_text()
    assert "/cache/texts/" in maps
    for name in ("texts", "hashes.npy", "places.npy"):
        assert any(line.endswith(f"/{name}") for line in maps.splitlines() if "/cache/texts/" in line), name
    assert len(store) == 1000


def _open_and_report(table: TextTable, cache: Path, start, results) -> None:
    built = []
    original = texts._build
    texts._build = lambda *args: (built.append(1), original(*args))
    start.wait()
    found = open_store(table, cache, LIMIT).lookup(["500"])
    results.put((len(built), found))


def test_of_processes_that_open_a_store_at_once_one_builds_it(tmp_path):
    table = _table(tmp_path, doc_id=[str(i) for i in range(20_000)], text=[f"text {i}" for i in range(20_000)])
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_open_and_report, args=(table, tmp_path / "cache", start, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    assert sorted(num_built for num_built, _ in reports) == [0, 1]
    assert [found for _, found in reports] == [[(b"text 500", None)]] * 2


def _die_while_building(table: TextTable, cache: Path) -> None:
    texts._append = lambda *args: os._exit(9)
    open_store(table, cache, LIMIT)


def test_the_remains_of_a_builder_that_was_killed_are_removed_and_never_read(tmp_path):
    table = _table(tmp_path, doc_id=["a"], text=["text a"])
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(table, cache))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    [remains] = [path for path in (cache / "texts").iterdir() if path.is_dir()]
    assert remains.name.endswith(".tmp")
    assert open_store(table, cache, LIMIT).lookup(["a"]) == [(b"text a", None)]
    assert not remains.exists()


def test_a_damaged_table_is_an_error_and_not_a_store(tmp_path):
    table = _table(tmp_path, doc_id=["a"], text=["a text that will be damaged"])
    path = tmp_path / "t.parquet"
    path.write_bytes(path.read_bytes().replace(b"will be damaged", b"has been damagd", 1))
    with pytest.raises(InputError, match=r"t\.parquet, the document table, cannot be read .*restore the file"):
        open_store(table, tmp_path / "cache", LIMIT)
    assert not (tmp_path / "cache" / "texts" / f"{table.digest}-{LIMIT}").exists()


def test_a_table_with_an_id_beyond_the_limit_is_an_error(tmp_path):
    table = _table(tmp_path, doc_id=["a", "x" * (MAX_ID_BYTES + 1)], text=["text a", "text x"])
    with pytest.raises(InputError, match="an id of the document table has 65,537 bytes, but may have at most 65,536"):
        open_store(table, tmp_path / "cache", LIMIT)


def test_a_table_that_changed_since_it_was_found_is_not_stored_under_its_old_name(tmp_path):
    table = _table(tmp_path, doc_id=["a"], text=["before"])
    _table(tmp_path, doc_id=["a"], text=["after that"])
    with pytest.raises(InputError, match=r"t\.parquet has changed since the run was planned"):
        open_store(table, tmp_path / "cache", LIMIT)
    assert not (tmp_path / "cache" / "texts" / f"{table.digest}-{LIMIT}").exists()


def test_the_cache_is_in_the_home_folder_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/somebody")
    assert default_cache() == Path("/somebody/.cache/crossenc")
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path))
    assert default_cache() == tmp_path


# --- finding the columns


def test_usual_names_are_found_and_configured_ones_come_first(tmp_path):
    columns = {"qid": ["1"], "question": ["x"], "docno": ["1"], "passage": ["x"], "title": ["t"], "body": ["y"]}
    path = write(tmp_path / "t.parquet", pa.table(columns))

    def find(kind, role, names):
        table = find_table(kind, path, role, names, {})
        return table.id_column, table.text_column, table.title_column

    assert find("query", "query_id", {}) == ("qid", "question", None)
    assert find("document", "doc_id", {}) == ("docno", "passage", "title")
    assert find("document", "doc_id", {"text": "body", "title": "question"}) == ("docno", "body", "question")
    # the candidates' name of an id, and the other table's text, are none of this table's business
    assert find("query", "query_id", {"query_id": "id of candidates", "text": "body"}) == ("qid", "question", None)


@pytest.mark.parametrize(
    ("kind", "columns", "names", "says"),
    [
        ("document", {"text": ["x"]}, {}, "no column for doc_id"),
        ("document", {"doc_id": ["1"]}, {}, "no column for text"),
        ("query", {"query_id": ["1"], "passage_text": ["x"]}, {}, "no column for text"),
        ("document", {"doc_id": ["1"], "text": ["x"]}, {"text": "bodi"}, r"no column 'bodi' \(from columns.text\)"),
        ("query", {"query_id": ["1"], "text": ["x"]}, {"query": "q"}, r"no column 'q' \(from columns.query\)"),
        ("document", {"doc_id": ["1"], "text": [5]}, {}, "column 'text' is int64, but must be text; cast it first"),
        ("query", {"query_id": ["1"], "text": [["x"]]}, {}, "column 'text' is list.*, but must be text"),
        ("document", {"doc_id": ["1"], "text": ["x"], "title": [1.5]}, {}, "column 'title' is double, but must be"),
        ("document", {"doc_id": [1.5], "text": ["x"]}, {}, "column 'doc_id' is double, but must be text"),
    ],
)
def test_a_table_that_lacks_what_it_is_for_is_refused(tmp_path, kind, columns, names, says):
    path = write(tmp_path / "t.parquet", pa.table(columns))
    with pytest.raises(InputError, match=rf"t\.parquet.*{says}"):
        find_table(kind, path, f"{'doc' if kind == 'document' else 'query'}_id", names, {})


def test_files_of_a_table_with_different_columns_are_refused(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"doc_id": ["1"], "text": ["x"]}))
    write(tmp_path / "b.parquet", pa.table({"doc_id": ["1"], "text": ["x"], "title": ["x"]}))
    with pytest.raises(InputError, match=r"a\.parquet and .*b\.parquet have different columns"):
        find_table("document", str(tmp_path), "doc_id", {}, {})


# --- columns of texts and ids

TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint16(), pa.large_string()),
]


def _cast(values: list[str | None], kind: pa.DataType) -> pa.Array:
    array = pa.array(values, pa.string())
    return (array.dictionary_encode() if pa.types.is_dictionary(kind) else array).cast(kind)


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_kind_of_column_gives_the_same_texts_and_ids(kind):
    values = ["b", None, "a", "b", "", "ü"]
    column = _cast(values, kind)
    as_bytes = [None if value is None else value.encode() for value in values]
    assert as_binary(column).to_pylist() == as_bytes
    assert id_bytes(column) == as_bytes
    distinct, rows = distinct_texts(column, None, LIMIT)
    assert [distinct[row] for row in rows] == as_bytes
    assert len(distinct) == 5
    sliced, rows = distinct_texts(column.slice(2, 2), None, LIMIT)
    assert [sliced[row] for row in rows] == [b"a", b"b"]
    assert len(sliced) == 2


def test_an_id_may_have_64_kib_and_no_more():
    ids = pa.array(["x" * MAX_ID_BYTES, "x" * (MAX_ID_BYTES + 1)])
    assert id_bytes(ids) == [b"x" * MAX_ID_BYTES, MAX_ID_BYTES + 1]


def test_integers_are_ids_by_their_digits():
    assert id_bytes(pa.array([2**64 - 1, None, 0], pa.uint64())) == [b"18446744073709551615", None, b"0"]


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.text(max_size=3)), st.one_of(st.none(), st.text(max_size=3)))),
    st.booleans(),
)
def test_a_title_is_joined_to_its_own_text(rows, as_dictionary):
    titles, column = (pa.array([row[i] for row in rows], pa.string()) for i in range(2))
    if as_dictionary:
        titles, column = titles.dictionary_encode(), column.dictionary_encode()
    distinct, places = distinct_texts(column, titles, LIMIT)
    joined = [None if text is None else f"{title} {text}" if title else text for title, text in rows]
    assert [distinct[place] for place in places] == [None if text is None else text.encode() for text in joined]
