from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.batching import token_budget_batches
from crossenc.engine import CPU_BATCH_TOKENS, Engine
from crossenc.errors import ConfigError
from crossenc.records import Scorer, TokenizedPairs
from crossenc.testing import WORDS, FakeScorer, FakeTokenizer, tiny_checkpoint
from crossenc.tokenizer import PairTokenizer, load_tokenizer

# Batches of other shapes add float32 products in another order; the differences stay around 1e-6.
TOLERANCE = 1e-5


def load(folder: Path, **options: Any) -> tuple[PairTokenizer, Engine]:
    tokenizer = load_tokenizer(folder)
    return tokenizer, Engine.from_checkpoint(folder, tokenizer, device="cpu", **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairTokenizer, Engine]:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def pairs(bert: tuple[PairTokenizer, Engine]) -> TokenizedPairs:
    """Thirty pairs of 4 to 63 tokens, in no order of length."""
    documents = [" ".join(WORDS[(i + k) % 10] for k in range(i * 7 % 60)) for i in range(30)]
    return bert[0].encode(["what"] * 30, documents)


def one_by_one(engine: Engine, pairs: TokenizedPairs) -> np.ndarray:
    """Reference: each pair alone through the model, without padding."""
    scores = []
    for start, end in pairwise(pairs.offsets):
        inputs = {"input_ids": torch.from_numpy(pairs.input_ids[start:end].astype(np.int64))[None]}
        if pairs.token_type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(pairs.token_type_ids[start:end].astype(np.int64))[None]
        with torch.no_grad():
            scores.append(engine.activation(engine.network(inputs)["scores"].float())[0].numpy())
    return np.array(scores)


class RunsOutOfMemory(torch.nn.Module):
    """A model on a device that holds `num_tokens` padded tokens; it remembers the batches it was given."""

    def __init__(self, model: Any, num_tokens: int) -> None:
        super().__init__()
        self.model, self.num_tokens = model, num_tokens
        self.batches: list[tuple[int, int]] = []

    def forward(self, features: dict[str, torch.Tensor]) -> Any:
        self.batches.append(tuple(features["input_ids"].shape))
        if features["input_ids"].numel() > self.num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(features)


