"""The policy against made-up machines: steps take what a function says, guesses are right with a given probability."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from engine.speculation.policy import PATIENCE, Policy

MOST = 8
StepSeconds = Callable[[int], float]


def memory_bound(rows: int) -> float:
    """A machine that reads weights for as long as it computes 16 rows."""
    return 0.010 + 0.0002 * rows


def two_cores(rows: int) -> float:
    """A quarter of a billion parameters on a small CPU: arithmetic counts from 6 rows on."""
    return max(0.007 * (1 + 0.03 * (rows - 1)), 0.0035 + 0.00085 * rows)


def compute_bound(rows: int) -> float:
    """Twice the rows, twice the time."""
    return 0.001 * rows


@dataclass
class World:
    """Runs steps of a batch in which something can always be guessed."""

    step_s: StepSeconds
    batch: int
    right: float
    depth_s: float = 0.0
    noise: float = 0.03
    policy: Policy = field(default_factory=lambda: Policy(most_running=64))
    dice: random.Random = field(default_factory=lambda: random.Random(1))
    lengths: list[int] = field(default_factory=list)
    """Guesses in each step, all requests together."""

    def run(self, num_steps: int) -> float:
        """Tokens a second, as a multiple of what plain steps give."""
        tokens, seconds = 0, 0.0
        for _ in range(num_steps):
            lengths = {}
            if self.policy.wants(self.batch):
                lengths = self.policy.choose(self.batch, {f"r{number}": MOST for number in range(self.batch)})
            if lengths:
                seconds += self.depth_s * max(lengths.values())
                self.policy.observe_guessing(self.batch, self.depth_s)
            count = sum(lengths.values())
            taken = self.step_s(self.batch + count) * self.dice.lognormvariate(0, self.noise)
            for request_id, length in lengths.items():
                num_right = next((at for at in range(length) if self.dice.random() >= self.right), length)
                self.policy.observe_guesses(request_id, length, num_right)
                tokens += num_right
            self.policy.observe_idle(not count)
            self.policy.observe_step(self.batch, count, taken)
            tokens, seconds = tokens + self.batch, seconds + taken
            self.lengths.append(count)
        return tokens / seconds * self.step_s(self.batch) / self.batch


@pytest.mark.parametrize("step_s", [memory_bound, two_cores])
def test_right_guesses_alone_in_a_batch_make_it_several_times_faster(step_s: StepSeconds) -> None:
    world = World(step_s, batch=1, right=1.0)
    assert world.run(200) > 4
    assert world.lengths[1] < MOST / 2, "it starts modestly"
    assert world.lengths[20:40] == [MOST] * 20


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("right", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("step_s", [memory_bound, two_cores, compute_bound])
def test_wrong_guesses_cost_next_to_nothing(step_s: StepSeconds, right: float, batch: int) -> None:
    assert World(step_s, batch, right).run(1000) > 0.965


def test_lengths_follow_how_often_guesses_are_right() -> None:
    means = []
    for right in (0.2, 0.6, 0.95):
        world = World(two_cores, 1, right)
        world.run(400)
        means.append(sum(world.lengths) / 400)
    assert 0.5 < means[0] < 2.5 < means[1] < 6 < means[2]


@pytest.mark.parametrize("batch", [1, 8])
def test_it_stops_while_hopeless_and_finds_out_when_that_changes(batch: int) -> None:
    world = World(two_cores, batch, right=0.0)
    world.run(500)
    assert sum(world.lengths[100:]) < 400 * 0.3, "one guess now and then"
    world.right = 1.0
    world.lengths.clear()
    world.run(600)
    assert sum(world.lengths[-100:]) / 100 > 0.8 * batch * MOST


@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_that_leaves_no_arithmetic_to_spare_gets_almost_no_guesses(batch: int) -> None:
    world = World(compute_bound, batch, right=0.8)
    world.run(500)
    assert sum(world.lengths[50:]) < 450 * 0.4


def test_the_same_guesses_pay_in_a_small_batch_and_not_in_a_large_one() -> None:
    assert World(two_cores, 1, right=0.7).run(500) > 1.8
    world = World(two_cores, 32, right=0.7)
    world.run(500)
    assert sum(world.lengths[50:]) < 450


def test_a_draft_model_that_is_too_slow_is_not_asked() -> None:
    """Each of its steps takes as long as one of the target."""
    world = World(memory_bound, 1, right=0.9, depth_s=0.010)
    assert world.run(1000) > 0.96
    assert sum(world.lengths[50:]) < 950 * 0.1
    assert World(memory_bound, 1, right=0.9, depth_s=0.001).run(1000) > 2.5


def test_a_bad_request_does_not_spoil_a_good_one() -> None:
    policy = Policy(most_running=8)
    policy.observe_step(2, 0, 0.010)
    for _ in range(100):
        lengths = policy.choose(2, {"good": MOST, "bad": MOST})
        for request_id, length in lengths.items():
            policy.observe_guesses(request_id, length, length if request_id == "good" else 0)
        policy.observe_step(2, sum(lengths.values()), 0.010 + 0.001 * sum(lengths.values()))
    assert lengths == {"good": MOST}


def test_steps_that_somebody_disturbed_do_not_end_it() -> None:
    world = World(two_cores, 1, right=0.9)
    world.run(100)
    for count in (0, 4, 4):
        world.policy.observe_step(1, count, 5.0)
    assert world.run(300) > 2.5


def test_more_running_than_the_bound_are_left_alone_whatever_was_measured() -> None:
    policy = Policy(most_running=4)
    assert [policy.wants(count) for count in (1, 4, 5, 64)] == [True, True, False, False]


def test_the_first_step_of_a_batch_size_is_plain() -> None:
    policy = Policy(most_running=4)
    assert policy.choose(1, {"a": 8}) == {}
    policy.observe_step(1, 0, 0.01)
    assert policy.choose(1, {"a": 8}) != {}
    assert policy.choose(2, {"a": 8, "b": 8}) == {}


def test_where_nothing_is_ever_found_it_is_looked_for_in_a_quarter_of_the_steps_until_something_is() -> None:
    policy = Policy(most_running=4)
    looked = []
    for _ in range(200):
        looked.append(policy.wants(1))
        policy.observe_idle(True)
    assert looked[:PATIENCE] == [True] * PATIENCE
    assert 0.2 < sum(looked[PATIENCE:]) / len(looked[PATIENCE:]) < 0.3
    policy.observe_idle(False)
    assert policy.wants(1)


def test_what_is_known_of_a_request_is_forgotten_with_it() -> None:
    policy = Policy(most_running=4)
    policy.observe_guesses("a", 1, 0)
    policy.forget("a")
    policy.forget("never seen")
    assert not policy._records


def test_guesses_for_a_batch_that_was_never_seen_without_them_tell_nothing() -> None:
    """Requests come and go between the choice and the step."""
    policy = Policy(most_running=64)
    policy.observe_step(3, 0, 0.010)
    policy.observe_step(2, 4, 0.012)
    assert policy.choose(2, {"a": MOST, "b": MOST}) == {}
    assert policy.spare_s(2) == 0.0
    policy.observe_step(2, 0, 0.010)
    assert policy.choose(2, {"a": MOST, "b": MOST})
