"""Recognises how candidates are laid out in a table, and which column plays which role.

Three layouts: `nested` (one row a query, with lists of documents), `pairs` (one row a query-document pair, with the
texts) and `ids` (one row a pair, texts in the tables `queries` and `corpus`). It looks at schemas only, never at data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.types as pt

from crossenc.errors import InputError
from pipelines.config import LayoutName

_TypeTest = Callable[[pa.DataType], bool]
_DOC_ID_NAMES = (
    "doc_id",
    "docid",
    "docno",
    "pid",
    "corpus_id",
    "corpus-id",
    "passage_id",
    "document_id",
    "did",
)
#: Role -> the column names that mean it, the first that is present wins. A configured name comes before them.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "query_id": ("query_id", "qid", "query-id", "queryid", "topic_id"),
    "query": ("query", "query_text", "question", "topic"),
    "doc_id": _DOC_ID_NAMES,
    "text": (
        "text",
        "document",
        "document_text",
        "passage",
        "doc",
        "doc_text",
        "contents",
        "content",
        "body",
    ),
    "title": ("title", "doc_title"),
    "rank": ("rank", "first_stage_rank"),
    "score": ("score", "first_stage_score", "bm25", "bm25_score", "retrieval_score"),
    "doc_ids": ("doc_ids", "docids", "docnos", "pids", "corpus_ids", "passage_ids", "document_ids"),
    "documents": ("documents", "docs", "passages", "texts", "candidates"),
    "titles": ("titles",),
    "ranks": ("ranks",),
    "scores": ("scores", "first_stage_scores"),
}


#: Columns that results have of their own; an input column of such a name is not passed through.
RESULT_NAMES = ("query_id", "doc_id", "rank", "score", "model_score", "first_stage_rank", "first_stage_score")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of one layout hold what. A role that the table lacks is None.

    In the nested layout the document roles name list columns, or, where `struct` is set, fields of that
    list<struct> column.
    """

    layout: LayoutName
    query_id: str
    doc_id: str
    query: str | None = None
    text: str | None = None
    title: str | None = None
    rank: str | None = None
    score: str | None = None
    struct: str | None = None
    pass_through: tuple[str, ...] = ()

    def to_read(self) -> list[str]:
        """The top-level columns to read from a file."""
        document_roles = [self.struct] if self.struct else [self.doc_id, self.text, self.title, self.rank, self.score]
        names = [self.query_id, self.query, *document_roles, *self.pass_through]
        return list(dict.fromkeys(name for name in names if name is not None))


def resolve(
    schema: pa.Schema,
    *,
    layout: str,
    names: Mapping[str, str],
    pass_through: Sequence[str],
    has_texts: bool,
    file: str,
) -> Columns:
    """The columns to use in a file with `schema`. `has_texts` says whether queries and corpus tables are given.

    Raises InputError that lists what is there and suggests the nearest name.
    """
    unknown = [role for role in names if role not in ALIASES]
    if unknown:
        raise InputError(f"columns: {unknown[0]!r} is not a role; roles are {', '.join(ALIASES)}")
    check_schema(schema, file)
    finder = Finder(schema, names, file)
    if layout == "auto":
        layout = _recognise(finder, has_texts)
    query_id = finder.required("query_id")
    for column in pass_through:
        finder.check_present(column, "pass_through")
        if column in RESULT_NAMES:
            raise InputError(f"pass_through: {column!r} is a column of the results already; leave it out")
    if layout == "nested":
        if has_texts:
            raise InputError(f"{file} has lists of documents with their texts; leave queries and corpus out")
        return _nested(finder, query_id, tuple(pass_through))
    has_own_texts = layout == "pairs"
    if not has_own_texts and not has_texts:
        raise InputError(f"{file} holds ids only: name the tables with the texts as `queries` and `corpus`")
    columns = Columns(
        layout="pairs" if has_own_texts else "ids",
        query_id=query_id,
        doc_id=finder.required("doc_id"),
        query=finder.required("query") if has_own_texts else None,
        text=finder.required("text") if has_own_texts else None,
        title=finder.optional("title") if has_own_texts else None,
        rank=finder.optional("rank"),
        score=finder.optional("score"),
        pass_through=tuple(pass_through),
    )
    _check_types(schema, schema, columns, file)
    return columns


