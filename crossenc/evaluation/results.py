"""What an evaluation found: systems on collections, as figures. Plain data, without a text of any query or document.

Everything is JSON-friendly: numbers, strings, tuples, string-keyed mappings, and None for what could not be computed.
A *system* is anything that ranks: a model, a ranking that is there already, or the first stage itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: The name of the system that leaves the candidates as they are.
FIRST_STAGE = "first_stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean of a measure over queries, and its 95 % bootstrap interval (None for fewer than two queries)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A system minus another one, over the same queries.

    `low` and `high` bound the mean difference (95 % bootstrap). `p_randomisation` and `p_t` are two-sided; `p_holm` is
    Holm's correction of the former for everything that was compared beside it. None for fewer than two queries.
    """

    mean: float
    low: float | None
    high: float | None
    p_t: float | None
    p_randomisation: float | None
    p_holm: float | None
    num_better: int
    num_worse: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measure of a system. `difference` is to the baseline; None for the baseline, and for judged@k, which says how
    much is known and not how good a ranking is.
    """

    measure: str
    value: Mean
    difference: Difference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthPoint:
    """The main measure when the system orders only the first stage's top `depth`, against the first stage."""

    depth: int
    mean: float
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFigure:
    """The main measure over the queries whose column `column` has the value `value`."""

    column: str
    value: str
    num_queries: int
    mean: float
    difference: Difference | None  # to the baseline; None for the baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """A system on a collection.

    `figures` are in the order of the measures. `depths` is empty for the first stage, and for a ranking that lacks
    too many of its documents. `pairs_per_second` is that of one scorer while it scores, None for what was not scored.
    """

    system: str
    kind: str  # "first_stage", "model" or "ranking"
    source: str  # the model, or where the ranking was read from
    figures: tuple[Figure, ...]
    depths: tuple[DepthPoint, ...]
    segments: tuple[SegmentFigure, ...]
    num_without_ranking: int  # judged queries that this system has no ranking for: they count as 0
    pairs_per_second: float | None
    num_failed: int = 0  # candidates that are not ranked because scoring them failed
    notes: tuple[str, ...] = ()

    def figure(self, measure: str) -> Figure:
        """The figure of `measure`. Raises KeyError where it was not computed."""
        for figure in self.figures:
            if figure.measure == measure:
                return figure
        raise KeyError(measure)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionResult:
    """All systems on one collection. `digests` identify what was judged: equal ones mean the same task."""

    collection: str
    num_queries: int
    num_judgements: int
    num_without_relevant: int  # queries none of whose judged documents is relevant: they count as 0
    num_candidates: int
    systems: tuple[SystemResult, ...]
    digests: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def system(self, name: str) -> SystemResult:
        """The result of the system `name`. Raises KeyError where there is none."""
        for system in self.systems:
            if system.system == name:
                return system
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All systems on all collections. The first of `measures` is the main one."""

    measures: tuple[str, ...]
    baseline: str
    seed: int
    collections: tuple[CollectionResult, ...]
    num_compared: int  # p values that Holm's correction is over

    def collection(self, name: str) -> CollectionResult:
        """The result on the collection `name`. Raises KeyError where there is none."""
        for collection in self.collections:
            if collection.collection == name:
                return collection
        raise KeyError(name)
