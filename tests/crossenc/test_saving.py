"""Checkpoints written: whole or not at all, over older ones, to the hub."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossenc import CrossEncoder
from crossenc.checkpoint import file_digests
from crossenc.errors import ConfigError
from crossenc.modules import Dense, LayerNorm, Pooling, Transformer
from crossenc.testing import tiny_checkpoint

PAIRS = [("what is water", "the river"), ("how", "stone " * 50)]


@pytest.fixture
def model(tmp_path: Path) -> CrossEncoder:
    return CrossEncoder(tiny_checkpoint(tmp_path / "original"), device="cpu", max_length=40)


def test_settings_survive_saving(model: CrossEncoder, tmp_path: Path) -> None:
    model.prompts["web"] = "the city "
    model.default_prompt_name = "web"
    model.activation_fn = torch.nn.Tanh()
    model.save(tmp_path / "saved")
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert (again.max_length, again.default_prompt_name, again.prompts) == (40, "web", {"web": "the city "})
    np.testing.assert_allclose(again.predict(PAIRS), model.predict(PAIRS), atol=1e-6)


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "original")
    CrossEncoder(tmp_path / "original", device="cpu", dtype="bfloat16").save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_saving_over_an_older_checkpoint_replaces_it_and_leaves_other_files(
    model: CrossEncoder, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "older", "electra", seed=3)
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    (folder / "model.safetensors.index.json").write_text("{}")
    model.save_pretrained(folder)
    np.testing.assert_allclose(CrossEncoder(folder, device="cpu").predict(PAIRS), model.predict(PAIRS), atol=1e-6)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("*-of-*")) and not list(tmp_path.glob("*.unfinished"))


def test_saving_that_fails_leaves_nothing_behind(model: CrossEncoder, tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"original"}


def test_a_model_put_together_from_parts_scores_saves_and_loads(tmp_path: Path) -> None:
    classic = CrossEncoder(tiny_checkpoint(tmp_path / "plain"), device="cpu")
    torch.manual_seed(0)
    parts = [
        Transformer(classic.model.bert, transformer_task="feature-extraction", tokenizer=classic.tokenizer),
        Pooling(32, ["cls", "mean"]),
        Dense(64, 16),
        LayerNorm(16),
        Dense(16, 2, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    model = CrossEncoder(modules=parts, device="cpu")
    assert (len(model), model.num_labels, model.max_length) == (5, 2, 128)
    model.save_pretrained(tmp_path / "saved")
    assert "3_LayerNorm/model.safetensors" in file_digests(tmp_path / "saved")
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), model.predict(PAIRS), atol=1e-6)
    with pytest.raises(ConfigError, match="a Transformer that has its tokenizer"):
        CrossEncoder(modules=parts[1:])
    with pytest.raises(ConfigError, match="either a folder, a URI or a hub id, or its modules"):
        CrossEncoder()


def test_pushing_uploads_the_whole_folder_and_returns_the_commit(model: CrossEncoder, monkeypatch) -> None:
    calls: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            calls["create"] = (repo_id, settings)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def create_branch(self, repo_id: str, **settings: Any) -> None:
            calls["branch"] = (repo_id, settings["branch"])

        def upload_folder(self, folder_path: str, **settings: Any) -> Any:
            calls["files"] = {path.name for path in Path(folder_path).iterdir()}
            calls["upload"] = settings
            return type("Done", (), {"commit_url": "https://hub/commit/1", "pr_url": None})

    monkeypatch.setattr("crossenc.saving.HfApi", Hub)
    url = model.push_to_hub("reranker", token="secret", private=True, revision="v2", commit_message="better")
    assert url == "https://hub/commit/1"
    assert calls["token"] == "secret"
    assert calls["create"] == ("reranker", {"private": True, "exist_ok": False, "repo_type": "model"})
    assert calls["branch"] == ("me/reranker", "v2")
    assert {"config.json", "model.safetensors", "modules.json", "tokenizer.json"} <= calls["files"]
    assert calls["upload"] == {
        "repo_id": "me/reranker",
        "commit_message": "better",
        "revision": "v2",
        "create_pr": False,
    }
