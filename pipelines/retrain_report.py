"""What is told of a retraining: report.html, the card of a promoted model, facts for the registry, lineage.

It turns records and figures into text; equal ones give equal pages. Names of files and models are data and stay text.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

from crossenc.card.promotion import Promotion, with_promotion
from crossenc.evaluation.gate import Decision
from crossenc.evaluation.results import FIRST_STAGE, Evaluation, Mean
from pipelines import plan as plans
from pipelines.evaluation_output import means_of
from pipelines.evaluation_report import verdict
from pipelines.pages import UNKNOWN, duration, load_template, p_value, rate, unit
from pipelines.records import MANIFEST_FILE
from pipelines.retrain_config import RetrainConfig
from pipelines.retrain_records import BASE, TRAINED_FOLDER, EndState, Retraining
from pipelines.storage import Location, read_bytes

_VERDICTS = {"promoted": "Promoted", "refused": "Refused", "void": "Void: the registry was changed meanwhile"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A retraining that was decided. `trained` is the manifest of its training run."""

    config: RetrainConfig
    retraining: Retraining
    decision: Decision
    evaluation: Evaluation
    folder: Location
    trained: Mapping[str, Any]

    @classmethod
    def of(
        cls, config: RetrainConfig, retraining: Retraining, decision: Decision, evaluation: Evaluation, folder: Location
    ) -> "Story":
        """With what training left in the retraining's folder."""
        trained = json.loads(read_bytes(folder / f"{TRAINED_FOLDER}/{MANIFEST_FILE}"))
        return cls(
            config=config,
            retraining=retraining,
            decision=decision,
            evaluation=evaluation,
            folder=folder,
            trained=trained,
        )


def facts_of(story: Story) -> dict[str, Any]:
    """What the registry and decision.json show beside the decision. Figures are means over the collections."""
    key, measure = story.retraining.key, story.config.gate.metric
    value, gain = means_of(story.evaluation, key, story.config.gate.collection)
    return {
        "retraining": key,
        "measure": measure,
        "value": value,
        "gain": gain,
        "summary": story.decision.summary,
        "gate": asdict(story.config.gate),
        "label_files": len(story.retraining.files),
        "new_label_files": [file.uri for file in story.retraining.new_files],
        "leaking_rows_left_out": sum(file.num_leaking for file in story.retraining.files),
        "leaking_rows_learned_before": story.retraining.num_leaking_before,
        "training_rows": story.trained["rows"]["train"],
        "training_seconds": story.trained["seconds"],
    }


def lineage_of(story: Story) -> dict[str, str]:
    """What the candidate comes from and was judged on, by names, versions and digests."""
    one, trained = story.retraining, story.trained["lineage"]
    base = f"none; trained from {story.config.base}"
    found = {"Parent version": one.parent or base, "Retraining": one.key}
    found |= {name if name != "Configuration" else "Training configuration": value for name, value in trained.items()}
    found["Configuration"] = plans.fingerprint(one.parts)
    for collection in story.evaluation.collections:
        digests = json.dumps(dict(collection.digests), sort_keys=True)
        found[f"Judged on {collection.collection}"] = hashlib.sha256(digests.encode()).hexdigest()
    return found


def card_of(story: Story, card: str) -> str:
    """The card that training wrote, with the evaluation that led to the promotion."""
    seconds = story.trained["seconds"]
    workers = story.config.train.workers.count
    training = f"{duration(seconds)} on {workers:,} {'worker' if workers == 1 else 'workers'}"
    price = story.config.price_per_hour
    if price is not None:
        training += f", {seconds / 3600 * price:,.2f} at {price:,.2f} an hour of the whole cluster"
    promotion = Promotion(
        name=story.config.name,
        version=story.retraining.key,
        decision=story.decision,
        evaluation=story.evaluation,
        scoring={one.collection: _scoring_words(story, one.collection) for one in story.evaluation.collections},
        training=training,
        lineage=lineage_of(story),
    )
    return with_promotion(card, promotion)


def _scoring_words(story: Story, collection: str) -> str:
    """How fast the candidate scores, and what a million pairs cost."""
    pairs = story.evaluation.collection(collection).system(story.retraining.key).pairs_per_second
    if not pairs:
        return "not known"
    scoring, price = story.config.evaluation.scoring, story.config.price_per_hour
    where = "a GPU" if scoring.gpus_per_actor else "the CPU"
    words = f"{rate(pairs)} pairs a second of one scorer on {where}"
    if price is None:
        return words
    cost = 1e6 / (pairs * scoring.actors) / 3600 * price
    scorers = "one scorer" if scoring.actors == 1 else f"{scoring.actors:,} scorers"
    return f"{words}; {cost:,.4f} for a million pairs with {scorers} at {price:,.2f} an hour of the whole cluster"


def render(story: Story, state: EndState, reason: str = "") -> str:
    """The page as one string. `reason` says why, where the decision does not."""
    return load_template("retrain.html.jinja").render(
        story=story,
        one=story.retraining,
        decision=story.decision,
        evaluation=story.evaluation,
        facts=facts_of(story),
        lineage=lineage_of(story),
        verdict=_VERDICTS[state],
        tone={"promoted": "better", "refused": "worse"}.get(state, ""),
        reason=reason,
        the=lambda name: _the(story, name),
        first_stage=FIRST_STAGE,
        interval=_interval,
        judged=verdict,
        p=lambda value: p_value(nan if value is None else value),
        scoring=lambda collection: _scoring_words(story, collection),
    )


def _the(story: Story, system: str) -> str:
    """What people call a system of the evaluation."""
    is_base = system == BASE and story.retraining.judges_base
    return "the first stage" if system == FIRST_STAGE else "the base model" if is_base else system


def _interval(value: Mean) -> str:
    return UNKNOWN if value.low is None or value.high is None else f"[{unit(value.low)}, {unit(value.high)}]"
