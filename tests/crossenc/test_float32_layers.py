from pathlib import Path

import numpy as np
import pytest
import torch

from crossenc import CrossEncoder
from crossenc.engine import Engine
from crossenc.errors import ConfigError
from crossenc.testing import tiny_checkpoint
from crossenc.tokenizer import load_tokenizer

HEAD = "0.model.classifier"
PAIRS = [("what is water", "the river of the city"), ("how is bread", "stone " * 30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_a_kept_layer_computes_in_float32_in_a_bfloat16_model_and_under_autocast(folder: Path) -> None:
    model = CrossEncoder(folder, device="cpu", dtype="bfloat16", keep_in_fp32_modules=[HEAD])
    head = model.get_submodule(HEAD)
    assert head.weight.dtype == torch.bfloat16
    assert head(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert model(model.preprocess(PAIRS))["scores"].dtype == torch.float32
    assert np.isfinite(model.predict(PAIRS)).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.ones(1, 32)).dtype == torch.float32


def test_the_choice_is_saved_and_can_be_taken_back(folder: Path, tmp_path: Path) -> None:
    model = CrossEncoder(folder, device="cpu", keep_in_fp32_modules=[HEAD])
    model.save_pretrained(tmp_path)
    loaded = CrossEncoder(tmp_path, device="cpu", dtype="bfloat16")
    assert loaded.keep_in_fp32_modules == [HEAD]
    scores = loaded.predict(PAIRS)
    engine = Engine.from_checkpoint(tmp_path, load_tokenizer(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert engine.score(load_tokenizer(tmp_path).encode(*zip(*PAIRS, strict=True))).tolist() == scores.tolist()
    loaded.set_keep_in_fp32_modules([])
    assert type(loaded.get_submodule(HEAD)) is torch.nn.Linear
    assert loaded.keep_in_fp32_modules == []


@pytest.mark.parametrize("name", ["0.model.clasifier", "0.model.bert"])
def test_only_linear_layers_can_be_kept(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}.* is no linear layer of the model, the last of which is"):
        CrossEncoder(folder, device="cpu", keep_in_fp32_modules=[name])
