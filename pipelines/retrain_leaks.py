"""Leaks: queries that a model would learn from and be judged on. Finds them, names them, and takes them out of labels.

Two queries are one where their texts are equal but for case, white space and Unicode form (NFKC). Where the text of one
is not known, they are one by the same id; with two texts an id proves nothing, since exports number their queries anew.
It reads queries and nothing else of labels and candidates, and knows nothing of models.
"""

import gzip
import io
import unicodedata
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import InputError
from pipelines.evaluation_inputs import Source
from pipelines.evaluation_inputs import read as read_judged
from pipelines.inputs import naming_damage, read_batches
from pipelines.layout import Finder, is_text
from pipelines.lines import parse_json
from pipelines.plan import Plan
from pipelines.progress import visible
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo, locate, open_input, read_bytes
from pipelines.texts import Text, TextTable, default_cache, distinct_texts, find_table, id_bytes, open_store
from pipelines.train_data_config import LabelledData
from pipelines.train_files import (
    DamagedError,
    Lines,
    cut_slices,
    find_columns,
    format_of,
    read_slice,
    schema_of,
)

_BATCH_ROWS = 1 << 14
_NAMED = 5
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Query:
    """A query where it stands: `text` and `query_id` are None where there is none that can be read."""

    file: FileInfo
    row: int
    query_id: str | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A query of the fixed set, and what it is known again by."""

    collection: str
    query_id: str
    by: Literal["text", "id"]


@dataclass(frozen=True, slots=True)
class FixedQueries:
    """The queries of the fixed set, by normalised text and by id, and by id those whose text is not known."""

    by_text: Mapping[str, Judged]
    by_id: Mapping[str, Judged]
    without_text: Mapping[str, Judged]

    def find(self, query: Query) -> Judged | None:
        """The query of the fixed set that this one is, or None."""
        if query.text and (found := self.by_text.get(normalised(query.text))):
            return found
        by_id = self.without_text if query.text else self.by_id
        return by_id.get(query.query_id) if query.query_id is not None else None


@dataclass(frozen=True, slots=True)
class Leak:
    """A query that is judged on, and where it stands among what a model would learn from."""

    query: Query
    judged: Judged

    def __str__(self) -> str:
        text = self.query.text if self.query.text is not None else self.query.query_id or ""
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} …"
        place = f"{self.query.file.location}, row {self.query.row}"
        by = " by its id" if self.judged.by == "id" else ""
        return f"{visible(shown)!r} ({place}) is {self.judged.query_id} of {self.judged.collection}{by}"


@dataclass(frozen=True, slots=True)
class Leaks:
    """Leaks of any number, in little memory: of each query of the fixed set the first one, and all rows by file."""

    first: dict[tuple[str, str], Leak] = field(default_factory=dict)
    rows: "dict[str, array[int]]" = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows.values()))

    def add(self, leak: Leak) -> None:
        self.first.setdefault((leak.judged.collection, leak.judged.query_id), leak)
        self.rows.setdefault(leak.query.file.location.uri, array("q")).append(leak.query.row)


def normalised(text: str) -> str:
    """`text` without differences of case, white space and Unicode form."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def fixed_queries(sources: Sequence[Source], max_text_bytes: int) -> FixedQueries:
    """The queries that models are judged on. Raises InputError as reading the collections does."""
    by_text: dict[str, Judged] = {}
    by_id: dict[str, Judged] = {}
    without_text: dict[str, Judged] = {}
    for source in sources:
        wanted = set(read_judged(source).qrels)
        found = {query_id: Judged(source.config.name, query_id, "id") for query_id in wanted}
        by_id |= found
        for query_id, text in _texts_of(source, wanted, max_text_bytes):
            if text:
                by_text.setdefault(normalised(text), Judged(source.config.name, query_id, "text"))
                found.pop(query_id, None)
        without_text |= found
    return FixedQueries(by_text, by_id, without_text)


