"""Builders of rows as they are between scoring and ranking, shared by the tests of the output side."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.commit import CommitSettings
from pipelines.rank import RankSettings
from pipelines.schemas import TOKEN_FIELDS, thin_schema
from pipelines.storage import Location, locate

SETTINGS = RankSettings(
    top_k=None, weight=None, query_id_type="string", doc_id_type="string", files=("file:///in/a", "file:///in/b")
)


def thin_rows(*rows: dict[str, object], pass_through: Sequence[pa.Field] = ()) -> pa.Table:
    """Scored rows: what a dict does not say is null, but for the place, which counts up."""
    schema = thin_schema(pass_through)
    return pa.Table.from_pylist(
        [{"file": 0, "row": i} | row for i, row in enumerate(rows)], schema=schema
    ).combine_chunks()


def scored(query_id: str, doc_id: str, score: float, rank: int | None = None, **more: object) -> dict[str, object]:
    return {"query_id": query_id, "doc_id": doc_id, "model_score": score, "stage_rank": rank, **more}


def refused(query_id: str | None, doc_id: str | None, reason: str, **more: object) -> dict[str, object]:
    return {"query_id": query_id, "doc_id": doc_id, "reason": reason, **more}


def with_tokens(rows: pa.Table, num_tokens: int = 3) -> pa.Table:
    """`rows` as the scoring stage hands them on: every good one with this many tokens."""
    lengths = [num_tokens if reason is None else 0 for reason in rows.column("reason").to_pylist()]
    columns = [
        pa.array([[7] * length for length in lengths], TOKEN_FIELDS[0].type),
        pa.nulls(rows.num_rows, TOKEN_FIELDS[1].type),
        pa.array(np.zeros(rows.num_rows, dtype=bool)),
    ]
    for field, column in zip(TOKEN_FIELDS, columns, strict=True):
        rows = rows.append_column(field, column)
    return rows


def commit_settings(output: object, num_buckets: int = 0, rank: RankSettings = SETTINGS) -> CommitSettings:
    location = output if isinstance(output, Location) else locate(str(output))
    return CommitSettings(
        output=location, fingerprint="f" * 64, rank=rank, num_buckets=num_buckets, score_range=(0.0, 1.0)
    )