def _recognise(finder: "Finder", has_texts: bool) -> str:
    if finder.has("doc_id"):
        return "ids" if has_texts or not finder.has("text") else "pairs"
    if finder.has("doc_ids") or finder.has("documents"):
        return "nested"
    finder.required("doc_id")
    raise AssertionError("unreachable: required() raises")


def _nested(finder: "Finder", query_id: str, pass_through: tuple[str, ...]) -> Columns:
    documents = finder.required("documents")
    query = finder.required("query")
    kind = finder.schema.field(documents).type
    if is_list(kind) and pt.is_struct(kind.value_type):
        fields = Finder(pa.schema(list(kind.value_type)), finder.names, f"{finder.file}, column {documents!r}")
        columns = Columns(
            layout="nested",
            doc_id=fields.required("doc_id"),
            query=query,
            text=fields.required("text"),
            title=fields.optional("title"),
            rank=fields.optional("rank"),
            score=fields.optional("score"),
            struct=documents,
            query_id=query_id,
            pass_through=pass_through,
        )
        _check_types(finder.schema, fields.schema, columns, finder.file)
        return columns
    columns = Columns(
        layout="nested",
        doc_id=finder.required("doc_ids"),
        query=query,
        text=documents,
        title=finder.optional("titles"),
        rank=finder.optional("ranks"),
        score=finder.optional("scores"),
        query_id=query_id,
        pass_through=pass_through,
    )
    names = [columns.doc_id, columns.text, columns.title, columns.rank, columns.score]
    lists = {name: finder.schema.field(name).type for name in names if name is not None}
    for name, kind in lists.items():
        if not is_list(kind):
            raise InputError(f"{finder.file}: column {name!r} is {kind}, but the nested layout needs a list in it")
    items = pa.schema([(name, kind.value_type) for name, kind in lists.items()])
    _check_types(finder.schema, items, columns, finder.file)
    return columns


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists."""
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether values are text or bytes, dictionary-coded or not."""
    if pt.is_dictionary(kind):
        kind = kind.value_type
    texts = (pt.is_string, pt.is_large_string, pt.is_string_view)
    raw = (pt.is_binary, pt.is_large_binary, pt.is_binary_view)
    return any(test(kind) for test in (*texts, *raw))


def _check_types(outer: pa.Schema, items: pa.Schema, columns: Columns, file: str) -> None:
    """Checks the columns of queries in `outer` and those of documents in `items`: the same schema, unless nested."""

    def check(schema: pa.Schema, name: str | None, role: str, wanted: str, tests: Sequence[_TypeTest]) -> None:
        if name is not None:
            kind = schema.field(name).type
            if not any(test(kind) for test in tests):
                raise InputError(f"{file}: column {name!r} ({role}) is {kind}, but must be {wanted}; cast it first")

    an_id = ("text or an integer", (is_text, pt.is_integer))
    check(outer, columns.query_id, "query_id", *an_id)
    check(outer, columns.query, "query", "text", (is_text,))
    check(items, columns.doc_id, "doc_id", *an_id)
    check(items, columns.text, "document text", "text", (is_text,))
    check(items, columns.title, "title", "text", (is_text,))
    check(items, columns.rank, "rank", "an integer of at most 64 signed bits", (_is_rank,))
    check(items, columns.score, "score", "a number", (pt.is_floating, pt.is_integer))


def _is_rank(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind)) and kind != pa.uint64()


