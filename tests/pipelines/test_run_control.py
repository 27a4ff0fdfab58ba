"""What the control actor makes of starts without an end: whose fault they are."""

import pytest
import ray

from pipelines.control import CAREFUL_AFTER_STARTS, GIVE_UP_LOADING_AFTER_DEATHS, REFUSE_AFTER_STARTS, RunControl

GONE = "0" * 56  # a node that the cluster does not have


@pytest.fixture
def here(ray_cluster) -> str:
    return ray.get_runtime_context().get_node_id()


def test_a_shard_whose_processes_die_is_scored_carefully_and_then_refused(here):
    control = RunControl("run")
    verdicts = [control.begin("s1", here) for _ in range(REFUSE_AFTER_STARTS + 1)]
    careful = REFUSE_AFTER_STARTS - CAREFUL_AFTER_STARTS
    assert verdicts == ["score"] * CAREFUL_AFTER_STARTS + ["careful"] * careful + ["refuse"]
    assert control.begin("s2", here) == "score"


def test_starts_on_nodes_that_are_gone_are_nobodys_fault(here):
    control = RunControl("run")
    assert {control.begin("s1", GONE) for _ in range(2 * REFUSE_AFTER_STARTS)} == {"score"}
    assert {control.begin_loading("a1", GONE) for _ in range(2 * GIVE_UP_LOADING_AFTER_DEATHS)} == {0}
    assert [control.begin_loading("a1", here) for _ in range(3)] == [0, 1, 2]


def test_a_shard_that_was_scored_starts_anew(here):
    control = RunControl("run")
    for _ in range(2 * REFUSE_AFTER_STARTS):
        assert control.begin("s1", here) == "score"
        control.end("s1")
    assert control.stop() == {"s1"}
    assert control.begin("s2", here) == "stop"
