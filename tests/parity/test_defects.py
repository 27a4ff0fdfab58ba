"""What goes wrong in sentence-transformers 6.2 and does not here; other such cases stand beside what they are about."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch

from crossenc import CrossEncoder, scoring
from crossenc.batching import token_budget_batches
from crossenc.errors import InputError
from crossenc.testing import tiny_checkpoint
from crossenc.tokenizer import load_tokenizer

PAIRS = [("what is water", "the river of the city"), ("how is bread", "in the stone bridge of winter")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_settings_of_the_caller_are_left_as_they_were(folder: Path) -> None:
    def given() -> dict[str, dict[str, Any]]:
        return {"model_kwargs": {}, "processor_kwargs": {}, "config_kwargs": {}}

    theirs, ours = given(), given()
    sentence_transformers.CrossEncoder(str(folder), device="cpu", num_labels=1, max_length=50, **theirs)
    CrossEncoder(folder, device="cpu", num_labels=1, max_length=50, **ours)
    assert theirs != given()
    assert ours == given()


def test_codes_among_words_do_not_fill_batches_with_padding(folder: Path) -> None:
    """A code has several times the tokens of a text with as many characters, so characters are a bad order."""
    generator = np.random.default_rng(0)
    words = ["water", "river", "bridge", "winter", "doctor"]
    documents = []
    for _ in range(400):
        length = int(generator.integers(20, 100))
        is_code = generator.random() < 0.25
        text = " ".join(generator.choice(words, length // 6)) if not is_code else "x9" * (length // 2)
        documents.append(text)
    lengths = load_tokenizer(folder).encode(["what"] * len(documents), documents).lengths

    def padded(batches: list[Any]) -> float:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum())

    by_characters = np.argsort([-len(text) for text in documents])
    assert padded([by_characters[start : start + 32] for start in range(0, len(documents), 32)]) > 1.8
    assert padded(token_budget_batches(lengths, max_batch_tokens=32 * 60)) < 1.2


def test_the_model_stays_on_its_device_and_in_its_mode_after_a_pool(folder: Path) -> None:
    ours = CrossEncoder(folder, device="cpu")
    ours.train()
    with ours.start_multi_process_pool(["cpu"]) as pool:
        assert ours.training
        assert not any(parameter.is_shared() for parameter in ours.parameters())
        ours.predict(PAIRS, pool=pool)
    assert ours.training


def test_texts_are_tokenised_while_others_are_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = CrossEncoder(folder, device="cpu")
    expected = ours.predict(PAIRS * 3)
    monkeypatch.setattr(scoring, "PAIRS_AHEAD", 2)
    second_chunk_is_tokenised = threading.Event()
    encode, forward, calls = ours.pair_tokenizer().encode, ours.forward, []

    def watched_encode(*args: Any) -> Any:
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 2:
            second_chunk_is_tokenised.set()
        return encode(*args)

    def waiting_forward(features: Any) -> Any:
        assert second_chunk_is_tokenised.wait(timeout=30)  # before the first chunk has scores
        return forward(features)

    monkeypatch.setattr(ours.pair_tokenizer(), "encode", watched_encode)
    monkeypatch.setattr(ours, "forward", waiting_forward)
    np.testing.assert_allclose(ours.predict(PAIRS * 3), expected, atol=1e-6)
    assert calls == [False] * 3


def test_an_error_names_the_place_among_all_inputs_however_they_are_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PAIRS_AHEAD", 2)
    with pytest.raises(InputError, match="document 5 is a NoneType"):
        CrossEncoder(folder, device="cpu").predict([*PAIRS, *PAIRS, PAIRS[0], ("what", None)])


def test_results_do_not_stay_on_the_device_one_by_one(folder: Path) -> None:
    ours = CrossEncoder(folder, device="cpu")
    scores = ours.predict(PAIRS * 3, convert_to_tensor=True)
    assert isinstance(scores, torch.Tensor)
    assert scores.is_contiguous()
    assert not scores.is_inference()  # a tensor that gradients may pass
