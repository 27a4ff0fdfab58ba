"""What is recorded of a model while it is made, to be shown on its card. Plain data: no model, no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossenc.card.dataset import DatasetFacts


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the card says of the model itself. `base_model` is the id or folder that training started from."""

    base_model: str | None
    base_revision: str | None
    max_length: int
    num_labels: int
    activation: str
    architecture: str

    @property
    def base_is_on_hub(self) -> bool:
        """Whether `base_model` is an id of the hub, `owner/name`, and not the name of a local folder."""
        return self.base_model is not None and self.base_model.count("/") == 1


@dataclass(slots=True)
class LogRow:
    """Figures of one training step; `values` maps a column to a number."""

    epoch: float
    step: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluator's figures at the end: measures by name, the `primary` one decides.

    A measure may be a text that starts with its number, such as "0.71 (+0.12)".
    """

    name: str
    evaluator: str
    config: Mapping[str, Any]
    measures: Mapping[str, float | str]
    primary: str | None


def number(measure: float | str) -> float:
    """The figure of a measure, which may be a text that starts with it."""
    return float(measure.split()[0] if isinstance(measure, str) else measure)


@dataclass(slots=True)
class CrossEncoderModelCardData:
    """What a user says about a model, and what was recorded while it was trained.

    `language` is one code or several; `license` an id such as "apache-2.0"; `train_datasets` and `eval_datasets`
    are dicts with name, id and revision. `model_id` is where the model will be on the hub. `emissions` is what
    training emitted: "emissions" in grams of CO2, "energy_consumed" in kWh, and more about the machine. `lineage` names
    what the model was made from, by digests or ids.
    `local_files_only` and `generate_widget_examples` are taken for compatibility: a card is always made offline and
    has no widget.
    """

    language: str | Sequence[str] | None = None
    license: str | None = None
    model_name: str | None = None
    model_id: str | None = None
    train_datasets: Sequence[Mapping[str, str]] = ()
    eval_datasets: Sequence[Mapping[str, str]] = ()
    task_name: str = "text reranking"
    tags: Sequence[str] = ("sentence-transformers", "cross-encoder", "reranker")
    local_files_only: bool = True
    generate_widget_examples: bool | None = None

    base_model: str | None = None
    base_revision: str | None = None
    training: list[DatasetFacts] = field(default_factory=list)
    validation: list[DatasetFacts] = field(default_factory=list)
    losses: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    changed_hyperparameters: dict[str, Any] = field(default_factory=dict)
    logs: list[LogRow] = field(default_factory=list)
    best_step: int | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    training_seconds: float | None = None
    emissions: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def was_trained(self) -> bool:
        """Whether training was recorded."""
        return bool(self.training or self.losses or self.logs)

    def add_loss(self, name: str, config: Mapping[str, Any], citation: str = "") -> None:
        """Record a loss by its class name, with its settings and its paper as BibTeX."""
        if (name, dict(config)) not in self.losses:
            self.losses.append((name, dict(config)))
        if citation and citation not in self.citations:
            self.citations.append(citation)

    def set_hyperparameters(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Record all settings of training; those that differ from `defaults` are shown first."""
        self.hyperparameters = dict(values)
        self.changed_hyperparameters = {
            name: v for name, v in values.items() if name not in defaults or v != defaults[name]
        }

    def add_log(self, epoch: float, step: int, values: Mapping[str, float]) -> None:
        """Record figures of a step; those of the same step share a row."""
        if not self.logs or self.logs[-1].step != step:
            self.logs.append(LogRow(epoch, step))
        self.logs[-1].values.update(values)

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, float | str], epoch: float = 0, step: int = 0
    ) -> None:
        """Record what an evaluator of crossenc.evaluation found; the last call for an evaluator counts."""
        config = evaluator.get_config_dict() if hasattr(evaluator, "get_config_dict") else {}
        primary = getattr(evaluator, "primary_metric", None)
        name = str(getattr(evaluator, "name", "") or "")
        found = Evaluation(name, type(evaluator).__name__, dict(config), dict(metrics), primary)
        others = [e for e in self.evaluations if (e.name, e.evaluator, e.config) != (name, found.evaluator, config)]
        self.evaluations = [*others, found]
        if primary is not None and primary in metrics:
            self.add_log(epoch, step, {primary: number(metrics[primary])})
