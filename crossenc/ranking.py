"""Turning scores into an order: the one place where ties and NaN are decided. Pure numpy; knows no model.

Higher scores come first. Equal scores keep the first stage's order, and what is still equal is ordered by
document id, so an order never depends on how the rows were laid out or batched.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import ScoreError
from crossenc.records import Candidates, Ranking, ScoredDoc


def order(
    scores: NDArray[np.floating[Any]],
    first_stage_ranks: NDArray[np.int64],
    doc_ids: Sequence[str],
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return the positions that sort rows by group, then score (high first), first-stage rank, document id.

    All arguments describe the same P rows; without `groups` all rows are one group. Rows equal in everything
    keep their input order. Scores are compared in the precision they are given in.
    Raises ScoreError at a NaN or infinite score, ValueError when the arguments differ in length.
    """
    num_rows = len(scores)
    if groups is None:
        groups = np.zeros(num_rows, dtype=np.int64)
    if not (scores.shape == (num_rows,) and len(first_stage_ranks) == len(doc_ids) == len(groups) == num_rows):
        raise ValueError(
            f"order needs one score, rank, document id and group per row, got {scores.shape} scores, "
            f"{len(first_stage_ranks)} ranks, {len(doc_ids)} document ids and {len(groups)} groups"
        )
    _require_finite(scores)
    keys = [first_stage_ranks, -scores, groups]
    positions = np.lexsort(keys)
    tied = _tied_rows(keys, positions)
    if len(tied):
        # Document ids are Python strings, slow to sort: only those that decide something become numbers.
        tied_ids = [doc_ids[row] for row in tied]
        number_of_id = {doc_id: number for number, doc_id in enumerate(sorted(set(tied_ids)))}
        id_numbers = np.zeros(num_rows, dtype=np.int64)
        id_numbers[tied] = [number_of_id[doc_id] for doc_id in tied_ids]
        positions = np.lexsort([id_numbers, *keys])
    return positions.astype(np.int64, copy=False)


def rank(candidates: Candidates, scores: NDArray[np.floating[Any]], top_k: int | None = None) -> Ranking:
    """Rank one query's documents by `scores` [N], keeping the best `top_k` (all of them when None).

    The first-stage rank is the position in `candidates`. `top_k=0` gives an empty ranking.
    Raises ScoreError at a NaN or infinite score, ValueError at a negative `top_k` or a wrong score count.
    """
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}; give the number of documents to keep, or None to keep all")
    positions = order(scores, np.arange(len(candidates.doc_ids)), candidates.doc_ids)[:top_k]
    docs = tuple(
        ScoredDoc(candidates.doc_ids[position], place, float(scores[position]))
        for place, position in enumerate(positions.tolist(), start=1)
    )
    return Ranking(candidates.query_id, docs)


def _require_finite(scores: NDArray[np.floating[Any]]) -> None:
    not_finite = np.flatnonzero(~np.isfinite(scores))
    if len(not_finite):
        raise ScoreError(
            f"{len(not_finite)} of {len(scores)} scores are NaN or infinite, first at row {not_finite[0]}: "
            "set these rows aside, or score them again in float32, before ranking"
        )


def _tied_rows(keys: Sequence[NDArray[Any]], positions: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows whose keys all equal a neighbour's in the sorted order."""
    equal_to_next = np.ones(max(0, len(positions) - 1), dtype=np.bool_)
    for key in keys:
        in_order = key[positions]
        equal_to_next &= in_order[1:] == in_order[:-1]
    tied = np.zeros(len(positions), dtype=np.bool_)
    tied[1:] |= equal_to_next
    tied[:-1] |= equal_to_next
    return positions[tied]
