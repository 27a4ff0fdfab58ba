"""Reranking over several small collections: folders of Parquet files, or NanoBEIR from the hub.

Knows a model by `predict` alone.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossenc.errors import InputError
from crossenc.evaluation.collection import read_folder, read_hub
from crossenc.evaluation.evaluator import BaseEvaluator, append_csv, log_start
from crossenc.evaluation.reranking import CrossEncoderRerankingEvaluator, gains

logger = logging.getLogger(__name__)

#: The collections of NanoBEIR, by the short names that users give.
_NANO_BEIR = {
    "climatefever": "NanoClimateFEVER",
    "dbpedia": "NanoDBPedia",
    "fever": "NanoFEVER",
    "fiqa2018": "NanoFiQA2018",
    "hotpotqa": "NanoHotpotQA",
    "msmarco": "NanoMSMARCO",
    "nfcorpus": "NanoNFCorpus",
    "nq": "NanoNQ",
    "quoraretrieval": "NanoQuoraRetrieval",
    "scidocs": "NanoSCIDOCS",
    "arguana": "NanoArguAna",
    "scifact": "NanoSciFact",
    "touche2020": "NanoTouche2020",
}
#: Their task is to find counter-arguments, which is not what a reranker learns: left out unless asked for.
_ARGUMENTS = ("arguana", "touche2020")


class CrossEncoderNanoBEIREvaluator(BaseEvaluator):
    """CrossEncoderRerankingEvaluator over collections, and what their values are together.

    `dataset_names` are folders (see `crossenc.evaluation.collection`), or names of subfolders of `dataset_id`, or, with
    a hub id as `dataset_id`, short names of NanoBEIR; None takes all subfolders, or all of NanoBEIR but arguana and
    touche2020. The first `rerank_k` candidates of each query are reranked. Metrics of a collection are called
    `<collection>_R<rerank_k>_<metric>`; `aggregate_fn` makes `NanoBEIR_R<rerank_k>_<aggregate_key>_<metric>` of them,
    with nDCG@k as the primary metric. Raises InputError for a collection that cannot be read.
    """

    def __init__(  # noqa: PLR0913 - the arguments of its namesake
        self,
        dataset_names: Sequence[str | Path] | None = None,
        dataset_id: str | Path = "sentence-transformers/NanoBEIR-en",
        rerank_k: int = 100,
        at_k: int = 10,
        always_rerank_positives: bool = True,
        prompt_name: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        aggregate_fn: Callable[[list[float]], Any] = np.mean,
        aggregate_key: str = "mean",
    ) -> None:
        names = _all_names(dataset_id) if dataset_names is None else dataset_names
        self.dataset_names = [str(name) for name in names]
        if not self.dataset_names:
            raise InputError("dataset_names is empty: name at least one collection, or give None for all there are")
        self.dataset_id = str(dataset_id)
        self.rerank_k = rerank_k
        self.at_k = at_k
        self.always_rerank_positives = always_rerank_positives
        self.prompt_name = prompt_name
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.aggregate_fn = aggregate_fn
        self.aggregate_key = aggregate_key
        self.name = f"NanoBEIR_R{rerank_k}_{aggregate_key}"
        self.csv_file = f"NanoBEIR_evaluation_{aggregate_key}_results.csv"
        self.csv_headers = ["epoch", "steps", "MAP", f"MRR@{at_k}", f"NDCG@{at_k}"]
        self.primary_metric = f"ndcg@{at_k}"
        self.evaluators = [self._evaluator(name) for name in self.dataset_names]

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        log_start(self, f"{len(self.evaluators)} collections", epoch, steps)
        results: dict[str, float] = {}
        by_metric: dict[str, list[float]] = {}
        for evaluator in self.evaluators:
            found = evaluator(model, output_path, epoch, steps)
            results |= found
            for name, value in found.items():
                by_metric.setdefault(name.removeprefix(f"{evaluator.name}_"), []).append(value)
        together = {metric: float(self.aggregate_fn(values)) for metric, values in by_metric.items()}
        reranked = {metric: value for metric, value in together.items() if not metric.startswith("base_")}
        if self.write_csv:
            append_csv(output_path, self.csv_file, self.csv_headers, [epoch, steps, *reranked.values()])
        for_card = gains(reranked, {metric: together[f"base_{metric}"] for metric in reranked})
        logger.info("together: %s", "  ".join(f"{metric} {value}" for metric, value in for_card.items()))
        self.store_metrics_in_model_card_data(model, self.prefix_name_to_metrics(for_card, self.name), epoch, steps)
        return results | self.prefix_name_to_metrics(together, self.name)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "dataset_names": self.dataset_names,
            "dataset_id": self.dataset_id,
            "rerank_k": self.rerank_k,
            "at_k": self.at_k,
            "always_rerank_positives": self.always_rerank_positives,
        }

    def _evaluator(self, dataset_name: str) -> CrossEncoderRerankingEvaluator:
        folder = _folder(dataset_name, self.dataset_id)
        if folder is not None:
            label = _NANO_BEIR.get(dataset_name.lower(), folder.name)
            samples = read_folder(folder, self.rerank_k)
        elif dataset_name.lower() in _NANO_BEIR:
            label = _NANO_BEIR[dataset_name.lower()]
            samples = read_hub(self.dataset_id, label, self.rerank_k)
        else:
            raise InputError(
                f"there is no folder {dataset_name!r}, and no collection of that name in NanoBEIR: give a folder with "
                f"queries, corpus, qrels and candidates, or one of {', '.join(_NANO_BEIR)}"
            )
        return CrossEncoderRerankingEvaluator(
            samples,
            at_k=self.at_k,
            always_rerank_positives=self.always_rerank_positives,
            name=f"{label}_R{self.rerank_k}",
            prompt_name=self.prompt_name,
            batch_size=self.batch_size,
            show_progress_bar=self.show_progress_bar,
            write_csv=self.write_csv,
        )


def _all_names(dataset_id: str | Path) -> list[str]:
    """The subfolders of a local folder that hold queries; where there are none, the collections of NanoBEIR."""
    found = sorted({path.parent.name for path in Path(dataset_id).glob("*/queries*")})
    return found or [name for name in _NANO_BEIR if name not in _ARGUMENTS]


def _folder(dataset_name: str, dataset_id: str) -> Path | None:
    """The local folder of a collection: one of `dataset_id`, or the name itself; None when there is none."""
    names = [dataset_name, _NANO_BEIR.get(dataset_name.lower(), dataset_name)]
    folders = [Path(dataset_id) / name for name in names]
    if dataset_name.lower() not in _NANO_BEIR:
        folders.append(Path(dataset_name))
    return next((folder for folder in folders if folder.is_dir()), None)
