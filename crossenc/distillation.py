"""What a student learns of its teachers: one score out of several, and lists of documents of all levels of score.

Pure numpy; knows no model, no file and no text. Nothing depends on the order in which candidates come, nor on other
queries, nor on a random state.

Shape letters: T teachers, N candidates of a query. Scores are logits: what comes after a sigmoid can hardly tell a good
document from the best.

Names of rules are what people read in a summary: RULES for documents, LEFT_OUT for whole queries.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossenc.mining import query_generator
from crossenc.ranking import order

#: Why a candidate is in no list -> the sentence that people read. The first that applies counts.
RULES: Mapping[str, str] = {
    "no_score": "not every teacher gave it a score",
    "repeated_text": "its text equals that of a better document",
    "not_drawn": "would do, but the list is full",
    "query_left_out": "would do, but the query is left out",
}
#: Why a query gives no list -> the sentence that people read.
LEFT_OUT: Mapping[str, str] = {
    "no_candidates": "every candidate was refused",
    "too_few_documents": "fewer than two documents have a score: there is nothing to compare",
}
#: A list of one document teaches nothing to a loss that compares.
_FEWEST_DOCUMENTS = 2


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of a teacher's scores: their number, mean and sum of squared deviations from it."""

    num_scores: int = 0
    mean: float = 0.0
    sum_squares: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 where all scores are equal, or there are none."""
        return math.sqrt(self.sum_squares / self.num_scores) if self.num_scores else 0.0


def scale_of(scores: NDArray[np.floating]) -> Scale:
    """The scale of some scores, which are finite."""
    if not len(scores):
        return Scale()
    values = scores.astype(np.float64)
    mean = float(values.mean())
    return Scale(len(values), mean, float(((values - mean) ** 2).sum()))


def merge_scales(scales: Iterable[Scale]) -> Scale:
    """The scale of all scores together, by the parallel formula of Chan et al. 1979, without loss of precision."""
    whole = Scale()
    for part in scales:
        num_scores = whole.num_scores + part.num_scores
        if part.num_scores:
            difference = part.mean - whole.mean
            between = difference**2 * whole.num_scores * part.num_scores / num_scores
            mean = whole.mean + difference * part.num_scores / num_scores
            whole = Scale(num_scores, mean, whole.sum_squares + part.sum_squares + between)
    return whole


def ensemble(scores: NDArray[np.float64], scales: Sequence[Scale]) -> NDArray[np.float64]:
    """One score [N] out of those of all teachers [T, N]: their mean on the first one's scale. NaN where one is NaN.

    `scales` [T] are of all scores that each teacher gave. Teachers differ in how wide their logits spread, and in a
    plain mean the widest alone would decide; so each is shifted and stretched to the mean and the deviation of the
    first, once for all queries: within a query it keeps how sure it is. The scale of a single teacher is thus its own,
    as a loss needs it that copies probabilities. A teacher that gives one score to everything counts as no opinion.
    """
    if len(scores) == 1:
        only: NDArray[np.float64] = scores[0]
        return only
    first = scales[0]
    standard = [(own - scale.mean) / (scale.deviation or 1.0) for own, scale in zip(scores, scales, strict=True)]
    mean: NDArray[np.float64] = np.mean(standard, axis=0)
    return first.mean + first.deviation * mean


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How a query's list is drawn.

    The range from a query's lowest score to its highest is cut into `strata` of equal width, and a list of up to
    `documents` takes as many from each as there are, so that it shows the student all levels. Strata are a query's own,
    for the losses compare documents of one query: over all queries together an easy query's documents would fill one
    stratum. They are of equal width, not of equal numbers, for a first stage brings few good documents and many bad
    ones, and equal numbers would be drawing at random. The `keep_top` best are always in the list.

    Raises ValueError for a value that gives no list.
    """

    documents: int = 8
    strata: int = 4
    keep_top: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.documents < _FEWEST_DOCUMENTS:
            raise ValueError(f"documents is {self.documents}; a list compares at least {_FEWEST_DOCUMENTS}")
        if self.strata < 1:
            raise ValueError(f"strata is {self.strata}; give 1 or more")
        if not 0 <= self.keep_top <= self.documents:
            raise ValueError(f"keep_top is {self.keep_top}; it is a part of the {self.documents} documents")


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """A query's N candidates, each document once.

    `text_keys` says which texts are equal (crossenc.mining.text_key); `ranks` int64 [N] are the first stage's, for
    ties; `scores` float64 [N], NaN for none. `positive_ids` are the judged relevant documents, among the candidates or
    not.
    """

    query_id: str
    doc_ids: Sequence[str]
    text_keys: Sequence[bytes]
    ranks: NDArray[np.int64]
    scores: NDArray[np.float64]
    positive_ids: Collection[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """A query's list, as positions among its candidates: positives first, then the others, the best of each first.

    `excluded` counts the remaining candidates by rule: `len(chosen) + sum(excluded.values()) == N`. `left_out` is the
    reason why there is no list, else None.
    """

    chosen: NDArray[np.int64]
    excluded: Mapping[str, int]
    left_out: str | None = None


def sample(query: SampleQuery, settings: SampleSettings) -> Sample:
    """Draw the query's list: a function of its arguments alone, whatever the order of the candidates.

    Judged positives with a score are always in it, up to its size. No text comes twice.
    """
    scored = np.flatnonzero(np.isfinite(query.scores))
    by_score = scored[order(query.scores[scored], query.ranks[scored], [query.doc_ids[i] for i in scored.tolist()])]
    is_positive = np.array([doc_id in query.positive_ids for doc_id in query.doc_ids], dtype=np.bool_)
    usable = _first_of_each_text(query, by_score, is_positive)
    excluded = Counter({"no_score": len(query.doc_ids) - len(scored), "repeated_text": len(scored) - len(usable)})
    if len(usable) < _FEWEST_DOCUMENTS:
        excluded["query_left_out"] = len(usable)
        reason = "too_few_documents" if len(query.doc_ids) else "no_candidates"
        return Sample(np.empty(0, dtype=np.int64), +excluded, reason)
    kept = _draw(query, usable, is_positive[usable], settings)
    excluded["not_drawn"] = len(usable) - len(kept)
    chosen = usable[kept]
    return Sample(np.concatenate([chosen[is_positive[chosen]], chosen[~is_positive[chosen]]]), +excluded)


def _first_of_each_text(
    query: SampleQuery, by_score: NDArray[np.int64], is_positive: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The positions that are left when of equal texts one is kept: a positive, or else the first. Best first."""
    first: dict[bytes, int] = {}
    for position in [*by_score[is_positive[by_score]].tolist(), *by_score[~is_positive[by_score]].tolist()]:
        first.setdefault(query.text_keys[position], position)
    return by_score[np.isin(by_score, list(first.values()))]


def _draw(
    query: SampleQuery, usable: NDArray[np.int64], is_positive: NDArray[np.bool_], settings: SampleSettings
) -> NDArray[np.int64]:
    """Places in `usable`, which comes best first, of the documents in the list, rising."""
    stratum = strata_of(query.scores[usable], settings.strata)
    positives = np.flatnonzero(is_positive)[: settings.documents].tolist()
    kept = [*positives, *(place for place in range(min(settings.keep_top, len(usable))) if not is_positive[place])]
    kept = kept[: settings.documents]
    generator = query_generator(settings.seed, query.query_id)
    waiting: list[list[int]] = [[] for _ in range(settings.strata)]
    for place in generator.permutation(len(usable)).tolist():
        if place not in kept:
            waiting[stratum[place]].append(place)
    num_taken = Counter(stratum[kept].tolist())
    while len(kept) < settings.documents and any(waiting):
        # The stratum with the fewest in the list is next, the better one of two.
        chosen = min((s for s in range(settings.strata) if waiting[s]), key=lambda s: (num_taken[s], s))
        num_taken[chosen] += 1
        kept.append(waiting[chosen].pop())
    return np.sort(np.array(kept, dtype=np.int64))


def strata_of(scores: NDArray[np.float64], num_strata: int) -> NDArray[np.int64]:
    """The stratum of each score, int64: 0 for the highest. All are of one width; equal scores are all in stratum 0."""
    low, high = scores.min(), scores.max()
    if high == low:
        return np.zeros(len(scores), dtype=np.int64)
    share = (high - scores) / (high - low)
    strata: NDArray[np.int64] = np.minimum((share * num_strata).astype(np.int64), num_strata - 1)
    return strata
