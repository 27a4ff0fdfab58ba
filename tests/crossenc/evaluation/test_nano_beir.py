"""Reranking over collections: folders of Parquet files in several shapes, what is missing, how values are joined."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossenc.errors import InputError
from crossenc.evaluation import CrossEncoderNanoBEIREvaluator, CrossEncoderRerankingEvaluator
from crossenc.evaluation.collection import read_folder
from tests.support.evaluators import GivenScores


def write(folder: Path, **tables: dict[str, list[Any]]) -> Path:
    for name, columns in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    return folder


#: Two judged queries and one that is not; the texts of documents are their scores.
TABLES: dict[str, dict[str, list[Any]]] = {
    "queries": {"query_id": ["q1", "q2", "q3"], "text": ["first", "second", "third"]},
    "corpus": {"doc_id": ["a", "b", "c", "d"], "text": ["1", "2", "3", "4"]},
    "qrels": {"query_id": ["q1", "q1", "q2"], "doc_id": ["c", "a", "b"], "relevance": [2, 0, 1]},
    "candidates": {
        "query_id": ["q1", "q1", "q1", "q2", "q2", "q3"],
        "doc_id": ["a", "c", "b", "d", "b", "a"],
        "rank": [2, 3, 1, 1, 2, 1],
        "score": [0.0, -1.0, 5.0, 2.0, 1.0, 1.0],
    },
}
SAMPLES = [
    {"query": "first", "positive": ["3"], "documents": ["2", "1", "3"]},
    {"query": "second", "positive": ["2"], "documents": ["4", "2"]},
]


def by_number(query: str, document: str) -> float:
    return float(document or 0)


def test_a_folder_becomes_samples_in_the_order_of_the_queries(tmp_path: Path):
    assert read_folder(write(tmp_path, **TABLES), 100) == SAMPLES
    assert [sample["documents"] for sample in read_folder(tmp_path, 1)] == [["2"], ["4"]]


def test_the_names_and_lists_of_beir_are_understood(tmp_path: Path):
    write(
        tmp_path,
        queries={"_id": ["q1", "q2"], "text": ["first", "second"]},
        corpus={"_id": ["a", "b", "c", "d"], "text": ["1", "2", "3", "4"]},
        qrels={"query-id": ["q1", "q2"], "corpus-id": ["c", "b"]},
        bm25={"query-id": ["q2", "q1"], "corpus-ids": [["d", "b"], ["b", "a", "c"]]},
    )
    assert read_folder(tmp_path, 100) == SAMPLES


def test_tables_may_be_folders_of_files_and_ids_numbers(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    for part, (ids, texts) in enumerate((([10, 20], ["1", "2"]), ([30, 40], ["3", "4"]))):
        pq.write_table(pa.table({"doc_id": ids, "text": texts}), tmp_path / "corpus" / f"part-{part}.parquet")
    write(
        tmp_path,
        queries={"query_id": [1, 2], "query": ["first", "second"]},
        qrels={"query_id": [1, 2], "doc_id": [30, 20], "score": [1, 3]},
        candidates={"query_id": [1, 1, 1, 2, 2], "doc_id": [10, 20, 30, 40, 20], "score": [2.0, 3.0, 1.0, 2.0, -5.0]},
    )
    assert read_folder(tmp_path, 100) == SAMPLES


def test_a_title_stands_before_its_text(tmp_path: Path):
    corpus = {"doc_id": ["a", "b", "c", "d"], "title": ["One", "", None, "Four"], "text": ["1", "2", None, "4"]}
    samples = read_folder(write(tmp_path, **{**TABLES, "corpus": corpus}), 100)
    assert samples[0]["documents"] == ["2", "One 1", ""] and samples[1]["documents"] == ["Four 4", "2"]


def test_a_judged_query_counts_also_without_candidates_or_relevant_documents(tmp_path: Path):
    qrels = {"query_id": ["q1", "q2"], "doc_id": ["c", "b"], "relevance": [1, 0]}
    candidates = {"query_id": ["q2"], "doc_id": ["d"]}
    samples = read_folder(write(tmp_path, **{**TABLES, "qrels": qrels, "candidates": candidates}), 100)
    assert samples == [
        {"query": "first", "positive": ["3"], "documents": []},
        {"query": "second", "positive": [], "documents": ["4"]},
    ]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"corpus": {"doc_id": ["a"], "text": ["1"]}}, "the corpus has no document '[bc]'"),
        ({"queries": {"query_id": ["q1"], "text": ["first"]}}, "the queries have no 'q2', which the qrels judge"),
        ({"queries": {"query_id": ["q1"], "txt": ["first"]}}, "no column text or query or document; it has query_id"),
        ({"qrels": {"query_id": ["q1"], "document": ["a"]}}, "no column doc_id or corpus-id"),
        ({"candidates": {"qid": ["q1"]}}, "candidates.parquet has no column doc_id"),
    ],
)
def test_what_does_not_fit_together_is_named(tables: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_folder(write(tmp_path, **{**TABLES, **tables}), 100)


def test_a_missing_or_damaged_table_is_named(tmp_path: Path):
    write(tmp_path, **{name: table for name, table in TABLES.items() if name != "candidates"})
    with pytest.raises(InputError, match=r"no candidates or bm25: put candidates.parquet there"):
        read_folder(tmp_path, 100)
    (tmp_path / "candidates.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"candidates.parquet cannot be read"):
        read_folder(tmp_path, 100)


# The evaluator


@pytest.fixture
def collections(tmp_path: Path) -> Path:
    """Two collections beside each other; the second has one judged query, whose first candidate is right."""
    write(tmp_path / "fruit", **TABLES)
    one = {"query_id": ["q3"], "doc_id": ["a"]}
    write(tmp_path / "msmarco", **{**TABLES, "qrels": one, "candidates": one})
    return tmp_path


def test_values_of_all_collections_and_their_mean(collections: Path, tmp_path: Path):
    model = GivenScores(by_number)
    evaluator = CrossEncoderNanoBEIREvaluator(dataset_id=collections, at_k=5)
    found = evaluator(model, tmp_path / "out", 1, 2)
    assert evaluator.dataset_names == ["fruit", "msmarco"]
    fruit = CrossEncoderRerankingEvaluator(SAMPLES, at_k=5, name="fruit_R100")(GivenScores(by_number))
    assert {name: value for name, value in found.items() if name.startswith("fruit_")} == fruit
    assert found["NanoMSMARCO_R100_mrr@5"] == found["NanoMSMARCO_R100_base_map"] == 1
    for metric in ("map", "mrr@5", "ndcg@5", "base_map", "base_mrr@5", "base_ndcg@5"):
        assert found[f"NanoBEIR_R100_mean_{metric}"] == pytest.approx((fruit[f"fruit_R100_{metric}"] + 1) / 2)
    assert evaluator.primary_metric == "NanoBEIR_R100_mean_ndcg@5" and len(found) == 18

    assert [told[1:] for told in model.model_card_data.told[-1:]] == [
        (
            {
                "NanoBEIR_R100_mean_map": "0.8750 (+0.1667)",
                "NanoBEIR_R100_mean_mrr@5": "0.8750 (+0.1667)",
                "NanoBEIR_R100_mean_ndcg@5": "0.9077 (+0.1250)",
            },
            1,
            2,
        )
    ]
    with (tmp_path / "out" / "NanoBEIR_evaluation_mean_results.csv").open(newline="") as lines:
        headers, row = csv.reader(lines)
    assert headers == ["epoch", "steps", "MAP", "MRR@5", "NDCG@5"]
    assert row[:4] == ["1", "2", "0.875", "0.875"]
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert len(model.calls) == 2
    assert evaluator.get_config_dict() == {
        "dataset_names": ["fruit", "msmarco"],
        "dataset_id": str(collections),
        "rerank_k": 100,
        "at_k": 5,
        "always_rerank_positives": True,
    }


def test_collections_may_be_chosen_by_name_or_by_folder_and_joined_otherwise(collections: Path, tmp_path: Path):
    def worst(values: list[float]) -> float:
        return min(values)

    evaluator = CrossEncoderNanoBEIREvaluator(
        ["msmarco", str(write(tmp_path / "elsewhere" / "nuts", **TABLES))],
        dataset_id=str(collections),
        rerank_k=1,
        always_rerank_positives=False,
        aggregate_fn=worst,
        aggregate_key="worst",
        write_csv=False,
    )
    found = evaluator(GivenScores(by_number), tmp_path / "out")
    assert found["nuts_R1_map"] == 0 and found["NanoMSMARCO_R1_map"] == 1
    assert found[evaluator.primary_metric] == 0 and evaluator.primary_metric == "NanoBEIR_R1_worst_ndcg@10"
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_model(collections: Path):
    model = GivenScores(by_number)
    CrossEncoderNanoBEIREvaluator(["fruit"], dataset_id=collections, prompt_name="web", batch_size=3)(model)
    assert model.calls[0]["prompt_name"] == "web" and model.calls[0]["batch_size"] == 3


def test_unknown_and_missing_names_are_refused(collections: Path):
    with pytest.raises(ValueError, match="no folder 'fruits', and no collection of that name in NanoBEIR"):
        CrossEncoderNanoBEIREvaluator(["fruits"], dataset_id=collections)
    with pytest.raises(ValueError, match="at least one collection"):
        CrossEncoderNanoBEIREvaluator([])


def test_a_hub_dataset_without_the_library_or_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"subset queries, split NanoMSMARCO cannot be loaded.*give a folder"):
        CrossEncoderNanoBEIREvaluator(["msmarco"])  # tests run offline
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        CrossEncoderNanoBEIREvaluator(["msmarco"])


def test_a_public_collection_is_read_from_its_folder(shared_data: Path):
    folder = shared_data / "data" / "scifact_mini"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    first = {}  # the scores of the first stage, by place

    def score(query: str, document: str) -> float:
        return -first.setdefault(query, {}).setdefault(document, len(first[query]))

    found = CrossEncoderNanoBEIREvaluator([folder], rerank_k=20)(GivenScores(score))
    for metric in ("mrr@10", "ndcg@10"):  # the order of the first stage is kept, so nothing is gained in the top
        assert found[f"scifact_mini_R20_{metric}"] == found[f"scifact_mini_R20_base_{metric}"]
    qrels = pq.read_table(folder / "qrels.parquet").to_pydict()
    candidates = pq.read_table(folder / "candidates.parquet").to_pydict()
    relevant = {pair for *pair, grade in zip(*qrels.values(), strict=True) if grade > 0 for pair in [tuple(pair)]}
    ranks: dict[str, list[int]] = {query: [] for query, _ in relevant}
    for query, doc, rank in zip(candidates["query_id"], candidates["doc_id"], candidates["rank"], strict=True):
        if (query, doc) in relevant and rank <= 10:
            ranks[query].append(rank)
    expected = np.mean([1 / min(places) if places else 0 for places in ranks.values()])
    assert found["scifact_mini_R20_base_mrr@10"] == pytest.approx(expected)