def check_id(schema: pa.Schema, name: str, file: str) -> None:
    """Raises InputError unless the ids in column `name` are text or integers, dictionary-coded or not."""
    kind = schema.field(name).type
    values = kind.value_type if pt.is_dictionary(kind) else kind
    if not is_text(values) and not pt.is_integer(values):
        raise InputError(
            f"{file}: column {name!r} is {kind}, but ids must be text or integers; cast it first (pandas turns"
            " integers beside an empty cell into floats: use its Int64)"
        )


def check_schema(schema: pa.Schema, file: str) -> None:
    """Raises InputError for a schema that is ambiguous or unsafe to read."""
    twice = [name for name in set(schema.names) if schema.names.count(name) > 1]
    if twice:
        raise InputError(f"{file} has two columns named {sorted(twice)[0]!r}; rename one")
    for field in schema:
        extension = _extension(field)
        if extension:
            raise InputError(
                f"{file}: column {field.name!r} has the extension type {extension}, which could run code when it is"
                " read; write the file again with plain columns"
            )


def _extension(field: pa.Field) -> str:
    """The first extension type in a field, however deep; empty where there is none."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    if name is not None:
        return str(name.decode(errors="replace"))
    inner = (_extension(field.type.field(i)) for i in range(field.type.num_fields))
    return next(filter(None, inner), "")


def check_same(first: pa.Schema, other: pa.Schema, columns: Columns, first_file: str, other_file: str) -> None:
    """Raises InputError unless the columns to read have the same types in both files (text types count as one)."""
    for name in columns.to_read():
        if name not in other.names:
            raise InputError(f"{other_file} has no column {name!r}, but {first_file} has: make the files alike")
        left, right = first.field(name).type, other.field(name).type
        if _shape(left) != _shape(right):
            raise InputError(f"column {name!r} is {left} in {first_file} but {right} in {other_file}: make them alike")


def _shape(kind: pa.DataType) -> str:
    """A type's name with all text types written alike."""
    if is_text(kind):
        return "text"
    if is_list(kind):
        return f"list<{_shape(kind.value_type)}>"
    if pt.is_struct(kind):
        return "struct<" + ",".join(f"{field.name}:{_shape(field.type)}" for field in kind) + ">"
    return str(kind)


class Finder:
    """Looks up columns by role in one schema: by a configured name, or else by the usual ones in `aliases`."""

    def __init__(
        self,
        schema: pa.Schema,
        names: Mapping[str, str],
        file: str,
        aliases: Mapping[str, tuple[str, ...]] = ALIASES,
    ) -> None:
        self.schema, self.names, self.file, self.aliases = schema, names, file, aliases

    def has(self, role: str) -> bool:
        """Whether there is a column for `role`."""
        return self.names.get(role) in self.schema.names or self._by_alias(role) is not None

    def optional(self, role: str) -> str | None:
        """The column for `role`, or None. Raises InputError where the configured name is absent."""
        if role in self.names:
            self.check_present(self.names[role], f"columns.{role}")
            return self.names[role]
        return self._by_alias(role)

    def required(self, role: str) -> str:
        """The column for `role`. Raises InputError where there is none."""
        found = self.optional(role)
        if found is None:
            raise InputError(
                f"{self.file} has no column for {role} (looked for {', '.join(self.aliases[role][:4])} …); it has"
                f" {', '.join(self.schema.names)}.{self._suggest(role)} Set columns: {{{role}: <its name>}}"
            )
        return found

    def _by_alias(self, role: str) -> str | None:
        return next((name for name in self.aliases[role] if name in self.schema.names), None)

    def check_present(self, name: str, setting: str) -> None:
        """Raises InputError unless there is a column `name`, which `setting` asks for."""
        if name not in self.schema.names:
            raise InputError(
                f"{self.file} has no column {name!r} (from {setting}); it has {', '.join(self.schema.names)}."
                f"{self._suggest(name)}"
            )

    def _suggest(self, name: str) -> str:
        near = get_close_matches(name, self.schema.names, n=1, cutoff=0.5)
        return f" Did you mean {near[0]!r}?" if near else ""
