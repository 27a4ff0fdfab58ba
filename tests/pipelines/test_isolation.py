"""Scoring pairs that raise or kill: exactly the guilty ones are refused, and everything ends."""

import weakref
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossenc.errors import ScoreError
from crossenc.records import TokenizedPairs
from crossenc.testing import FakeScorer
from pipelines import isolation
from pipelines.isolation import Outcome, is_broken, score_halving, score_isolated, select
from tests.pipelines.guilty import FIRST_TOKEN, GuiltyModel, GuiltyScorer, make_pairs


def isolated(crimes: dict[int, str], num_pairs: int = 20) -> Outcome:
    return score_isolated(GuiltyModel(crimes), 1, GuiltyScorer({}), make_pairs(num_pairs))


def check(outcome: Outcome, guilty: dict[int, str], num_pairs: int = 20) -> None:
    """The guilty pairs, and no others, have these reasons; all others have their scores."""
    assert {pair: reason for pair, (reason, _) in outcome.failures.items()} == guilty
    expected = FakeScorer().score(make_pairs(num_pairs))
    expected[list(guilty)] = np.nan
    np.testing.assert_array_equal(outcome.scores, expected)


def test_chosen_pairs_keep_their_tokens_types_and_marks():
    pairs = TokenizedPairs(
        np.array([1, 2, 3, 4, 5, 6], np.int32),
        np.array([0, 1, 1, 4, 6]),
        np.array([0, 0, 1, 1, 0, 1], np.uint8),
        np.array([False, True, False, True]),
    )
    chosen = select(pairs, np.array([3, 0, 1]))
    assert chosen.input_ids.tolist() == [5, 6, 1]
    assert chosen.offsets.tolist() == [0, 2, 3, 3]
    assert chosen.token_type_ids.tolist() == [0, 1, 0]
    assert chosen.truncated.tolist() == [True, False, True]


def test_without_failures_scores_are_those_of_one_call():
    check(score_halving(GuiltyScorer({}), make_pairs(20)), {})


def test_no_pairs_need_no_scorer():
    outcome = score_halving(GuiltyScorer({}), make_pairs(0))
    assert (len(outcome.scores), outcome.failures) == (0, {})
    assert len(score_isolated(GuiltyModel({}, load_crime="exit"), 1, GuiltyScorer({}), make_pairs(0)).scores) == 0


@settings(deadline=None)
@given(st.sets(st.integers(0, 19)))
def test_halving_refuses_exactly_the_pairs_that_raise(guilty):
    outcome = score_halving(GuiltyScorer(dict.fromkeys(guilty, "raise")), make_pairs(20))
    check(outcome, dict.fromkeys(guilty, "scoring_error"))


def test_a_failure_says_what_was_raised_in_one_line():
    outcome = score_halving(GuiltyScorer({3: "raise"}), make_pairs(5))
    assert outcome.failures == {3: ("scoring_error", "ValueError: no score for this")}


class Tensor:
    """What a forward pass allocates."""


class SmallDevice:
    """A scorer on a device with room for `capacity` tensors, whose forward passes take one, and fail for one pair."""

    max_batch_tokens, is_packed = 4096, True

    def __init__(self, capacity: int, guilty: int) -> None:
        self.capacity, self.guilty = capacity, guilty
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def score(self, pairs: TokenizedPairs) -> Any:
        if len(self.alive) == self.capacity:
            raise MemoryError("the device is full")
        activations = Tensor()
        self.alive.add(activations)
        if self.guilty + FIRST_TOKEN in pairs.input_ids:
            raise ValueError("no score for this")
        return FakeScorer().score(pairs)


def test_what_a_failed_forward_pass_had_allocated_is_free_before_its_halves_are_scored():
    outcome = score_halving(SmallDevice(capacity=3, guilty=41), make_pairs(64))
    check(outcome, {41: "scoring_error"}, num_pairs=64)


def test_what_a_failed_forward_pass_had_allocated_is_free_before_a_child_looks_whether_it_is_broken():
    class Pipe:
        """A parent's end that asks for one pair's score and then goes away."""

        asked, replies = [make_pairs(1)], []

        def recv(self) -> TokenizedPairs:
            if not self.asked:
                raise EOFError
            return self.asked.pop()

        def send(self, reply: Any) -> None:
            self.replies.append(reply)

    class SmallModel(GuiltyModel):
        def load_scorer(self, threads: int) -> Any:
            return SmallDevice(capacity=1, guilty=0)

    pipe: Any = Pipe()
    isolation._serve(SmallModel({}), 1, pipe)
    assert pipe.replies == [None, "scoring_error: ValueError: no score for this"]


def test_a_scorer_is_broken_when_it_fails_on_an_ordinary_pair():
    model, scorer = GuiltyModel({}), GuiltyScorer({0: "raise", 1: "stick"})
    score_halving(scorer, make_pairs(1))
    assert not is_broken(model, scorer)
    score_halving(scorer, make_pairs(2))
    assert is_broken(model, scorer)


def test_a_child_gives_the_scores_of_this_process():
    check(isolated({}), {})


def test_pairs_that_end_their_process_and_pairs_that_raise_are_refused_alone():
    outcome = isolated({3: "exit", 4: "raise", 10: "kill", 15: "segfault"})
    check(outcome, {3: "scoring_crash", 4: "scoring_error", 10: "scoring_crash", 15: "scoring_crash"})
    details = [outcome.failures[pair][1] for pair in (3, 10, 15)]
    assert details == [f"the process ended with code {code}" for code in (3, -9, -11)]


def test_pairs_after_one_that_breaks_its_process_for_good_are_not_blamed():
    outcome = isolated({2: "stick"})
    check(outcome, {2: "scoring_crash"})
    assert outcome.failures[2][1] == "RuntimeError: an earlier error sticks"


def test_with_more_killers_than_allowed_the_rest_is_refused_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(isolation, "MAX_CHILD_DEATHS", 1)
    outcome = isolated(dict.fromkeys(range(8, 12), "kill"))
    # Batches run from one end of the shard to the other, so that half of it has its scores.
    assert 8 <= len(outcome.failures) <= 12
    scores = FakeScorer().score(make_pairs(20))
    is_scored = np.isfinite(outcome.scores)
    np.testing.assert_array_equal(outcome.scores[is_scored], scores[is_scored])
    assert set(outcome.failures) == set(np.flatnonzero(~is_scored).tolist())
    assert {reason for reason, _ in outcome.failures.values()} == {"scoring_crash"}
    assert any("too many" in detail for _, detail in outcome.failures.values())


@pytest.mark.parametrize(("crime", "message"), [("raise", "the weights are gone"), ("exit", "died while loading")])
def test_a_child_that_cannot_load_the_model_stops_the_run_with_the_reason(crime, message):
    with pytest.raises(ScoreError, match=f"could not start a separate scoring process: .*{message}"):
        score_isolated(GuiltyModel({}, load_crime=crime), 1, GuiltyScorer({}), make_pairs(3))


def test_no_child_is_left_behind():
    before = set(psutil.Process().children())
    isolated({5: "kill"}, num_pairs=8)
    with pytest.raises(ScoreError):
        score_isolated(GuiltyModel({}, load_crime="raise"), 1, GuiltyScorer({}), make_pairs(1))
    left = [child for child in psutil.Process().children() if child not in before]
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []
