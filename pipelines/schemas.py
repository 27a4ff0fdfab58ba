"""The Arrow schemas of what a run writes, and of the rows that travel between its stages.

`results/` is the product: readable by anything, one row per ranked document. `completeness/` accounts for every
query, `quarantine/` for every refused candidate.
"""

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from crossenc.errors import StorageError

#: Why a candidate was refused -> the sentence that people read.
REASONS: Mapping[str, str] = {
    "query_id_missing": "the query id is null or empty",
    "doc_id_missing": "the document id is null or empty",
    "id_not_utf8": "an id is not valid UTF-8",
    "id_too_large": "an id is larger than 64 KiB",
    "query_missing": "the query text is null",
    "query_empty": "the query text is empty or only white space",
    "query_too_large": "the query text is larger than max_text_bytes",
    "query_not_utf8": "the query text is not valid UTF-8",
    "query_unknown": "the query id is not in the queries table",
    "query_ambiguous": "the queries table has two texts for the query id",
    "document_missing": "the document text is null",
    "document_empty": "the document text is empty or only white space",
    "document_too_large": "the document text is larger than max_text_bytes",
    "document_not_utf8": "the document text is not valid UTF-8",
    "document_unknown": "the document id is not in the corpus table",
    "document_ambiguous": "the corpus table has two texts for the document id",
    "list_empty": "the nested row has no documents",
    "list_length_mismatch": "the lists of a nested row have different lengths",
    "first_stage_score_missing": "interpolation needs a first-stage score of at most 1e300 and this candidate has none",
    "duplicate_document": "the query has this document more than once; the best first-stage rank is kept",
    "score_not_finite": "the model gave NaN or infinity",
    "scoring_error": "the model raised an error on this candidate alone",
    "scoring_crash": "the scoring process died on this candidate alone",
    "unreadable": "the input file is damaged at this row",
    "query_not_text": "the query is something else than text",
    "document_not_text": "the document is something else than text",
    "documents_refused": "none of the row's documents can be used, or not the positive, or no negative",
    "label_not_finite": "the label is missing or not a finite number",
    "weight_not_finite": "the weight is missing, negative or not a finite number",
    "line_broken": "the line is not one JSON object, or has not three fields",
    "line_too_large": "the line is longer than 64 MiB",
}


#: Those of REASONS that are about the model or the machine: the candidate itself could be scored.
SCORING_FAILURES = ("score_not_finite", "scoring_error", "scoring_crash")


def thin_schema(pass_through: Sequence[pa.Field]) -> pa.Schema:
    """Rows after scoring: a candidate each, without texts and tokens. `item` is its place in a nested list.

    Exactly one of `model_score` and `reason` is set.
    """
    return pa.schema(
        [
            pa.field("query_id", pa.large_string()),
            pa.field("doc_id", pa.large_string()),
            pa.field("file", pa.int32()),
            pa.field("row", pa.int64()),
            pa.field("item", pa.int32()),
            pa.field("stage_rank", pa.int64()),
            pa.field("stage_score", pa.float64()),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
            *pass_through,
            pa.field("model_score", pa.float32()),
        ]
    )


#: Fields that the tokenising stage adds for the scoring stage; refused candidates have an empty list and null.
TOKEN_FIELDS = (
    pa.field("input_ids", pa.large_list(pa.int32())),
    pa.field("token_type_ids", pa.large_list(pa.uint8())),
    pa.field("truncated", pa.bool_()),
)


def results_schema(
    query_id: pa.DataType, doc_id: pa.DataType, pass_through: Sequence[pa.Field], interpolated: bool
) -> pa.Schema:
    """One row per ranked document: queries in input order, documents by rank.

    `score` orders the documents (the model's, or the interpolated one; then `model_score` holds the model's).
    """
    model_score = [pa.field("model_score", pa.float32(), nullable=False)] if interpolated else []
    return pa.schema(
        [
            pa.field("query_id", query_id, nullable=False),
            pa.field("doc_id", doc_id, nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("score", pa.float64() if interpolated else pa.float32(), nullable=False),
            *model_score,
            pa.field("first_stage_rank", pa.int64(), nullable=False),
            pa.field("first_stage_score", pa.float64()),
            *pass_through,
        ]
    )


def completeness_schema(query_id: pa.DataType) -> pa.Schema:
    """One row per query: `num_candidates == num_scored + num_refused`, `num_results` of them were kept."""
    counts = ("num_candidates", "num_scored", "num_refused", "num_results")
    return pa.schema([pa.field("query_id", query_id), *(pa.field(name, pa.int64(), nullable=False) for name in counts)])


#: One row per refused candidate, with its place in the input and never its text.
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("item", pa.int32()),
    ]
)


def means_damage(error: pa.ArrowException | OSError) -> bool:
    """Whether an error from reading Parquet is about its content, and not the store's or the disk's.

    Arrow reports a footer or page that it cannot decode as a bare OSError; those of a store have a class of their
    own, those of a disk a number.
    """
    if isinstance(error, StorageError | FileNotFoundError | PermissionError):
        return False
    return not isinstance(error, OSError) or error.errno is None


def to_ipc(table: pa.Table) -> bytes:
    """`table` as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(data: pa.Buffer | bytes) -> pa.Table:
    """The table in an Arrow IPC stream, without copying."""
    return pa.ipc.open_stream(data).read_all()


def to_parquet(table: pa.Table, *, row_group_rows: Sequence[int] | None = None) -> bytes:
    """`table` as a Parquet file with page checksums; equal tables give equal bytes.

    `row_group_rows`, where given, are the lengths of its row groups, which may be 0.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", write_page_checksum=True) as writer:
        if row_group_rows is None:
            writer.write_table(table)
        else:
            start = 0
            for rows in row_group_rows:
                writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
                start += rows
    return buffer.getvalue()
