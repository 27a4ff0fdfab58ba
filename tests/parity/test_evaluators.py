"""Evaluators give the values of sentence-transformers on random scores, where no defect of theirs is involved."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers.base.evaluation import SequentialEvaluator as ReferenceSequential
from sentence_transformers.cross_encoder import evaluation as reference

from crossenc import evaluation
from tests.support.evaluators import GivenScores

# Theirs adds float64 terms in another order.
TOLERANCE = 1e-9


def number(query: str, document: str) -> float:
    """Different scores for all documents of a query, of no visible order."""
    return float(np.sin(float(document or 0) * 12.9898 + len(query)) * 8)


def both(class_name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    return getattr(reference, class_name)(*args, **options), getattr(evaluation, class_name)(*args, **options)


def assert_same(evaluators: tuple[Any, Any], model: Any, tmp_path: Path) -> None:
    """Equal values, primary metric, files, settings and what the card is told."""
    theirs, ours = (
        evaluator(model, str(tmp_path / place), 3, 40)
        for evaluator, place in zip(evaluators, ("theirs", "ours"), strict=True)
    )
    assert list(ours) == list(theirs)
    assert ours == pytest.approx(theirs, abs=TOLERANCE, nan_ok=True)
    assert evaluators[1].primary_metric == evaluators[0].primary_metric
    assert evaluators[1].get_config_dict() == evaluators[0].get_config_dict()
    assert evaluators[1].csv_headers == evaluators[0].csv_headers
    assert evaluators[1].description == evaluators[0].description
    told = model.model_card_data.told
    for (_, their_card, *their_moment), (_, our_card, *our_moment) in zip(
        told[: len(told) // 2], told[len(told) // 2 :], strict=True
    ):
        assert our_moment == their_moment == [3, 40] and list(our_card) == list(their_card)
        for name, value in their_card.items():
            expected = value if isinstance(value, str) else pytest.approx(value, abs=TOLERANCE, nan_ok=True)
            assert our_card[name] == expected
    files = sorted((tmp_path / "theirs").iterdir())
    assert [path.name for path in files] == [path.name for path in sorted((tmp_path / "ours").iterdir())]
    for path in files:
        (headers, *rows), (our_headers, *our_rows) = (
            [line.split(",") for line in (tmp_path / place / path.name).read_text().splitlines()]
            for place in ("theirs", "ours")
        )
        assert our_headers == headers
        # Theirs writes the digits that tell a float32 from its neighbours, ours those of a float64.
        assert np.array(our_rows, float) == pytest.approx(np.array(rows, float), rel=1e-7, abs=TOLERANCE, nan_ok=True)


def random_samples(seed: int, kind: str) -> list[dict[str, Any]]:
    """Queries with 1 to 3 positives and 2 to 14 other documents; with `documents` the positives are among them."""
    rng = np.random.default_rng(seed)
    samples = []
    for query in range(6):
        documents = [str(value) for value in rng.permutation(500)[: rng.integers(5, 18)]]
        positives = documents[: rng.integers(1, 4)]
        sample: dict[str, Any] = {"query": "q" * (query + 1), "positive": positives}
        if kind == "negative":
            sample["negative"] = documents[len(positives) :]
        else:
            sample["documents"] = [str(value) for value in rng.permutation(documents)]
        samples.append(sample)
    return samples


@pytest.mark.parametrize("kind", ["negative", "documents"])
@pytest.mark.parametrize("at_k", [1, 3, 10])
@pytest.mark.parametrize("always", [True, False])
def test_reranking_equals_theirs(kind: str, at_k: int, always: bool, tmp_path: Path):
    for seed in range(5):
        samples = random_samples(seed, kind)
        evaluators = both(
            "CrossEncoderRerankingEvaluator", samples, at_k=at_k, name="dev", always_rerank_positives=always
        )
        assert_same(evaluators, GivenScores(number), tmp_path / str(seed))


def test_reranking_of_unfound_positives_behind_long_lists_equals_theirs_but_for_the_base_map():
    samples = random_samples(0, "documents")
    samples[2]["documents"] = [text for text in samples[2]["documents"] if text != samples[2]["positive"][0]]
    samples[3]["documents"] = [text for text in samples[3]["documents"] if text not in samples[3]["positive"]]
    samples[4]["positive"] = []
    theirs, ours = (
        evaluator(GivenScores(number)) for evaluator in both("CrossEncoderRerankingEvaluator", samples, at_k=3)
    )
    # They add the precision at the places after the list, where no document of the first stage stands.
    assert theirs.pop("base_map") >= ours.pop("base_map")
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 1000])
def test_classification_by_one_label_equals_theirs(levels: int, dtype: type, tmp_path: Path):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, levels, 30) / 7
        labels = rng.integers(0, 2, 30).tolist()
        pairs = [["q", str(place)] for place in range(30)]
        model = GivenScores(lambda query, document, scores=scores: scores[int(document or 0)], dtype)
        assert_same(both("CrossEncoderClassificationEvaluator", pairs, labels, name="dev"), model, tmp_path / str(seed))


@pytest.mark.parametrize("label", [0, 1])
def test_classification_of_one_kind_of_label_equals_theirs(label: int, tmp_path: Path):
    pairs = [["q", str(place)] for place in range(5)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class", UserWarning)  # theirs, by scikit-learn
        evaluators = both("CrossEncoderClassificationEvaluator", pairs, [label] * 5)
        assert_same(evaluators, GivenScores(number), tmp_path)


def test_classification_by_several_labels_equals_theirs(tmp_path: Path):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores, labels = rng.normal(size=(25, 4)), rng.integers(0, 3 + seed % 3, 25).tolist()
        pairs = [["q", str(place)] for place in range(25)]
        model = GivenScores(lambda query, document, scores=scores: scores[int(document or 0)])
        assert_same(both("CrossEncoderClassificationEvaluator", pairs, labels, name="nli"), model, tmp_path / str(seed))


def test_correlation_equals_theirs(tmp_path: Path):
    for seed in range(10):
        given = np.random.default_rng(seed).integers(0, 6, 20).astype(float).tolist()
        pairs = [["q", str(place)] for place in range(20)]
        evaluators = both("CrossEncoderCorrelationEvaluator", pairs, given, name="sts")
        assert_same(evaluators, GivenScores(number, np.float64), tmp_path / str(seed))


def test_evaluators_in_a_row_equal_theirs():
    pairs, given = [["q", str(place)] for place in range(20)], np.linspace(0, 1, 20).tolist()
    parts = list(
        zip(*(both("CrossEncoderCorrelationEvaluator", pairs, given, name=name) for name in "ab"), strict=True)
    )
    theirs, ours = ReferenceSequential(parts[0]), evaluation.SequentialEvaluator(parts[1])
    model = GivenScores(number, np.float64)
    assert ours(model) == pytest.approx(theirs(model), abs=TOLERANCE)
    assert ours.primary_metric == theirs.primary_metric


@pytest.fixture
def hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local dataset of NanoBEIR's layout, which `datasets` loads as it loads one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    folder = tmp_path / "hub"
    configs = []
    for subset in ("queries", "corpus", "qrels", "bm25"):
        for split in ("NanoMSMARCO", "NanoNQ"):
            tables = {
                "queries": {"_id": [f"q{n}" for n in range(8)], "text": ["q" * (n + 1) for n in range(8)]},
                "corpus": {"_id": [f"d{n}" for n in range(60)], "text": [str(n) for n in range(60)]},
                "qrels": {"query-id": [f"q{n % 8}" for n in range(16)], "corpus-id": [f"d{n * 3}" for n in range(16)]},
                "bm25": {
                    "query-id": [f"q{n}" for n in range(8)],
                    "corpus-ids": [[f"d{place}" for place in rng.permutation(60)] for _ in range(8)],
                },
            }
            path = folder / subset / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(tables[subset]), path)
        files = "".join(
            f"\n  - split: {split}\n    path: {subset}/{split}.parquet" for split in ("NanoMSMARCO", "NanoNQ")
        )
        configs.append(f"- config_name: {subset}\n  data_files:{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    return folder


@pytest.mark.parametrize("always", [True, False])
def test_nano_beir_equals_theirs(hub_dataset: Path, always: bool, tmp_path: Path):
    # With all documents among the candidates no positive is missing, where values would differ.
    evaluators = both(
        "CrossEncoderNanoBEIREvaluator",
        ["msmarco", "NQ"],
        dataset_id=str(hub_dataset),
        rerank_k=60,
        at_k=5,
        always_rerank_positives=always,
    )
    assert_same(evaluators, GivenScores(number), tmp_path / "out")
