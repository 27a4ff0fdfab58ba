"""Layouts are recognised by their columns, and what cannot be read safely is refused with a way out."""

import pyarrow as pa
import pytest

from crossenc.errors import InputError
from pipelines.layout import ALIASES, Columns, check_same, check_schema, is_text, resolve

S, I64, F64 = pa.string(), pa.int64(), pa.float64()


def _resolve(schema, layout="auto", names=None, pass_through=(), has_texts=False):
    return resolve(
        schema, layout=layout, names=names or {}, pass_through=pass_through, has_texts=has_texts, file="f.parquet"
    )


def _pairs(**changes):
    fields = {"query_id": S, "query": S, "doc_id": S, "text": S} | changes
    return pa.schema([(name, kind) for name, kind in fields.items() if kind is not None])


def _nested(**changes):
    fields = {"query_id": S, "query": S, "doc_ids": pa.list_(S), "documents": pa.list_(S)} | changes
    return pa.schema([(name, kind) for name, kind in fields.items() if kind is not None])


def _nested_structs(**changes):
    struct = pa.struct([(name, kind) for name, kind in ({"doc_id": S, "text": S} | changes).items()])
    return pa.schema([("query_id", S), ("query", S), ("documents", pa.list_(struct))])


# --- recognising


def test_pairs_are_rows_with_both_texts():
    assert _resolve(_pairs(title=S, rank=I64, score=F64)) == Columns(
        layout="pairs",
        query_id="query_id",
        doc_id="doc_id",
        query="query",
        text="text",
        title="title",
        rank="rank",
        score="score",
    )


def test_rows_of_ids_need_the_two_tables_of_texts():
    schema = pa.schema([("query_id", S), ("doc_id", S)])
    assert _resolve(schema, has_texts=True) == Columns(layout="ids", query_id="query_id", doc_id="doc_id")
    with pytest.raises(InputError, match=r"f\.parquet holds ids only: name the tables"):
        _resolve(schema)


def test_tables_of_texts_win_over_texts_in_the_rows():
    columns = _resolve(_pairs(), has_texts=True)
    assert (columns.layout, columns.text, columns.query) == ("ids", None, None)


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)])
def test_lists_of_documents_are_nested(list_type):
    schema = _nested(documents=list_type(S), doc_ids=list_type(S), ranks=list_type(I64))
    assert _resolve(schema) == Columns(
        layout="nested", query_id="query_id", query="query", doc_id="doc_ids", text="documents", rank="ranks"
    )


def test_lists_of_structs_are_nested_and_name_fields_of_the_struct():
    columns = _resolve(_nested_structs(title=S, rank=I64, score=F64))
    assert (columns.struct, columns.doc_id, columns.text, columns.title) == ("documents", "doc_id", "text", "title")
    assert columns.to_read() == ["query_id", "query", "documents"]


def test_nested_candidates_beside_tables_of_texts_are_refused_because_one_would_be_ignored():
    with pytest.raises(InputError, match="leave queries and corpus out"):
        _resolve(_nested(), has_texts=True)


@pytest.mark.parametrize("role", ["query_id", "query", "doc_id", "text", "rank"])
def test_usual_names_are_found_by_themselves(role):
    for alias in ALIASES[role]:
        kinds = {"query_id": S, "query": S, "doc_id": S, "text": S, "rank": I64}
        schema = pa.schema([(alias if name == role else name, kind) for name, kind in kinds.items()])
        assert getattr(_resolve(schema), role) == alias


def test_configured_names_come_before_the_usual_ones():
    columns = _resolve(_pairs(body=S, fr=I64), names={"text": "body", "rank": "fr"})
    assert (columns.text, columns.rank) == ("body", "fr")


def test_configured_names_reach_into_structs():
    schema = _nested_structs(body=S)
    assert _resolve(schema, names={"text": "body"}).text == "body"


def test_only_the_needed_columns_are_read_once_each():
    columns = _resolve(_pairs(lang=S, unused=S), pass_through=("lang", "text"))
    assert columns.to_read() == ["query_id", "query", "doc_id", "text", "lang"]


# --- what is missing


def test_a_missing_column_is_named_with_what_there_is_and_the_nearest_name():
    with pytest.raises(InputError) as missing:
        _resolve(_pairs(query_id=None, quer_id=S))
    message = str(missing.value)
    assert "f.parquet has no column for query_id" in message
    assert "it has query, doc_id, text, quer_id" in message
    assert "Did you mean 'quer_id'? Set columns: {query_id: <its name>}" in message


@pytest.mark.parametrize("role", ["query", "text"])
def test_pairs_without_one_of_the_texts_are_refused(role):
    with pytest.raises(InputError, match=f"no column for {role}"):
        _resolve(_pairs(**{role: None}), layout="pairs")


def test_a_configured_column_that_is_absent_is_refused_even_if_the_role_is_optional():
    with pytest.raises(InputError, match=r"no column 'bm52' \(from columns.score\).*Did you mean 'bm25'"):
        _resolve(_pairs(bm25=F64), names={"score": "bm52"})
    with pytest.raises(InputError, match="'teext' is not a role; roles are query_id, "):
        _resolve(_pairs(), names={"teext": "text"})


