"""Compares systems on judged collections: rankings in, an Evaluation out. A pure function of its arguments.

Conventions are those of `metrics` (trec_eval's with -c): every judged query counts, one without a ranking as 0, and an
unjudged document is not relevant. The first stage is always among the systems. Shapes: Q queries, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import ConfigError
from crossenc.evaluation.depths import rerank_top, useful_depths
from crossenc.evaluation.metrics import per_query
from crossenc.evaluation.results import (
    FIRST_STAGE,
    CollectionResult,
    DepthPoint,
    Difference,
    Evaluation,
    Figure,
    Mean,
    SegmentFigure,
    SystemResult,
)
from crossenc.evaluation.significance import PairedTest, mean_intervals, paired_comparisons
from crossenc.evaluation.significance import holm as holm_adjusted
from crossenc.records import Qrels

#: Query id -> document ids, best first.
Run = Mapping[str, Sequence[str]]
#: Measure -> query id -> value.
Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A ranking to judge. Without `has_depths` it is not looked at by depths.

    `num_failed` candidates are not in it because scoring them failed.
    """

    name: str
    kind: str
    source: str
    run: Run
    has_depths: bool = True
    pairs_per_second: float | None = None
    num_failed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Judged queries with the first stage's ranking and the systems to compare on them.

    Exactly the queries of `qrels` count. `segments` maps a column to each query's value; a query without one belongs
    to no segment of that column. `digests` and `notes` go into the result as they are.
    """

    name: str
    qrels: Qrels
    first_stage: Run
    systems: tuple[System, ...]
    segments: Mapping[str, Mapping[str, str]]
    digests: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def all_systems(self) -> tuple[System, ...]:
        """The first stage, and then the systems."""
        first = System(name=FIRST_STAGE, kind="first_stage", source="", run=self.first_stage, has_depths=False)
        return (first, *self.systems)


def is_coverage(measure: str) -> bool:
    """Whether a measure says how much is judged, and not how good a ranking is."""
    return measure.partition("@")[0].lower() == "judged"


def values_of(collection: Collection, measures: Sequence[str]) -> dict[str, Values]:
    """System -> measure -> query id -> value, for every judged query and all systems of the collection."""
    return {system.name: per_query(measures, collection.qrels, system.run) for system in collection.all_systems}


def evaluate(
    collections: Sequence[Collection],
    values: Mapping[str, Mapping[str, Values]],
    *,
    depths: Sequence[int],
    baseline: str = FIRST_STAGE,
    seed: int = 0,
) -> Evaluation:
    """All figures, intervals and tests. `values` holds `values_of` each collection by name; equal input, equal output.

    The measures are those of `values`, of which the first is the main one. Raises ConfigError where the baseline is
    not among the systems of a collection, and for a main measure that only says how much is judged.
    """
    measures = tuple(next(iter(values[collections[0].name].values())))
    if is_coverage(measures[0]):
        raise ConfigError(f"{measures[0]} cannot be the main measure: it does not say how good a ranking is")
    results = []
    for collection in collections:
        names = [system.name for system in collection.all_systems]
        if baseline not in names:
            raise ConfigError(
                f"baseline {baseline!r} is none of the systems on {collection.name!r}: {', '.join(names)}"
            )
        results.append(_collection_result(collection, values[collection.name], measures, depths, baseline, seed))
    return _with_holm(
        Evaluation(measures=measures, baseline=baseline, seed=seed, collections=tuple(results), num_compared=0)
    )


def _collection_result(
    collection: Collection,
    values: Mapping[str, Values],
    measures: tuple[str, ...],
    depths: Sequence[int],
    baseline: str,
    seed: int,
) -> CollectionResult:
    qrels = collection.qrels
    table = {
        name: np.array([[of[measure][query] for measure in measures] for query in qrels]).reshape(-1, len(measures))
        for name, of in values.items()
    }
    figures = _figures(table, measures, baseline, seed)
    main = {name: columns[:, 0] for name, columns in table.items()}
    segments = _segments(collection, main, baseline, seed)
    points = _depth_points(collection, measures[0], main[FIRST_STAGE], depths, seed)
    return CollectionResult(
        collection=collection.name,
        num_queries=len(qrels),
        num_judgements=sum(len(grades) for grades in qrels.values()),
        num_without_relevant=sum(max(grades.values(), default=0) <= 0 for grades in qrels.values()),
        num_candidates=sum(len(collection.first_stage.get(query, ())) for query in qrels),
        systems=tuple(
            SystemResult(
                system=system.name,
                kind=system.kind,
                source=system.source,
                figures=figures[system.name],
                depths=points.get(system.name, ()),
                segments=segments[system.name],
                num_without_ranking=sum(not system.run.get(query) for query in qrels),
                pairs_per_second=system.pairs_per_second,
                num_failed=system.num_failed,
                notes=system.notes,
            )
            for system in collection.all_systems
        ),
        digests=collection.digests,
        notes=collection.notes,
    )


def _figures(
    table: Mapping[str, NDArray[np.float64]], measures: tuple[str, ...], baseline: str, seed: int
) -> dict[str, tuple[Figure, ...]]:
    """Each system's figures, with differences to the baseline."""
    stacked_QC = np.concatenate(list(table.values()), axis=1)
    intervals = mean_intervals(stacked_QC, seed)
    tests = paired_comparisons(np.tile(table[baseline], len(table)), stacked_QC, seed)
    found = {}
    for number, (name, columns) in enumerate(table.items()):
        own = slice(number * len(measures), (number + 1) * len(measures))
        found[name] = tuple(
            Figure(
                measure=measure,
                value=Mean(mean=_mean(columns[:, m]), low=_known(low), high=_known(high)),
                difference=None if name == baseline or is_coverage(measure) else _difference(test),
            )
            for m, (measure, (low, high), test) in enumerate(zip(measures, intervals[own], tests[own], strict=True))
        )
    return found


