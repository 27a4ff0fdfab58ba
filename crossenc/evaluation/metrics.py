"""Ranking measures per query, computed by ir_measures. Knows nothing of models, files or significance.

The conventions are decided here and nowhere else: a judged query without a ranking counts as 0, a query
without judgements is left out, a negative grade counts as 0, and the order of a ranking alone matters, never
its scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from crossenc.errors import ConfigError, InputError
from crossenc.records import Qrels

#: trec_eval allocates memory in proportion to the highest grade and overflows silently beyond 32 bits.
_MAX_GRADE = 1_000_000
_EXAMPLES = "nDCG@10, RR@10, R@100, AP, P@5, Judged@10 or Success@1"


def per_query(measures: Sequence[str], qrels: Qrels, run: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Measure -> query id -> value, for every query of `qrels`, in the order of `qrels`.

    `measures` are ir_measures names; `run` holds each query's doc ids, best first. Raises ConfigError for a
    measure that cannot be computed, InputError for a ranking that names a document twice and for a grade
    above a million.
    """
    providers = _providers()
    parsed = {name: _parse(name, providers) for name in measures}
    numbers = {str(number): query_id for number, query_id in enumerate(qrels)}
    grades, scores = {}, {}
    for number, query_id in numbers.items():
        grades[number], ranked = _renumbered(query_id, qrels[query_id], run.get(query_id, ()))
        if ranked:  # Judged divides by the length of a ranking
            scores[number] = ranked
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    for metric in providers.iter_calc(list(set(parsed.values())), grades, scores):
        for name, measure in parsed.items():
            if measure == metric.measure:
                values[name][numbers[metric.query_id]] = float(metric.value)
    return values


def display_name(measure: str) -> str:
    """The name that readers expect: RR@10, which ir_measures averages over queries, is shown as MRR@10."""
    return f"M{measure}" if measure == "RR" or measure.startswith(("RR@", "RR(")) else measure


def _providers() -> Any:
    """The implementations in use, fixed so that an optional package elsewhere never changes a figure."""
    import ir_measures  # importing it installs a log handler, which `import crossenc.evaluation` must not do

    return ir_measures.providers.FallbackProvider([ir_measures.pytrec_eval, ir_measures.msmarco, ir_measures.judged])


def _parse(name: str, providers: Any) -> Any:
    """The ir_measures measure called `name`."""
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
        supported = providers.supports(measure)
    except (NameError, ValueError, AssertionError) as error:
        raise ConfigError(f"unknown measure {name!r}: {error}; use for example {_EXAMPLES}") from error
    if not supported:
        raise ConfigError(f"measure {name!r} cannot be computed here; use for example {_EXAMPLES}")
    cutoff = measure.params.get("cutoff", 1)
    if cutoff < 1:  # trec_eval ends the whole process on a cutoff of 0
        raise ConfigError(f"measure {name!r} has cutoff {cutoff}; a cutoff is at least 1")
    return measure


def _renumbered(
    query_id: str, judged: Mapping[str, int], ranked: Sequence[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Grades and scores under plain names: trec_eval ends the process on ids with NUL or lone surrogates."""
    positions = {doc_id: str(position) for position, doc_id in enumerate(ranked)}
    if len(positions) != len(ranked):
        raise InputError(f"the ranking of query {query_id!r} names a document twice; keep each document once")
    if max(judged.values(), default=0) > _MAX_GRADE:
        raise InputError(f"query {query_id!r} has a grade above {_MAX_GRADE}; use small grades such as 0 to 4")
    missing = iter(range(len(judged)))
    grades = {positions.get(doc_id) or f"missing-{next(missing)}": max(grade, 0) for doc_id, grade in judged.items()}
    return grades, {name: -float(name) for name in positions.values()}