def test_scores_are_in_input_order_and_equal_those_of_lone_pairs(
    bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs
) -> None:
    engine = replace(bert[1], max_batch_tokens=200)
    assert len(token_budget_batches(pairs.lengths, 200)) > 4
    scores = engine.score(pairs)
    assert (scores.shape, scores.dtype) == ((30,), np.float32)
    np.testing.assert_allclose(scores, one_by_one(engine, pairs)[:, 0], atol=TOLERANCE)
    assert scores.std() > 0.01  # the pairs are told apart


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra", "modernbert"])
def test_every_family_gives_one_column_a_label(family: Any, tmp_path: Path) -> None:
    tokenizer, engine = load(tiny_checkpoint(tmp_path, family, num_labels=3), max_batch_tokens=90)
    pairs = tokenizer.encode(["what", "the river", ""], ["the water " * 20, "stone", ""])
    scores = engine.score(pairs)
    assert scores.shape == (3, 3)
    np.testing.assert_allclose(scores, one_by_one(engine, pairs), atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(max_batch_tokens=st.integers(1, 4000), window=st.integers(1, 40))
def test_the_cut_into_batches_changes_no_score(
    bert: tuple[PairTokenizer, Engine], max_batch_tokens: int, window: int
) -> None:
    tokenizer, engine = bert
    pairs = tokenizer.encode(["what"] * 12, ["the water " * (i * 5 % 13) for i in range(12)])
    scores = replace(engine, max_batch_tokens=max_batch_tokens, window=window).score(pairs)
    np.testing.assert_allclose(scores, engine.score(pairs), atol=TOLERANCE)


def test_scoring_twice_gives_equal_bits(bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs) -> None:
    assert bert[1].score(pairs).tobytes() == bert[1].score(pairs).tobytes()


def test_left_padding_is_honoured(bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs) -> None:
    seen = []
    engine = replace(bert[1], padding_side="left", pad_token_id=77, max_batch_tokens=10_000)
    hook = engine.network[0].model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs), with_kwargs=True
    )
    engine.score(pairs)
    hook.remove()
    ids, mask, types = (seen[0][name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    longest_first = np.argsort(-pairs.lengths, kind="stable")
    for row, pair in enumerate(longest_first):
        start, end = pairs.offsets[pair], pairs.offsets[pair + 1]
        num_padding = ids.shape[1] - (end - start)
        assert ids[row].tolist() == [77] * num_padding + pairs.input_ids[start:end].tolist()
        assert mask[row].tolist() == [0] * num_padding + [1] * (end - start)
        assert types[row, num_padding:].tolist() == pairs.token_type_ids[start:end].tolist()


def test_no_pairs_give_no_scores(bert: tuple[PairTokenizer, Engine]) -> None:
    scores = bert[1].score(bert[0].encode([], []))
    assert (scores.shape, scores.dtype) == ((0,), np.float32)


def test_logits_are_widened_before_the_activation(
    tmp_path: Path, bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs
) -> None:
    seen = []

    def spy(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return torch.sigmoid(logits)

    _, engine = load(tiny_checkpoint(tmp_path), dtype=torch.bfloat16, activation=spy)
    scores = engine.score(pairs)
    assert set(seen) == {torch.float32}
    # bfloat16 keeps 8 bits of mantissa, a relative error of 4e-3 at each step of the model.
    np.testing.assert_allclose(scores, bert[1].score(pairs), atol=0.05)


def test_scores_that_are_not_finite_are_returned_as_they_are(
    bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs
) -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(logits > 0, torch.nan, torch.inf)

    assert not np.isfinite(replace(bert[1], activation=broken).score(pairs)).any()


def test_a_model_in_training_is_scored_in_eval_mode_and_left_in_training(
    bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs
) -> None:
    expected = bert[1].score(pairs)
    bert[1].network.train()
    scores = bert[1].score(pairs)
    assert bert[1].network.training
    bert[1].network.eval()
    assert scores.tobytes() == expected.tobytes()  # dropout would change them


def test_scoring_leaves_no_gradients_and_no_autograd_mode(
    bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs
) -> None:
    bert[1].score(pairs)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in bert[1].network.parameters())


def test_finished_batches_are_reported(bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs) -> None:
    counts: list[int] = []
    replace(bert[1], max_batch_tokens=200).score(pairs, counts.append)
    assert counts == [len(batch) for batch in token_budget_batches(pairs.lengths, 200, is_packed=True)]


@pytest.mark.parametrize("num_tokens", [1000, 300, 63])
def test_out_of_memory_halves_what_is_left_and_changes_no_score(
    bert: tuple[PairTokenizer, Engine],
    pairs: TokenizedPairs,
    num_tokens: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert pairs.lengths.max() == 63
    caplog.set_level("WARNING")
    model = RunsOutOfMemory(bert[1].network, num_tokens)
    counts: list[int] = []
    calls: list[None] = []
    engine = replace(bert[1], network=model, max_batch_tokens=2000, on_out_of_memory=lambda: calls.append(None))
    np.testing.assert_allclose(engine.score(pairs, counts.append), bert[1].score(pairs), atol=TOLERANCE)
    assert sum(counts) == len(pairs)
    done = [rows for rows, width in model.batches if rows * width <= num_tokens]
    assert done == counts  # no batch that had succeeded was run again
    failed = [rows * width for rows, width in model.batches if rows * width > num_tokens]
    assert all(later <= earlier / 2 for earlier, later in pairwise(failed))
    assert len(calls) == len(failed)
    assert "out of memory" in caplog.text
    assert "max_batch_tokens" in caplog.text


def test_out_of_memory_with_a_single_pair_is_raised(bert: tuple[PairTokenizer, Engine], pairs: TokenizedPairs) -> None:
    model = RunsOutOfMemory(bert[1].network, 62)
    with pytest.raises(torch.OutOfMemoryError):
        replace(bert[1], network=model).score(pairs)
    assert model.batches[-1] == (1, 63)


@pytest.mark.parametrize("limit", ["max_batch_tokens", "max_batch_pairs"])
def test_a_batch_limit_below_one_is_refused(bert: tuple[PairTokenizer, Engine], limit: str) -> None:
    with pytest.raises(ConfigError, match=limit):
        replace(bert[1], **{limit: 0})


def test_the_default_budget_is_that_of_the_device(bert: tuple[PairTokenizer, Engine]) -> None:
    assert bert[1].max_batch_tokens == CPU_BATCH_TOKENS


def test_the_fake_scorer_knows_pairs_apart_and_only_by_their_tokens() -> None:
    scorer: Scorer = FakeScorer()
    tokenizer = FakeTokenizer()
    queries, documents = ["a b", "a", "b a", "a b"], ["c", "b c", "c", "c"]
    scores = scorer.score(tokenizer.encode(queries, documents))
    assert scores.dtype == np.float32
    assert scores[0] == scores[3]
    assert len(set(scores.tolist())) == 3
    alone = [scorer.score(tokenizer.encode([q], [d]))[0] for q, d in zip(queries, documents, strict=True)]
    assert alone == scores.tolist()
    assert scorer.score(tokenizer.encode([], [])).shape == (0,)


def test_the_fake_scorers_scores_fill_the_unit_interval_evenly() -> None:
    pairs = FakeTokenizer().encode(["q"] * 20_000, [f"document {i}" for i in range(20_000)])
    counts, _ = np.histogram(FakeScorer().score(pairs), bins=10, range=(0, 1))
    # 2,000 expected in each bin with a standard deviation of 42.
    assert counts.sum() == 20_000
    assert abs(counts - 2_000).max() < 250
