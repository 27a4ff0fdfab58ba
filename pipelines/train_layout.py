"""Recognises how labelled data is laid out, and which column plays which role.

`pairs`, `tuples`, `lists`, `ids` and `flagembedding` are recognised by their columns, `triples` are lines of three
fields. It looks at schemas only, never at data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.types as pt

from crossenc.errors import InputError
from pipelines import layout as layouts
from pipelines.train_data_config import LabelledLayout

Kind = Literal["text", "texts", "number", "numbers", "id"]

#: Role -> the column names that mean it, the first that is present wins. A configured name comes before them.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "query": (*layouts.ALIASES["query"], "anchor"),
    "document": ("document", "text", *layouts.ALIASES["text"][2:], "answer"),
    "title": layouts.ALIASES["title"],
    "label": ("label", "relevance", "grade", "rel"),
    "weight": ("weight", "sample_weight"),
    "positive": ("positive",),
    "negative": ("negative",),
    "docs": ("docs", *layouts.ALIASES["documents"]),
    "labels": ("labels",),
    "pos": ("pos",),
    "neg": ("neg",),
    "pos_scores": ("pos_scores",),
    "neg_scores": ("neg_scores",),
    "query_id": layouts.ALIASES["query_id"],
    "doc_id": layouts.ALIASES["doc_id"],
}
#: Layout -> the roles that make it that layout.
_NEEDED: Mapping[LabelledLayout, tuple[str, ...]] = {
    "flagembedding": ("query", "pos", "neg"),
    "tuples": ("query", "positive", "negative"),
    "lists": ("query", "docs", "labels"),
    "pairs": ("query", "document", "label"),
    "ids": ("query_id", "doc_id", "label"),
}
_KINDS: Mapping[str, Kind] = {
    "docs": "texts",
    "pos": "texts",
    "neg": "texts",
    "label": "number",
    "weight": "number",
    "labels": "numbers",
    "pos_scores": "numbers",
    "neg_scores": "numbers",
    "query_id": "id",
    "doc_id": "id",
    "positive_id": "id",
    "negative_id": "id",
}
_NUMBERED = re.compile(r"negative_(\d+)")


@dataclass(frozen=True, slots=True)
class LabelledColumns:
    """Role -> column of one layout, in the order in which a row's documents stand.

    The columns of triples are the numbers of their fields. Several negatives have the roles negative_1, negative_2 …
    """

    layout: LabelledLayout
    names: Mapping[str, str]

    @property
    def negatives(self) -> list[str]:
        """The roles of negatives in a row of tuples or triples."""
        return [role for role in self.names if role in ("negative", "negative_id") or _NUMBERED.fullmatch(role)]

    @property
    def is_single(self) -> bool:
        """Whether a row is one pair."""
        return self.layout in ("pairs", "ids")

    @property
    def has_ids(self) -> bool:
        """Whether the texts are in tables of their own."""
        return "query_id" in self.names

    @property
    def key(self) -> str:
        """The column that is equal in rows of one query."""
        return self.names["query_id" if self.has_ids else "query"]

    @property
    def lists(self) -> list[str]:
        """The columns of a row that hold lists of documents."""
        return [self.names[role] for role in ("docs", "pos", "neg") if role in self.names]


def kind_of(role: str) -> Kind:
    """What values of a role are."""
    return _KINDS.get(role, "text")


def triples(has_texts: bool) -> LabelledColumns:
    """The columns of lines with three fields; `has_texts` says whether there are tables with the texts of ids."""
    suffix = "_id" if has_texts else ""
    roles = [role + suffix for role in ("query", "positive", "negative")]
    return LabelledColumns("triples", {role: str(field) for field, role in enumerate(roles)})


def resolve(schema: pa.Schema, layout: str, names: Mapping[str, str], has_texts: bool, file: str) -> LabelledColumns:
    """The columns to use in a file with `schema`. `has_texts` says whether queries and corpus tables are given.

    Raises InputError that lists what is there and suggests the nearest name.
    """
    unknown = [role for role in names if role not in ALIASES and not _NUMBERED.fullmatch(role)]
    if unknown:
        raise InputError(f"columns: {unknown[0]!r} is not a role; roles are {', '.join(ALIASES)}, negative_1 …")
    if layout == "triples":
        raise InputError(f"{file} has named columns, but triples are lines of three fields: name a .tsv file")
    layouts.check_schema(schema, file)
    finder = layouts.Finder(schema, _alike(names), file, ALIASES)
    chosen = _recognise(finder, has_texts) if layout == "auto" else layout
    if chosen == "ids" and not has_texts:
        raise InputError(f"{file} holds ids only: name the tables with the texts as `queries` and `corpus`")
    if chosen != "ids" and has_texts:
        raise InputError(f"{file} holds its own texts; leave queries and corpus out, or set layout: ids")
    find: Mapping[str, Any] = {"tuples": _tuples, "lists": _lists, "flagembedding": _flagembedding}
    roles = find.get(chosen, _single)(finder, chosen)
    weight = finder.optional("weight")
    columns = LabelledColumns(chosen, roles | ({"weight": weight} if weight else {}))  # type: ignore[arg-type]
    for role, name in columns.names.items():
        _check_type(schema.field(name), role, file)
    return columns


def _alike(names: Mapping[str, str]) -> dict[str, str]:
    """`names` in which label and labels are one role, as people do not tell them apart."""
    name = names.get("labels", names.get("label"))
    return {**names, "label": name, "labels": name} if name is not None else dict(names)


def _recognise(finder: layouts.Finder, has_texts: bool) -> str:
    def present(role: str) -> bool:
        return finder.has(role) or (role == "negative" and bool(_negatives(finder)))

    if has_texts:
        return "ids"
    for layout, roles in _NEEDED.items():
        # The label may have any name, and is asked for by that.
        if all(present(role) for role in roles if role not in ("label", "labels")):
            return layout
    shapes = "; ".join(f"{layout} {', '.join(roles)}" for layout, roles in _NEEDED.items())
    raise InputError(
        f"{finder.file} has the columns {', '.join(finder.schema.names)}, which are no layout of labelled data"
        f" ({shapes}). Set layout, and columns: {{role: <its name>}} for the roles that it has"
    )


def _single(finder: layouts.Finder, layout: str) -> dict[str, str]:
    roles = {role: finder.required(role) for role in _NEEDED[layout]}  # type: ignore[index]
    title = finder.optional("title") if layout == "pairs" else None
    return roles | ({"title": title} if title else {})


def _tuples(finder: layouts.Finder, layout: str) -> dict[str, str]:
    roles = {role: finder.required(role) for role in ("query", "positive")}
    roles |= _negatives(finder) or {"negative": finder.required("negative")}
    labels = finder.optional("labels")
    return roles | ({"labels": labels} if labels else {})


def _negatives(finder: layouts.Finder) -> dict[str, str]:
    """The columns of negatives: those that are configured, or negative_1 … by number, or negative alone."""
    own = {role: name for role, name in finder.names.items() if role == "negative" or _NUMBERED.fullmatch(role)}
    for role, name in own.items():
        finder.check_present(name, f"columns.{role}")
    numbered = [name for name in finder.schema.names if _NUMBERED.fullmatch(name)]
    numbered = sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))
    single = {"negative": "negative"} if finder.has("negative") else {}
    return own or {name: name for name in numbered} or single


def _lists(finder: layouts.Finder, layout: str) -> dict[str, str]:
    return {role: finder.required(role) for role in ("query", "docs", "labels")}


def _flagembedding(finder: layouts.Finder, layout: str) -> dict[str, str]:
    roles = {role: finder.required(role) for role in ("query", "pos", "neg")}
    if "labels" in finder.names:
        if finder.names["labels"] != "scores":
            raise InputError(
                f"columns: labels of the layout flagembedding are 1 and 0, or with {{labels: scores}} pos_scores and"
                f" neg_scores; {finder.names['labels']!r} is neither"
            )
        roles |= {role: finder.required(role) for role in ("pos_scores", "neg_scores")}
    return roles


def _check_type(field: pa.Field, role: str, file: str) -> None:
    kind = kind_of(role)
    inner = field.type
    if kind in ("texts", "numbers"):
        if not layouts.is_list(inner):
            raise InputError(f"{file}: column {field.name!r} ({role}) is {inner}, but must be a list of {kind}")
        inner = inner.value_type
    is_number = pt.is_floating(inner) or pt.is_integer(inner) or pt.is_boolean(inner)
    fits = {
        "text": layouts.is_text(inner),
        "number": is_number,
        "id": layouts.is_text(inner) or pt.is_integer(inner),
    }
    wanted = kind.removesuffix("s")
    if not fits[wanted] and not pt.is_null(inner):
        noun = {"text": "text", "number": "a number", "id": "text or an integer"}[wanted]
        raise InputError(f"{file}: column {field.name!r} ({role}) holds {inner}, but must hold {noun}; cast it first")


def json_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """The columns of JSON objects, with the type of the first value that is not null; null where there is none."""
    kinds: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            if pt.is_null(kinds.get(name, pa.null())):
                kinds[name] = _json_type(value)
    return pa.schema(list(kinds.items()))


def _json_type(value: Any) -> pa.DataType:
    if isinstance(value, list):
        return pa.list_(next((_json_type(item) for item in value if item is not None), pa.null()))
    if isinstance(value, dict):
        return pa.struct([])
    simple = ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64()), (str, pa.string()))
    return next((kind for python, kind in simple if isinstance(value, python)), pa.null())
