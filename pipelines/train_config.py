"""The settings of a training job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs. Fields that change a result are part of the run's fingerprint (`result_options`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.train_data_config import LabelledData

#: A step's lists, unless the job says otherwise.
_BATCH_LISTS = 16
#: Settings that say where and how fast, not what is learned.
_WITHOUT_EFFECT = {
    "output",
    "registry",
    "workers",
    "checkpoint_minutes",
    "keep_checkpoints",
    "storage_options",
    "drain_seconds",
    "ray_address",
}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossConfig(BaseModel):
    """The loss by its name, and its own parameters beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(description="one of crossenc.losses.LOSSES")] = "binary_cross_entropy"

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LoraConfig(_Settings):
    """Low-rank adapters that are trained with the head, in the place of the backbone's weights (needs peft)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...] | None, Field(description="names of layers; peft's choice if absent")] = (
        None
    )


class WorkersConfig(_Settings):
    """The processes that train together."""

    count: Annotated[int, Field(ge=1, le=4096, description="workers")] = 1
    min_count: Annotated[int | None, Field(ge=1, description="go on with so few where nodes are lost")] = None
    gpus: Annotated[float, Field(ge=0, le=1, description="GPUs of each worker; a part of one for a single worker")] = 0
    cpus: Annotated[float | None, Field(gt=0, description="CPUs, and torch threads, of each worker")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="tokens in one forward pass of a worker")] = None
    max_failures: Annotated[int, Field(ge=0, description="deaths of workers before the job ends with an error")] = 20

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersConfig":
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is above count {self.count}")
        if 0 < self.gpus <= 0.5 and self.count > 1:
            raise ValueError(
                f"two workers with gpus {self.gpus:g} share a device, where NCCL exchanges no gradients: set gpus: 1,"
                " or count: 1"
            )
        return self


class TrainConfig(_Settings):
    """A training job."""

    train: Annotated[LabelledData, Field(description="labelled data: files, or {files: …, layout: …, …}")]
    validation: Annotated[
        LabelledData | Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="labelled data to choose the best checkpoint by; or the share of queries held out for it"),
    ] = None
    model: Annotated[str, Field(min_length=1, description="folder, URI, hub id with @revision, or registry://name")]
    output: Annotated[str, Field(min_length=1, description="folder for the model; made if absent")]
    registry: Annotated[
        str | None, Field(description="folder or URI of the registry, for models as registry://name")
    ] = None
    loss: LossConfig = LossConfig()
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    batch_lists: Annotated[int | None, Field(ge=1, description="lists in a step of all workers together")] = None
    batch_tokens: Annotated[int | None, Field(ge=1, description="or tokens, whole lists all the same")] = None
    max_length: Annotated[int | None, Field(ge=1, description="tokens a pair may have; more are cut")] = None
    num_labels: Annotated[int | None, Field(ge=1, description="outputs of a new head")] = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    head_learning_rate: Annotated[float | None, Field(gt=0, description="the backbone's by default")] = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, description="steps of warm-up; below 1 a share of all steps")] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        Field(description="number format of the forward pass; weights stay in float32"),
    ] = "float32"
    dropout: Annotated[float | None, Field(ge=0, lt=1, description="everywhere; the model's own if absent")] = None
    gradient_checkpointing: Annotated[bool, Field(description="less memory for more time")] = False
    freeze_layers: Annotated[int, Field(ge=0, description="layers from below, and the embeddings, left as is")] = 0
    lora: LoraConfig | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    shuffled_lists: Annotated[
        int | None, Field(ge=1, description="lists shuffled together at most; what a worker keeps if absent")
    ] = None
    log_steps: Annotated[int, Field(ge=1, description="steps that a point of the loss curve is the mean of")] = 100
    evaluate_steps: Annotated[int | None, Field(ge=1, description="steps between validations; an epoch if absent")] = (
        None
    )
    checkpoint_minutes: Annotated[float, Field(ge=0, description="time between checkpoints to resume from")] = 10
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints kept, beside the best")] = 2
    workers: WorkersConfig = WorkersConfig()
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}
    drain_seconds: Annotated[float, Field(ge=0, description="time to store a checkpoint after SIGTERM")] = 60
    ray_address: Annotated[str | None, Field(description="a running cluster; a local one is started if absent")] = None

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch_lists is not None and self.batch_tokens is not None:
            raise ValueError("batch_lists and batch_tokens are two ways to give one size; give one of them")
        if self.dtype == "float16" and not self.workers.gpus:
            raise ValueError("float16 trains on GPUs alone; use bfloat16 or float32 on CPUs")
        if self.lora is not None and self.freeze_layers:
            raise ValueError("lora leaves the backbone's weights as they are; leave freeze_layers out")
        return self

    @property
    def lists_in_batch(self) -> int | None:
        """Lists in a step, None where its size is given in tokens."""
        return None if self.batch_tokens is not None else self.batch_lists or _BATCH_LISTS

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up out of `num_steps`."""
        return round(self.warmup * num_steps) if self.warmup < 1 else min(int(self.warmup), num_steps)

    def result_options(self) -> dict[str, Any]:
        """The settings that change what is learned."""
        return self.model_dump(mode="json", exclude=_WITHOUT_EFFECT | {"train", "validation", "model"})
