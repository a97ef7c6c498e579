"""What the engine is told of an assignment."""

from baton.v1 import worker_link_pb2 as wire
from engine.requests import Handover, Standing
from worker.roles import engine_request


def standing(**fields: object) -> Standing:
    return engine_request(wire.Assignment(**fields), "r/1", "model", Handover.GIVE).standing


def test_an_assignment_says_whose_it_is_and_what_its_turn_depends_on() -> None:
    assert standing(tenant="a", weight=2.5, priority=-3, kv_share=0.25) == Standing("a", 2.5, -3, 0.25)


def test_one_that_says_nothing_is_one_of_many_equals() -> None:
    assert standing() == Standing("", 1.0, 0, 0.0)
