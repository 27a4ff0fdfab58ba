"""The settings of a mining job: what may stand in its YAML file, with types, defaults and checks.

It knows nothing of how a job runs. Fields that change a result are part of the run's fingerprint (`result_options`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crossenc.mining import MineSettings
from pipelines.config import LayoutName

FormatName = Literal["pairs", "triplets", "tuples", "lists", "ids", "flagembedding", "triples"]
_RULES = (
    "num_negatives",
    "min_rank",
    "max_rank",
    "max_score",
    "min_score",
    "absolute_margin",
    "relative_margin",
    "positive_percentile",
    "sampling",
    "random_share",
    "seed",
)


class MineConfig(BaseModel):
    """A mining job. The rules are those of crossenc.mining.MineSettings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: Annotated[str | tuple[str, ...], Field(description="Parquet file, folder or glob; or a list")] = ()
    reranked: Annotated[str | None, Field(description="output folder of a finished rerank run")] = None
    qrels: Annotated[
        str | tuple[str, ...],
        Field(min_length=1, description="judgements, or a list of them: Parquet or TREC; above 0 is a positive"),
    ]
    known_positives: Annotated[
        str | tuple[str, ...], Field(description="more judgements: their positives are no negatives, and not learned")
    ] = ()
    output: Annotated[str, Field(min_length=1, description="folder for the training data; made if absent")]
    layout: Annotated[Literal["auto"] | LayoutName, Field(description="shape of the candidates")] = "auto"
    queries: Annotated[str | None, Field(description="table query_id, text (layout ids)")] = None
    corpus: Annotated[str | None, Field(description="table doc_id, text[, title]")] = None
    columns: Annotated[dict[str, str], Field(description="role -> column name, where the usual names differ")] = {}
    format: Annotated[FormatName, Field(description="shape of the training data")] = "lists"
    scores: Annotated[bool, Field(description="also write the scores of positives and negatives")] = False
    labels: Annotated[Literal["binary", "grades"], Field(description="a positive's label: 1, or its grade")] = "binary"
    num_negatives: Annotated[int, Field(description="negatives per query")] = 5
    min_negatives: Annotated[int | None, Field(description="a query with fewer is left out; tuples need all")] = None
    min_rank: Annotated[int, Field(description="first-stage rank of the first candidate to take, from 1")] = 1
    max_rank: Annotated[int | None, Field(description="and of the last one")] = None
    max_score: Annotated[float | None, Field(description="highest score of a negative")] = None
    min_score: Annotated[float | None, Field(description="lowest score of a negative")] = None
    absolute_margin: Annotated[float | None, Field(description="score below the lowest-scored positive's")] = None
    relative_margin: Annotated[float | None, Field(description="the same as a part of that score")] = None
    positive_percentile: Annotated[float | None, Field(description="share of that score to stay below")] = None
    sampling: Annotated[Literal["top", "random"], Field(description="the hardest, or drawn ones")] = "top"
    random_share: Annotated[float, Field(description="part of the negatives that is drawn from what is left")] = 0.0
    random_from: Annotated[
        Literal["candidates", "others"], Field(description="draw it from the query's candidates, or other queries'")
    ] = "candidates"
    seed: Annotated[int, Field(description="of all drawing")] = 0
    workers: Annotated[int, Field(ge=1, le=1024, description="processes that mine, on this machine")] = 1
    shard_candidates: Annotated[int | None, Field(ge=1, description="candidates in a shard; by size if absent")] = None
    max_text_bytes: Annotated[int, Field(ge=1, description="a longer query or document is refused")] = 4 * 2**20
    skip_bad_files: Annotated[bool, Field(description="go on without files that planning cannot read")] = False
    storage_options: Annotated[dict[str, Any], Field(repr=False, description="passed to the file system")] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "MineConfig":
        if bool(self.candidate_uris) == (self.reranked is not None) or not all(self.candidate_uris):
            raise ValueError("name the candidates, or as reranked the output folder of a rerank run; one of the two")
        if self.reranked is not None and (self.columns or self.layout != "auto"):
            raise ValueError("layout and columns are those of the rerank run; leave them out")
        if self.queries is not None and self.corpus is None:
            raise ValueError("queries and corpus go together: both tables are needed for candidates given as ids")
        if self.layout in ("nested", "pairs") and self.queries is not None:
            raise ValueError(f"layout {self.layout} holds its own queries; leave queries out, or use ids")
        if self.positive_percentile is not None and self.relative_margin is not None:
            raise ValueError("positive_percentile: 0.95 and relative_margin: 0.05 are one rule; give one of them")
        if self.format == "tuples" and self.min_negatives not in (None, self.num_negatives):
            raise ValueError("tuples need all num_negatives; leave min_negatives out")
        if self.format == "triples" and self.scores:
            raise ValueError("triples have no place for scores; set scores: false, or format: triplets")
        rules = self.rules()
        if self.random_from == "others" and not rules.num_random:
            raise ValueError("random_from: others needs a random_share that makes up at least one negative")
        if self.random_from == "others" and self.scores:
            raise ValueError("documents of other queries have no scores; set scores: false or random_from: candidates")
        return self

    @property
    def candidate_uris(self) -> tuple[str, ...]:
        return (self.candidates,) if isinstance(self.candidates, str) else self.candidates

    @property
    def qrels_uris(self) -> tuple[str, ...]:
        return (self.qrels,) if isinstance(self.qrels, str) else self.qrels

    @property
    def known_uris(self) -> tuple[str, ...]:
        return (self.known_positives,) if isinstance(self.known_positives, str) else self.known_positives

    @property
    def pass_through(self) -> tuple[str, ...]:
        """None: training data has texts and labels only."""
        return ()

    def rules(self) -> MineSettings:
        """The rules for choosing. Raises ValueError as MineSettings does."""
        default = self.num_negatives if self.format == "tuples" else 1
        return MineSettings(
            **{name: getattr(self, name) for name in _RULES},
            min_negatives=default if self.min_negatives is None else self.min_negatives,
            require_scores=self.scores,
        )

    def result_options(self) -> dict[str, Any]:
        """The settings that change results: two runs with equal ones and equal inputs give equal files."""
        own = {*_RULES, "layout", "columns", "format", "scores", "labels", "random_from", "min_negatives"}
        own |= {"known_positives"} if self.known_positives else set()
        return self.model_dump(mode="json", include=own | {"max_text_bytes", "skip_bad_files"})
