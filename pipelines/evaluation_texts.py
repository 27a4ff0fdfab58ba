"""The texts of an evaluation: laid down as a rerank job reads them, and looked up to be shown.

Only candidates of the queries that count are laid down, under names that carry a digest of their content. It knows
nothing of models and measures.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossenc.errors import RunConflictError
from pipelines.evaluation_inputs import Judged, Source
from pipelines.inputs import naming_damage, read_batches
from pipelines.layout import Columns
from pipelines.plan import Plan
from pipelines.rows import flatten
from pipelines.schemas import to_parquet
from pipelines.storage import FileInfo, Location, expand, locate, open_input, put_new
from pipelines.texts import as_binary, default_cache, find_table, open_store

_PART_BYTES = 64 * 2**20
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Prepared:
    """The candidates with their texts, as a rerank job reads them: settings of RerankConfig, and a digest of it all."""

    settings: Mapping[str, Any]
    digest: str


def prepare(judged: Judged, folder: Location, depth: int) -> Prepared:
    """Lays the first `depth` candidates of each query down in `folder` as a rerank job reads them.

    Equal content has equal names, so what is there already is used. The source must have texts.
    """
    wanted = {query: docs[:depth] for query, docs in judged.first_stage.items()}
    source = judged.source
    if not source.tables:
        assert source.plan is not None, "only tables of candidates hold texts"
        files = [_store(folder, "candidates", data) for data in _pairs_parts(source, source.plan, wanted)]
        uris = tuple(uri for uri, _ in files)
        return Prepared({"candidates": uris, "layout": "pairs"}, _combined(digest for _, digest in files))
    roles = ("query_id", "doc_id", "query", "text", "title")
    names = {role: name for role, name in source.config.columns.items() if role in roles}
    candidates, digest = _store(folder, "candidates", to_parquet(_ids_table(wanted, names)))
    settings: dict[str, Any] = {"candidates": candidates, "layout": "ids", "columns": names}
    assert source.config.tables is not None, "there are tables"
    settings["queries"], settings["corpus"] = source.config.tables
    digests = [digest, *(table.digest for table in source.tables)]
    return Prepared(settings, _combined(digests))


def _combined(digests: Any) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _store(folder: Location, name: str, data: bytes) -> tuple[str, str]:
    """Stores a file under a name with its digest; returns its URI and the digest."""
    digest = hashlib.sha256(data).hexdigest()
    place = folder / f"{name}-{digest[:16]}.parquet"
    if put_new(place, data) != data:
        raise RunConflictError(f"{place} is not what was written there; start over with --new-run")
    return place.uri, digest


def _ids_table(wanted: Mapping[str, Sequence[str]], names: Mapping[str, str]) -> pa.Table:
    rows = [(query, doc_id, rank) for query, docs in wanted.items() for rank, doc_id in enumerate(docs, start=1)]
    query_ids, doc_ids, ranks = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            names.get("query_id", "query_id"): pa.array(query_ids, pa.string()),
            names.get("doc_id", "doc_id"): pa.array(doc_ids, pa.string()),
            "rank": pa.array(ranks, pa.int64()),
        }
    )


def _pairs_parts(source: Source, plan: Plan, wanted: Mapping[str, Sequence[str]]) -> Iterator[bytes]:
    """The wanted candidates of tables that hold texts, as Parquet files of pairs, in the order of the input."""
    ranks = {
        (query.encode(), doc_id.encode()): rank
        for query, docs in wanted.items()
        for rank, doc_id in enumerate(docs, start=1)
    }
    queries = pa.array([query.encode() for query in wanted], pa.large_binary())
    tables: list[pa.Table] = []
    for file in source.candidates:
        for batch in _candidate_batches(file, plan.columns):
            chosen = batch.filter(pc.is_in(as_binary(batch.column(plan.columns.query_id)), queries))
            if chosen.num_rows:
                tables.append(_pairs(chosen, plan.columns, ranks))
            if sum(table.nbytes for table in tables) > _PART_BYTES:
                yield to_parquet(pa.concat_tables(tables))
                tables = []
    if tables:
        yield to_parquet(pa.concat_tables(tables))


def _candidate_batches(file: FileInfo, columns: Columns) -> Iterator[pa.RecordBatch]:
    names = columns.to_read()
    with naming_damage(f"{file.location} cannot be read"), open_input(file) as stream:
        max_rows = 64 if columns.layout == "nested" else _BATCH_ROWS
        yield from read_batches(stream, pq.read_metadata(stream), names, names, max_rows=max_rows)


def _pairs(batch: pa.RecordBatch, columns: Columns, ranks: Mapping[tuple[bytes, bytes], int]) -> pa.Table:
    """The ranked candidates of a batch. Texts stay bytes: whether they are texts is for the run to say."""
    raw = flatten(batch, columns, 0)
    query_ids, doc_ids = raw.query_id.to_pylist(), raw.doc_id.to_pylist()
    found = [ranks.get(pair) for pair in zip(query_ids, doc_ids, strict=True)]
    assert raw.query is not None and raw.text is not None, "the layout holds texts"
    table = {
        "query_id": as_binary(raw.query_id).cast(pa.large_string()),
        "query": as_binary(raw.query),
        "doc_id": _valid_text(as_binary(raw.doc_id)),
        "text": as_binary(raw.text),
        "rank": pa.array(found, pa.int64()),
    }
    if raw.title is not None:
        table["title"] = as_binary(raw.title)
    return pa.table(table).filter(pa.array(np.array([rank is not None for rank in found], dtype=bool)))


def _valid_text(ids: pa.Array) -> pa.Array:
    """Ids as text; bytes that are none become null: no ranking names them."""
    try:
        return ids.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in ids.to_pylist()], pa.large_string())


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts to show, cut to some length: of queries, and of (query id, document id)."""

    queries: Mapping[str, str]
    documents: Mapping[tuple[str, str], str]


