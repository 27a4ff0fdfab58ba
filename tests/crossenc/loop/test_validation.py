"""What validation measures, and on which lists."""

import math
from dataclasses import replace

import numpy as np
import pytest

from crossenc.loop.lists import TokenizedLists
from crossenc.loop.validation import measured, validate
from crossenc.losses import objective
from tests.crossenc.loop.support import make_lists, tiny_model


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


def graded(model, *labels: list[float]) -> TokenizedLists:
    """A list for each list of labels."""
    lists = make_lists(model, [len(one) for one in labels])
    return replace(lists, labels=np.array([label for one in labels for label in one], np.float32))


def test_lists_are_measured_where_a_ranking_can_be_better_than_another(model):
    lists = graded(model, [1.0], [0, 0], [1, 1], [1, 0], [2, 1])
    scores = np.array([3, 1, 2, 1, 2, 1, 2, 1, 2], np.float32)  # each list's last document first
    wanted = [[1 / math.log2(3), 1 / 2], [(1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), 1]]
    assert measured(scores, lists) == pytest.approx(np.array(wanted))


def test_single_pairs_are_judged_by_their_loss_alone(model):
    lists = graded(model, [1.0], [0.0], [1.0])
    assert set(validate(model, [lists], objective("binary_cross_entropy"))) == {"validation_loss"}


def test_lists_that_a_loss_does_not_count_give_no_figure(model):
    assert validate(model, [graded(model, [1.0], [0.0])], objective("rank_net")) == {}
