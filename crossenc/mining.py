"""Rules that choose training negatives from a query's candidates. Pure numpy; knows no model, no file and no text.

A cross-encoder learns most from documents that look right and are wrong. A first stage finds them, and among them
stand documents that are right and that nobody judged: the rules here take the hard ones and leave out those that are
probably right. Nothing depends on the order in which candidates come, nor on other queries, nor on a random state.

Names of rules are what people read in a summary: RULES for documents, LEFT_OUT for whole queries.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossenc.ranking import order

#: Why a candidate is no negative -> the sentence that people read. The first that applies counts.
RULES: Mapping[str, str] = {
    "positive": "a known positive of the query",
    "equals_positive": "its text equals a positive's",
    "min_rank": "ranked before min_rank by the first stage",
    "max_rank": "ranked after max_rank by the first stage",
    "no_score": "has no score, and the settings need one",
    "max_score": "scored above max_score",
    "min_score": "scored below min_score",
    "absolute_margin": "scored less than absolute_margin below the positive",
    "relative_margin": "scored less than relative_margin below the positive",
    "positive_percentile": "scored above positive_percentile of the positive",
    "repeated_text": "its text equals that of a better candidate",
    "not_drawn": "would do, but the query has its negatives",
    "query_left_out": "would do, but the query is left out",
}
#: Why a query gives nothing -> the sentence that people read.
LEFT_OUT: Mapping[str, str] = {
    "no_positive": "no document is judged relevant",
    "positive_without_text": "no positive is among the candidates or in the corpus",
    "positive_without_score": "no positive is among the scored candidates, and the settings need its score",
    "no_candidates": "every candidate was refused",
    "too_few_negatives": "the rules leave fewer negatives than are needed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MineSettings:
    """The rules. Ranks count from 1 and are the first stage's; scores are the candidates'.

    Margins hold a negative's score against that of the query's lowest-scored positive, so that no positive is
    contradicted. With `pos` that score, a negative is kept where

        score < pos - absolute_margin
        score < pos - relative_margin * |pos|
        score < pos - (1 - positive_percentile) * |pos|      (= positive_percentile * pos, for a positive score)

    `min_score` and `max_score` are kept themselves. `sampling` takes the best-scored of the documents that are left
    (by rank where there are no scores), or draws them. `random_share` is that part of `num_negatives` that is drawn
    afterwards, from what is then left, or from `others` where they are given. A query with fewer than `min_negatives`
    is left out. `require_scores` keeps documents without a score out even where no rule needs it.

    A cross-encoder's own score as the judge of what may be a negative: RocketQA (arXiv:2010.08191), which takes
    documents that it scores low. A share of the positive's score as the limit: NV-Retriever (arXiv:2407.15831), whose
    best one was 0.95. Drawing from a range of ranks: LCE (arXiv:2101.08751), for rerankers; not from the very first
    ones, where unjudged positives stand: SimANS (arXiv:2210.11773). Margins are in the scores' own unit: look at some
    first.

    Raises ValueError for a value that no query could meet.
    """

    num_negatives: int = 5
    min_negatives: int = 1
    min_rank: int = 1
    max_rank: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    positive_percentile: float | None = None
    sampling: Literal["top", "random"] = "top"
    random_share: float = 0.0
    seed: int = 0
    require_scores: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_negatives <= self.num_negatives:
            raise ValueError(
                f"min_negatives is {self.min_negatives} and num_negatives {self.num_negatives}; both must be at least"
                " 1, and the first not above the second"
            )
        if self.min_rank < 1 or (self.max_rank is not None and self.max_rank < self.min_rank):
            raise ValueError(f"no rank lies from {self.min_rank} to {self.max_rank}; ranks count from 1")
        if self.min_score is not None and self.max_score is not None and self.max_score < self.min_score:
            raise ValueError(f"no score lies from {self.min_score} to {self.max_score}; raise max_score")
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"random_share is {self.random_share}; it is a part of num_negatives, from 0 to 1")
        if self.positive_percentile is not None and not 0 < self.positive_percentile <= 1:
            raise ValueError(f"positive_percentile is {self.positive_percentile}; give a share above 0 and up to 1")
        for name in ("absolute_margin", "relative_margin"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is negative; a margin is a distance below the positive's score")

    @property
    def needs_positive_score(self) -> bool:
        """Whether a rule compares with the positive."""
        return any(m is not None for m in (self.absolute_margin, self.relative_margin, self.positive_percentile))

    @property
    def needs_scores(self) -> bool:
        """Whether a candidate without a score cannot be judged."""
        limits = (self.max_score, self.min_score)
        return self.require_scores or self.needs_positive_score or any(limit is not None for limit in limits)

    @property
    def num_random(self) -> int:
        """How many of the negatives are the random share."""
        return round(self.num_negatives * self.random_share)


@dataclass(frozen=True, slots=True)
class MineQuery:
    """A query's N candidates, each document once, and what is known to be right.

    `text_keys` says which texts are equal: `text_key` of each. `ranks` int64 [N]; `scores` float64 [N], NaN for none.
    `positive_ids` are the judged relevant documents, among the candidates or not; `positive_keys` the keys of the texts
    of those whose text is known. `known_ids` and `known_keys` are the same of documents that are known to be right, but
    are not what the query is to learn.
    """

    query_id: str
    doc_ids: Sequence[str]
    text_keys: Sequence[bytes]
    ranks: NDArray[np.int64]
    scores: NDArray[np.float64]
    positive_ids: Collection[str]
    positive_keys: Collection[bytes]
    known_ids: Collection[str] = ()
    known_keys: Collection[bytes] = ()


@dataclass(frozen=True, slots=True)
class Others:
    """Documents of other queries to draw from, in an order that does not depend on how the input lay."""

    doc_ids: Sequence[str]
    text_keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Mined:
    """What the rules made of a query.

    `negatives` int64, positions among its candidates: hard ones first, the best of them first, then the random share.
    `others` int64, positions among the others. `excluded` counts the remaining candidates by rule:
    `len(negatives) + sum(excluded.values()) == N`. `left_out` is the reason why there are none, else None.
    """

    negatives: NDArray[np.int64]
    others: NDArray[np.int64]
    excluded: Mapping[str, int]
    left_out: str | None = None


def text_key(text: str) -> bytes:
    """Sixteen bytes that are equal for texts equal but for case and white space."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def query_generator(seed: int, query_id: str) -> np.random.Generator:
    """A generator that draws the same for a seed and a query, wherever and whenever."""
    digest = hashlib.blake2b(f"{seed} {query_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def mine(query: MineQuery, settings: MineSettings, others: Others | None = None) -> Mined:
    """Choose the query's negatives by the rules of `settings`: a function of its arguments alone.

    Never a known positive, never a text equal to a positive's, no text twice. Documents out of `others` have neither
    rank nor score: they are only kept apart, by id and by text, from the positives and from the query's own candidates.
    """
    if not query.positive_ids:
        return _leave_out(query, Counter(), "no_positive")
    if not query.positive_keys:
        return _leave_out(query, Counter(), "positive_without_text")
    is_positive = np.array([doc_id in query.positive_ids for doc_id in query.doc_ids], dtype=np.bool_)
    has_score = np.isfinite(query.scores)
    if (settings.needs_positive_score or settings.require_scores) and not (is_positive & has_score).any():
        return _leave_out(query, Counter(), "positive_without_score")
    is_positive |= np.array([doc_id in query.known_ids for doc_id in query.doc_ids], dtype=np.bool_)
    is_scored_positive = is_positive & has_score
    excluded: Counter[str] = Counter()
    left = np.ones(len(query.doc_ids), dtype=np.bool_)
    lowest = float(query.scores[is_scored_positive].min()) if is_scored_positive.any() else np.nan
    for rule, applies in _rules(query, settings, is_positive, lowest):
        excluded[rule] = int((left & applies).sum())
        left &= ~applies
    usable = _first_of_each_text(query, _by_hardness(query, left))
    excluded["repeated_text"] = int(left.sum()) - len(usable)
    negatives, drawn = _choose(query, settings, usable, others)
    if len(negatives) + len(drawn) < settings.min_negatives:
        return _leave_out(query, excluded, "too_few_negatives")
    excluded["not_drawn"] = len(usable) - len(negatives)
    return Mined(negatives, drawn, +excluded)


def _leave_out(query: MineQuery, excluded: Counter[str], reason: str) -> Mined:
    excluded["query_left_out"] = len(query.doc_ids) - excluded.total()
    nothing = np.empty(0, dtype=np.int64)
    return Mined(nothing, nothing, +excluded, reason)


def _rules(
    query: MineQuery, settings: MineSettings, is_positive: NDArray[np.bool_], lowest_positive: float
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Each rule that is set, in the order of RULES, with the candidates that it excludes, bool [N]."""
    scores, ranks = query.scores, query.ranks
    right = {*query.positive_keys, *query.known_keys}
    equals = np.array([key in right for key in query.text_keys], dtype=np.bool_)
    rules = [("positive", is_positive), ("equals_positive", equals), ("min_rank", ranks < settings.min_rank)]
    if settings.max_rank is not None:
        rules.append(("max_rank", ranks > settings.max_rank))
    if settings.needs_scores:
        rules.append(("no_score", ~np.isfinite(scores)))
    if settings.max_score is not None:
        rules.append(("max_score", scores > settings.max_score))
    if settings.min_score is not None:
        rules.append(("min_score", scores < settings.min_score))
    margins = {"absolute_margin": settings.absolute_margin}
    size = abs(lowest_positive)
    margins["relative_margin"] = None if settings.relative_margin is None else settings.relative_margin * size
    share = settings.positive_percentile
    margins["positive_percentile"] = None if share is None else (1 - share) * size
    rules += [(name, scores >= lowest_positive - margin) for name, margin in margins.items() if margin is not None]
    return rules


def _by_hardness(query: MineQuery, left: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of the documents that are left: by score, those without one last; then by rank and document id."""
    ordered = []
    for chosen in (left & np.isfinite(query.scores), left & ~np.isfinite(query.scores)):
        at = np.flatnonzero(chosen)
        scores = np.nan_to_num(query.scores[at], nan=0.0)
        ordered.append(at[order(scores, query.ranks[at], [query.doc_ids[i] for i in at.tolist()])])
    return np.concatenate(ordered)


def _first_of_each_text(query: MineQuery, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    first: dict[bytes, int] = {}
    for position in positions.tolist():
        first.setdefault(query.text_keys[position], position)
    return np.array(list(first.values()), dtype=np.int64)


def _choose(
    query: MineQuery, settings: MineSettings, usable: NDArray[np.int64], others: Others | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the negatives among the candidates and among the others. `usable` comes hardest first."""
    generator = query_generator(settings.seed, query.query_id)
    num_hard = settings.num_negatives - settings.num_random
    if settings.sampling == "top":
        hard, rest = usable[:num_hard], usable[num_hard:]
    else:
        drawn = np.zeros(len(usable), dtype=np.bool_)
        drawn[generator.permutation(len(usable))[:num_hard]] = True
        hard, rest = usable[drawn], usable[~drawn]
    nothing = np.empty(0, dtype=np.int64)
    if not settings.num_random:
        return hard, nothing
    if others is None:
        random = rest[np.sort(generator.permutation(len(rest))[: settings.num_random])]
        return np.concatenate([hard, random]), nothing
    return hard, _draw_others(query, settings.num_random, others, generator)


def _draw_others(query: MineQuery, num: int, others: Others, generator: np.random.Generator) -> NDArray[np.int64]:
    own = {*query.doc_ids, *query.positive_ids, *query.known_ids}
    keys = {*query.positive_keys, *query.known_keys, *query.text_keys}
    chosen: list[int] = []
    for position in generator.permutation(len(others.doc_ids)).tolist():
        if len(chosen) == num:
            break
        if others.doc_ids[position] not in own and others.text_keys[position] not in keys:
            keys.add(others.text_keys[position])
            chosen.append(position)
    return np.array(chosen, dtype=np.int64)
