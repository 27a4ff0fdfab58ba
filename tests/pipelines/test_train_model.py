"""The model of a training job before its first step."""

import numpy as np
import pytest
import torch

from crossenc import CrossEncoder
from crossenc.loop.optimizer import load_trained_weights, trained_weights
from crossenc.testing import tiny_checkpoint
from pipelines.train_config import TrainConfig
from pipelines.train_model import build, source
from tests.crossenc.loop.support import make_learner, make_lists, weights_of
from tests.support.checkpoints import make_backbone


def make(folder, **more):
    config = TrainConfig.model_validate({"train": "-", "output": "-", "model": str(folder), **more})
    return build(config, source(config))


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tokenizer and a model without a head."""
    return make_backbone(tmp_path / "backbone")


def test_a_new_head_is_drawn_by_the_seed(backbone):
    heads = [make(backbone, seed=seed).model.classifier.weight.detach().numpy() for seed in (1, 1, 2)]
    assert make(backbone).head_is_new
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])


def test_dropout_is_the_jobs_while_training_and_the_parents_in_what_is_saved(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    config = TrainConfig.model_validate({"train": "-", "output": "-", "model": str(folder), "dropout": 0.0})
    training, saved = build(config, source(config)), build(config, source(config), is_trained=True)
    assert {part.p for part in training.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}
    assert saved.config.hidden_dropout_prob == CrossEncoder(folder, device="cpu").config.hidden_dropout_prob > 0


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_lora_trains_adapters_and_the_head_alone_and_becomes_part_of_the_model(tmp_path, family, has_head):
    folder = tiny_checkpoint(tmp_path / "model", family)
    if not has_head:
        CrossEncoder(folder, device="cpu").model.base_model.save_pretrained(folder)
    model = make(folder, lora={"rank": 2, "target_modules": ["query", "value"]})
    assert model.head_is_new is not has_head
    lists = make_lists(model, [3, 2])
    learner = make_learner(model, lists, optimizer=torch.optim.SGD)
    before = weights_of(model)
    for step in range(2):  # a LoRA's first factor has no gradient while its second one is zero
        learner.step(step, lists, 2, rate=1.0)
    changed = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert any("lora_A" in name for name in changed) and any("lora_B" in name for name in changed)
    assert {name for name in changed if "lora_" not in name} == {
        name for name in before if "classifier" in name and "original_module" not in name
    }
    again = make(folder, lora={"rank": 2, "target_modules": ["query", "value"]})
    load_trained_weights(again, trained_weights(model))
    again.mark_trained()
    again.merge_adapters()
    again.save_pretrained(tmp_path / "merged")
    merged = CrossEncoder(tmp_path / "merged", device="cpu")
    pairs = [("water", "the river"), ("bread", "stone and bread")]
    model.mark_trained()
    assert np.allclose(merged.predict(pairs), model.eval().predict(pairs), atol=1e-5)
    assert {name for name, _ in merged.named_parameters()} == set(weights_of(make(folder)))
