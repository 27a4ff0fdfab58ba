from pathlib import Path

import numpy as np
import pytest
import torch

from crossenc import CrossEncoder, InputExample
from crossenc.testing import tiny_checkpoint

PAIRS = [("what is water", "the river of the city"), ("how is bread", "in the stone bridge of winter")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"), device="cpu")


def test_renamed_properties_warn_and_give_what_the_new_ones_do(
    model: CrossEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "crossenc")
    with pytest.warns(DeprecationWarning, match="`default_activation_function` property was renamed"):
        assert model.default_activation_function is model.activation_fn
    with pytest.warns(DeprecationWarning, match="`_target_device` property was renamed .*: write `device`"):
        assert model._target_device == torch.device("cpu")
    with pytest.warns(DeprecationWarning, match="_target_device"):
        model._target_device = "cpu"
    assert "write `activation_fn`" in caplog.text


def test_tokenize_is_preprocess(model: CrossEncoder) -> None:
    with pytest.warns(DeprecationWarning, match="call `preprocess`"):
        features = model.tokenize(PAIRS)
    assert {name: tensor.tolist() for name, tensor in features.items()} == {
        name: tensor.tolist() for name, tensor in model.preprocess(PAIRS).items()
    }


def test_the_limit_has_three_names(model: CrossEncoder) -> None:
    model.max_seq_length = 20
    try:
        assert (model.max_length, model.max_seq_length, model.get_max_seq_length()) == (20, 20, 20)
        assert model.tokenizer.model_max_length == 20
    finally:
        model.max_length = 128


def test_only_text_is_supported(model: CrossEncoder) -> None:
    assert model.get_model_kwargs() == []
    model.clear_placement_cache()
    assert model.modalities == ["text"]
    assert (model.supports("text"), model.supports("image")) == (True, False)


def test_the_default_activation_is_that_of_the_checkpoint_not_the_one_set(model: CrossEncoder, tmp_path: Path) -> None:
    changed = CrossEncoder(tiny_checkpoint(tmp_path), device="cpu", activation_fn=torch.nn.Tanh())
    assert isinstance(changed.get_default_activation_fn(), torch.nn.Sigmoid)


def test_batches_are_collated_by_the_number_of_labels(model: CrossEncoder, tmp_path: Path) -> None:
    examples = [InputExample(texts=list(pair), label=label) for pair, label in zip(PAIRS, (1, 0), strict=True)]
    features, labels = model.smart_batching_collate(examples)
    assert features["input_ids"].tolist() == model.preprocess(PAIRS)["input_ids"].tolist()
    assert (labels.dtype, labels.tolist()) == (torch.float32, [1.0, 0.0])
    assert model.smart_batching_collate_text_only(examples)["input_ids"].shape == features["input_ids"].shape
    three = CrossEncoder(tiny_checkpoint(tmp_path, num_labels=3), device="cpu")
    assert three.smart_batching_collate(examples)[1].dtype == torch.int64


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    gradients = []
    for checkpointed in (False, True):
        model = CrossEncoder(folder, device="cpu")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
            model.train()
            for part in model.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
        model.logits(PAIRS).sum().backward()
        gradients.append(model.model.bert.encoder.layer[0].output.dense.weight.grad.numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-6)


def test_old_fit_trains(tmp_path: Path) -> None:
    model = CrossEncoder(tiny_checkpoint(tmp_path), device="cpu")
    before = model.predict(PAIRS)
    loader = torch.utils.data.DataLoader([InputExample(texts=list(pair), label=1.0) for pair in PAIRS], batch_size=2)
    model.old_fit(loader, epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-2}, show_progress_bar=False)
    assert (model.predict(PAIRS) > before).all()