def _texts_of(source: Source, wanted: set[str], max_text_bytes: int) -> Iterator[tuple[str, str]]:
    """Id and text of each query of a collection, at least once."""
    if source.tables:
        ids = sorted(wanted)
        texts = _looked_up(ids, source.tables[0], max_text_bytes)
        yield from ((id_, text) for id_, text in zip(ids, texts, strict=True) if text is not None)
    elif source.plan is not None:
        for query in candidate_queries(source.plan, None, source.options, max_text_bytes):
            if query.query_id in wanted and query.text is not None:
                yield query.query_id, query.text


def candidate_queries(
    plan: Plan, table: TextTable | None, options: Mapping[str, Any], max_text_bytes: int
) -> Iterator[Query]:
    """The queries of candidates, in the first row of each batch that has them; of ids the texts are in `table`."""
    columns = plan.columns
    names = [columns.query_id, *([columns.query] if columns.query else [])]
    for entry in plan.inputs:
        file = FileInfo(locate(entry.uri, options), entry.num_bytes, entry.version)
        first_row = 0
        with naming_damage(f"{file.location} cannot be read"), open_input(file) as stream:
            for batch in read_batches(stream, pq.read_metadata(stream), names, names, max_rows=_BATCH_ROWS):
                texts = batch.column(columns.query) if columns.query else None
                yield from _in_batch(file, first_row, batch.column(columns.query_id), texts, table, max_text_bytes)
                first_row += batch.num_rows


def label_queries(
    data: LabelledData, files: Sequence[FileInfo], options: Mapping[str, Any], max_text_bytes: int
) -> Iterator[Query]:
    """The queries of labelled data, in every row. Rows that cannot be read are left out: training refuses them."""
    columns = find_columns(data, files)
    table = query_table(data, options)
    text_column = None if columns.has_ids else columns.key
    id_columns = [columns.key if columns.has_ids else _id_column(data, file) for file in files]
    for entry in cut_slices(files, columns, grouped=False, slice_pairs=None):
        file, id_column = files[entry.file], id_columns[entry.file]
        names = [name for name in (id_column, text_column) if name is not None]
        try:
            for batch in read_slice(file, entry, names, [columns.key]):
                if isinstance(batch, Lines):
                    yield from _in_lines(file, batch, (id_column, text_column), table, max_text_bytes)
                else:
                    ids = batch[1].column(id_column) if id_column else None
                    texts = batch[1].column(text_column) if text_column else None
                    yield from _in_batch(file, batch[0], ids, texts, table, max_text_bytes, every_row=True)
        except DamagedError:
            continue


def _id_column(data: LabelledData, file: FileInfo) -> str | None:
    """The column with the ids of queries whose texts stand beside them; None where there is none."""
    schema = schema_of(file)
    if schema is None:
        return None
    names = {role: name for role, name in data.columns.items() if role == "query_id"}
    found = Finder(schema, names, str(file.location)).optional("query_id")
    is_id = found is not None and (is_text(schema.field(found).type) or pa.types.is_integer(schema.field(found).type))
    return found if is_id else None


def query_table(data: LabelledData, options: Mapping[str, Any]) -> TextTable | None:
    """The table with the texts of labels given as ids."""
    if data.queries is None:
        return None
    names = {role: name for role, name in data.columns.items() if role in ("query_id", "query")}
    return find_table("query", data.queries, "query_id", names, dict(options))


def text_of(text: Text) -> str | None:
    """A text that is one, decoded; None for one that is absent or too long."""
    return text.decode(errors="replace") if isinstance(text, bytes) else None


def _in_batch(
    file: FileInfo,
    first_row: int,
    ids: pa.Array | None,
    texts: pa.Array | None,
    table: TextTable | None,
    max_text_bytes: int,
    *,
    every_row: bool = False,
) -> Iterator[Query]:
    """The queries of columns: each in its first row, or in every one."""
    found_ids: list[str | None] = []
    found_texts: list[str | None] = []
    if ids is not None:
        found_ids = [text_of(id_) for id_ in id_bytes(ids)]
    if texts is None:
        found_texts = _looked_up(found_ids, table, max_text_bytes)
    elif pa.types.is_null(texts.type):
        found_texts = [None] * len(texts)
    else:
        distinct, rows = distinct_texts(texts, None, max_text_bytes)
        found_texts = [text_of(distinct[row]) for row in rows]
    found_ids = found_ids or [None] * len(found_texts)
    seen: set[tuple[str | None, str | None]] = set()
    for number, key in enumerate(zip(found_ids, found_texts, strict=True)):
        if every_row or key not in seen:
            seen.add(key)
            yield Query(file, first_row + number, *key)


