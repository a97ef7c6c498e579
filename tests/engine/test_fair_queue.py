"""Several tenants on one engine: who is served when, who gives way, and that nobody waits for ever."""

from collections import Counter
from itertools import combinations, count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequestError
from engine.fair_queue import MAX_IDLE, PASSED
from engine.plan import StepPlan
from engine.requests import EngineRequest, Handover, Standing
from tests.engine.stand_in import World, make_request

BATCH, RUNNING, MOST_OUTPUT = 16, 4, 5


class Clients:
    """Send requests of tenants to a world, each prompt unlike all others, and count what is computed for whom."""

    def __init__(self, **options) -> None:
        self.world = World(**{"max_batch_tokens": BATCH, "max_running": RUNNING, "max_waiting": 256} | options)
        self.standings: dict[str, Standing] = {}
        self.computed: Counter[str] = Counter()
        self._numbers = count(50)

    def send(self, num_tokens: int, standing: Standing, max_tokens: int = 1, **options) -> str:
        number = next(self._numbers)
        request_id = f"{standing.tenant}{number}"
        self.world.add(
            make_request(request_id, [number] * num_tokens, max_tokens=max_tokens, standing=standing, **options)
        )
        self.standings[request_id] = standing
        return request_id

    def step(self) -> int:
        """Returns how many tokens it computed."""
        plans = self.world.runner.plans
        num_plans = len(plans)
        self.world.step()
        for plan in plans[num_plans:]:
            for sequence in plan.sequences:
                self.computed[self.standings[sequence.request_id].tenant] += len(sequence.token_ids)
        return sum(plan.num_tokens for plan in plans[num_plans:])

    def waiting(self) -> Counter[str]:
        return Counter(sequence.request.standing.tenant for sequence in self.world.engine._scheduler._queue)

    def steps_until_first_token(self, request_id: str) -> int:
        steps = 0
        while not self.world.outputs[request_id]:
            self.step()
            steps += 1
            assert steps < 5000
        return steps


def held_by(world: World, request_id: str) -> int:
    sequence = world.engine._scheduler._sequences.get(request_id)
    return len(sequence.block_ids) if sequence is not None else 0


tenants = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4)
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, MOST_OUTPUT)), min_size=1, max_size=5)


@given(weights=tenants, sizes=st.dictionaries(st.sampled_from("abcd"), lengths), late=st.sampled_from("abcd-"))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_who_always_wants_more_is_served_by_weight_whatever_others_send(weights, sizes, late) -> None:
    """`late` comes when the others have been served for a while, and has no claim to what it missed."""
    clients = Clients(num_blocks=200, max_model_tokens=64)
    standings = {tenant: Standing(tenant, weight) for tenant, weight in weights.items()}
    sent: Counter[str] = Counter()

    def serve(tenants: list[str], num_steps: int) -> None:
        for _ in range(num_steps):
            for tenant in tenants:
                own = sizes.get(tenant, [(8, 2)])
                while clients.waiting()[tenant] <= RUNNING:
                    clients.send(own[sent[tenant] % len(own)][0], standings[tenant], own[sent[tenant] % len(own)][1])
                    sent[tenant] += 1
            assert clients.step() > 0

    serve([tenant for tenant in weights if tenant != late], 30)
    clients.computed.clear()
    serve(list(weights), 100)
    # A chunk of a prompt, and what was running when it became another tenant's turn, are not taken back.
    at_once = BATCH + RUNNING * MOST_OUTPUT
    assert clients.computed.total() > 100 * RUNNING / 2
    for one, other in combinations(weights, 2):
        difference = clients.computed[one] / weights[one] - clients.computed[other] / weights[other]
        assert abs(difference) <= at_once / weights[one] + at_once / weights[other]


