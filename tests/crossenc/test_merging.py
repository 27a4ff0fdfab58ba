import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from crossenc import CrossEncoder
from crossenc.errors import ConfigError
from crossenc.testing import tiny_checkpoint

PAIRS = [("what is water", "the river of the city"), ("how is bread", "in the stone bridge of winter")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[CrossEncoder]:
    folder = tmp_path_factory.mktemp("models")
    return [CrossEncoder(tiny_checkpoint(folder / str(seed), seed=seed), device="cpu") for seed in range(3)]


def set_head(model: CrossEncoder, values: list[float]) -> None:
    bias = model.model.bert.pooler.dense.bias
    with torch.no_grad():
        bias.zero_()
        bias[: len(values)] = torch.tensor(values)


def merged_head(models: list[CrossEncoder], method: str, parameters: dict[str, Any], size: int) -> list[float]:
    merged = CrossEncoder.merge(models, method, parameters=parameters)
    head: list[float] = merged.model.bert.pooler.dense.bias[:size].tolist()
    return head


def test_the_mean_is_weighted_by_shares_of_the_sum(models: list[CrossEncoder]) -> None:
    for model, values in zip(models, ([1.0, 0.0], [0.0, 4.0], [2.0, 2.0]), strict=True):
        set_head(model, values)
    assert merged_head(models, "linear", {}, 2) == pytest.approx([1.0, 2.0])
    assert merged_head(models, "linear", {"weight": [1, 1, 2]}, 2) == pytest.approx([1.25, 2.0])


def test_slerp_goes_along_the_arc(models: list[CrossEncoder]) -> None:
    set_head(models[0], [1.0, 0.0])
    set_head(models[1], [0.0, 1.0])
    expected = [math.cos(math.pi / 6), math.sin(math.pi / 6)]  # a third of a right angle
    assert merged_head(models[:2], "slerp", {"t": 1 / 3}, 2) == pytest.approx(expected)
    set_head(models[1], [3.0, 0.0])  # one direction: a straight line
    assert merged_head(models[:2], "slerp", {}, 2) == pytest.approx([2.0, 0.0])


def test_the_ends_score_like_the_models_which_stay_as_they_are(models: list[CrossEncoder], tmp_path: Path) -> None:
    before = [model.predict(PAIRS).tolist() for model in models]
    merged = CrossEncoder.merge(models[:2], "slerp", parameters={"t": 1.0})
    assert merged.predict(PAIRS).tolist() == pytest.approx(before[1], abs=1e-6)
    assert [model.predict(PAIRS).tolist() for model in models] == before
    models[0].save_pretrained(tmp_path)
    from_folders = CrossEncoder.merge([tmp_path, tmp_path], device="cpu")
    assert from_folders.predict(PAIRS).tolist() == pytest.approx(before[0], abs=1e-6)


def test_what_cannot_be_merged_is_refused(models: list[CrossEncoder], tmp_path: Path) -> None:
    for arguments, problem in (
        (([models[0]],), "linear merges two or more models, not 1"),
        ((models, "slerp"), "slerp merges two models, not 3"),
        ((models, "ties"), "'ties' of merging: choose from linear, slerp"),
    ):
        with pytest.raises(ConfigError, match=problem):
            CrossEncoder.merge(*arguments)
    for method, parameters, problem in (
        ("linear", {"weight": [1]}, "give one number a model, 2 in all"),
        ("linear", {"t": 1}, "linear has no parameter 't'"),
        ("slerp", {"t": 2}, "t is 2"),
    ):
        with pytest.raises(ConfigError, match=problem):
            CrossEncoder.merge(models[:2], method, parameters=parameters)
    wider = CrossEncoder(tiny_checkpoint(tmp_path / "wider", hidden_size=64), device="cpu")
    with pytest.raises(ConfigError, match="model 1 has other weights than model 0"):
        CrossEncoder.merge([models[0], wider])
    other_words = [f"w{i}" for i in range(24)]
    stranger = CrossEncoder(tiny_checkpoint(tmp_path / "words", vocabulary=other_words), device="cpu")
    with pytest.raises(ConfigError, match="model 1 has another vocabulary"):
        CrossEncoder.merge([models[0], stranger])


def test_a_merged_model_has_neither_card_nor_checkpoint_of_its_own_yet(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "README.md").write_text("# The first one, with its results\n")
    merged = CrossEncoder.merge([folder, tiny_checkpoint(tmp_path / "other", seed=1)], device="cpu")
    assert merged.base_location is None
    merged.save_pretrained(tmp_path / "merged")
    assert "The first one" not in (tmp_path / "merged" / "README.md").read_text()


def test_models_with_adapters_are_merged_when_their_adapters_are(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    models = [CrossEncoder(folder, device="cpu") for _ in range(2)]
    models[1].add_adapter(LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ConfigError, match=r"model 1 has an adapter, which has no mean: call merge_adapters\(\)"):
        CrossEncoder.merge(models)
    models[1].merge_adapters()
    assert CrossEncoder.merge(models).predict(PAIRS).tolist() == pytest.approx(models[0].predict(PAIRS).tolist())
