"""A section of a card about the evaluation that a model was promoted by: figures, significance, lineage, throughput.

It adds to the card that training wrote and knows neither registries nor files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from crossenc.card.render import inline, markdown_environment
from crossenc.evaluation.gate import Decision
from crossenc.evaluation.metrics import display_name
from crossenc.evaluation.results import FIRST_STAGE, Evaluation

_TEMPLATE = Path(__file__).with_name("promotion.md.jinja")
_UNKNOWN = "\N{EN DASH}"
_NEXT_HEADINGS = ("\n## Training Details\n", "\n### Lineage\n", "\n### Framework Versions\n", "\n## Citation\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What the section says.

    `name` is the model's in its registry, `version` the promoted one, which is also the name of the system in the
    evaluation. `scoring` tells by collection what scoring costs and `training` what making the model did, in words;
    `lineage` names what it comes from, by names and digests.
    """

    name: str
    version: str
    decision: Decision
    evaluation: Evaluation
    scoring: Mapping[str, str]
    training: str
    lineage: Mapping[str, str]


def with_promotion(card: str, promotion: Promotion) -> str:
    """The card with the section, before what tells of training, and with the figures in its front matter."""
    environment = markdown_environment()
    environment.filters.update(measure=display_name, p=_p_value, signed="{:+.4f}".format)
    environment.globals.update(interval=_interval, the=_the)
    section = environment.from_string(_TEMPLATE.read_text()).render(
        one=promotion, evaluation=promotion.evaluation, main=promotion.evaluation.measures[0]
    )
    front, body = _parts(card)
    front |= _figures(promotion)
    at = next((place for heading in _NEXT_HEADINGS if (place := body.find(heading)) >= 0), len(body))
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n{body[:at].rstrip()}\n\n{section.strip()}\n{body[at:]}"


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest of a card."""
    if card.startswith("---\n") and "\n---\n" in card[3:]:
        matter, _, body = card[4:].partition("\n---\n")
        found = yaml.safe_load(matter)
        if isinstance(found, dict):
            return found, body
    return {}, card


def _figures(promotion: Promotion) -> dict[str, Any]:
    """The model's own figures as the hub reads them."""
    results = [
        EvalResult(
            task_type="text-ranking",
            task_name="text reranking",
            dataset_type=one.collection,
            dataset_name=one.collection,
            metric_type=figure.measure.lower(),
            metric_name=display_name(figure.measure),
            metric_value=figure.value.mean,
        )
        for one in promotion.evaluation.collections
        for figure in one.system(promotion.version).figures
        if figure.difference is not None
    ]
    metrics = sorted({result.metric_type for result in results})
    return {"metrics": metrics, "model-index": eval_results_to_model_index(promotion.name, results)}


def _interval(low: float | None, high: float | None) -> str:
    return _UNKNOWN if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _p_value(p: float | None) -> str:
    return _UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _the(system: str) -> str:
    return "the first stage" if system == FIRST_STAGE else inline(system)