@given(
    arrivals=st.lists(
        st.tuples(
            st.builds(Standing, st.sampled_from("abc"), st.sampled_from([1.0, 3.0]), st.integers(0, 2)),
            st.integers(1, 40),
            st.integers(1, MOST_OUTPUT),
            st.integers(0, 3),
        ),
        max_size=30,
    ),
    num_blocks=st.sampled_from([12, 30]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_step_leaves_room_that_somebody_could_use_and_tenants_are_served_in_order(arrivals, num_blocks) -> None:
    clients = Clients(num_blocks=num_blocks, max_model_tokens=48)
    scheduler = clients.world.engine._scheduler
    lines: dict[tuple[str, int], list[str]] = {}

    plan = scheduler.plan

    def checked(*args) -> StepPlan:
        planned = plan(*args)
        if planned.num_tokens < BATCH and scheduler._can_admit():
            assert any(scheduler.tables.shortfall(head) > 0 for head in scheduler._queue.heads())
        return planned

    scheduler.plan = checked
    for standing, num_tokens, max_tokens, num_steps in arrivals:
        request_id = clients.send(num_tokens, standing, max_tokens)
        lines.setdefault((standing.tenant, standing.priority), []).append(request_id)
        for _ in range(num_steps):
            clients.step()
    clients.world.run_to_the_end()
    for line in lines.values():
        assert [request_id for request_id in clients.world.started if request_id in line] == line


@pytest.mark.parametrize(("tenants", "at_most"), [(("flood", "other"), 3), (("same", "same"), None)])
def test_a_flood_of_long_prompts_delays_another_tenants_short_one_by_a_step_or_two(tenants, at_most) -> None:
    """Alone it takes one step. In the flood's own line it waits for all of it, which is what fairness prevents."""
    flood, other = (Standing(tenant) for tenant in tenants)
    clients = Clients(num_blocks=1000, max_model_tokens=256, max_running=16)
    for _ in range(64):
        clients.send(160, flood)
    for _ in range(30):
        clients.step()
    steps = clients.steps_until_first_token(clients.send(10, other))
    print(f"first token after {steps} steps; alone after 1")
    assert steps <= at_most if at_most is not None else steps > 500
    clients.world.run_to_the_end()


def test_prompts_of_two_tenants_go_on_in_turns() -> None:
    clients = Clients(num_blocks=200, max_model_tokens=512)
    clients.send(160, Standing("a", 3.0))
    clients.step()
    clients.send(160, Standing("b", 1.0))
    clients.computed.clear()
    for _ in range(8):
        clients.step()
    assert clients.computed == {"a": 6 * BATCH, "b": 2 * BATCH}
    clients.world.run_to_the_end()


def test_what_is_cached_costs_its_tenant_nothing() -> None:
    clients = Clients(num_blocks=200, max_model_tokens=512, max_running=8)
    text = list(range(100, 124))
    clients.world.add(make_request("first", text, max_tokens=1, standing=Standing("a")))
    clients.standings["first"] = Standing("a")
    other = clients.send(300, Standing("b"))
    while "first" not in clients.world.ended:
        clients.step()
    clients.computed.clear()
    for number in range(5):  # each computes one token of 25
        clients.world.add(make_request(f"again {number}", [*text, number], max_tokens=1, standing=Standing("a")))
        clients.standings[f"again {number}"] = Standing("a")
    while clients.computed["a"] < 5:
        clients.step()
    assert clients.computed["a"] == 5
    assert clients.computed["b"] <= 2 * BATCH
    assert not clients.world.outputs[other]
    clients.world.run_to_the_end()


def test_a_greater_priority_goes_first_and_takes_blocks_from_a_lesser_one() -> None:
    clients = Clients(num_blocks=8, max_model_tokens=64)
    low = [clients.send(11, Standing("a"), max_tokens=20) for _ in range(2)]
    clients.step()
    waiting = clients.send(3, Standing("b"))
    high = clients.send(10, Standing("c", priority=1))
    assert clients.steps_until_first_token(high) == 1
    assert clients.world.engine.counters["preemptions"] == 1
    assert held_by(clients.world, low[0])
    assert clients.world.started.index(high) < 3
    clients.world.run_to_the_end()
    assert clients.world.started.index(waiting) > clients.world.started.index(high)


def test_a_greater_priority_takes_the_place_of_a_lesser_one_in_the_batch() -> None:
    clients = Clients(num_blocks=64, max_model_tokens=64)
    for _ in range(RUNNING):
        clients.send(4, Standing("a"), max_tokens=30)
    clients.step()
    assert clients.steps_until_first_token(clients.send(4, Standing("a", priority=1))) == 1
    clients.world.run_to_the_end()


def test_a_handover_is_never_preempted_for_a_greater_priority() -> None:
    clients = Clients(num_blocks=16, max_model_tokens=64)
    gives = clients.send(60, Standing("a"), handover=Handover.GIVE)
    clients.step()
    high = clients.send(20, Standing("b", priority=1))
    clients.step()
    assert held_by(clients.world, gives) == 15
    assert not held_by(clients.world, high)
    clients.world.run_to_the_end()


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_a_lesser_priority_waits_for_no_more_than_a_multiple_of_its_own_tokens(num_tokens) -> None:
    clients = Clients(num_blocks=400, max_model_tokens=64)
    high, low = Standing("a", priority=5), Standing("b")
    for _ in range(3):
        clients.send(40, high)
    clients.step()
    request_id = clients.send(num_tokens, low)
    clients.computed.clear()
    while not clients.world.outputs[request_id]:
        while clients.waiting()["a"] < 3:
            clients.send(40, high)
        clients.step()
    # It moves up between two steps, and shares the batch with those above from there on.
    assert PASSED * num_tokens - BATCH <= clients.computed["a"] <= PASSED * num_tokens + 2 * num_tokens + 3 * BATCH
    clients.world.run_to_the_end()


def test_when_blocks_run_out_the_tenant_that_holds_most_for_its_weight_gives_way_newest_first() -> None:
    clients = Clients(num_blocks=12, max_model_tokens=64, max_running=8)
    small = clients.send(8, Standing("a"), max_tokens=30)
    large = [clients.send(11, Standing("b", 1.5), max_tokens=30) for _ in range(3)]
    clients.step()
    clients.step()
    while not clients.world.engine.counters["preemptions"]:
        clients.step()
    assert [bool(held_by(clients.world, each)) for each in (small, *large)] == [True, True, True, False]
    clients.world.run_to_the_end()


def test_when_blocks_run_out_a_lesser_priority_gives_way_whoever_holds_more() -> None:
    clients = Clients(num_blocks=12, max_model_tokens=64, max_running=8)
    low = clients.send(4, Standing("a"), max_tokens=30)
    high = [clients.send(12, Standing("b", priority=1), max_tokens=30) for _ in range(3)]
    clients.step()
    while not clients.world.engine.counters["preemptions"]:
        clients.step()
    assert not held_by(clients.world, low)
    assert all(held_by(clients.world, each) for each in high[:2])
    clients.world.run_to_the_end()


def test_a_share_of_the_blocks_is_a_bound_only_while_somebody_else_waits() -> None:
    clients = Clients(num_blocks=16, max_model_tokens=64)
    bounded, other = Standing("a", kv_share=0.5), Standing("b")
    # 1. Alone, a tenant gets more than its share.
    first = [clients.send(14, bounded, max_tokens=20) for _ in range(3)]
    clients.step()
    clients.step()
    clients.step()
    assert sum(held_by(clients.world, each) for each in first) > 8
    # 2. Somebody else comes, and what was lent comes back, newest first.
    others = clients.send(30, other, max_tokens=4)
    assert clients.steps_until_first_token(others) <= 3
    assert sum(held_by(clients.world, each) for each in first) <= 8
    assert held_by(clients.world, first[0])
    # 3. While others wait it starts nothing beyond its share; afterwards it does, and all end right.
    clients.world.run_to_the_end()


def test_a_request_that_is_larger_than_its_tenants_share_is_served_alone() -> None:
    clients = Clients(num_blocks=16, max_model_tokens=64)
    large = clients.send(30, Standing("a", kv_share=0.1), max_tokens=4)
    other = clients.send(30, Standing("b", kv_share=0.1), max_tokens=4)
    clients.world.run_to_the_end()
    assert clients.world.ended.keys() == {large, other}


def test_counters_of_tenants_that_are_gone_are_bounded() -> None:
    clients = Clients(num_blocks=64, max_model_tokens=64)
    stays = clients.send(4, Standing("stays"), max_tokens=50)
    queue = clients.world.engine._scheduler._queue
    for number in range(MAX_IDLE + 20):
        clients.world.engine.add(request := make_request(f"r{number}", [1], standing=Standing(f"t{number}")))
        clients.world.engine.abort(request.id)
    assert len(queue._idle) == MAX_IDLE
    clients.world.engine.abort(stays)
    assert not queue._idle
    assert not queue._accounts
    assert not queue._account_of


@pytest.mark.parametrize(
    ("weight", "kv_share"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, 1.5), (1.0, -0.1)]
)
def test_a_standing_that_makes_no_sense_is_refused(weight, kv_share) -> None:
    world = World()
    request: EngineRequest = make_request("bad", [1], standing=Standing("a", weight, 0, kv_share))
    with pytest.raises(InvalidRequestError, match="weight"):
        world.engine.add(request)