def _depth_points(
    collection: Collection, measure: str, first_stage: NDArray[np.float64], depths: Sequence[int], seed: int
) -> dict[str, tuple[DepthPoint, ...]]:
    """For each system that can be looked at by depths, the main measure at each depth that is worth a look."""
    longest = max((len(collection.first_stage.get(query, ())) for query in collection.qrels), default=0)
    useful = useful_depths(depths, longest)
    systems = [system for system in collection.all_systems if system.has_depths]
    columns = []
    for system in systems:
        for depth in useful:
            run = {
                query: rerank_top(collection.first_stage.get(query, ()), system.run.get(query, ()), depth)
                for query in collection.qrels
            }
            columns.append(list(per_query([measure], collection.qrels, run)[measure].values()))
    if not columns:
        return {}
    after_QC = np.array(columns).T
    tests = iter(paired_comparisons(np.repeat(first_stage[:, None], after_QC.shape[1], axis=1), after_QC, seed))
    means = iter([_mean(column) for column in after_QC.T])
    return {
        system.name: tuple(
            DepthPoint(depth=depth, mean=next(means), difference=_difference(next(tests))) for depth in useful
        )
        for system in systems
    }


def _segments(
    collection: Collection, main: Mapping[str, NDArray[np.float64]], baseline: str, seed: int
) -> dict[str, tuple[SegmentFigure, ...]]:
    """Each system's main measure within each segment."""
    found: dict[str, list[SegmentFigure]] = {name: [] for name in main}
    stacked_QC = np.stack(list(main.values()), axis=1)
    before_QC = np.repeat(main[baseline][:, None], len(main), axis=1)
    queries = list(collection.qrels)
    for column, value_of in collection.segments.items():
        for value in sorted({value_of[query] for query in queries if query in value_of}):
            inside = np.array([value_of.get(query) == value for query in queries])
            tests = paired_comparisons(before_QC[inside], stacked_QC[inside], seed)
            means = [_mean(column) for column in stacked_QC[inside].T]
            for name, mean, test in zip(main, means, tests, strict=True):
                found[name].append(
                    SegmentFigure(
                        column=column,
                        value=value,
                        num_queries=test.num_queries,
                        mean=mean,
                        difference=None if name == baseline else _difference(test),
                    )
                )
    return {name: tuple(figures) for name, figures in found.items()}


def _difference(test: PairedTest) -> Difference:
    """The test as a result; Holm's correction comes when everything is compared."""
    return Difference(
        mean=test.mean_difference,
        low=_known(test.low),
        high=_known(test.high),
        p_t=_known(test.p_t),
        p_randomisation=_known(test.p_randomisation),
        p_holm=None,
        num_better=test.num_better,
        num_worse=test.num_worse,
    )


def _mean(values: NDArray[np.float64]) -> float:
    """The sum from first to last, divided once: to the last digit what ir_measures says. numpy's mean sums in pairs."""
    return float(np.cumsum(values)[-1] / len(values))


def _known(value: float) -> float | None:
    return None if isnan(value) else value


def _with_holm(evaluation: Evaluation) -> Evaluation:
    """Corrects the p values of each table: figures over all collections, depths and segments within each of them."""
    systems = [system for collection in evaluation.collections for system in collection.systems]
    figures = [figure.difference for system in systems for figure in system.figures if figure.difference]
    adjusted = _adjust(figures)
    collections = []
    for collection in evaluation.collections:
        adjusted |= _adjust([point.difference for system in collection.systems for point in system.depths])
        segments = [segment.difference for system in collection.systems for segment in system.segments]
        adjusted |= _adjust([difference for difference in segments if difference])
        collections.append(
            replace(collection, systems=tuple(_replaced(system, adjusted) for system in collection.systems))
        )
    num_compared = sum(difference.p_randomisation is not None for difference in figures)
    return replace(evaluation, collections=tuple(collections), num_compared=num_compared)


def _adjust(differences: Sequence[Difference]) -> dict[int, Difference]:
    """The differences with p_holm, by identity: equal ones may stand in several places."""
    p_values = [float("nan") if d.p_randomisation is None else d.p_randomisation for d in differences]
    return {
        id(difference): replace(difference, p_holm=_known(p))
        for difference, p in zip(differences, holm_adjusted(p_values), strict=True)
    }


def _replaced(system: SystemResult, adjusted: Mapping[int, Difference]) -> SystemResult:
    def of(difference: Difference | None) -> Difference | None:
        return None if difference is None else adjusted[id(difference)]

    return replace(
        system,
        figures=tuple(replace(figure, difference=of(figure.difference)) for figure in system.figures),
        depths=tuple(replace(point, difference=adjusted[id(point.difference)]) for point in system.depths),
        segments=tuple(replace(segment, difference=of(segment.difference)) for segment in system.segments),
    )
