"""Any order of requests, tenants, steps, guesses, deliveries, aborts, leases: right tokens, whole pool at the end."""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from baton.block_names import root_name
from baton.errors import InvalidRequestError
from engine.requests import Elsewhere, EngineRequest, Handover, Standing
from engine.scheduler import EngineFull
from tests.engine.stand_in import LONG_PROMPT, PAGE, World, make_request, undisturbed

MAX_MODEL_TOKENS = 44
SHARED_TEXT = [token % 7 for token in range(MAX_MODEL_TOKENS)]
ROOTS = [root_name("stand-in", cache_salt=salt) for salt in ("", "other tenant")]

prompts = st.one_of(
    st.sampled_from([SHARED_TEXT[: PAGE * blocks] for blocks in (1, 2, 3, 5)] + [[0] * 9, [0] * 12]),
    st.builds(
        lambda num_shared, own: SHARED_TEXT[:num_shared] + own,
        st.one_of(st.integers(0, LONG_PROMPT - 4), st.integers(0, MAX_MODEL_TOKENS - 3)),
        st.lists(st.integers(0, 1), min_size=1, max_size=3),
    ),
)

patterns = st.one_of(st.just([]), st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=3))
"""Guesses, right or wrong, of one request after the other."""


standings = st.one_of(
    st.just(Standing()),
    st.builds(
        Standing,
        tenant=st.sampled_from("ab"),
        weight=st.sampled_from([0.5, 1.0, 3.0]),
        priority=st.sampled_from([-1, 0, 2]),
        kv_share=st.sampled_from([0.0, 0.3, 0.6]),
    ),
)


