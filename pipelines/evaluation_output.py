"""What an evaluation writes, and how its figures are read again: evaluation.json, per_query.parquet, losses.jsonl, the
report, and TREC runs. It knows nothing of how rankings came about.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from crossenc.errors import RunConflictError
from crossenc.evaluation import comparison
from crossenc.evaluation.comparison import Collection, Values
from crossenc.evaluation.results import Evaluation
from pipelines import evaluation_report, rankings
from pipelines import plan as plans
from pipelines.evaluation_config import EvaluateConfig
from pipelines.evaluation_losses import Loss, with_texts, worst_losses
from pipelines.evaluation_texts import Prepared, look_up
from pipelines.records import REPORT_FILE
from pipelines.schemas import to_parquet
from pipelines.storage import Location, put, read_bytes

#: Raised when the meaning of evaluation.json changes.
FORMAT = 1
EVALUATION_FILE = "evaluation.json"
PER_QUERY_FILE = "per_query.parquet"
LOSSES_FILE = "losses.jsonl"
#: All that an evaluation has found; its other outputs are what it was found from.
EVALUATION_FILES = (EVALUATION_FILE, PER_QUERY_FILE, LOSSES_FILE, REPORT_FILE)
TREC_FOLDER = "trec"
_TEXT_LENGTH = 280
_PACKAGES = ("crossenc", "ir_measures", "numpy", "ray", "scipy", "torch", "transformers")
_EVALUATION = TypeAdapter(Evaluation)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A collection with all its rankings, its texts where there are any, and the files that it was read from."""

    collection: Collection
    texts: Prepared | None
    inputs: tuple[str, ...]


def write(
    output: Location, config: EvaluateConfig, judgements: Sequence[Judgement], parts: Mapping[str, str]
) -> Evaluation:
    """Computes all figures and writes everything but the mark of success. `parts` are what the figures rest on."""
    collections = [judgement.collection for judgement in judgements]
    values = {one.name: comparison.values_of(one, config.measures) for one in collections}
    found = comparison.evaluate(collections, values, depths=config.depths, baseline=config.baseline, seed=config.seed)
    losses = [
        loss for judgement in judgements for loss in _losses(judgement, values[judgement.collection.name], config)
    ]
    versions = {package: version(package) for package in _PACKAGES}
    body = {"format": FORMAT, "fingerprint": plans.fingerprint(parts), "depends_on": dict(parts), "versions": versions}
    put(output / EVALUATION_FILE, json.dumps(body | {"evaluation": asdict(found)}, indent=1).encode())
    put(output / PER_QUERY_FILE, to_parquet(per_query_table(collections, values, config.baseline)))
    lines = [json.dumps(asdict(loss), ensure_ascii=False) + "\n" for loss in losses]
    put(output / LOSSES_FILE, "".join(lines).encode())
    if config.trec_run:
        _write_runs(output, collections)
    page = evaluation_report.Page(
        evaluation=found,
        differences={
            one.name: {name: _differences(values[one.name], name, config) for name in values[one.name]}
            for one in collections
        },
        losses=tuple(losses),
        output=str(output),
        inputs={judgement.collection.name: judgement.inputs for judgement in judgements},
        versions=versions,
    )
    put(output / REPORT_FILE, evaluation_report.render(page).encode())
    return found


def _write_runs(output: Location, collections: Sequence[Collection]) -> None:
    for one in collections:
        for system in one.all_systems:
            run = {query: system.run[query] for query in one.qrels if query in system.run}
            put(output / f"{TREC_FOLDER}/{one.name}/{system.name}.run", rankings.trec_run(run))


def _differences(values: Mapping[str, Values], system: str, config: EvaluateConfig) -> tuple[float, ...]:
    """The main measure of each query minus the baseline's."""
    before, after = values[config.baseline][config.measures[0]], values[system][config.measures[0]]
    return tuple(after[query] - before[query] for query in before)


def _losses(judgement: Judgement, values: Mapping[str, Values], config: EvaluateConfig) -> list[Loss]:
    """The worst losses of each system, with what texts there are."""
    losses = worst_losses(judgement.collection, values, config.measures[0], config.baseline, config.worst)
    if judgement.texts is None or not losses:
        return losses
    pairs = [pair for loss in losses for pair in loss.pairs]
    found = look_up(judgement.texts, pairs, config.storage_options, config.max_text_bytes, _TEXT_LENGTH)
    return [with_texts(loss, found) for loss in losses]


def per_query_table(
    collections: Sequence[Collection], values: Mapping[str, Mapping[str, Values]], baseline: str
) -> pa.Table:
    """A row for each query and system: what was judged and ranked, a column for each measure, segments, and
    `difference`, that of the main measure to the baseline.
    """
    segments = list(dict.fromkeys(column for one in collections for column in one.segments))
    rows: list[dict[str, Any]] = []
    for one in collections:
        for system in one.all_systems:
            of = values[one.name][system.name]
            main = next(iter(of))
            for query, grades in one.qrels.items():
                row = {
                    "collection": one.name,
                    "query_id": query,
                    "system": system.name,
                    "num_judged": len(grades),
                    "num_relevant": sum(grade > 0 for grade in grades.values()),
                    "num_ranked": len(system.run.get(query, ())),
                    "difference": of[main][query] - values[one.name][baseline][main][query],
                }
                row |= {measure: by_query[query] for measure, by_query in of.items()}
                row |= {f"segment {name}": one.segments.get(name, {}).get(query) for name in segments}
                rows.append(row)
    texts = ["collection", "query_id", "system", *(f"segment {name}" for name in segments)]
    kinds = {name: pa.string() for name in texts} | dict.fromkeys(
        ("num_judged", "num_relevant", "num_ranked"), pa.int64()
    )
    names = list(rows[0])
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    return pa.Table.from_pylist(rows, schema=schema)


def means_of(found: Evaluation, system: str, collection: str | None = None) -> tuple[float, float | None]:
    """A system's main measure and its gain over the baseline, as means over the collections, or of one of them.

    The baseline has no gain.
    """
    chosen = [one for one in found.collections if collection in (None, one.collection)]
    figures = [one.system(system).figure(found.measures[0]) for one in chosen]
    gains = [figure.difference.mean for figure in figures if figure.difference is not None]
    value = sum(figure.value.mean for figure in figures) / len(figures)
    return value, sum(gains) / len(gains) if gains else None


def load(output: Location) -> Evaluation:
    """What a finished evaluation found. Raises RunConflictError where there is none that can be read."""
    try:
        return _EVALUATION.validate_python(stored(output)["evaluation"])
    except (KeyError, ValidationError) as error:
        raise RunConflictError(
            f"{output / EVALUATION_FILE} is no evaluation of this version ({error}); start over with --new-run"
        ) from None


def stored(output: Location) -> dict[str, Any]:
    """The content of evaluation.json. Raises RunConflictError where it is of no version that can be read."""
    try:
        body: dict[str, Any] = json.loads(read_bytes(output / EVALUATION_FILE))
        if body["format"] != FORMAT or "fingerprint" not in body:
            raise ValueError("another format")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise RunConflictError(
            f"{output / EVALUATION_FILE} is no evaluation of this version ({error}); start over with --new-run"
        ) from None
    return body
