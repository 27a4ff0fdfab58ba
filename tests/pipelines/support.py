"""Candidates in every layout, and a shortcut through planning and preparing; for the tests of the input side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.testing import FakeTokenizer
from pipelines import plan as plans
from pipelines.config import RerankConfig
from pipelines.inputs import list_candidates, scan
from pipelines.plan import Plan
from pipelines.prepare import ReadSettings, Tokenizer, pass_through_fields, prepare
from pipelines.texts import find_table


@dataclass(frozen=True)
class Doc:
    """A candidate of a query."""

    doc_id: Any
    text: Any
    title: Any = None
    rank: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class Query:
    """A query with its candidates."""

    query_id: Any
    text: Any
    docs: tuple[Doc, ...]


_DOC_FIELDS = {"doc_id": None, "text": pa.string(), "title": pa.string(), "rank": pa.int64(), "score": pa.float64()}


def as_pairs(queries: Sequence[Query], id_type: pa.DataType | None = None) -> pa.Table:
    """One row per candidate, with the texts."""
    rows = [(query, doc) for query in queries for doc in query.docs]
    id_type = id_type or pa.string()
    columns = {
        "query_id": pa.array([query.query_id for query, _ in rows], id_type),
        "query": pa.array([query.text for query, _ in rows], pa.string()),
    }
    for name, kind in _DOC_FIELDS.items():
        columns[name] = pa.array([getattr(doc, name) for _, doc in rows], kind or id_type)
    return pa.table(columns)


def as_nested_lists(queries: Sequence[Query], id_type: pa.DataType | None = None) -> pa.Table:
    """One row per query, with a list column for each property of its candidates."""
    id_type = id_type or pa.string()
    names = {"doc_id": "doc_ids", "text": "documents", "title": "titles", "rank": "ranks", "score": "scores"}
    columns = _query_columns(queries, id_type)
    for field, kind in _DOC_FIELDS.items():
        values = [[getattr(doc, field) for doc in query.docs] for query in queries]
        columns[names[field]] = pa.array(values, pa.list_(kind or id_type))
    return pa.table(columns)


def as_nested_structs(queries: Sequence[Query], id_type: pa.DataType | None = None) -> pa.Table:
    """One row per query, with one list of structs."""
    id_type = id_type or pa.string()
    struct = pa.struct([(name, kind or id_type) for name, kind in _DOC_FIELDS.items()])
    values = [[{name: getattr(doc, name) for name in _DOC_FIELDS} for doc in query.docs] for query in queries]
    return pa.table(_query_columns(queries, id_type) | {"documents": pa.array(values, pa.list_(struct))})


def _query_columns(queries: Sequence[Query], id_type: pa.DataType) -> dict[str, pa.Array]:
    return {
        "query_id": pa.array([query.query_id for query in queries], id_type),
        "query": pa.array([query.text for query in queries], pa.string()),
    }


def as_ids(queries: Sequence[Query], id_type: pa.DataType | None = None) -> tuple[pa.Table, pa.Table, pa.Table]:
    """One row per candidate without texts, the table of queries and that of documents."""
    pairs = as_pairs(queries, id_type)
    docs = {doc.doc_id: doc for query in queries for doc in query.docs if doc.doc_id is not None}
    corpus = {
        "doc_id": pa.array(list(docs), pairs.schema.field("doc_id").type),
        "text": pa.array([doc.text for doc in docs.values()], pa.string()),
        "title": pa.array([doc.title for doc in docs.values()], pa.string()),
    }
    columns = _query_columns(queries, pairs.schema.field("query_id").type)
    texts = pa.table({"query_id": columns["query_id"], "text": columns["query"]})
    return pairs.select(["query_id", "doc_id", "rank", "score"]), texts, pa.table(corpus)


def write(path: Path, table: pa.Table, **options: Any) -> str:
    """Writes `table` with page checksums; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"write_page_checksum": True, **options})
    return str(path)


def job(candidates: str | Sequence[str], **settings: Any) -> RerankConfig:
    """A rerank job on these candidates whose other settings do not matter."""
    return RerankConfig.model_validate({"candidates": candidates, "model": "fake", "output": "/nowhere", **settings})


def make_plan(config: RerankConfig, shard_candidates: int | None = None) -> Plan:
    """The plan of `config`, not stored."""
    inputs = scan(config, list_candidates(config))
    return plans.make(inputs, {}, shard_candidates=shard_candidates, force_two_phase=False)


def read_settings(config: RerankConfig, plan: Plan, cache: Path) -> ReadSettings:
    """What `prepare` needs to know."""
    file_schema = pq.read_schema(plan.inputs[0].uri.removeprefix("file://")) if config.pass_through else pa.schema([])
    tables = {"queries": None, "corpus": None}
    if config.queries and config.corpus:
        options = config.storage_options
        tables["queries"] = find_table("query", config.queries, "query_id", config.columns, options)
        tables["corpus"] = find_table("document", config.corpus, "doc_id", config.columns, options)
    return ReadSettings(
        columns=plan.columns,
        pass_through=pass_through_fields(file_schema, plan.columns),
        storage_options=dict(config.storage_options),
        max_text_bytes=config.max_text_bytes,
        needs_score=config.interpolate is not None,
        cache=cache,
        **tables,
    )


def prepared(
    config: RerankConfig, cache: Path, shard_candidates: int | None = None, tokenizer: Tokenizer | None = None
) -> pa.Table:
    """The rows of all shards of `config`, in the order of the shards."""
    plan = make_plan(config, shard_candidates)
    settings = read_settings(config, plan, cache)
    tokenizer = tokenizer or FakeTokenizer()
    tables = [prepare(shard, plan.inputs[shard.file], settings, tokenizer).rows for shard in plan.shards]
    return pa.concat_tables(tables)
