"""Checkpoints written: whole or not at all, over older ones, to the hub."""

import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
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


def test_a_limit_of_ones_own_takes_the_place_of_the_checkpoints(model: CrossEncoder, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "first")
    settings = json.loads((tmp_path / "first" / "sentence_bert_config.json").read_text())
    settings["processing_kwargs"] = {"text": {"max_length": 30}}
    (tmp_path / "first" / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert CrossEncoder(tmp_path / "first", device="cpu").max_length == 30
    CrossEncoder(tmp_path / "first", device="cpu", max_length=12).save_pretrained(tmp_path / "second")
    assert CrossEncoder(tmp_path / "second", device="cpu").max_length == 12


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


class Hub:
    """Stands in for the hub's client and notes what it is asked."""

    has_card: bool | Exception = False

    def __init__(self, token: str | None = None) -> None:
        CALLS.clear()
        CALLS["token"] = token

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        CALLS["create"] = (repo_id, settings)
        return type("Url", (), {"repo_id": repo_id if "/" in repo_id else f"me/{repo_id}"})

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        CALLS["branch"] = (repo_id, branch, exist_ok)

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        CALLS["asked"] = (repo_id, filename, revision)
        if isinstance(self.has_card, Exception):
            raise self.has_card
        return self.has_card

    def upload_folder(self, folder_path: str, **settings: Any) -> Any:
        CALLS["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        CALLS["upload"] = settings
        pr_url = "https://hub/discussions/1" if settings["create_pr"] else None
        return type("Done", (), {"commit_url": "https://hub/commit/1", "pr_url": pr_url})


CALLS: dict[str, Any] = {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("crossenc.saving.HfApi", Hub)
    monkeypatch.setattr(Hub, "has_card", False)
    return Hub


def test_pushing_uploads_the_whole_folder_and_returns_the_commit(model: CrossEncoder, hub: type[Hub]) -> None:
    url = model.push_to_hub("reranker", token="secret", private=True, revision="v2", commit_message="better")
    assert url == "https://hub/commit/1"
    assert CALLS["token"] == "secret"
    assert CALLS["create"] == ("reranker", {"private": True, "exist_ok": False, "repo_type": "model"})
    assert CALLS["branch"] == ("me/reranker", "v2", True)
    assert {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "README.md"} <= set(CALLS["files"])
    assert CALLS["upload"] == {
        "repo_id": "me/reranker",
        "commit_message": "better",
        "commit_description": None,
        "revision": "v2",
        "create_pr": False,
    }
    assert 'CrossEncoder("me/reranker")' in CALLS["files"]["README.md"].decode()


@pytest.mark.parametrize("name", ["push_to_hub", "save_to_hub"])
def test_the_arguments_of_pushing_are_those_of_sentence_transformers(name: str) -> None:
    theirs = inspect.signature(getattr(sentence_transformers.CrossEncoder, name)).parameters
    ours = inspect.signature(getattr(CrossEncoder, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for argument in set(theirs) - {"commit_message"}:  # the message is in other words
        assert ours[argument].default == theirs[argument].default


def test_a_pull_request_is_opened_with_a_description(model: CrossEncoder, hub: type[Hub]) -> None:
    assert model.push_to_hub("me/reranker", create_pr=True) == "https://hub/discussions/1"
    assert CALLS["create"][1]["exist_ok"]
    assert CALLS["upload"]["create_pr"] and "CrossEncoder" in CALLS["upload"]["commit_description"]


def test_a_card_on_the_hub_stays_unless_it_is_to_be_replaced(
    model: CrossEncoder, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model.push_to_hub("me/reranker")
    assert "README.md" in CALLS["files"] and "asked" not in CALLS  # a new repository has no card
    model.push_to_hub("me/reranker", exist_ok=True, revision="v2")
    assert "README.md" in CALLS["files"] and CALLS["asked"] == ("me/reranker", "README.md", "v2")
    monkeypatch.setattr(hub, "has_card", True)
    model.push_to_hub("me/reranker", exist_ok=True)
    assert "README.md" not in CALLS["files"] and "model.safetensors" in CALLS["files"]
    model.push_to_hub("me/reranker", exist_ok=True, replace_model_card=True)
    assert "README.md" in CALLS["files"]
    caplog.set_level("WARNING")
    monkeypatch.setattr(hub, "has_card", ConnectionError("no network"))
    model.push_to_hub("me/reranker", exist_ok=True)
    assert "README.md" not in CALLS["files"] and "could not be found out" in caplog.text


def test_tags_and_datasets_stand_in_the_uploaded_card(model: CrossEncoder, hub: type[Hub]) -> None:
    model.push_to_hub("me/reranker", tags=["medical"], train_datasets=["me/questions"])
    card = CALLS["files"]["README.md"].decode()
    assert "- medical\n" in card and "- me/questions\n" in card
    model.push_to_hub("me/reranker", tags="short")
    assert "- short\n" in CALLS["files"]["README.md"].decode()


def test_a_saved_folder_is_pushed_as_it_is(model: CrossEncoder, hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    model.push_to_hub("me/reranker", local_model_path=tmp_path / "other")
    assert CALLS["files"] == {"config.json": b"{}"}


def test_weights_are_pushed_as_safetensors_whatever_is_asked(model: CrossEncoder, hub: type[Hub]) -> None:
    with pytest.warns(DeprecationWarning, match="weights are safetensors") as seen:
        model.push_to_hub("me/reranker", safe_serialization=False)
    assert seen[0].filename == __file__
    assert "model.safetensors" in CALLS["files"]


def test_the_old_name_of_pushing_works_and_warns(model: CrossEncoder, hub: type[Hub]) -> None:
    with pytest.warns(DeprecationWarning, match="call push_to_hub") as seen:
        model.save_to_hub("reranker", "me", "secret", True, commit_message="old")
    assert seen[0].filename == __file__
    assert CALLS["create"][0] == "me/reranker" and CALLS["create"][1]["private"]
    assert (CALLS["token"], CALLS["upload"]["commit_message"]) == ("secret", "old")
    with (
        pytest.warns(DeprecationWarning, match="repo_name"),
        pytest.warns(DeprecationWarning, match="call push_to_hub"),
    ):
        model.save_to_hub(repo_name="me/reranker")
    assert CALLS["create"][0] == "me/reranker"
    with pytest.warns(DeprecationWarning), pytest.raises(ConfigError, match="not of the organization you"):
        model.save_to_hub("me/reranker", organization="you")


def test_saving_works_over_a_link_to_another_disk_and_in_the_current_folder(
    model: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.predict(PAIRS)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        link = tmp_path / "link"
        link.symlink_to(elsewhere)
        for _ in range(2):
            model.save_pretrained(link)
        np.testing.assert_allclose(CrossEncoder(link, device="cpu").predict(PAIRS), expected, atol=1e-6)
        assert not [name for name in os.listdir(elsewhere) if name.endswith(".unfinished")]
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    np.testing.assert_allclose(CrossEncoder(tmp_path, device="cpu").predict(PAIRS), expected, atol=1e-6)


def test_arguments_by_place_are_those_of_sentence_transformers(model: CrossEncoder, tmp_path: Path) -> None:
    model.save(tmp_path / "one", "a name", False)
    assert not (tmp_path / "one" / "README.md").exists()
    with pytest.warns(DeprecationWarning, match="safe_serialization"):
        model.save_pretrained(tmp_path / "two", None, True, None, False)
    assert (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.parametrize("activation", [torch.nn.LeakyReLU(0.5), torch.tanh, lambda scores: scores * 2])
def test_an_activation_that_its_name_does_not_tell_is_saved_with_a_warning(
    activation: Any, model: CrossEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.activation_fn = activation
    with caplog.at_level("WARNING", "crossenc"):
        model.save_pretrained(tmp_path / "saved")
    assert "cannot be loaded again by its name alone: pass activation_fn" in caplog.text
    caplog.clear()
    model.activation_fn = torch.nn.LeakyReLU()
    model.save_pretrained(tmp_path / "saved")
    assert not caplog.text
