"""Compiled models give the scores of others, and are called with few shapes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crossenc import CrossEncoder
from crossenc import engine as engines
from crossenc.compiling import Shapes, compile_backbone, shapes_of
from crossenc.engine import Engine
from crossenc.packing import scoring_view
from crossenc.testing import Family, tiny_checkpoint
from crossenc.tokenizer import load_tokenizer
from tests.crossenc.test_packing import MAX_LENGTH, PACKED, PADDED, TOLERANCE, classifier, random_pairs

LENGTHS = [40, 3, 38, 20, 1, 30, 17, 17, 5, 33, 8, 12, 25]
#: Of these with 100, 300 and 1,000 tokens a batch, where a pair has 40 at most.
FEW_SHAPES = {(2, 40), (3, 32), (4, 24), (2, 16), (7, 40), (8, 24), (16, 40)}


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts how many it is given."""

    def __init__(self) -> None:
        self.num_compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.num_compiled += 1
        return graph.forward


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the token ids of all batches."""
    seen: list[tuple[int, int]] = []
    make = Engine.batch_inputs

    def spy(self: Engine, *args: Any) -> dict[str, torch.Tensor]:
        inputs = make(self, *args)
        seen.append(tuple(inputs["input_ids"].shape))
        return inputs

    monkeypatch.setattr(Engine, "batch_inputs", spy)
    return seen


def test_widths_are_powers_of_two_and_one_between_two() -> None:
    lengths = np.array([1, 16, 17, 24, 25, 33, 48, 49, 97, 200, 500])
    widths = [16, 16, 24, 24, 32, 48, 48, 64, 128, 256, 512]
    assert Shapes(None).widths(lengths).tolist() == widths
    assert Shapes(500).widths(lengths).tolist() == [*widths[:-1], 500]


def test_rows_are_a_power_of_two_or_as_many_as_there_may_be() -> None:
    assert [Shapes(None).num_rows(n, 100) for n in (1, 2, 3, 5, 64, 65, 100)] == [2, 2, 4, 8, 64, 100, 100]
    assert [Shapes(None).num_rows(n, 1) for n in (1, 3)] == [1, 3]


@pytest.mark.parametrize("family", [*PACKED, *PADDED, "qwen3 left"])
def test_batches_of_few_shapes_give_the_same_scores(
    family: str, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = "left" if "left" in family else "right"
    engine = replace(classifier(family.removesuffix(" left")), may_pack=False, padding_side=side)
    pairs = random_pairs(LENGTHS, with_types=False)
    expected = engine.score(pairs)
    monkeypatch.setattr(engines, "shapes_of", lambda network: Shapes(MAX_LENGTH))
    shapes.clear()
    for max_batch_tokens in (100, 300, 1000):
        limited = replace(engine, max_batch_tokens=max_batch_tokens)
        np.testing.assert_allclose(limited.score(pairs), expected, atol=TOLERANCE)
    assert set(shapes) == FEW_SHAPES


def test_a_compiled_model_gives_the_same_scores_by_one_graph(shapes: list[tuple[int, int]]) -> None:
    torch.compiler.reset()
    engine, graphs = classifier("bert", num_hidden_layers=1, max_position_embeddings=MAX_LENGTH), Graphs()
    pairs = random_pairs(LENGTHS)
    expected = engine.score(pairs)
    compile_backbone(engine.network[0].model, backend=graphs)
    assert engine.forward_kind.startswith("padded")
    for max_batch_tokens in (100, 300, 1000):
        limited = replace(engine, max_batch_tokens=max_batch_tokens)
        np.testing.assert_allclose(limited.score(pairs), expected, atol=TOLERANCE)
    assert set(shapes) == FEW_SHAPES
    assert graphs.num_compiled == 1


def test_other_networks_are_called_with_shapes_as_they_come() -> None:
    assert shapes_of(nn.Sequential(nn.Linear(2, 2))) is None
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled.compile(backend="eager")
    assert shapes_of(compiled) is None


def test_out_of_memory_halves_batches_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replace(classifier("bert"), may_pack=False)
    pairs = random_pairs(LENGTHS)
    expected = engine.score(pairs)
    monkeypatch.setattr(engines, "shapes_of", lambda network: Shapes(MAX_LENGTH))
    make, tried = Engine.batch_inputs, []

    def cramped(self: Engine, *args: Any) -> dict[str, torch.Tensor]:
        inputs = make(self, *args)
        tried.append(inputs["input_ids"].numel())
        if tried[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs

    monkeypatch.setattr(Engine, "batch_inputs", cramped)
    np.testing.assert_allclose(replace(engine, max_batch_tokens=1000).score(pairs), expected, atol=TOLERANCE)
    failed = [size for size in tried if size > 100]
    assert failed == [640, 320, 160]  # 13 pairs of 40 in 16 rows, and no more than half of it at the next try


def test_a_lone_pair_that_does_not_fit_twice_is_tried_once(
    shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replace(classifier("bert"), may_pack=False, max_batch_tokens=100)
    pairs = random_pairs([40])
    expected = engine.score(pairs)
    monkeypatch.setattr(engines, "shapes_of", lambda network: Shapes(MAX_LENGTH))
    make, capacity = Engine.batch_inputs, 40

    def cramped(self: Engine, *args: Any) -> dict[str, torch.Tensor]:
        inputs = make(self, *args)
        if inputs["input_ids"].numel() > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs

    monkeypatch.setattr(Engine, "batch_inputs", cramped)
    shapes.clear()
    np.testing.assert_allclose(engine.score(pairs), expected, atol=TOLERANCE)
    assert shapes == [(2, 40), (1, 40)]
    capacity = 39
    with pytest.raises(torch.OutOfMemoryError):
        engine.score(pairs)
    assert shapes == [(2, 40), (1, 40)] * 2


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_tokens_that_a_model_is_given_are_known_beforehand(
    is_compiled: bool, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pairs = replace(classifier("bert"), max_batch_tokens=100), random_pairs(LENGTHS)
    assert engine.num_fed_tokens(pairs.lengths) == sum(LENGTHS)
    engine = replace(engine, may_pack=False, max_batch_pairs=3)
    if is_compiled:
        monkeypatch.setattr(engines, "shapes_of", lambda network: Shapes(MAX_LENGTH))
    engine.score(pairs)
    assert engine.num_fed_tokens(pairs.lengths) == sum(rows * width for rows, width in shapes)


def test_a_model_of_16_bits_is_compiled_too(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = CrossEncoder(tiny_checkpoint(tmp_path), device="cpu", dtype="bfloat16")
    pairs = [("what", "the water of the river"), ("how", "stone")]
    expected, graphs = model.predict(pairs), Graphs()
    model.compile(backend=graphs)
    np.testing.assert_allclose(model.predict(pairs), expected, atol=0.02)
    assert graphs.num_compiled == 1


def test_a_compiled_model_of_16_bits_still_has_its_head_in_float32() -> None:
    network = classifier("bert").network.bfloat16()
    network[0].model.compile(backend="eager")
    seen = scoring_view(network, is_packed=False)[0].model
    assert (seen.classifier.weight.dtype, seen._compiled_call_impl) == (torch.float32, None)


@pytest.mark.faults  # 15 s of compiling each: with the other long tests
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own call
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_torchs_own_compiler_gives_the_same_scores(family: Family, tmp_path: Path) -> None:
    torch.compiler.reset()
    folder = tiny_checkpoint(tmp_path, family)
    tokenizer = load_tokenizer(folder)
    words = ["water", "river", "city", "train"]
    texts = [" ".join(words[i % 4 :] * (1 + 5 * i)) for i in range(12)]
    pairs = tokenizer.encode(["what is water"] * len(texts), texts)
    compiled, plain = (
        Engine.from_checkpoint(folder, tokenizer, device="cpu", max_batch_tokens=999, compiles=compiles)
        for compiles in (True, False)
    )
    assert (compiled.is_packed, plain.is_packed) == (False, True)
    np.testing.assert_allclose(compiled.score(pairs), plain.score(pairs), atol=TOLERANCE)
