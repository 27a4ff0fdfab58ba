"""The settings of a rerank job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs. Fields that change a result are part of the run's fingerprint (`result_options`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LayoutName = Literal["nested", "pairs", "ids"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoringConfig(_Settings):
    """The pool of scoring actors."""

    actors: Annotated[int, Field(ge=1, le=100_000, description="scoring actors, each with its own model")] = 1
    gpus_per_actor: Annotated[float, Field(ge=0, le=64, description="GPUs of each actor; a fraction shares one")] = 0
    cpus_per_actor: Annotated[
        float | None,
        Field(gt=0, description="CPUs, and torch threads, of each actor; 1 beside a GPU by default"),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        Field(description="number format of the forward pass; auto is bfloat16 on actors whose device is fast at it"),
    ] = "float32"
    max_batch_tokens: Annotated[int | None, Field(ge=1, description="tokens in one batch")] = None
    max_length: Annotated[int | None, Field(ge=1, description="tokens a pair may have; more are cut")] = None
    activation: Annotated[
        Literal["checkpoint", "identity"],
        Field(description="what scores go through: what the checkpoint names, or nothing: scores are raw logits"),
    ] = "checkpoint"
    compile: Annotated[
        bool, Field(description="compile the model, with CUDA graphs on GPUs; batches are padded then, to few shapes")
    ] = False
    backend: Annotated[Literal["torch", "onnx"], Field(description="what runs the model")] = "torch"
    onnx_file: Annotated[
        str | None, Field(description="file in the checkpoint's folder onnx; model.onnx by default")
    ] = None

    @model_validator(mode="after")
    def _one_backend(self) -> "ScoringConfig":
        if self.backend == "onnx" and (self.dtype != "float32" or self.gpus_per_actor > 0):
            raise ValueError(
                "backend onnx runs on CPUs, in the precision of its file: leave dtype and gpus_per_actor out"
            )
        if self.backend == "onnx" and self.compile:
            raise ValueError("compile goes with backend: torch")
        if self.backend != "onnx" and self.onnx_file is not None:
            raise ValueError("onnx_file goes with backend: onnx")
        return self

    def result_options(self) -> dict[str, Any]:
        """The settings that change scores. Those off the beaten track are among them where they are used."""
        names = {"dtype", "max_batch_tokens", "max_length"}
        names |= {"activation"} if self.activation != "checkpoint" else set()
        names |= {"compile"} if self.compile else set()
        return self.model_dump(include=names | ({"backend", "onnx_file"} if self.backend == "onnx" else set()))


class InterpolateConfig(_Settings):
    """Mixing the model's score with the first stage's, both z-normalised within each query.

    final = weight * z(model) + (1 - weight) * z(first stage). Give the weight, or judgements to choose it by.
    """

    weight: Annotated[float | None, Field(ge=0, le=1)] = None
    fit: Annotated[str | None, Field(description="qrels (Parquet or TREC) of queries to choose the weight on")] = None

    @model_validator(mode="after")
    def _one_source(self) -> "InterpolateConfig":
        if (self.weight is None) == (self.fit is None):
            raise ValueError("give either weight (a number from 0 to 1) or fit (a qrels file), not both")
        return self


class RerankConfig(_Settings):
    """A rerank job."""

    candidates: Annotated[str | tuple[str, ...], Field(description="Parquet file, folder or glob; or a list of them")]
    model: Annotated[str, Field(min_length=1, description="folder, URI, hub id with @revision, or registry://name")]
    output: Annotated[str, Field(min_length=1, description="folder for the results; made if absent")]
    registry: Annotated[
        str | None, Field(description="folder or URI of the registry, for models as registry://name")
    ] = None
    layout: Annotated[Literal["auto"] | LayoutName, Field(description="shape of the candidates")] = "auto"
    queries: Annotated[str | None, Field(description="table query_id, text (layout ids)")] = None
    corpus: Annotated[str | None, Field(description="table doc_id, text[, title] (layout ids)")] = None
    columns: Annotated[dict[str, str], Field(description="role -> column name, where the usual names differ")] = {}
    pass_through: Annotated[tuple[str, ...], Field(description="columns copied into the results")] = ()
    top_k: Annotated[int | None, Field(ge=1, description="documents kept per query; all by default")] = None
    interpolate: InterpolateConfig | None = None
    scoring: ScoringConfig = ScoringConfig()
    cpus_per_tokeniser: Annotated[float, Field(gt=0, description="CPUs of each reading and tokenising task")] = 1
    shard_candidates: Annotated[int | None, Field(ge=1, description="candidates in a shard; by size if absent")] = None
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    skip_bad_files: Annotated[bool, Field(description="go on without files that planning cannot read")] = False
    qrels: Annotated[str | None, Field(description="judgements; the report then shows before and after")] = None
    trec_run: Annotated[bool, Field(description="also write TREC run files, trec/part-*.run")] = False
    price_per_hour: Annotated[float | None, Field(ge=0, description="of the whole cluster, for the cost")] = None
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}
    drain_seconds: Annotated[float, Field(ge=0, description="time to finish shards in work after SIGTERM")] = 30
    ray_address: Annotated[str | None, Field(description="a running cluster; a local one is started if absent")] = None

    @model_validator(mode="after")
    def _consistent(self) -> "RerankConfig":
        if not self.candidates or not all(self.candidate_uris):
            raise ValueError("candidates is empty: name at least one file, folder or glob")
        twice = [name for i, name in enumerate(self.pass_through) if name in self.pass_through[:i]]
        if twice:
            raise ValueError(f"pass_through names {twice[0]!r} twice")
        if (self.queries is None) != (self.corpus is None):
            raise ValueError("queries and corpus go together: both tables are needed for candidates given as ids")
        if self.layout in ("nested", "pairs") and self.queries is not None:
            raise ValueError(f"layout {self.layout} holds its own texts; leave queries and corpus out, or use ids")
        return self

    @property
    def candidate_uris(self) -> tuple[str, ...]:
        return (self.candidates,) if isinstance(self.candidates, str) else self.candidates

    def result_options(self) -> dict[str, Any]:
        """The settings that change results: two runs with equal ones and equal inputs give equal files."""
        own = {"layout", "columns", "pass_through", "top_k", "interpolate", "max_text_bytes"}
        own |= {"skip_bad_files", "trec_run"}
        return self.model_dump(mode="json", include=own) | self.scoring.result_options()
