"""The settings of a retraining job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs. Each step is a job of its own, whose settings are made from these.
"""

from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from crossenc.evaluation.gate import Gate
from crossenc.evaluation.results import FIRST_STAGE
from pipelines.config import RerankConfig, ScoringConfig
from pipelines.distill_config import DistillConfig, StudentConfig
from pipelines.evaluation_config import EvaluateConfig, Name, SystemConfig
from pipelines.mine_config import MineConfig
from pipelines.train_config import TrainConfig
from pipelines.train_data_config import LabelledData

#: Settings of the steps that are the whole job's.
_SHARED = ("registry", "max_text_bytes", "storage_options", "drain_seconds", "ray_address")
#: Settings of training that say where and how fast, not what is learned.
_TRAIN_WITHOUT_EFFECT = {"workers", "checkpoint_minutes", "keep_checkpoints"}


def _leave_out(section: BaseModel, name: str, made: tuple[str, ...]) -> None:
    """Raises ValueError where a section has settings that the retraining job gives it, or has itself."""
    given = [setting for setting in (*made, *_SHARED) if setting in section.model_fields_set]
    if given:
        of_job = f"; set it beside {name}, for the whole job" if given[0] in _SHARED else ""
        raise ValueError(f"{given[0]} is given by the retraining job: leave it out{of_job}")


class _OfTheJob(BaseModel):
    """Settings of a section that are the whole job's."""

    registry: Annotated[str | None, Field(exclude=True)] = None
    max_text_bytes: Annotated[int, Field(exclude=True)] = 0
    storage_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    drain_seconds: Annotated[float, Field(exclude=True)] = 0
    ray_address: Annotated[str | None, Field(exclude=True)] = None


