"""Whether a new model may replace the one in use: a pure function of what an evaluation found.

A model is promoted when every rule of the gate holds, and refused when one does not; either way the decision says why,
rule by rule. The gate knows figures only: it runs no model, reads no file and moves nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from crossenc.errors import ConfigError
from crossenc.evaluation.metrics import display_name
from crossenc.evaluation.results import FIRST_STAGE, CollectionResult, Evaluation, SegmentFigure, SystemResult

#: Means of the same values in another order differ in their last bits; that must not decide.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What is asked of a model. Every rule must hold on every collection, or on `collection` alone where that is given.

    `metric`: the measure that decides, chosen before anyone looks: the main one of the evaluation.
    `min_gain`: least mean gain over the baseline; a gain must be above 0 in any case.
    `max_p`: the p value of the paired randomisation test must be below it: the probability of promoting a model that
    is no better. The test is one-sided, because the question is: half of the p value that evaluations show, for a gain.
    `min_queries`: judged queries, at least; fewer prove nothing.
    `beat_first_stage`: at every depth of the evaluation the mean must be above the first stage's.
    `segment_floors`: least mean difference to the baseline (usually negative) by segment: `column=value`, or `column`
    for all its other values, on each collection that has it; one must. A segment of fewer than `min_segment_queries`
    is too noisy to be held against a model.
    `max_slowdown`: time per pair, at most so many times the baseline's. Both are timed while they score, one after the
    other: on a machine that is busy with other work the two times do not compare.

    Beside these, scoring must not have failed for any candidate, of either system: one that lacks a document for that
    is worse by it, or better, and says nothing about the model.
    """

    metric: str = "nDCG@10"
    min_gain: float = 0.0
    max_p: float = 0.05
    min_queries: int = 30
    collection: str | None = None
    beat_first_stage: bool = True
    segment_floors: Mapping[str, float] = field(default_factory=dict)
    min_segment_queries: int = 20
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain < 1:
            raise ConfigError(f"min_gain is {self.min_gain}; give a gain from 0 to below 1, as 0.005")
        if not 0 < self.max_p <= 1:
            raise ConfigError(f"max_p is {self.max_p}; give a probability above 0 and up to 1, as 0.05")
        if self.min_queries < 2 or self.min_segment_queries < 2:
            raise ConfigError("min_queries and min_segment_queries are at least 2: one query has no spread")
        if self.max_slowdown is not None and not (isfinite(self.max_slowdown) and self.max_slowdown > 0):
            raise ConfigError(f"max_slowdown is {self.max_slowdown}; give a factor such as 1.5")
        wrong = next((name for name, floor in self.segment_floors.items() if not isfinite(floor)), None)
        if wrong is not None:
            raise ConfigError(f"segment_floors: {wrong!r} is {self.segment_floors[wrong]}; give a difference, as -0.02")


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of a gate on one collection: whether it holds, and the figures in words."""

    rule: str
    holds: bool
    words: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether `candidate` may replace `baseline`, and every check that led there."""

    promote: bool
    candidate: str
    baseline: str
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why: the checks that failed, or, for a promotion, all of them."""
        return tuple(check.words for check in self.checks if self.promote or not check.holds)

    @property
    def summary(self) -> str:
        """The decision in one line."""
        verb = "promote" if self.promote else "refuse"
        return f"{verb} {self.candidate} over {self.baseline}: " + "; ".join(self.reasons)


def decide(gate: Gate, evaluation: Evaluation, candidate: str) -> Decision:
    """Whether `candidate` may replace the evaluation's baseline.

    Raises ConfigError where gate and evaluation do not fit: another main measure, or a system or collection that is
    not there.
    """
    if gate.metric != evaluation.measures[0]:
        raise ConfigError(
            f"the gate decides by {gate.metric}, but the evaluation's main measure is {evaluation.measures[0]}; name"
            " the same one first among its measures"
        )
    if candidate in (evaluation.baseline, FIRST_STAGE):
        raise ConfigError(
            f"{candidate!r} cannot be promoted: name a system other than the baseline and the first stage"
        )
    checks: list[Check] = []
    for collection in _collections(gate, evaluation):
        try:
            found, baseline = collection.system(candidate), collection.system(evaluation.baseline)
        except KeyError as missing:
            raise ConfigError(f"{missing.args[0]!r} was not evaluated on {collection.collection!r}") from None
        checks += _failures(collection, found, baseline)
        checks += _gain(gate, collection, found, baseline)
        checks += _depths(gate, collection, found)
        checks += _segments(gate, collection, found)
        checks += _slowdown(gate, collection, found, baseline)
    checks += _missing_segments(gate, _collections(gate, evaluation), candidate)
    return Decision(all(check.holds for check in checks), candidate, evaluation.baseline, tuple(checks))


def _collections(gate: Gate, evaluation: Evaluation) -> tuple[CollectionResult, ...]:
    if gate.collection is None:
        return evaluation.collections
    try:
        return (evaluation.collection(gate.collection),)
    except KeyError:
        names = ", ".join(collection.collection for collection in evaluation.collections)
        raise ConfigError(f"the gate names the collection {gate.collection!r}; evaluated are {names}") from None


def _failures(collection: CollectionResult, found: SystemResult, baseline: SystemResult) -> Iterator[Check]:
    for system in (baseline, found):
        if system.num_failed:
            words = (
                f"scoring failed for {system.num_failed:,} candidates of {collection.collection} with {system.system}:"
                " its ranking lacks them, and figures do not compare; evaluate again, and if it fails again take what"
                " quarantine/ of its run names out of the collection"
            )
            yield Check("failures", False, words)


def _gain(gate: Gate, collection: CollectionResult, found: SystemResult, baseline: SystemResult) -> Iterator[Check]:
    figure, before = found.figure(gate.metric), baseline.figure(gate.metric).value.mean
    difference = figure.difference
    assert difference is not None, "only the baseline has no difference"
    where = f"on {collection.num_queries:,} queries of {collection.collection}"
    change = f"{display_name(gate.metric)} {before:.4f} → {figure.value.mean:.4f} ({difference.mean:+.4f}) {where}"
    if collection.num_queries < gate.min_queries:
        words = (
            f"{collection.collection} has {collection.num_queries:,} judged queries; {gate.min_queries:,} are needed"
        )
        yield Check("min_queries", False, words)
    enough = difference.mean > _ROUNDING and difference.mean >= gate.min_gain - _ROUNDING
    asked = f"a gain of {gate.min_gain:g} or more" if gate.min_gain else "a gain"
    yield Check("min_gain", enough, f"{change}: {asked} is asked for")
    if difference.p_randomisation is None:
        yield Check("max_p", False, f"no test is possible {where}")
    else:
        half = difference.p_randomisation / 2  # sign flips are symmetric: each side has half of the extreme ones
        p = half if difference.mean > 0 else 1 - half
        holds = p < gate.max_p
        shown = f"p = {p:.4f}" if p >= 0.00005 else "p < 0.0001"
        words = f"one-sided {shown} {where}, " + ("below" if holds else "not below") + f" {gate.max_p:g}"
        yield Check("max_p", holds, words + ("" if holds else ": a model that is no better could look like this"))


def _depths(gate: Gate, collection: CollectionResult, found: SystemResult) -> Iterator[Check]:
    if not gate.beat_first_stage:
        return
    name = display_name(gate.metric)
    losing = [point for point in found.depths if point.difference.mean <= _ROUNDING]
    if not found.depths:
        words = f"{found.system} was not looked at by depths on {collection.collection}"
    elif losing:
        shown = ", ".join(f"top {point.depth:,}: {point.difference.mean:+.4f}" for point in losing)
        words = f"{name} does not beat the first stage on {collection.collection} when it orders only its {shown}"
    else:
        least = min(found.depths, key=lambda point: point.difference.mean)
        words = (
            f"{name} beats the first stage of {collection.collection} at every depth, by"
            f" {least.difference.mean:+.4f} or more (top {least.depth:,})"
        )
    yield Check("beat_first_stage", bool(found.depths) and not losing, words)


def _segments(gate: Gate, collection: CollectionResult, found: SystemResult) -> Iterator[Check]:
    for segment in found.segments:
        floor = gate.segment_floors.get(f"{segment.column}={segment.value}", gate.segment_floors.get(segment.column))
        if floor is not None:
            yield _segment(gate, collection, segment, floor)


def _missing_segments(gate: Gate, collections: Sequence[CollectionResult], candidate: str) -> Iterator[Check]:
    """A rule about a segment that no collection has says nothing: that must not let a model through."""
    segments = [segment for collection in collections for segment in collection.system(candidate).segments]
    present = {f"{segment.column}={segment.value}" for segment in segments} | {segment.column for segment in segments}
    names = ", ".join(collection.collection for collection in collections)
    for name in gate.segment_floors:
        if name not in present:
            words = f"no query of {names} is in the segment {name}: its floor cannot be looked at"
            yield Check("segment_floors", False, words)


def _segment(gate: Gate, collection: CollectionResult, segment: SegmentFigure, floor: float) -> Check:
    assert segment.difference is not None, "only the baseline has no difference"
    where = f"{segment.column}={segment.value} ({segment.num_queries:,} queries of {collection.collection})"
    if segment.num_queries < gate.min_segment_queries:
        return Check("segment_floors", True, f"{where} has too few queries to be held against the model")
    holds = segment.difference.mean >= floor - _ROUNDING
    words = f"{display_name(gate.metric)} changes by {segment.difference.mean:+.4f} in {where}"
    return Check("segment_floors", holds, f"{words}, {'not below' if holds else 'below'} the floor of {floor:+g}")


def _slowdown(gate: Gate, collection: CollectionResult, found: SystemResult, baseline: SystemResult) -> Iterator[Check]:
    if gate.max_slowdown is None:
        return
    where = f"on {collection.collection}"
    if not baseline.pairs_per_second:
        yield Check("max_slowdown", True, f"{baseline.system} was not scored {where}: no rate to compare with")
    elif not found.pairs_per_second:
        yield Check("max_slowdown", False, f"the rate of {found.system} {where} is not known")
    else:
        factor = baseline.pairs_per_second / found.pairs_per_second
        rates = f"{baseline.pairs_per_second:,.0f} → {found.pairs_per_second:,.0f} pairs/s"
        words = f"a pair takes {factor:.2f} times as long {where} ({rates}); {gate.max_slowdown:g} times is allowed"
        yield Check("max_slowdown", factor <= gate.max_slowdown, words)
