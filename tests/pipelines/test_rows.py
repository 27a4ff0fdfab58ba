"""Candidates are the same whatever the layout, and a bad one is refused with the first reason that applies."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.layout import Columns, resolve
from pipelines.rows import CheckedRows, check, flatten
from pipelines.schemas import REASONS
from pipelines.texts import find_table, open_store
from tests.pipelines.support import Doc, Query, as_ids, as_nested_lists, as_nested_structs, as_pairs, write

LIMIT = 20


def _batch(table: pa.Table) -> pa.RecordBatch:
    [batch] = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    return batch


def _columns(table: pa.Table, **options: object) -> Columns:
    defaults = {"layout": "auto", "names": {}, "pass_through": (), "has_texts": False, "file": "f"}
    return resolve(table.schema, **defaults | options)


def _check(table: pa.Table, first_row: int = 0, needs_score: bool = False, **options: object) -> CheckedRows:
    raw = flatten(_batch(table), _columns(table, **options), first_row)
    return check(raw, queries=None, corpus=None, max_text_bytes=LIMIT, needs_score=needs_score)


def _one(**changes: object) -> pa.Table:
    values = {"query_id": "q", "query": "query", "doc_id": "d", "text": "text", "rank": 1, "score": 1.0} | changes
    kinds = {"rank": pa.int64(), "score": pa.float64()}
    arrays = {
        name: value if isinstance(value, pa.Array) else pa.array([value], kinds.get(name, pa.string()))
        for name, value in values.items()
    }
    return pa.table(arrays)


def _not_utf8(value: bytes) -> pa.Array:
    return pa.array([value], pa.binary()).view(pa.string())


# --- four layouts, one meaning

DOC_TEXTS = st.sampled_from([None, "", " \n", "text", "ünï\x00", "x" * 30])
RANKS = st.one_of(st.none(), st.integers(-3, 3))
SCORES = st.one_of(st.none(), st.floats(width=32))


@st.composite
def _queries(draw):
    ids = draw(st.lists(st.text(max_size=3), unique=True, max_size=5))
    texts = draw(
        st.dictionaries(st.text(max_size=2), st.tuples(DOC_TEXTS, st.sampled_from([None, "", "T"])), max_size=6)
    )
    queries = []
    for id_ in ids:
        doc_ids = draw(st.lists(st.sampled_from([None, *texts]), max_size=5))
        docs = tuple(
            Doc(doc_id, *texts.get(doc_id, (None, None)), rank=draw(RANKS), score=draw(SCORES)) for doc_id in doc_ids
        )
        queries.append(Query(id_, draw(DOC_TEXTS), docs))
    return queries


def _comparable(checked: CheckedRows) -> list[tuple[object, ...]]:
    num_rows = len(checked.reasons)
    raw = checked.raw
    ranks = raw.rank.to_pylist() if raw.rank is not None else [None] * num_rows
    scores = [repr(score) for score in raw.score.to_pylist()] if raw.score is not None else [None] * num_rows
    texts = [
        (query, document) if reason is None else None
        for query, document, reason in zip(checked.queries, checked.documents, checked.reasons, strict=True)
    ]
    columns = (checked.query_ids, checked.doc_ids, texts, checked.reasons, checked.details, ranks, scores)
    return list(zip(*columns, strict=True))


@settings(max_examples=60, deadline=None)
@given(_queries(), st.booleans())
def test_the_four_layouts_of_the_same_candidates_give_the_same_rows(tmp_path_factory, queries, needs_score):
    folder = tmp_path_factory.mktemp("rows")
    queries = [query for query in queries if query.docs]  # pairs have no place for one without candidates
    pairs = _check(as_pairs(queries), needs_score=needs_score)
    lists = _check(as_nested_lists(queries), needs_score=needs_score)
    structs = _check(as_nested_structs(queries), needs_score=needs_score)
    candidates, query_table, corpus_table = as_ids(queries)
    stores = {}
    for kind, table in (("query", query_table), ("document", corpus_table)):
        path = write(folder / f"{kind}.parquet", table)
        id_role = "query_id" if kind == "query" else "doc_id"
        stores[kind] = open_store(find_table(kind, path, id_role, {}, {}), folder, LIMIT)
    raw = flatten(_batch(candidates), _columns(candidates, has_texts=True), 0)
    ids = check(raw, queries=stores["query"], corpus=stores["document"], max_text_bytes=LIMIT, needs_score=needs_score)
    assert _comparable(lists) == _comparable(pairs)
    assert _comparable(structs) == _comparable(pairs)
    assert _comparable(ids) == _comparable(pairs)
    places = [(row, item) for row, query in enumerate(queries) for item in range(len(query.docs))]
    for nested in (lists.raw, structs.raw):
        assert list(zip(nested.row.tolist(), nested.item.tolist(), strict=True)) == places
    assert pairs.raw.row.tolist() == ids.raw.row.tolist() == list(range(len(places)))
    assert pairs.raw.item is None
    assert set(pairs.reasons) - {None} <= set(REASONS)


def test_rows_count_from_the_first_row_of_the_batch():
    queries = [Query("q1", "x", (Doc("a", "x"), Doc("b", "x"))), Query("q2", "x", (Doc("c", "x"),))]
    assert _check(as_pairs(queries), first_row=100).raw.row.tolist() == [100, 101, 102]
    nested = _check(as_nested_lists(queries), first_row=100).raw
    assert nested.row.tolist() == [100, 100, 101]
    assert nested.item.tolist() == [0, 1, 0]


def test_a_slice_of_a_batch_gives_its_own_candidates():
    queries = [Query(f"q{i}", f"query {i}", tuple(Doc(f"d{i}{j}", f"{i}{j}") for j in range(i))) for i in range(5)]
    for build in (as_nested_lists, as_nested_structs):
        table = build(queries)
        raw = flatten(_batch(table).slice(2, 2), _columns(table), 2)
        checked = check(raw, queries=None, corpus=None, max_text_bytes=LIMIT, needs_score=False)
        assert checked.doc_ids == ["d20", "d21", "d30", "d31", "d32"]
        assert checked.query_ids == ["q2", "q2", "q3", "q3", "q3"]
        assert checked.documents == ["20", "21", "30", "31", "32"]
        assert raw.row.tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_every_kind_of_list_is_read(kind):
    table = pa.table(
        {
            "query_id": ["q1", "q2"],
            "query": ["x", "y"],
            "doc_ids": pa.array([["a", "b"], ["c", "d"]], kind(pa.string())),
            "documents": pa.array([["1", "2"], ["3", "4"]], kind(pa.large_string())),
        }
    )
    checked = _check(table)
    assert list(zip(checked.doc_ids, checked.documents, strict=True)) == [
        ("a", "1"),
        ("b", "2"),
        ("c", "3"),
        ("d", "4"),
    ]


def test_dictionary_coded_lists_are_read_like_others():
    queries = [Query("q1", "x", (Doc("a", "1"), Doc("b", None), Doc("c", "1")))]
    table = as_nested_lists(queries)
    values = table.column("documents").combine_chunks()
    coded = pa.ListArray.from_arrays(values.offsets, values.values.dictionary_encode())
    table = table.set_column(table.column_names.index("documents"), "documents", coded)
    assert _check(table).documents == ["1", None, "1"]


def test_a_null_struct_in_a_list_is_a_candidate_without_an_id():
    kind = pa.list_(pa.struct([("doc_id", pa.string()), ("text", pa.string())]))
    documents = pa.array([[{"doc_id": "a", "text": "x"}, None]], kind)
    checked = _check(pa.table({"query_id": ["q"], "query": ["x"], "documents": documents}))
    assert checked.reasons == [None, "doc_id_missing"]


# --- empty lists, and lists of different lengths


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_a_row_without_documents_is_one_refused_candidate_of_its_query(kind):
    table = pa.table(
        {
            "query_id": ["before", "empty", "null", "after"],
            "query": ["x"] * 4,
            "doc_ids": pa.array([["1"], [], None, ["9"]], kind(pa.string())),
            "documents": pa.array([["one"], [], None, ["nine"]], kind(pa.string())),
        }
    )
    checked = _check(table)
    assert checked.reasons == [None, "list_empty", "list_empty", None]
    assert checked.query_ids == ["before", "empty", "null", "after"]
    assert checked.doc_ids == ["1", None, None, "9"]
    assert checked.raw.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("doc_ids", "documents", "scores", "num_candidates"),
    [
        (["a", "b"], ["x"], [1.0, 2.0], 2),
        (["a"], ["x", "y", "z"], [1.0], 3),
        (["a"], ["x"], [], 1),
        ([], ["x"], [1.0], 1),
        (None, ["x", "y"], None, 2),
    ],
)
def test_every_candidate_of_a_row_whose_lists_differ_in_length_is_refused(doc_ids, documents, scores, num_candidates):
    table = pa.table(
        {
            "query_id": ["before", "bad", "after"],
            "query": ["x", "x", "x"],
            "doc_ids": pa.array([["1"], doc_ids, ["9"]], pa.list_(pa.string())),
            "documents": pa.array([["one"], documents, ["nine"]], pa.list_(pa.string())),
            "scores": pa.array([[1.0], scores, [9.0]], pa.list_(pa.float64())),
        }
    )
    checked = _check(table)
    assert checked.reasons == [None, *["list_length_mismatch"] * num_candidates, None]
    assert checked.raw.row.tolist() == [0, *[1] * num_candidates, 2]
    assert checked.documents[0] == "one"
    assert checked.documents[-1] == "nine"
    assert checked.doc_ids[-1] == "9"
    assert checked.raw.score.to_pylist()[-1] == 9.0
    assert checked.doc_ids[1 : 1 + num_candidates] == [*(doc_ids or []), *[None] * num_candidates][:num_candidates]


def test_a_list_to_pass_through_must_be_as_long_as_the_others():
    table = pa.table(
        {
            "query_id": ["q1", "q2"],
            "query": ["x", "x"],
            "doc_ids": [["a", "b"], ["c"]],
            "documents": [["1", "2"], ["3"]],
            "langs": [["en", "ru"], ["en", "ru"]],
            "group": ["g1", "g2"],
        }
    )
    checked = _check(table, pass_through=("langs", "group"))
    assert checked.reasons == [None, None, "list_length_mismatch", "list_length_mismatch"]
    assert [array.to_pylist() for array in checked.raw.pass_through] == [
        ["en", "ru", "en", "ru"],
        ["g1", "g1", "g2", "g2"],
    ]


# --- reasons


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({}, None, None),
        ({"query_id": None}, "query_id_missing", None),
        ({"doc_id": None}, "doc_id_missing", None),
        ({"query_id": ""}, "query_id_missing", None),
        ({"doc_id": ""}, "doc_id_missing", None),
        ({"query_id": "x" * 65_537}, "id_too_large", "65,537 bytes"),
        ({"doc_id": "x" * 65_537}, "id_too_large", "65,537 bytes"),
        ({"query_id": _not_utf8(b"\xff")}, "id_not_utf8", None),
        ({"doc_id": _not_utf8(b"a\xc3")}, "id_not_utf8", None),
        ({"query": None}, "query_missing", None),
        ({"query": ""}, "query_empty", None),
        ({"query": "x" * 21}, "query_too_large", "21 bytes"),
        ({"query": _not_utf8(b"ab\xff")}, "query_not_utf8", "byte 2"),
        ({"text": None}, "document_missing", None),
        ({"text": ""}, "document_empty", None),
        ({"text": " \t\n\u2003"}, "document_empty", None),
        ({"text": "x" * 20}, None, None),
        ({"text": "x" * 21}, "document_too_large", "21 bytes"),
        ({"text": "ü" * 11}, "document_too_large", "22 bytes"),
        ({"text": "x" * 2000}, "document_too_large", "2,000 bytes"),
        ({"text": _not_utf8(b"\xed\xa0\x80")}, "document_not_utf8", "byte 0"),  # a lone surrogate
        ({"text": "a\x00b\u200b\u202e"}, None, None),
        ({"text": "\x00"}, None, None),
        ({"title": "T" * 15}, None, None),
        ({"title": "T" * 16}, "document_too_large", "21 bytes"),
        ({"title": _not_utf8(b"\xff")}, "document_not_utf8", "byte 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_reason(changes, reason, detail):
    table = _one(**changes)
    if "query" in changes or "query_id" in changes:  # as the same reason stands for a whole query when nested
        nested = table.append_column("doc_ids", pa.array([["d"]])).append_column("documents", pa.array([["text"]]))
        nested = nested.drop_columns(["doc_id", "text", "rank", "score"])
        assert _check(nested).reasons == [reason]
    checked = _check(table)
    assert (checked.reasons, checked.details) == ([reason], [detail])
    assert reason is None or reason in REASONS


def test_a_good_candidate_keeps_its_text_unchanged():
    text = " a\x00b\u200b\u202e\r\n "
    assert _check(_one(text=text)).documents == [text]


def test_one_bad_row_costs_only_itself():
    table = pa.concat_tables([_one(), _one(text=None), _one(query=_not_utf8(b"\xff")), _one(doc_id="last")])
    assert _check(table).reasons == [None, "document_missing", "query_not_utf8", None]


ALL_WRONG = {"query_id": None, "doc_id": None, "query": "", "text": None, "score": math.nan}
RIGHT = {"query_id": "q", "doc_id": "d", "query": "query", "text": "text", "score": 1.0}


def test_the_first_reason_counts():
    found = []
    wrong = dict(ALL_WRONG)
    for mended in ("query_id", "doc_id", "query", "text", "score"):
        found += _check(_one(**wrong), needs_score=True).reasons
        wrong[mended] = RIGHT[mended]
    assert found == [
        "query_id_missing",
        "doc_id_missing",
        "query_empty",
        "document_missing",
        "first_stage_score_missing",
    ]
    assert _check(_one(**wrong), needs_score=True).reasons == [None]


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf, 1.7e308, -1.7e308])
def test_interpolation_needs_a_finite_first_stage_score_that_can_be_normalised_and_scoring_does_not(score):
    assert _check(_one(score=score), needs_score=True).reasons == ["first_stage_score_missing"]
    assert _check(_one(score=score)).reasons == [None]


def test_without_a_column_of_scores_interpolation_refuses_every_candidate():
    table = _one().drop_columns("score")
    assert _check(table, needs_score=True).reasons == ["first_stage_score_missing"]


def test_whole_numbers_and_half_floats_are_scores():
    for score in (pa.array([2**60 + 1]), pa.array([1.5], pa.float16()), pa.array([2**64 - 1], pa.uint64())):
        assert _check(_one(score=score), needs_score=True).reasons == [None]


def test_ids_are_text_exactly_whatever_their_type():
    for kind, id_ in ((pa.int64(), 2**53 + 1), (pa.uint64(), 2**64 - 1), (pa.int8(), -7)):
        checked = _check(_one(query_id=pa.array([id_], kind), doc_id=pa.array([id_], kind)))
        assert (checked.query_ids, checked.doc_ids) == ([str(id_)], [str(id_)])
    odd = "a/../b\n=ü\x00" + "x" * 10_000
    assert _check(_one(doc_id=odd, query_id=odd)).doc_ids == [odd]


def test_equal_texts_share_one_string():
    table = pa.concat_tables([_one(text="a text of some length"[:20])] * 3)
    for batch in (table, table.set_column(3, "text", table.column("text").combine_chunks().dictionary_encode())):
        checked = _check(batch)
        assert checked.documents[0] is checked.documents[1] is checked.documents[2]
        assert checked.queries[0] is checked.queries[2]


def test_the_query_of_a_nested_row_is_not_copied_for_each_candidate():
    docs = tuple(Doc(str(i), "x") for i in range(10_000))
    batch = _batch(as_nested_lists([Query("q", "y" * 10_000, docs)]))
    before = pa.total_allocated_bytes()
    raw = flatten(batch, _columns(pa.table(batch)), 0)
    assert pa.total_allocated_bytes() - before < 5_000_000  # copied it would be 100 MB
    assert pc.count(raw.query).as_py() == 10_000


def test_an_empty_batch_has_no_candidates():
    for build in (as_pairs, as_nested_lists, as_nested_structs):
        checked = _check(build([]))
        assert checked.reasons == []
        assert checked.raw.row.dtype == np.int64
