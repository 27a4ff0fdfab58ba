"""What an evaluation judges on: judgements, candidates, segments and texts, out of Parquet, BEIR folders and TREC runs.

It reads ids and judgements; texts are left to evaluation_texts. It knows nothing of models and measures.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import InputError
from crossenc.records import Qrels
from pipelines import rankings
from pipelines.evaluate import ids_as_text, read_qrels
from pipelines.evaluation_config import CollectionConfig
from pipelines.inputs import naming_damage, read_footer
from pipelines.layout import ALIASES, Finder, check_id
from pipelines.lines import json_lines
from pipelines.plan import Plan
from pipelines.rankings import Ranking, Tables
from pipelines.storage import FileInfo, expand, locate, open_input
from pipelines.texts import JSON_IDS, TextTable, as_binary, find_table

#: More values than this are no segments.
_MAX_SEGMENTS = 50


@dataclass(frozen=True, slots=True)
class Source:
    """A collection, with everything found that its figures rest on. Either `plan` or `run` holds the candidates.

    `tables` are the texts of candidates given as ids. `attributes` are the files with the columns of `where` and
    `segments`.
    """

    config: CollectionConfig
    qrels: tuple[FileInfo, ...]
    plan: Plan | None
    run: Ranking | None
    tables: tuple[TextTable, ...]
    attributes: tuple[FileInfo, ...]
    options: Mapping[str, Any]

    @property
    def has_texts(self) -> bool:
        """Whether a model could read the candidates."""
        return bool(self.tables) or (self.plan is not None and self.plan.columns.text is not None)

    @property
    def files(self) -> list[FileInfo]:
        """Every file that the figures rest on."""
        tables = [file for table in self.tables for file in table.files]
        return [*self.qrels, *self.candidates, *tables, *self.attributes]

    @property
    def candidates(self) -> list[FileInfo]:
        if self.run is not None:
            return list(self.run.files)
        assert self.plan is not None, "candidates are a run or a table"
        return [FileInfo(locate(f.uri, self.options), f.num_bytes, f.version) for f in self.plan.inputs]


@dataclass(frozen=True, slots=True)
class Judged:
    """The queries that count: their judgements, their candidates in first-stage order, and what segment they are of.

    `digests` identify judgements and candidates: equal ones mean equal content, wherever it lay.
    """

    source: Source
    qrels: Qrels
    first_stage: Mapping[str, list[str]]
    segments: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    digests: Mapping[str, str]


def find(config: CollectionConfig, options: Mapping[str, Any]) -> Source:
    """Looks up what the collection names. Raises InputError before any work is done."""
    qrels = expand(locate(config.qrels_uri, options), ".parquet")
    read_qrels(config.qrels_uri, options)  # found malformed now, not after another collection's hours
    tables = tuple(
        find_table(kind, uri, role, config.columns, options)
        for kind, role, uri in zip(("query", "document"), ("query_id", "doc_id"), config.tables or (), strict=False)
    )
    first = expand(locate(config.candidate_uris[0], options), ".parquet")[0]
    plan = run = None
    if rankings.is_parquet(first):
        queries = None if config.tables is None and not _holds_ids_only(first, config) else "tables"
        layout = "ids" if queries and config.layout == "auto" and config.tables is None else config.layout
        plan = Tables(config.candidate_uris, layout, config.columns, queries, options).plan()
    elif len(config.candidate_uris) > 1:
        raise InputError(f"{config.name}: candidates name several files, and {first.location} is a TREC run; give one")
    else:
        run = rankings.find(config.candidate_uris[0], options)
    attributes: tuple[FileInfo, ...] = ()
    if config.where or config.segments:
        attributes = _attribute_files(config, tables, first, options)
    return Source(config, tuple(qrels), plan, run, tables, attributes, options)


def _holds_ids_only(file: FileInfo, config: CollectionConfig) -> bool:
    finder = Finder(read_footer(file).schema.to_arrow_schema(), config.columns, str(file.location))
    return finder.has("doc_id") and not finder.has("text")


def _attribute_files(
    config: CollectionConfig, tables: Sequence[TextTable], candidates: FileInfo, options: Mapping[str, Any]
) -> tuple[FileInfo, ...]:
    if config.query_columns is not None:
        return tuple(expand(locate(config.query_columns, options), ".parquet"))
    if tables:
        return tables[0].files
    if rankings.is_parquet(candidates):
        return tuple(file for uri in config.candidate_uris for file in expand(locate(uri, options), ".parquet"))
    raise InputError(f"{config.name}: name the table with the columns of where and segments as query_columns")


def read(source: Source) -> Judged:
    """The queries that count, with all but texts. Raises InputError where none is left."""
    config = source.config
    everything = read_qrels(config.qrels_uri, source.options)
    attributes = _read_attributes(source)
    qrels, notes = _choose(config, everything, attributes)
    if source.run is not None:
        first_stage = rankings.read(source.run, qrels, source.options)
    else:
        assert source.plan is not None, "candidates are a run or a table"
        first_stage = rankings.whole_runs(source.plan, qrels, source.options)
    num_missing = sum(not first_stage.get(query) for query in qrels)
    if num_missing == len(qrels):
        raise InputError(
            f"{config.name}: none of the {len(qrels):,} judged queries is among the candidates; compare the query ids"
            f" of {config.qrels_uri} with those of {config.candidate_uris[0]}"
        )
    if num_missing and config.missing_queries == "leave_out":
        qrels = {query: grades for query, grades in qrels.items() if first_stage.get(query)}
    if num_missing:
        how = "count as 0" if config.missing_queries == "zero" else "are left out"
        notes.append(f"{num_missing:,} judged queries have no candidates and {how}")
    segments = {
        column: {query: value for query, value in attributes[column].items() if query in qrels}
        for column in config.segments
    }
    for column, values in segments.items():
        distinct = len(set(values.values()))
        if not 0 < distinct <= _MAX_SEGMENTS:
            raise InputError(
                f"{config.name}: column {column!r} has {distinct:,} values among the judged queries; a column of 1 to"
                f" {_MAX_SEGMENTS} makes segments"
            )
    digests = {
        "qrels": _digest([query, sorted(grades.items())] for query, grades in sorted(qrels.items())),
        "first_stage": _digest([query, first_stage.get(query, [])] for query in sorted(qrels)),
    }
    return Judged(source, qrels, first_stage, segments, tuple(notes), digests)


def _digest(rows: Iterator[Any]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()


def _choose(
    config: CollectionConfig, qrels: Qrels, attributes: Mapping[str, Mapping[str, str]]
) -> tuple[Qrels, list[str]]:
    """The judged queries that the collection asks for, in the order of the judgements, and how they were chosen."""
    notes = []
    chosen = [
        query
        for query in qrels
        if all(attributes[column].get(query) in values for column, values in config.accepted.items())
    ]
    if not chosen:
        wanted = ", ".join(f"{column} in {sorted(values)}" for column, values in config.accepted.items())
        raise InputError(f"{config.name}: none of the {len(qrels):,} judged queries has {wanted}")
    if config.where:
        notes.append(f"{len(chosen):,} of {len(qrels):,} judged queries are chosen by their columns")
    if config.num_queries is not None and config.num_queries < len(chosen):
        notes.append(f"{config.num_queries:,} of {len(chosen):,} queries are drawn by a hash of their ids")
        by = sorted(chosen, key=lambda query: hashlib.sha256(query.encode()).digest())
        drawn = set(by[: config.num_queries])
        chosen = [query for query in chosen if query in drawn]
    return {query: qrels[query] for query in chosen}, notes


def _read_attributes(source: Source) -> dict[str, dict[str, str]]:
    """Column -> query id -> value as text, for the columns that the collection names."""
    columns = list(dict.fromkeys([*source.config.where, *source.config.segments]))
    found: dict[str, dict[str, str]] = {column: {} for column in columns}
    for file in source.attributes:
        rows = _parquet_rows if rankings.is_parquet(file) else _json_rows
        for query, values in rows(file, columns, source.config.columns):
            for column, value in zip(columns, values, strict=True):
                if value is not None:
                    found[column][query] = str(value)
    return found


def _parquet_rows(
    file: FileInfo, columns: Sequence[str], names: Mapping[str, str]
) -> Iterator[tuple[str, Sequence[Any]]]:
    schema = read_footer(file).schema.to_arrow_schema()
    own = {role: name for role, name in names.items() if name in schema.names}
    finder = Finder(schema, own, str(file.location))
    query_id = finder.required("query_id")
    check_id(schema, query_id, str(file.location))
    for column in columns:
        finder.check_present(column, "where and segments")
        if pa.types.is_nested(schema.field(column).type):
            raise InputError(f"{file.location}: column {column!r} is {schema.field(column).type}, not a plain value")
    with naming_damage(f"{file.location} cannot be read"), open_input(file) as stream:
        for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(columns=[query_id, *columns]):
            rows = zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
            yield from zip(ids_as_text(as_binary(batch.column(query_id))).to_pylist(), rows, strict=True)


def _json_rows(file: FileInfo, columns: Sequence[str], names: Mapping[str, str]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Values of the line itself or of its `metadata`, as BEIR has it."""
    for number, body in json_lines(file):
        metadata = body.get("metadata")
        fields = {**metadata, **body} if isinstance(metadata, dict) else body
        values = [fields.get(column) for column in columns]
        yield _json_id(body, "query_id", f"{file.location}, line {number}"), values


def _json_id(body: Mapping[str, Any], role: str, place: str) -> str:
    """The id of a line, as text. Raises InputError where it has none."""
    for name in (*JSON_IDS, *ALIASES[role]):
        if isinstance(body.get(name), str | int):
            return str(body[name])
    raise InputError(f"{place}: no _id; BEIR's lines have _id and text")
