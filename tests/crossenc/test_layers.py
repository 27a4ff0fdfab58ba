"""Models with some of their layers: which ones, and that nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from crossenc import CrossEncoder
from crossenc.errors import CheckpointError, ConfigError
from crossenc.layers import keep_layers, layers_to_keep, spread
from crossenc.testing import tiny_checkpoint

PAIRS = [("what is the river", "water in the city"), ("bread and music", "the doctor of winter stone")]


def deep_checkpoint(folder: Path, family: str, num_layers: int) -> Path:
    """A checkpoint with that many layers; DistilBERT, of which there is no tiny one, has BERT's tokenizer."""
    if family != "distilbert":
        return tiny_checkpoint(folder, family, num_layers=num_layers, seed=1)
    tiny_checkpoint(folder)
    sizes = {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": num_layers, "num_labels": 1}
    config = AutoConfig.for_model(family, vocab_size=AutoConfig.from_pretrained(folder).vocab_size, **sizes)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("num_layers", "num_kept", "kept"),
    [(6, 3, (0, 3, 5)), (12, 6, (0, 2, 4, 7, 9, 11)), (12, 2, (0, 11)), (5, 1, (0,)), (4, 4, (0, 1, 2, 3))],
)
def test_the_first_the_last_and_evenly_between(num_layers, num_kept, kept):
    assert spread(num_layers, num_kept) == kept


@pytest.mark.parametrize("num_kept", [0, 5])
def test_a_number_of_layers_that_there_is_not_is_refused(num_kept):
    with pytest.raises(ConfigError, match="has 4 layers"):
        spread(4, num_kept)


@pytest.mark.parametrize(
    ("family", "place"),
    [("bert", "encoder.layer"), ("electra", "encoder.layer"), ("distilbert", "layer"), ("modernbert", "layers")],
)
def test_the_kept_layers_have_their_weights_and_the_rest_is_as_it_was(tmp_path, family, place):
    folder = deep_checkpoint(tmp_path / "deep", family, 5)
    assert keep_layers(folder, 3, tmp_path / "shallow") == (0, 2, 4) == layers_to_keep(folder, 3)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("deep", "shallow"))
    inside = f".{place}."
    renamed = {old: new for new, old in enumerate((0, 2, 4))}
    expected = {}
    for name, tensor in before.items():
        start, found, rest = name.partition(inside)
        if found:
            number, _, rest = rest.partition(".")
            if int(number) not in renamed:
                continue
            name = f"{start}{inside}{renamed[int(number)]}.{rest}"
        expected[name] = tensor
    assert expected.keys() == after.keys() and len(after) < len(before)
    assert all(torch.equal(expected[name], after[name]) for name in after)
    shallow = CrossEncoder(tmp_path / "shallow")
    assert shallow.config.num_hidden_layers == 3 and shallow.max_length == CrossEncoder(folder).max_length
    assert np.isfinite(shallow.predict(PAIRS)).all()


def test_all_layers_give_the_same_scores(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    keep_layers(folder, 2, tmp_path / "same")
    np.testing.assert_array_equal(CrossEncoder(tmp_path / "same").predict(PAIRS), CrossEncoder(folder).predict(PAIRS))


def test_kept_layers_of_modernbert_attend_as_far_as_they_did(tmp_path):
    folder = deep_checkpoint(tmp_path / "deep", "modernbert", 4)
    assert keep_layers(folder, 2, tmp_path / "shallow") == (0, 3)
    kinds = AutoConfig.from_pretrained(tmp_path / "shallow").layer_types
    assert kinds == ["full_attention", "full_attention"]


def test_a_family_whose_layers_are_not_known_is_refused_with_the_ones_that_are(tmp_path):
    AutoConfig.for_model("gpt2", n_layer=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"gpt2 model.*bert, roberta.*modernbert"):
        layers_to_keep(tmp_path, 2)