def look_up(
    prepared: Prepared, pairs: Collection[tuple[str, str]], options: Mapping[str, Any], max_text_bytes: int, length: int
) -> Texts:
    """The texts of `pairs` and of their queries, cut to `length` characters; what there is no text of is left out."""
    settings = prepared.settings
    if settings["layout"] == "pairs":
        return _texts_of_pairs(settings["candidates"], set(pairs), options, length)

    def lookup(kind: str, role: str, uri: str, ids: Sequence[str]) -> dict[str, str]:
        table = find_table(kind, uri, role, settings["columns"], options)
        found = open_store(table, default_cache(), max_text_bytes).lookup(ids)
        texts = {id_: _shown(text, length) for id_, (text, _) in zip(ids, found, strict=True)}
        return {id_: text for id_, text in texts.items() if text is not None}

    queries = lookup("query", "query_id", settings["queries"], sorted({query for query, _ in pairs}))
    documents = lookup("document", "doc_id", settings["corpus"], sorted({doc_id for _, doc_id in pairs}))
    return Texts(queries, {pair: documents[pair[1]] for pair in pairs if pair[1] in documents})


def _texts_of_pairs(
    uris: Sequence[str], pairs: Collection[tuple[str, str]], options: Mapping[str, Any], length: int
) -> Texts:
    queries: dict[str, str] = {}
    documents: dict[tuple[str, str], str] = {}
    wanted = pa.array(sorted({query for query, _ in pairs}), pa.large_string())
    for uri in uris:
        with open_input(expand(locate(uri, options), ".parquet")[0]) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.filter(pc.is_in(batch.column("query_id"), wanted)).to_pylist():
                    query, document = _shown(row["query"], length), _shown(_with_title(row), length)
                    if query is not None:
                        queries[row["query_id"]] = query
                    if document is not None and (row["query_id"], row["doc_id"]) in pairs:
                        documents[row["query_id"], row["doc_id"]] = document
    return Texts(queries, documents)


def _with_title(row: Mapping[str, Any]) -> bytes | None:
    text: bytes | None = row["text"]
    title: bytes | None = row.get("title")
    return text if not title or text is None else title + b" " + text


def _shown(text: bytes | int | None, length: int) -> str | None:
    """The start of a text; None where there is no text to show."""
    if not isinstance(text, bytes):
        return None
    decoded = text[: 4 * length + 4].decode(errors="replace")
    return decoded if len(decoded) <= length else decoded[:length] + " …"
