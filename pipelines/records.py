"""What the stages of a run tell the driver, and what a finished run says of itself. Plain data.

A record is JSON-friendly: numbers, strings, tuples and string-keyed mappings only, never a text from the input.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

#: How a job came to its end; what was stopped goes on when it is run again.
JobState = Literal["done", "already done", "stopped"]
#: Upper edges, in tokens, of the document-length histogram's bins; the last bin is open.
LENGTH_EDGES: tuple[int, ...] = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
#: Bins of the score histogram: SCORE_BINS equal bins between two edges that depend on the activation.
SCORE_BINS = 80
#: What a finished run leaves beside its results. SUCCESS_FILE is stored last: without it nothing is finished.
MANIFEST_FILE = "_manifest.json"
SUCCESS_FILE = "_SUCCESS"
REPORT_FILE = "report.html"
_SUMMED = (
    "num_queries",
    "num_candidates",
    "num_scored",
    "num_results",
    "num_tokens",
    "num_padded_tokens",
    "num_truncated",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """What is known of a committed shard from its own footer: a pure function of the shard.

    The conservation law: `num_candidates == num_scored + sum(refused.values())`.
    `refused` maps a reason code to a number of candidates, `forward_kinds` how the model was called to a number of
    pairs that were scored so.
    `score_histogram` has SCORE_BINS counts of scored candidates by model score (ends include what lies outside);
    `length_histogram` has len(LENGTH_EDGES) + 1 counts of pairs by tokens.
    """

    num_queries: int
    num_candidates: int
    num_scored: int
    num_results: int
    refused: Mapping[str, int]
    num_tokens: int
    num_padded_tokens: int
    num_truncated: int
    score_histogram: tuple[int, ...]
    length_histogram: tuple[int, ...]
    forward_kinds: Mapping[str, int] = field(default_factory=dict)


def add_counts(counts: Iterable[ShardCounts]) -> ShardCounts:
    """The sum over shards."""
    refused: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    scores, lengths = [0] * SCORE_BINS, [0] * (len(LENGTH_EDGES) + 1)
    for one in counts:
        refused.update(one.refused)
        kinds.update(one.forward_kinds)
        for name in _SUMMED:
            sums[name] += getattr(one, name)
        scores = [a + b for a, b in zip(scores, one.score_histogram, strict=True)]
        lengths = [a + b for a, b in zip(lengths, one.length_histogram, strict=True)]
    return ShardCounts(
        refused=dict(sorted(refused.items())),
        forward_kinds=dict(sorted(kinds.items())),
        score_histogram=tuple(scores),
        length_histogram=tuple(lengths),
        **{name: sums[name] for name in _SUMMED},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Wall-clock seconds that one shard spent in each stage."""

    read: float = 0.0
    tokenise: float = 0.0
    score: float = 0.0
    write: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One committed shard as the driver sees it. `path` is relative to the output folder."""

    shard_id: str
    path: str
    num_bytes: int
    sha256: str
    counts: ShardCounts
    seconds: StageSeconds
    finished_at: float  # Unix time, for the throughput plot only; nothing is decided by it
    side_paths: tuple[str, ...] = ()  # the completeness and quarantine files that belong to it


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedExample:
    """A quarantined candidate shown in the report. Ids are cut to 80 characters; there is no document text."""

    reason: str
    query_id: str
    doc_id: str
    file: str
    row: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureComparison:
    """One measure before (first stage) and after (reranked), over the same queries.

    `low` and `high` bound the mean difference (95 % bootstrap interval); `p_t` and `p_randomisation` are
    two-sided p values of the paired t test and the sign-flip randomisation test (NaN for fewer than two queries).
    """

    measure: str
    num_queries: int
    before: float
    after: float
    low: float
    high: float
    p_t: float
    p_randomisation: float
    num_better: int
    num_worse: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a sample of queries is ranked by the run's number format and by float32.

    `num_other_documents` counts queries whose ten best are other documents, `num_other_order` those whose ten best
    differ at all. Differences are of scores. With nothing measured, `note` says why.
    """

    num_queries: int = 0
    num_pairs: int = 0
    num_other_documents: int = 0
    num_other_order: int = 0
    max_difference: float = 0.0
    mean_difference: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Everything that report.html shows."""

    output: str
    candidates: tuple[str, ...]
    model: str
    top_k: int | None
    counts: ShardCounts  # summed over shards
    num_shards: int
    num_shards_timed: int  # shards whose timing is known (timings of a killed driver can be lost)
    elapsed_seconds: float  # this process's own wall time
    seconds: StageSeconds  # summed over timed shards
    throughput: tuple[tuple[float, int], ...]  # (Unix time a shard finished, its scored pairs)
    score_range: tuple[float, float]  # outer edges of the score histogram
    refused_examples: tuple[RefusedExample, ...] = ()
    evaluation: tuple[MeasureComparison, ...] = ()
    evaluation_note: str = ""  # how many judged queries were compared and how many were left out, and why
    interpolation: str = ""  # the weight used and where it came from; empty without interpolation
    agreement: Agreement | None = None  # None where the run computes in float32
    cost: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