class FixedSet(_OfTheJob, EvaluateConfig):
    """The settings of an evaluation job, but for those that the retraining job gives it. A list is its collections."""

    systems: Annotated[tuple[SystemConfig, ...], Field(exclude=True)] = ()
    output: Annotated[str, Field(exclude=True)] = "evaluation"
    baseline: Annotated[str, Field(exclude=True)] = FIRST_STAGE

    @model_validator(mode="before")
    @classmethod
    def _from_collections(cls, value: Any) -> Any:
        return {"collections": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _leaves_out(self) -> "FixedSet":
        _leave_out(self, "evaluation", ("systems", "output", "baseline"))
        return self


class TrainSection(_OfTheJob, TrainConfig):
    """The settings of a training job, but for those that the retraining job gives it."""

    train: Annotated[LabelledData, Field(exclude=True)] = LabelledData(files="labels")
    model: Annotated[str, Field(exclude=True)] = "start"
    output: Annotated[str, Field(exclude=True)] = "trained"

    @model_validator(mode="after")
    def _leaves_out(self) -> "TrainSection":
        _leave_out(self, "train", ("train", "model", "output"))
        return self


class MineSection(MineConfig):
    """The settings of a mining job, but for those that the retraining job gives it, and how candidates are scored."""

    scoring: Annotated[ScoringConfig, Field(description="of the current version, as in rerank")] = ScoringConfig()
    reranked: Annotated[str | None, Field(exclude=True)] = None
    qrels: Annotated[str | tuple[str, ...], Field(exclude=True)] = "labels"
    known_positives: Annotated[str | tuple[str, ...], Field(exclude=True)] = ()
    output: Annotated[str, Field(exclude=True)] = "mined"
    max_text_bytes: Annotated[int, Field(exclude=True)] = 0
    storage_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    @model_validator(mode="after")
    def _leaves_out(self) -> "MineSection":
        _leave_out(self, "mine", ("reranked", "qrels", "known_positives", "output"))
        if self.format == "ids":
            raise ValueError("training reads texts: choose another format than ids, as lists")
        return self


class DistillSection(_OfTheJob, DistillConfig):
    """The settings of a distillation job, but for those that the retraining job gives it."""

    output: Annotated[str, Field(exclude=True)] = "distilled"
    student: StudentConfig = StudentConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DistillSection":
        _leave_out(self, "distill", ("output",))
        if self.student.model is not None or self.student_layers is not None:
            raise ValueError("the student starts as the current version: leave student.model and student_layers out")
        self.job("start", "distilled", {})
        return self

    def job(self, start: str, output: str, shared: dict[str, Any]) -> DistillConfig:
        """The job in which a student that starts as `start` learns from the teachers."""
        settings = self.model_dump(exclude_unset=True)
        student = {**settings.pop("student", {}), "model": start}
        return DistillConfig.model_validate({**settings, "output": output, "student": student, **shared})


def _known_gate(value: Any) -> Any:
    """Refuses a misspelt rule: a gate that lacks one lets everything through."""
    known = [field.name for field in fields(Gate)]
    for name in value if isinstance(value, dict) else ():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {name}; {hint}")
    return value


class RetrainConfig(BaseModel):
    """A retraining job. The rules of the gate are told by crossenc.evaluation.gate.Gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Annotated[LabelledData, Field(description="labelled data that grows: a folder or glob, or {files: …, …}")]
    evaluation: Annotated[FixedSet, Field(description="what every model is judged on: the collections of evaluate")]
    registry: Annotated[str, Field(min_length=1, description="folder with the versions of models")]
    name: Annotated[Name, Field(description="of the model in the registry")]
    base: Annotated[str, Field(min_length=1, description="model to start from while the registry has no version")]
    output: Annotated[str, Field(min_length=1, description="folder with a sub-folder for each retraining")]
    use: Annotated[Literal["all", "new"], Field(description="train on all labels, or on the new ones")] = "all"
    leaking: Annotated[
        Literal["refuse", "drop"], Field(description="rows whose query is judged on: stop, or train without them")
    ] = "refuse"
    mine: Annotated[MineSection | None, Field(description="settings of mine: negatives for the judged labels")] = None
    distill: Annotated[DistillSection | None, Field(description="settings of distill: it learns of teachers first")] = (
        None
    )
    train: Annotated[TrainSection, Field(description="settings of train")] = TrainSection()
    gate: Annotated[Gate, BeforeValidator(_known_gate), Field(description="rules of promotion")] = Gate()
    push: Annotated[str | None, Field(min_length=1, description="hub repository for promoted models")] = None
    price_per_hour: Annotated[float | None, Field(gt=0, description="of the whole cluster")] = None
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}
    drain_seconds: Annotated[float, Field(ge=0, description="time to end well after SIGTERM")] = 60
    ray_address: Annotated[str | None, Field(description="a running cluster; a local one is started if absent")] = None

    @field_validator("push")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and value.count("/") != 1:
            raise ValueError(f"{value} is no repository of the hub; write owner/name")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "RetrainConfig":
        measure = self.evaluation.measures[0]
        if self.gate.metric != measure:
            raise ValueError(
                f"gate.metric is {self.gate.metric}, but the first of evaluation.measures is {measure}: name the same"
            )
        names = [collection.name for collection in self.evaluation.collections]
        if self.gate.collection not in (None, *names):
            raise ValueError(f"gate.collection is {self.gate.collection}; evaluation has {', '.join(names)}")
        decisive = [one for one in self.evaluation.collections if self.gate.collection in (None, one.name)]
        segments = {column for collection in decisive for column in collection.segments}
        for name in self.gate.segment_floors:
            if name.partition("=")[0] not in segments:
                raise ValueError(f"gate.segment_floors: no collection that the gate looks at has {name} as a segment")
        if self.mine is not None and self.labels.queries is None:
            raise ValueError("mine needs labels that are judgements: ids, with the tables queries and corpus")
        try:
            self.evaluate_config({"candidate": "model"}, FIRST_STAGE, "evaluation")
            self.train_config(LabelledData(files="labels"), "start", "trained")
            if self.mine is not None:
                self.rerank_config("model", "reranked")
        except ValidationError as error:
            problems = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from None
        return self

    def _shared(self, kind: type[BaseModel]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SHARED if name in kind.model_fields}

    def evaluate_config(self, models: dict[str, str], baseline: str, output: str) -> EvaluateConfig:
        """The job that judges models, by name, on the fixed set."""
        systems = [{"name": name, "model": model} for name, model in models.items()]
        made = {"systems": systems, "baseline": baseline, "output": output}
        return EvaluateConfig.model_validate(self.evaluation.model_dump() | made | self._shared(EvaluateConfig))

    def train_config(self, data: LabelledData, start: str, output: str) -> TrainConfig:
        """The job that trains on `data`, starting as `start`."""
        made = {"train": data, "model": start, "output": output}
        return TrainConfig.model_validate(self.train.model_dump() | made | self._shared(TrainConfig))

    def distill_config(self, start: str, output: str) -> DistillConfig:
        """The job that distils teachers into what training starts as. There must be a section for it."""
        assert self.distill is not None, "asked only where there is a section"
        return self.distill.job(start, output, self._shared(DistillConfig))

    def scoring_config(self, model: str, output: str) -> RerankConfig:
        """The job in which `model` scores a collection of the fixed set; which one is not said."""
        settings = {"candidates": "none", "scoring": self.evaluation.scoring, "model": model, "output": output}
        return RerankConfig.model_validate(settings | self._shared(RerankConfig))

    def rerank_config(self, model: str, output: str) -> RerankConfig:
        """The job in which `model` scores the candidates to mine. There must be a section for mining."""
        assert self.mine is not None, "asked only where there is a section"
        same = {*RerankConfig.model_fields} & {*MineConfig.model_fields} - {"output", "qrels"}
        settings = {name: getattr(self.mine, name) for name in same} | self._shared(RerankConfig)
        if self.mine.queries is None:  # the corpus is for positives alone: candidates have texts of their own
            settings["corpus"] = None
        return RerankConfig.model_validate({**settings, "scoring": self.mine.scoring, "model": model, "output": output})

    def mine_config(
        self, qrels: tuple[str, ...], reranked: str | None, output: str, known: tuple[str, ...] = ()
    ) -> MineConfig:
        """The job that mines negatives for the judgements in `qrels`, by a rerank run's scores where there is one.

        Positives of the judgements in `known` are no negatives either.
        """
        assert self.mine is not None, "asked only where there is a section"
        settings = self.mine.model_dump(exclude={"scoring"}) | self._shared(MineConfig)
        if reranked is not None:
            for name in ("candidates", "layout", "columns"):  # those of the rerank run
                del settings[name]
        made = {"qrels": qrels, "known_positives": known, "reranked": reranked, "output": output}
        return MineConfig.model_validate(settings | made)

    def result_options(self) -> dict[str, Any]:
        """The settings that change what a retraining comes to, beside the label files."""
        own = {"registry", "name", "base", "use", "leaking", "max_text_bytes"}
        return {
            **self.model_dump(mode="json", include=own),
            "labels": self.labels.model_dump(mode="json", exclude={"files"}),
            "evaluation": self.evaluation.model_dump(mode="json", exclude={"scoring", "trec_run"})
            | {"scoring": self.evaluation.scoring.result_options()},
            "mine": self.mine
            and self.mine.model_dump(mode="json", exclude={"workers", "scoring"})
            | {"scoring": self.mine.scoring.result_options()},
            "distill": self.distill
            and self.distill.model_dump(
                mode="json", exclude={"workers": True, "scoring": True, "student": _TRAIN_WITHOUT_EFFECT}
            )
            | {"scoring": self.distill.scoring.result_options()},
            "train": self.train.model_dump(mode="json", exclude=_TRAIN_WITHOUT_EFFECT),
            "gate": asdict(self.gate),
        }