class EngineMachine(RuleBasedStateMachine):
    """Every request that nobody aborts must reach its end, and everything that the stand-in checks holds on the way."""

    look_ahead = False

    @initialize(
        num_blocks=st.sampled_from([6, 9, 12, 20]),
        max_running=st.sampled_from([1, 3, 5]),
        max_batch_tokens=st.sampled_from([5, 13]),
        keeps=st.sampled_from([0.0, 0.7, 1.0]),
        save_at_eviction=st.booleans(),
        early=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_running: int,
        max_batch_tokens: int,
        keeps: float,
        save_at_eviction: bool,
        early: bool,
    ) -> None:
        self.num_added = 0
        self.world = World(
            num_blocks=num_blocks,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            max_model_tokens=MAX_MODEL_TOKENS,
            max_waiting=8,
            look_ahead=self.look_ahead,
            keeps=keeps,
            save_at_eviction=save_at_eviction,
            early=early,
        )

    def any_id(self, data: st.DataObject) -> str:
        """Of a request that waits, runs or has ended, or that never was."""
        return data.draw(st.sampled_from([f"r{number}" for number in range(self.num_added + 1)]))

    def can_be_served(self, request: EngineRequest) -> bool:
        positions = len(request.token_ids)
        if request.handover is not Handover.GIVE:
            positions = min(request.num_prompt_tokens + request.sampling.max_tokens, MAX_MODEL_TOKENS) - 1
        fits = -(-positions // PAGE) <= self.world.allocator.num_blocks
        return fits and len(request.token_ids) < MAX_MODEL_TOKENS

    def add(
        self, prompt, handover, max_tokens, min_tokens, stop, num_delivered, root, placed, elsewhere, standing
    ) -> None:
        request_id = f"r{self.num_added}"
        options = {"max_tokens": max_tokens, "min_tokens": min_tokens, "stop": stop, "cache_root": root}
        options["standing"] = standing
        whole = undisturbed(make_request(request_id, prompt, **options), MAX_MODEL_TOKENS)
        num_delivered = min(num_delivered, len(whole.outputs) - 1)
        request = make_request(request_id, prompt, handover, num_delivered=num_delivered, **options)
        if placed is not None and handover is Handover.GIVE and not self.look_ahead:
            request = self.world.placed(request, int(placed * ((len(request.token_ids) - 1) // PAGE)))
        request = replace(request, elsewhere=Elsewhere(elsewhere, 0.0, 0.0) if elsewhere else None)
        try:
            self.world.add(request)
        except EngineFull:
            assert self.world.engine.load().waiting >= 8, "preempted requests return to the line above its bound"
            return
        except InvalidRequestError:
            assert not self.can_be_served(request)
            return
        assert self.can_be_served(request)
        self.num_added += 1

    @rule(
        data=st.data(),
        handovers=st.lists(st.sampled_from(Handover), min_size=1, max_size=3),
        root=st.sampled_from([ROOTS[0], ROOTS[0], ROOTS[1]]),
    )
    def add_some(self, data: st.DataObject, handovers: list[Handover], root: bytes) -> None:
        for handover in handovers:
            self.add(
                data.draw(prompts, "prompt"),
                handover,
                data.draw(st.integers(1, 16), "max_tokens"),
                data.draw(st.integers(0, 4), "min_tokens"),
                data.draw(st.sampled_from([(), (3, 17, 21, 30)]), "stop"),
                data.draw(st.sampled_from([0, 0, 1, 5]), "num_delivered"),
                root,
                data.draw(st.sampled_from([None, 0.0, 0.5, 1.0]), "placed"),
                data.draw(st.sampled_from([0, 0, 7, 30]), "elsewhere"),
                data.draw(standings, "standing"),
            )

    @rule(count=st.integers(1, 8), pattern=patterns)
    def step(self, count: int, pattern: list[list[bool]]) -> None:
        self.world.drafter.pattern = pattern
        for _ in range(count):
            self.world.step()

    @rule(ends=st.booleans())
    def watch_cache(self, ends: bool) -> None:
        """Whoever is told of a moment and of all changes since knows what is cached; the world compares."""
        self.world.watch_cache()
        if ends:
            self.world.engine.unwatch_cache()
            self.world.told = None

    @precondition(lambda self: self.world.reserved)
    @rule(data=st.data(), with_first_token=st.booleans(), part=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    def receive(self, data: st.DataObject, with_first_token: bool, part: float) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.reserved)))
        num_tokens = round(part * len(self.world.runner.streams[request_id].request.token_ids))
        self.world.scribble(request_id)
        self.world.deliver(request_id, num_tokens)
        self.world.receive(request_id, num_tokens, with_first_token)
        self.world.check()

    @precondition(lambda self: self.world.from_peer - self.world.quarantined)
    @rule(data=st.data(), part=st.sampled_from([0.0, 0.5, 1.0]))
    def go_on_while_somebody_writes(self, data: st.DataObject, part: float) -> None:
        """A peer that computes into the blocks does not stop: what it called final is kept, the rest is its own."""
        world = self.world
        request_id = data.draw(st.sampled_from(sorted(world.from_peer - world.quarantined)))
        num_tokens = int(part * (len(world.runner.streams[request_id].request.token_ids) // PAGE)) * PAGE
        world.deliver(request_id, num_tokens)
        world.receive(request_id, num_tokens, with_first_token=False, fenced=True)
        world.scribble(request_id)
        world.check()

    @precondition(lambda self: self.world.fenced)
    @rule(data=st.data())
    def lower_fence(self, data: st.DataObject) -> None:
        self.world.lower_fence(data.draw(st.sampled_from(sorted(self.world.fenced))))
        self.world.check()

    @precondition(lambda self: self.world.reserved or self.world.fenced)
    @rule(data=st.data())
    def stray_write(self, data: st.DataObject) -> None:
        self.world.scribble(data.draw(st.sampled_from(sorted({*self.world.reserved, *self.world.fenced}))))
        self.world.check()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = self.any_id(data)
        self.world.abort(request_id)
        assert not self.world.engine.abort(request_id), "aborting twice is harmless"
        self.world.check()

    @precondition(lambda self: self.world.leases)
    @rule(data=st.data(), expired=st.booleans())
    def end_lease(self, data: st.DataObject, expired: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.leases)))
        (self.world.quarantine_lease if expired else self.world.release_lease)(request_id)
        self.world.check()

    @precondition(lambda self: self.world.runner.streams)
    @rule(data=st.data(), reader=st.sampled_from(["reader 0", "reader 1"]))
    def lease_what_is_cached(self, data: st.DataObject, reader: str) -> None:
        self.world.lease_prefix(reader, data.draw(st.sampled_from(sorted(self.world.runner.streams))))
        self.world.check()

    @precondition(lambda self: self.world.readers)
    @rule(data=st.data(), expired=st.booleans())
    def end_reader(self, data: st.DataObject, expired: bool) -> None:
        self.world.end_reader(data.draw(st.sampled_from(sorted(self.world.readers))), expired)
        self.world.check()

    @precondition(lambda self: self.world.quarantined)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        self.world.resolve(data.draw(st.sampled_from(sorted(self.world.quarantined))))
        self.world.check()

    @rule(data=st.data())
    def late_or_repeated_message(self, data: st.DataObject) -> None:
        """The world asserts what each call must answer."""
        request_id = self.any_id(data)
        world = self.world
        if request_id not in world.reserved or request_id in world.quarantined:
            assert not world.engine.receive(request_id, 0, data.draw(st.sampled_from([None, 0])))
        if request_id not in world.leases:
            world.release_lease(request_id)
            world.quarantine_lease(request_id)
        if request_id not in world.quarantined:
            world.resolve(request_id)
        world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_the_end()


class LookAheadMachine(EngineMachine):
    """The same with a step planned while the one before is in flight, and in effect as late as can be."""

    look_ahead = True


SETTINGS = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
EngineMachine.TestCase.settings = LookAheadMachine.TestCase.settings = SETTINGS
TestEngineMachine = EngineMachine.TestCase
TestLookAheadMachine = LookAheadMachine.TestCase