def test_columns_to_pass_through_must_exist_and_be_new():
    with pytest.raises(InputError, match=r"no column 'langs' \(from pass_through\).*Did you mean 'lang'"):
        _resolve(_pairs(lang=S), pass_through=("langs",))
    with pytest.raises(InputError, match="'score' is a column of the results already"):
        _resolve(_pairs(score=F64), pass_through=("score",))


# --- types


@pytest.mark.parametrize(
    "kind",
    [
        S,
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int8(), S),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_every_kind_of_text_is_text(kind):
    assert is_text(kind)
    assert _resolve(_pairs(query=kind, text=kind, doc_id=kind, query_id=kind)).layout == "pairs"


@pytest.mark.parametrize("kind", [pa.uint64(), pa.int8()], ids=str)
def test_ids_may_be_integers_but_no_other_numbers(kind):
    assert _resolve(_pairs(doc_id=kind, query_id=kind)).layout == "pairs"
    for wrong in (F64, pa.bool_(), pa.decimal128(5), pa.timestamp("s"), pa.null()):
        for role in ("doc_id", "query_id"):
            with pytest.raises(InputError, match=rf"column '{role}' .* but must be text or an integer; cast it first"):
                _resolve(_pairs(**{role: wrong}))


NOT_TEXT = [I64, F64, pa.bool_(), pa.list_(S), pa.struct([("a", S)]), pa.map_(S, S), pa.binary(4), pa.null()]


@pytest.mark.parametrize("kind", NOT_TEXT, ids=str)
@pytest.mark.parametrize("role", ["query", "text", "title"])
def test_a_text_column_that_holds_no_text_is_refused(role, kind):
    with pytest.raises(InputError, match=rf"column '{role}' .*must be text; cast it first"):
        _resolve(_pairs(**{role: kind}), layout="pairs")


@pytest.mark.parametrize("kind", NOT_TEXT, ids=str)
def test_nested_queries_and_documents_that_hold_no_text_are_refused(kind):
    for schema in (
        _nested(query=kind),
        _nested(documents=pa.list_(kind) if not pa.types.is_struct(kind) else pa.list_(pa.list_(kind))),
        _nested(titles=pa.list_(kind)),
        _nested_structs(text=kind),
        _nested_structs(title=kind),
        _nested_structs().set(1, pa.field("query", kind)),
    ):
        with pytest.raises(InputError, match="must be text; cast it first"):
            _resolve(schema)


@pytest.mark.parametrize("column", ["doc_ids", "documents", "titles", "ranks", "scores"])
def test_a_nested_column_that_is_no_list_is_refused(column):
    with pytest.raises(InputError, match=rf"column '{column}' is string, but the nested layout needs a list"):
        _resolve(_nested(**{column: S}))


def test_ranks_are_whole_numbers_and_scores_are_numbers():
    for schema in (_pairs(rank=F64), _pairs(rank=pa.uint64()), _nested(ranks=pa.list_(S)), _nested_structs(rank=F64)):
        with pytest.raises(InputError, match=r"\(rank\) is .*must be an integer of at most 64 signed bits"):
            _resolve(schema)
    for schema in (_pairs(score=S), _nested(scores=pa.list_(S)), _nested_structs(score=pa.decimal128(9))):
        with pytest.raises(InputError, match=r"\(score\) is .*must be a number"):
            _resolve(schema)
    assert _resolve(_pairs(rank=pa.uint32(), score=pa.float16())).rank == "rank"


# --- schemas that are ambiguous or unsafe


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"f\.parquet has two columns named 'text'; rename one"):
        check_schema(pa.schema([("text", S), ("query", S), ("text", S)]), "f.parquet")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda field: field,
        lambda field: pa.field("x", pa.list_(field)),
        lambda field: pa.field("x", pa.struct([field])),
        lambda field: pa.field("x", pa.map_(S, field)),
        lambda field: pa.field("x", pa.large_list(pa.struct([pa.field("y", pa.list_(field))]))),
    ],
    ids=["plain", "list", "struct", "map", "deep"],
)
def test_an_extension_type_is_refused_however_deep(wrap):
    unknown = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    known = pa.field("x", pa.uuid())
    for field, name in ((unknown, r"ray\.data\.arrow_pickled_object"), (known, r"arrow\.uuid")):
        with pytest.raises(InputError, match=f"column 'x' has the extension type {name}, which could run code"):
            check_schema(pa.schema([("query_id", S), wrap(field)]), "f.parquet")


def test_files_are_alike_if_they_differ_only_in_kinds_of_text():
    first, other = _nested(), _nested(query=pa.binary(), documents=pa.large_list(pa.large_string()), extra=I64)
    check_same(first, other, _resolve(first), "a", "b")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (_pairs(doc_id=I64), "column 'doc_id' is string in a but int64 in b: make them alike"),
        (_pairs(rank=pa.int32()), "column 'rank' is int64 in a but int32 in b"),
        (_pairs(rank=I64, text=None), "b has no column 'text', but a has: make the files alike"),
    ],
)
def test_files_that_differ_in_a_column_that_is_read_are_refused(other, says):
    first = _pairs(rank=I64)
    with pytest.raises(InputError, match=says):
        check_same(first, other, _resolve(first), "a", "b")
