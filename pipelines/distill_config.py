"""The settings of a distillation job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs. Each stage is a job of its own, whose settings are made from these.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crossenc.distillation import SampleSettings
from pipelines.config import LayoutName, RerankConfig, ScoringConfig
from pipelines.train_config import LossConfig, TrainConfig
from pipelines.train_data_config import LabelledData

_LOSS = "kl_distillation"
#: Settings of training that are the distillation job's own, or made by it.
_SHARED = ("registry", "max_text_bytes", "storage_options", "drain_seconds", "ray_address")
_MADE = ("train", "output", *_SHARED)
_OF_LISTS = ("documents", "strata", "keep_top", "seed")


class StudentConfig(TrainConfig):
    """The settings of a training job, but for those that the distillation job gives it."""

    train: Annotated[LabelledData, Field(exclude=True)] = LabelledData(files="lists")
    output: Annotated[str, Field(exclude=True)] = "student"
    registry: Annotated[str | None, Field(exclude=True)] = None
    model: Annotated[
        str | None, Field(min_length=1, description="folder, URI, hub id with @revision, or registry://name")
    ] = None  # type: ignore[assignment]
    loss: LossConfig = LossConfig(name=_LOSS)
    max_text_bytes: Annotated[int, Field(exclude=True)] = 0
    storage_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    drain_seconds: Annotated[float, Field(exclude=True)] = 0
    ray_address: Annotated[str | None, Field(exclude=True)] = None

    @field_validator("loss", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Parameters alone are those of the default loss."""
        return {"name": _LOSS, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _leaves_out(self) -> "StudentConfig":
        given = [name for name in _MADE if name in self.model_fields_set]
        if given:
            of_job = "; set it beside student, for the whole job" if given[0] in _SHARED else ""
            raise ValueError(f"{given[0]} is given by the distillation job: leave it out{of_job}")
        return self


class DistillConfig(BaseModel):
    """A distillation job. How lists are drawn is told by crossenc.distillation.SampleSettings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teachers: Annotated[str | tuple[str, ...], Field(description="one model or several, named as in rerank")]
    candidates: Annotated[str | tuple[str, ...], Field(description="Parquet file, folder or glob; or a list of them")]
    output: Annotated[str, Field(min_length=1, description="folder for all stages; made if absent")]
    registry: Annotated[
        str | None, Field(description="folder or URI of the registry, for models as registry://name")
    ] = None
    layout: Annotated[Literal["auto"] | LayoutName, Field(description="shape of the candidates")] = "auto"
    queries: Annotated[str | None, Field(description="table query_id, text (layout ids)")] = None
    corpus: Annotated[str | None, Field(description="table doc_id, text[, title] (layout ids)")] = None
    columns: Annotated[dict[str, str], Field(description="role -> column name, where the usual names differ")] = {}
    scoring: Annotated[ScoringConfig, Field(description="of the teachers, as in rerank; always raw logits")] = (
        ScoringConfig(activation="identity")
    )
    qrels: Annotated[str | None, Field(description="judgements: positives are kept, and come first")] = None
    documents: Annotated[int, Field(description="documents in a list, at most")] = 8
    strata: Annotated[int, Field(description="levels of a query's scores that a list has documents of")] = 4
    keep_top: Annotated[int, Field(description="best documents that are always in the list")] = 1
    seed: Annotated[int, Field(description="of the drawing")] = 0
    student: Annotated[StudentConfig, Field(description="settings of train")] = StudentConfig()
    student_layers: Annotated[
        int | None, Field(ge=1, description="the student starts as the first teacher with so many of its layers")
    ] = None
    workers: Annotated[int, Field(ge=1, le=1024, description="processes that draw lists, on this machine")] = 1
    shard_candidates: Annotated[int | None, Field(ge=1, description="candidates in a shard; by size if absent")] = None
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    skip_bad_files: Annotated[bool, Field(description="go on without files that planning cannot read")] = False
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}
    drain_seconds: Annotated[float, Field(ge=0, description="time to end well after SIGTERM")] = 60
    ray_address: Annotated[str | None, Field(description="a running cluster; a local one is started if absent")] = None

    @field_validator("scoring", mode="before")
    @classmethod
    def _raw(cls, value: Any) -> Any:
        return {"activation": "identity", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> "DistillConfig":
        if not self.teacher_names or not all(self.teacher_names):
            raise ValueError("teachers is empty: name at least one model")
        if len(set(self.teacher_names)) < len(self.teacher_names):
            raise ValueError("teachers names a model twice; once is enough")
        if (self.student.model is None) == (self.student_layers is None):
            raise ValueError("give the student's model, or student_layers for one made from the first teacher")
        if self.scoring.activation != "identity":
            raise ValueError("a student learns from raw logits: leave scoring.activation out")
        self.sampling()
        try:
            self.rerank_config(self.teacher_names[0], self.output)
            self.train_config("lists", "model", self.output)
        except ValidationError as error:
            problems = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from None
        return self

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return (self.teachers,) if isinstance(self.teachers, str) else self.teachers

    def sampling(self) -> SampleSettings:
        """How lists are drawn. Raises ValueError as SampleSettings does."""
        return SampleSettings(**{name: getattr(self, name) for name in _OF_LISTS})

    def rerank_config(self, teacher: str, output: str) -> RerankConfig:
        """The job in which a teacher scores the candidates."""
        same = {*RerankConfig.model_fields} & {*DistillConfig.model_fields} - {"output", "qrels"}
        settings = {name: getattr(self, name) for name in same}
        return RerankConfig.model_validate({**settings, "model": teacher, "output": output})

    def train_config(self, lists: str, model: str, output: str) -> TrainConfig:
        """The job in which the student learns from the lists in a folder, starting from `model`."""
        settings = self.student.model_dump() | {name: getattr(self, name) for name in _SHARED}
        data = {"files": lists, "layout": "lists"}
        return TrainConfig.model_validate({**settings, "train": data, "model": model, "output": output})

    def list_options(self) -> dict[str, Any]:
        """The settings that change the lists, beside the teachers' scores."""
        return self.model_dump(mode="json", include={*_OF_LISTS, "max_text_bytes"})
