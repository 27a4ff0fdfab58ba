"""Layouts read and models loaded: what is refused, and what the scores go through."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from crossenc.errors import CheckpointError
from crossenc.layout import PART_NAMES, TASKS, load_config, read_layout
from crossenc.loading import _LOADERS, load_parts, resolve_activation
from crossenc.modules import PARTS
from crossenc.quiet import quiet_transformers
from crossenc.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("original") / "bert")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_what_a_folder_may_name_is_what_can_be_loaded() -> None:
    assert set(_LOADERS) == set(TASKS) and set(PARTS) == set(PART_NAMES)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def load_model(folder: Path, **settings: Any) -> PreTrainedModel:
    """The transformers model of a classic checkpoint."""
    return load_parts(folder, read_layout(folder), **settings)[0].model


def activation_of(folder: Path) -> str:
    return type(resolve_activation(read_layout(folder), load_config(folder).num_labels)).__name__


# models


def test_a_model_loads_in_eval_mode_and_the_dtype_asked_for(original: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(original, dtype=dtype)
        assert not model.training
        assert model.dtype == dtype


def test_loading_prints_and_logs_nothing(
    original: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    load_model(original, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_settings_of_transformers_are_restored_after_a_quiet_block() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet_transformers():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_model_without_a_trained_head_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks classifier.weight.*train its head"):
        load_model(checkpoint, dtype=torch.float32)


def test_another_number_of_labels_than_the_heads_is_refused(original: Path) -> None:
    assert load_model(original, num_labels=1, dtype=torch.float32).config.num_labels == 1
    with pytest.raises(CheckpointError, match="another shape for classifier"):
        load_model(original, num_labels=3, dtype=torch.float32)


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["classifier.weight"][0, 0] = 1e9  # finite in float32, infinite in float16
    save_file(weights, path, metadata={"format": "pt"})
    load_model(checkpoint, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"classifier.weight .* NaN or infinite in torch.float16"):
        load_model(checkpoint, dtype=torch.float16)


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    edit_json(checkpoint / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(CheckpointError, match="code that comes with a checkpoint is never run"):
        load_config(checkpoint)
    with pytest.raises(CheckpointError, match="never run"):
        load_model(checkpoint, dtype=torch.float32)
    assert not marker.exists()


def test_an_architecture_without_classification_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(CheckpointError, match="does not load"):
        load_model(checkpoint, dtype=torch.float32)


# activations


@pytest.mark.parametrize(
    ("v6", "v4", "v3", "expected"),
    [
        ("torch.nn.modules.linear.Identity", "torch.nn.Tanh", "torch.nn.ReLU", "Identity"),
        (None, "torch.nn.modules.activation.Tanh", "torch.nn.ReLU", "Tanh"),
        (None, None, "torch.nn.modules.linear.Identity", "Identity"),
        (None, None, None, "Sigmoid"),
    ],
)
def test_the_newest_activation_key_wins(
    checkpoint: Path, v6: str | None, v4: str | None, v3: str | None, expected: str
) -> None:
    if v6:
        edit_json(checkpoint / "config_sentence_transformers.json", activation_fn=v6)
    if v4:
        edit_json(checkpoint / "config.json", sentence_transformers={"activation_fn": v4, "version": "4.1.0"})
    if v3:
        edit_json(checkpoint / "config.json", sbert_ce_default_activation_function=v3)
    assert activation_of(checkpoint) == expected


def test_several_labels_default_to_raw_logits(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, num_labels=3)
    assert activation_of(folder) == "Identity"


@pytest.mark.parametrize(
    "path",
    ["os.system", "torch.nn.functional.sigmoid", "torch.nn.Linear", "evil.torch.nn.Sigmoid", "Sigmoid", ""],
)
def test_an_activation_outside_the_list_is_refused_by_name(checkpoint: Path, path: str) -> None:
    edit_json(checkpoint / "config_sentence_transformers.json", activation_fn=path)
    with pytest.raises(CheckpointError, match=f"activation '{path}'"):
        activation_of(checkpoint)
