"""The settings of an evaluation job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crossenc.evaluation.comparison import is_coverage
from crossenc.evaluation.results import FIRST_STAGE
from pipelines.config import LayoutName, ScoringConfig

#: A name becomes part of paths and of column values.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_Value = str | int | bool


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CollectionConfig(_Settings):
    """Judged queries with candidates. Give a BEIR folder, or name the parts."""

    name: Annotated[Name, Field(description="for tables, and for folders in the output")]
    candidates: Annotated[
        str | tuple[str, ...], Field(description="the first stage: Parquet in any layout of rerank, or a TREC run")
    ]
    beir: Annotated[
        str | None, Field(description="folder with queries.jsonl, corpus.jsonl and qrels/test.tsv; replaces these")
    ] = None
    qrels: Annotated[str | None, Field(description="judgements: Parquet or TREC")] = None
    layout: Annotated[Literal["auto"] | LayoutName, Field(description="shape of Parquet candidates")] = "auto"
    queries: Annotated[str | None, Field(description="table query_id, text (layout ids)")] = None
    corpus: Annotated[str | None, Field(description="table doc_id, text[, title]")] = None
    columns: Annotated[dict[str, str], Field(description="role -> column name, where the usual names differ")] = {}
    query_columns: Annotated[
        str | None, Field(description="table with query_id and the columns of where and segments; queries by default")
    ] = None
    where: Annotated[
        dict[str, _Value | tuple[_Value, ...]], Field(description="column -> value or values: only these queries count")
    ] = {}
    segments: Annotated[tuple[str, ...], Field(description="columns whose values are also judged by themselves")] = ()
    num_queries: Annotated[int | None, Field(ge=1, description="so many of the queries, drawn by a hash of the id")] = (
        None
    )
    missing_queries: Annotated[
        Literal["zero", "leave_out"], Field(description="judged queries without candidates: trec_eval with -c, without")
    ] = "zero"

    @model_validator(mode="after")
    def _consistent(self) -> "CollectionConfig":
        if not self.candidates or not all(self.candidate_uris):
            raise ValueError("candidates is empty: name at least one file, folder or glob")
        if self.beir is None and self.qrels is None:
            raise ValueError("name the judgements as qrels, or a BEIR folder as beir")
        if self.beir is not None and (self.queries or self.corpus):
            raise ValueError("a BEIR folder has its own queries and corpus; leave them out")
        if (self.queries is None) != (self.corpus is None):
            raise ValueError("queries and corpus go together: both tables are needed for candidates given as ids")
        if self.layout in ("nested", "pairs") and self.tables is not None:
            raise ValueError(f"layout {self.layout} holds its own texts; leave queries and corpus out, or use ids")
        return self

    @property
    def candidate_uris(self) -> tuple[str, ...]:
        return (self.candidates,) if isinstance(self.candidates, str) else self.candidates

    @property
    def tables(self) -> tuple[str, str] | None:
        """The tables of queries and documents, None where the candidates hold the texts or there are none."""
        if self.beir is not None:
            return f"{self.beir.rstrip('/')}/queries.jsonl", f"{self.beir.rstrip('/')}/corpus.jsonl"
        return None if self.queries is None or self.corpus is None else (self.queries, self.corpus)

    @property
    def qrels_uri(self) -> str:
        return self.qrels or f"{(self.beir or '').rstrip('/')}/qrels/test.tsv"

    @property
    def accepted(self) -> dict[str, frozenset[str]]:
        """Column -> the values, as text, whose queries count."""
        return {
            column: frozenset(map(str, values if isinstance(values, tuple) else (values,)))
            for column, values in self.where.items()
        }


class SystemConfig(_Settings):
    """Something that ranks: a model, or a ranking that is there already."""

    name: Annotated[Name, Field(description="for tables; by default the last part of the model's or ranking's name")]
    model: Annotated[
        str | None, Field(min_length=1, description="folder, URI, hub id with @revision, or registry://name")
    ] = None
    ranking: Annotated[
        str | dict[str, str] | None,
        Field(description="a TREC run, Parquet, or the output of a rerank run; by collection where there are several"),
    ] = None
    scoring: Annotated[ScoringConfig | None, Field(description="how this model is run; as the job says by default")] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A plain text is a model; a name is made where none is given."""
        if isinstance(value, str):
            value = {"model": value}
        if isinstance(value, Mapping) and "name" not in value:
            rankings = value.get("ranking")
            first = next(iter(rankings.values()), None) if isinstance(rankings, Mapping) else rankings
            source = str(value.get("model") or first or "")
            value = {**value, "name": _short_name(source)}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "SystemConfig":
        if (self.model is None) == (self.ranking is None):
            raise ValueError(f"system {self.name}: give either a model or a ranking")
        if self.ranking is not None and self.scoring is not None:
            raise ValueError(f"system {self.name}: scoring goes with a model; a ranking is only read")
        if self.name == FIRST_STAGE:
            raise ValueError(f"{FIRST_STAGE} is always among the systems; leave it out, or give another name")
        return self