def _in_lines(
    file: FileInfo,
    batch: Lines,
    columns: tuple[str | None, str | None],
    table: TextTable | None,
    max_text_bytes: int,
) -> Iterator[Query]:
    """The queries of lines; `columns` are those of ids and of texts."""
    is_json = format_of(file) == "jsonl"
    ids, texts = zip(*(_in_line(line, columns, is_json) for line in batch.lines), strict=True)
    if columns[1] is None:
        texts = tuple(_looked_up(ids, table, max_text_bytes))
    for number, query_id, text in zip(batch.numbers, ids, texts, strict=True):
        yield Query(file, number, query_id, text)


def _in_line(line: bytes, columns: Sequence[str | None], is_json: bool) -> list[str | None]:
    """The values of columns, None for those that are absent."""
    if is_json:
        row = parse_json(line)[0] or {}
        values = [row.get(name) if name is not None else None for name in columns]
        return [str(value) if isinstance(value, str | int) else None for value in values]
    fields = line.rstrip(b"\r\n").split(b"\t")
    places = [len(fields) if name is None else int(name) for name in columns]
    return [fields[place].decode(errors="replace") if place < len(fields) else None for place in places]


def _looked_up(ids: Sequence[str | None], table: TextTable | None, max_text_bytes: int) -> list[str | None]:
    """The texts of ids, None for those without one."""
    if table is None:
        return [None] * len(ids)
    distinct = sorted({id_ for id_ in ids if id_ is not None})
    found = open_store(table, default_cache(), max_text_bytes).lookup(distinct)
    texts = {id_: text_of(text) for id_, (text, _) in zip(distinct, found, strict=True)}
    return [None if id_ is None else texts[id_] for id_ in ids]


def find_leaks(queries: Iterable[Query], fixed: FixedQueries) -> Leaks:
    """The queries that are judged on, too, in every row where they stand."""
    leaks = Leaks()
    last: Query | None = None
    judged: Judged | None = None
    for query in queries:
        if last is None or (query.query_id, query.text) != (last.query_id, last.text):  # rows of a query stand together
            last, judged = query, fixed.find(query)
        if judged is not None:
            leaks.add(Leak(query, judged))
    return leaks


def refusal(leaks: Leaks, where: str, remedy: str) -> InputError:
    """The error that names leaks, of each query the first one."""
    shown = sorted(leaks.first.values(), key=lambda leak: (leak.query.file.location.uri, leak.query.row))
    lines = "".join(f"\n  {leak}" for leak in shown[:_NAMED])
    more = f"\n  … and {len(shown) - _NAMED:,} more" if len(shown) > _NAMED else ""
    return InputError(
        f"{len(shown):,} queries of {where} are judged on, too, in {leaks.num_rows:,} rows; a model that learned them"
        f" proves nothing by them:{lines}{more}\n{remedy}"
    )


def without_rows(file: FileInfo, rows: Collection[int]) -> tuple[str, bytes | None]:
    """Name and content of a file of labels without some rows; None where none is left.

    Arrow streams become Parquet, and lines are not compressed any more. The file is in memory whole.
    """
    kind, name = format_of(file), file.location.name
    if kind in ("jsonl", "tsv"):
        rows = set(rows)
        body = read_bytes(file.location)
        body = gzip.decompress(body) if name.lower().endswith(".gz") else body
        kept = [line for number, line in enumerate(io.BytesIO(body)) if number not in rows]
        return name[:-3] if name.lower().endswith(".gz") else name, b"".join(kept) if b"".join(kept).strip() else None
    with open_input(file) as source:
        table = pq.read_table(source) if kind == "parquet" else pa.ipc.open_stream(source).read_all()
    mask = np.ones(table.num_rows, dtype=bool)
    mask[list(rows)] = False
    stem = name.removesuffix(".parquet").removesuffix(".arrow")
    return f"{stem}.parquet", to_parquet(table.filter(pa.array(mask))) if mask.any() else None
