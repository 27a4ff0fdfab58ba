"""What the workers of a training run decide by themselves: functions that need no cluster."""

import math

import pytest

from pipelines.train_worker import judge


@pytest.mark.parametrize(
    ("values", "is_ranked", "value", "words"),
    [
        ({"validation_loss": 0.5, "nDCG@10": 0.75, "RR@10": 1.0}, True, 0.75, ""),
        ({"nDCG@10": 0.75}, True, 0.75, ""),
        ({"validation_loss": 0.5}, True, -0.5, "measures no ranking"),
        ({"validation_loss": 0.5}, False, -0.5, ""),
        ({"validation_loss": math.nan}, False, None, "cannot judge"),
        ({}, True, None, "cannot judge"),
    ],
)
def test_a_checkpoint_is_chosen_by_its_ranking_or_its_loss_and_people_hear_of_it(values, is_ranked, value, words):
    found, note = judge(values, is_ranked)
    assert found == value and (words in note if words else not note)