class EvaluateConfig(_Settings):
    """An evaluation job. The first stage of each collection is always among the systems, as `first_stage`."""

    collections: Annotated[tuple[CollectionConfig, ...], Field(min_length=1, description="what to judge on")]
    systems: Annotated[tuple[SystemConfig, ...], Field(description="what to judge, besides the first stage")] = ()
    output: Annotated[str, Field(min_length=1, description="folder for the results; made if absent")]
    measures: Annotated[
        tuple[str, ...], Field(min_length=1, description="names of ir_measures; the first is the main one")
    ] = ("nDCG@10", "RR@10", "AP", "R@100", "P@10", "Judged@10")
    depths: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="a model orders at most the deepest; the others are looked at, too"),
    ] = (10, 20, 50, 100, 1000)
    baseline: Annotated[str, Field(description="the system that the others are compared with")] = FIRST_STAGE
    seed: Annotated[int, Field(ge=0, description="of intervals and randomisation tests")] = 0
    worst: Annotated[int, Field(ge=0, le=100, description="queries shown per system: the largest losses")] = 10
    trec_run: Annotated[bool, Field(description="also write each ranking as a TREC run")] = False
    registry: Annotated[
        str | None, Field(description="folder or URI of the registry, for models as registry://name")
    ] = None
    scoring: ScoringConfig = ScoringConfig()
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}
    drain_seconds: Annotated[float, Field(ge=0, description="time to finish shards in work after SIGTERM")] = 30
    ray_address: Annotated[str | None, Field(description="a running cluster; a local one is started if absent")] = None

    @field_validator("measures")
    @classmethod
    def _different(cls, measures: tuple[str, ...]) -> tuple[str, ...]:
        _refuse_twice("measures", measures)
        if is_coverage(measures[0]):
            raise ValueError(f"{measures[0]} does not say how good a ranking is; name another measure first")
        return measures

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateConfig":
        collections = [collection.name for collection in self.collections]
        systems = [system.name for system in self.systems]
        _refuse_twice("collections", collections)
        _refuse_twice("systems", systems)
        if self.baseline not in (FIRST_STAGE, *systems):
            raise ValueError(f"baseline {self.baseline} is none of the systems {', '.join((FIRST_STAGE, *systems))}")
        for system in self.systems:
            if isinstance(system.ranking, str) and len(collections) > 1:
                raise ValueError(f"system {system.name}: name its ranking for each collection, as {{name: path}}")
            if isinstance(system.ranking, dict) and set(system.ranking) != set(collections):
                raise ValueError(
                    f"system {system.name}: its ranking must name the collections {', '.join(collections)}"
                )
        return self

    def ranking_of(self, system: SystemConfig, collection: CollectionConfig) -> str | None:
        """Where the ranking of a system is, None for a model."""
        return system.ranking.get(collection.name) if isinstance(system.ranking, dict) else system.ranking

    def result_options(self) -> dict[str, Any]:
        """The settings that change figures or pages: two jobs with equal ones and equal inputs give equal figures."""
        own = {"collections", "measures", "depths", "baseline", "seed", "worst", "trec_run", "max_text_bytes"}
        options = self.model_dump(mode="json", include=own)
        systems = [[s.name, s.model, s.ranking, (s.scoring or self.scoring).result_options()] for s in self.systems]
        return options | {"systems": systems}


def _short_name(source: str) -> str:
    """The last part of a path, URI or hub id, without its revision, as a name."""
    last = source.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:100]


def _refuse_twice(setting: str, names: Any) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"{setting} names {twice[0]!r} twice; give each its own name")
