"""How well a model orders the documents of queries, against the order they came in. Knows a model by `predict` alone.

Documents with equal texts are one document. Equal scores keep the order of `documents`; what stands in no such order
comes after, by its text. So no order depends on which documents are relevant.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import InputError
from crossenc.evaluation.evaluator import (
    BaseEvaluator,
    append_csv,
    csv_name,
    log_start,
    predict,
    single_scores,
)
from crossenc.evaluation.metrics import per_query
from crossenc.ranking import order

logger = logging.getLogger(__name__)

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """A query, its relevant documents, those that are ranked, and how many of these came in an order.

    `first_stage` counts the documents, at the start of `documents`, that a first stage ranked; None when there was
    no first stage. Texts are distinct within `positives` and within `documents`.
    """

    text: str
    positives: frozenset[str]
    documents: tuple[str, ...]
    first_stage: int | None

    @property
    def num_relevant(self) -> int:
        return sum(document in self.positives for document in self.documents)


class CrossEncoderRerankingEvaluator(BaseEvaluator):
    """MAP, MRR@k and nDCG@k (primary) of the order that a model gives to each query's documents.

    A sample is a dict with `query`, `positive` (a text or several), and either `negative` (texts) or `documents` (all
    that a first stage found, best first). With `documents` there are `base_` metrics of the first stage too: a
    positive that it did not find counts as not found. The model gets such positives as well, after the others, when
    `always_rerank_positives`; otherwise it can only be as good as the first stage's finds allow. A query without
    positives counts 0.
    """

    def __init__(  # noqa: PLR0913 - the arguments of its namesake
        self,
        samples: Sequence[Sample] | Mapping[Any, Sample],
        at_k: int = 10,
        always_rerank_positives: bool = True,
        name: str = "",
        prompt_name: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        mrr_at_k: int | None = None,
    ) -> None:
        if mrr_at_k is not None:
            warnings.warn("mrr_at_k is deprecated: write at_k", DeprecationWarning, stacklevel=2)
            at_k = mrr_at_k
        self.samples = list(samples.values()) if isinstance(samples, Mapping) else samples
        self.at_k = at_k
        self.always_rerank_positives = always_rerank_positives
        self.name = name
        self.prompt_name = prompt_name
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.csv_file = csv_name("CrossEncoderRerankingEvaluator", name, f"results_@{at_k}.csv")
        self.csv_headers = ["epoch", "steps", "MAP", f"MRR@{at_k}", f"NDCG@{at_k}"]
        self.primary_metric = f"ndcg@{at_k}"

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        log_start(self, self.name, epoch, steps)
        queries = [_read_sample(sample, self.always_rerank_positives) for sample in self.samples]
        if not queries:
            raise InputError("there is nothing to evaluate: give at least one sample")
        metrics = self._means(queries, self._rankings(queries, model))
        if self.write_csv:
            append_csv(output_path, self.csv_file, self.csv_headers, [epoch, steps, *metrics.values()])
        for_card: dict[str, Any] = dict(metrics)
        if any(query.first_stage is not None for query in queries):
            base = self._means(
                [query for query in queries if query.first_stage is not None],
                [list(query.documents[: query.first_stage]) for query in queries if query.first_stage is not None],
            )
            for_card = gains(metrics, base)
            metrics |= {f"base_{name}": value for name, value in base.items()}
        logger.info("%d queries: %s", len(queries), "  ".join(f"{name} {value}" for name, value in for_card.items()))
        self.store_metrics_in_model_card_data(model, self.prefix_name_to_metrics(for_card, self.name), epoch, steps)
        return self.prefix_name_to_metrics(metrics, self.name)

    def get_config_dict(self) -> dict[str, Any]:
        config: dict[str, Any] = {"at_k": self.at_k}
        if self.samples and "documents" in self.samples[0]:
            config["always_rerank_positives"] = self.always_rerank_positives
        return config

    def _rankings(self, queries: Sequence[_Query], model: Any) -> list[list[str]]:
        """Each query's documents in the model's order, from one call of it."""
        # A query of which no document is relevant counts 0 in any order: the model need not see it.
        asked = [query for query in queries if query.num_relevant]
        pairs = [(query.text, document) for query in asked for document in query.documents]
        scores = np.empty(0, np.float32)
        if pairs:
            found = predict(model, pairs, self.prompt_name, self.batch_size, self.show_progress_bar)
            scores = single_scores(found, self)
        ends = np.cumsum([len(query.documents) for query in asked], dtype=np.int64)
        parts = iter(np.split(scores, ends[:-1]))
        return [_ranked(query, next(parts)) if query.num_relevant else [] for query in queries]

    def _means(self, queries: Sequence[_Query], rankings: Sequence[Sequence[str]]) -> dict[str, float]:
        """MAP, MRR@k and nDCG@k of the rankings, means over the queries."""
        qrels = {str(number): dict.fromkeys(query.positives, 1) for number, query in enumerate(queries)}
        run = {str(number): ranking for number, ranking in enumerate(rankings)}
        measures = {"map": "AP", f"mrr@{self.at_k}": f"RR@{self.at_k}", f"ndcg@{self.at_k}": f"nDCG@{self.at_k}"}
        values = per_query(list(measures.values()), qrels, run)
        return {name: float(np.mean(list(values[measure].values()))) for name, measure in measures.items()}


def gains(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, str]:
    """Values with what they gained, as cards show them: `0.7105 (+0.2200)`."""
    return {name: f"{value:.4f} ({value - before[name]:+.4f})" for name, value in after.items()}


def _ranked(query: _Query, scores: NDArray[np.floating[Any]]) -> list[str]:
    """The documents of a query by score; equal ones in first-stage order, and without one by text."""
    first_stage = query.first_stage or 0
    ranks = np.minimum(np.arange(len(query.documents)), first_stage)
    return [query.documents[position] for position in order(scores, ranks, query.documents)]


def _read_sample(sample: Sample, always_rerank_positives: bool) -> _Query:
    """A sample's query; raises InputError naming what it lacks."""
    for key in ("query", "positive"):
        if key not in sample:
            raise InputError(f"a sample for reranking has no {key!r}; it has {', '.join(map(repr, sample))}")
    if ("negative" in sample) == ("documents" in sample):
        raise InputError("a sample for reranking needs exactly one of 'negative' and 'documents'")
    positives = [sample["positive"]] if isinstance(sample["positive"], str) else list(sample["positive"])
    if "negative" in sample:
        documents, first_stage = dict.fromkeys([*positives, *sample["negative"]]), None
    else:
        found = dict.fromkeys(sample["documents"])
        documents, first_stage = found, len(found)
        if always_rerank_positives:
            documents = dict.fromkeys([*found, *positives])
    return _Query(
        text=sample["query"],
        positives=frozenset(positives),
        documents=tuple(documents),
        first_stage=first_stage,
    )
