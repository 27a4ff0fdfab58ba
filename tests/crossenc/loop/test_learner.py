"""A step of the optimizer: the same however it is cut into passes, shared among workers or interrupted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import multiprocessing as mp

from crossenc.errors import CheckpointError, ConfigError
from crossenc.loop.optimizer import (
    freeze_lowest,
    load_optimizer_tensors,
    load_trained_weights,
    optimizer_tensors,
    parameter_groups,
    rate_factor,
    trained_weights,
)
from crossenc.loop.order import share
from crossenc.losses import LossSum
from tests.crossenc.loop.support import adamw, make_learner, make_lists, tiny_model, weights_of
from tests.support.s3 import free_port

SIZES = [3, 1, 4, 2, 5]


def same(left, right, tolerance=1e-6):
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left) <= tolerance


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra", "modernbert"])
def test_packed_training_gives_the_gradients_of_padded_training(tmp_path, family):
    found = []
    for is_packed in (True, False):
        model = tiny_model(tmp_path / family, family)
        lists = make_lists(model, SIZES)
        learner = make_learner(model, lists, optimizer=torch.optim.SGD, max_grad_norm=1e9, recomputes=not is_packed)
        assert learner.forward_kind.startswith("packed" if is_packed else "padded: activations")
        result = learner.step(0, lists, len(lists), rate=1.0)
        found.append((result.loss, result.gradient_norm, weights_of(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert same(found[0][2], found[1][2])


def test_a_step_is_what_plain_torch_does(tmp_path):
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists, max_grad_norm=0.5)
    other = tiny_model(tmp_path / "other")
    other.train()
    groups = parameter_groups(other, learning_rate=1e-3, head_learning_rate=None, weight_decay=0.01)
    optimizer = adamw(groups)
    for step in range(3):
        result = learner.step(step, lists, len(lists), rate=1.0)
        optimizer.zero_grad()
        logits = other(other.batch_inputs(lists.pairs, np.arange(len(lists.pairs))))["scores"][:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(lists.labels))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        assert result.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert same(weights_of(model), weights_of(other), 1e-5)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "lambda", "list_net", "localized_contrastive"])
def test_memory_changes_nothing_that_is_learned(tmp_path, loss):
    found = []
    for max_tokens in (10_000, 60):
        model = tiny_model(tmp_path / "model")
        lists = make_lists(model, SIZES, weights=[1, 2, 1, 0.5, 1])
        learner = make_learner(model, lists, loss, max_tokens=max_tokens)
        results = [learner.step(step, lists, len(lists), rate=1.0) for step in range(2)]
        found.append(([result.loss for result in results], weights_of(model)))
    (first, second), (first_in_parts, second_in_parts) = found[0][0], found[1][0]
    assert first == pytest.approx(first_in_parts, abs=1e-6)
    assert second == pytest.approx(second_in_parts, abs=2e-6)  # after a step of sums in another order
    assert same(found[0][1], found[1][1], 1e-5)


def _train_as_one_of_two(rank, folder, port):
    torch.set_num_threads(1)
    model = tiny_model(folder / f"worker-{rank}")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists, max_tokens=100)
    own = lists.take(share(np.arange(len(lists)), lists.sizes, 2)[rank])
    for step in range(3):
        result = learner.step(step, own, len(lists), rate=1.0, wishes=(rank == 1, False))
        assert result.wishes == (True, False), "what one worker wishes, all hear"
    torch.save(result.loss, folder / f"loss-{rank}")
    save_file(trained_weights(model), str(folder / f"weights-{rank}.safetensors"))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_workers_learn_what_one_does(tmp_path):
    mp.spawn(_train_as_one_of_two, (tmp_path, free_port()), nprocs=2)
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists)
    for step in range(3):
        result = learner.step(step, lists, len(lists), rate=1.0)
    both = [load_file(tmp_path / f"weights-{rank}.safetensors") for rank in range(2)]
    assert same(both[0], both[1], 0.0)
    assert same(both[0], trained_weights(model), 1e-5)
    assert torch.load(tmp_path / "loss-0") == pytest.approx(result.loss, abs=1e-6)


def test_a_run_that_is_taken_up_again_ends_with_the_same_weights_dropout_included(tmp_path):
    model = tiny_model(tmp_path / "model", dropout=0.3)
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists)
    for step in range(2):
        learner.step(step, lists, len(lists), rate=1.0)
    weights, state = trained_weights(model), optimizer_tensors(model, learner.optimizer)
    for step in range(2, 5):
        learner.step(step, lists, len(lists), rate=1.0)
    again = tiny_model(tmp_path / "again", dropout=0.3)
    other = make_learner(again, lists)
    load_trained_weights(again, weights)
    load_optimizer_tensors(again, other.optimizer, state)
    torch.rand(17)
    for step in range(2, 5):
        other.step(step, lists, len(lists), rate=1.0)
    assert same(weights_of(model), weights_of(again), 0.0)


def test_dropout_differs_from_step_to_step(tmp_path):
    model = tiny_model(tmp_path / "model", dropout=0.5)
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists)
    losses = {learner.step(step, lists, len(lists), rate=0.0).loss for step in range(3)}
    assert len(losses) == 3


def test_a_loss_that_is_no_number_changes_no_weight_and_says_whose_lists_it_was(tmp_path):
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, SIZES)
    learner = make_learner(model, lists)
    before = weights_of(model)
    labels = lists.labels.copy()
    labels[0] = math.nan
    result = learner.step(0, replace(lists, labels=labels), len(lists), rate=1.0)
    assert (result.is_finite, result.is_guilty) == (False, True)
    assert same(before, weights_of(model), 0.0)


def steep_loss(scores, labels, mask, weights) -> LossSum:
    """Zero, with a gradient that is infinite."""
    return LossSum((scores - scores.detach()).clamp(min=0).sqrt().sum(), weights.sum())


def test_any_workers_lists_may_be_why_a_gradient_is_no_number(tmp_path):
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, SIZES)
    result = make_learner(model, lists, steep_loss).step(0, lists, len(lists), rate=1.0)
    assert (result.loss, result.is_finite, result.is_guilty) == (0.0, False, True)


def test_half_precision_gives_up_once_its_loss_is_scaled_below_one(tmp_path):
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, [2])
    learner = make_learner(model, lists, steep_loss)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights_of(model)
    found = [learner.step(step, lists, 1, rate=1.0).is_finite for step in range(4)]
    assert found == [True, True, True, False], "left out at scales of 4, 2 and 1, and no more at 1/2"
    assert same(before, weights_of(model), 0.0)


def test_lists_without_weight_count_nothing(tmp_path):
    model = tiny_model(tmp_path / "model")
    lists = make_lists(model, SIZES, weights=[0] * 5)
    result = make_learner(model, lists).step(0, lists, 5, rate=1.0)
    assert (result.loss, result.gradient_norm) == (0.0, 0.0)


def test_biases_and_normalisation_are_not_decayed_and_the_head_has_its_own_rate(tmp_path):
    model = tiny_model(tmp_path / "model")
    groups = parameter_groups(model, learning_rate=1e-5, head_learning_rate=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {(group["lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]} for group in groups}
    assert found[1e-3, 0.1] == {"0.model.classifier.weight"}
    assert found[1e-3, 0.0] == {"0.model.classifier.bias"}
    assert all(name.endswith("bias") or "LayerNorm" in name for name in found[1e-5, 0.0])
    assert not any("LayerNorm" in name or name.endswith("bias") for name in found[1e-5, 0.1])
    assert sum(map(len, found.values())) == len(names)


def test_the_embeddings_and_the_lowest_layers_can_be_frozen(tmp_path):
    model = tiny_model(tmp_path / "model")
    freeze_lowest(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("embeddings" in name or "layer.0." in name for name in trained)
    assert any("layer.1." in name for name in trained) and "0.model.classifier.weight" in trained
    with pytest.raises(ConfigError, match="2 layers"):
        freeze_lowest(model, 3)


def test_only_trained_weights_are_stored_and_another_models_are_refused(tmp_path):
    model = tiny_model(tmp_path / "model")
    freeze_lowest(model, 2)
    weights = trained_weights(model)
    assert "0.model.classifier.weight" in weights and not any("encoder" in name for name in weights)
    with pytest.raises(CheckpointError, match="not those of this model"):
        load_trained_weights(tiny_model(tmp_path / "other", hidden_size=16), weights)


def test_the_learning_rate_rises_and_falls_as_its_schedule_says():
    linear = [rate_factor(step, 10, 2, "linear") for step in (0, 1, 2, 6, 9)]
    assert linear == pytest.approx([0, 0.5, 1, 0.5, 0.125])
    cosine = [rate_factor(step, 10, 2, "cosine") for step in (2, 6, 9)]
    assert cosine == pytest.approx([1, 0.5, (1 + math.cos(7 / 8 * math.pi)) / 2])
    assert rate_factor(9, 10, 0, "constant") == 1.0
