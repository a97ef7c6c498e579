"""Attempts of a lost coordinator: they go on, wait a while, and are handed over whole, or aborted."""

import asyncio
from typing import Any, cast

import pytest

from baton.token_ids import pack, unpack
from baton.v1 import worker_link_pb2 as wire
from engine.requests import TokenLogprobs
from worker import orphans as module
from worker.orphans import Orphans
from worker.roles import Attempt, Link, RoleHandler

OLD, NEW = 11, 22


def attempt(name: str, role: "wire.Role.ValueType" = wire.ROLE_DECODE, given: int = 0) -> Attempt:
    id = wire.AttemptId(request_id=name, attempt=1)
    assignment = wire.Assignment(
        id=id, role=role, handle=7, token_ids=pack([1, 2, *range(100, 100 + given)]), num_prompt_tokens=2,
        ticket=b"ticket", prefill=wire.HandoverPeer(worker_id="p"),
    )  # fmt: skip
    made = Attempt(cast(Link, None), id, f"{name}/1", 7, assignment, cast(RoleHandler, None), coordinator=OLD)
    made.tokens = list(range(100, 100 + given))
    return made


class World:
    def __init__(self, keep_s: float = 5.0) -> None:
        self.sent: list[wire.WorkerMessage] = []
        self.aborted: list[str] = []
        self.counters = {"orphans": 0.0, "orphans_adopted": 0.0, "orphans_aborted": 0.0}
        self.orphans = Orphans(self._abort, self.counters, keep_s)

    def _abort(self, attempt: Attempt) -> None:
        """As the shell does it."""
        self.aborted.append(attempt.key)
        self.orphans.ended(attempt, wire.Ending(id=attempt.id, reason=wire.END_REASON_ABORTED))

    def adopt(self, attempt: Attempt, coordinator: int = NEW) -> list[wire.WorkerMessage]:
        self.orphans.linked(coordinator, self.sent.append)
        self.sent.clear()
        self.orphans.adopt(attempt.id, attempt.key, 99, coordinator)
        return self.sent


def test_an_orphan_is_reported_to_another_coordinator_and_handed_over_with_all_its_tokens() -> None:
    async def run() -> None:
        world, orphan = World(), attempt("a", given=2)
        world.orphans.lost(OLD, [orphan])
        for index in range(3):
            orphan.tokens.append(200 + index)
            orphan.logprobs.append(TokenLogprobs(-index, (5, 6), (-0.5, -1.5)))
        orphan.cached_tokens = 1
        world.orphans.linked(NEW, world.sent.append)
        (message,) = world.sent
        told = message.orphan
        assert (told.num_tokens, told.cached_tokens, told.assignment.ticket) == (5, 1, b"ticket")
        assert unpack(told.assignment.token_ids) == [1, 2, 100, 101]
        assert not told.assignment.HasField("prefill")
        assert told.without_logprobs == 2
        assert 4 < told.kept_s <= 5
        admission, tokens = world.adopt(orphan)
        assert admission.admission.accepted
        step = tokens.tokens
        assert list(step.handles) == [99] * 5
        assert list(step.indices) == [0, 1, 2, 3, 4]
        assert list(step.token_ids) == [100, 101, 200, 201, 202]
        assert [(entry.entry, entry.logprob) for entry in step.logprobs] == [(2, 0.0), (3, -1.0), (4, -2.0)]
        assert not orphan.orphaned
        assert (orphan.handle, orphan.coordinator) == (99, NEW)
        (refusal,) = world.adopt(orphan)  # nobody gets it twice
        assert not refusal.admission.accepted
        assert world.counters == {"orphans": 1, "orphans_adopted": 1, "orphans_aborted": 0}
        assert world.aborted == []

    asyncio.run(run())


def test_long_streams_are_handed_over_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(module, "REPLAY_TOKENS", 4)
        world, orphan = World(), attempt("a", given=3)
        orphan.tokens += range(200, 207)
        orphan.logprobs += [TokenLogprobs(-1.0 * index) for index in range(7)]
        world.orphans.lost(OLD, [orphan])
        pieces = [message.tokens for message in world.adopt(orphan)[1:]]
        assert [index for piece in pieces for index in piece.indices] == list(range(10))
        assert [token for piece in pieces for token in piece.token_ids] == orphan.tokens
        found = {piece.indices[each.entry]: each.logprob for piece in pieces for each in piece.logprobs}
        assert found == {index: -1.0 * (index - 3) for index in range(3, 10)}

    asyncio.run(run())


def test_what_nobody_asks_for_is_aborted_when_its_time_is_over() -> None:
    async def run() -> None:
        world = World(keep_s=0.02)
        world.orphans.lost(OLD, [attempt("a")])
        world.orphans.ended(attempt("b"), wire.Ending(reason=wire.END_REASON_STOP))
        await asyncio.sleep(0.05)
        assert world.aborted == ["a/1"]
        assert len(world.orphans) == 0
        assert world.counters["orphans_aborted"] == 1

    asyncio.run(run())


def test_a_coordinator_that_comes_back_has_given_up_on_its_attempts() -> None:
    async def run() -> None:
        world = World()
        world.orphans.lost(OLD, [attempt("a")])
        world.orphans.ended(attempt("b"), wire.Ending(reason=wire.END_REASON_STOP))
        world.orphans.linked(OLD, world.sent.append)
        assert world.sent == []
        assert world.aborted == ["a/1"]
        assert len(world.orphans) == 0

    asyncio.run(run())


def test_coordinators_that_are_there_already_are_told_at_once() -> None:
    async def run() -> None:
        world = World()
        world.orphans.linked(NEW, world.sent.append)
        waiting, other = attempt("a", given=2), attempt("b")
        other.coordinator = NEW
        world.orphans.ended(other, wire.Ending(id=other.id, reason=wire.END_REASON_STOP))
        world.orphans.lost(OLD, [waiting])
        (message,) = world.sent
        assert message.orphan.assignment.id == waiting.id
        assert message.orphan.without_logprobs == 2, "its first token comes from a prefill worker, with its logprob"

    asyncio.run(run())


def test_attempts_that_have_just_ended_are_reported_too_and_end_again_where_they_are_adopted() -> None:
    async def run() -> None:
        world = World()
        reasons = [wire.END_REASON_LENGTH, wire.END_REASON_ABORTED, wire.END_REASON_ERROR, wire.END_REASON_DEADLINE]
        for reason in reasons:  # aborted: perhaps because its coordinator saw a stop string
            one = attempt(wire.EndReason.Name(reason), given=1)
            world.orphans.ended(one, wire.Ending(id=one.id, reason=reason, num_tokens=1))
        world.orphans.linked(NEW, world.sent.append)
        assert [message.orphan.assignment.id.request_id for message in world.sent] == [
            "END_REASON_LENGTH", "END_REASON_ABORTED",
        ]  # fmt: skip
        for coordinator in (NEW, 33):  # whoever adopted it may die as well
            messages = world.adopt(attempt("END_REASON_LENGTH"), coordinator)
            kinds = [message.WhichOneof("message") for message in messages]
            assert kinds == ["admission", "tokens", "ending"]

    asyncio.run(run())


def test_an_orphan_that_ends_while_it_waits_is_still_handed_over() -> None:
    async def run() -> None:
        world, orphan = World(), attempt("a", given=2)
        world.orphans.lost(OLD, [orphan])
        world.orphans.ended(orphan, wire.Ending(id=orphan.id, reason=wire.END_REASON_STOP, num_tokens=2))
        kinds = [message.WhichOneof("message") for message in world.adopt(orphan)]
        assert kinds == ["admission", "tokens", "ending"]

    asyncio.run(run())


def test_prefills_go_on_by_themselves_and_nothing_is_kept_where_that_is_off() -> None:
    async def run() -> None:
        world, prefill = World(), attempt("a", wire.ROLE_PREFILL)
        world.orphans.lost(OLD, [prefill])
        world.orphans.ended(prefill, wire.Ending(reason=wire.END_REASON_HANDED_OVER))
        assert prefill.orphaned
        assert len(world.orphans) == 0
        off: Any = World(keep_s=0)
        off.orphans.lost(OLD, [attempt("b")])
        off.orphans.ended(attempt("c"), wire.Ending(reason=wire.END_REASON_STOP))
        assert off.aborted == ["b/1"]
        assert world.aborted == []

    asyncio.run(run())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(module, "MAX_KEPT", 3)
        world = World()
        for number in range(5):
            world.orphans.lost(OLD, [attempt(str(number))])
        assert world.aborted == ["0/1", "1/1"]
        assert len(world.orphans) == 3

    asyncio.run(run())


class Wire:
    """A link to a coordinator."""

    def __init__(self, coordinator: int) -> None:
        self.coordinator = coordinator
        self.sent: list[wire.WorkerMessage] = []

    def send(self, message: wire.WorkerMessage) -> None:
        self.sent.append(message)


def test_a_claim_takes_a_request_from_a_coordinator_that_only_hangs() -> None:
    async def run() -> None:
        world, old, new = World(), Wire(OLD), Wire(NEW)
        for each in (old, new):
            world.orphans.linked(each.coordinator, each.send)
        mine, prefill, other = attempt("id-0"), attempt("id-1", wire.ROLE_PREFILL), attempt("idle-0")
        for each in (mine, prefill, other):
            each.link = old
        ended = attempt("id-2")
        ended.link = old
        world.orphans.ended(ended, wire.Ending(id=ended.id, reason=wire.END_REASON_STOP))
        world.orphans.claim("id", new, [mine, prefill, other])
        (told,) = old.sent
        assert (told.ending.id.request_id, told.ending.reason) == ("id-0", wire.END_REASON_TAKEN)
        assert [each.orphan.assignment.id.request_id for each in new.sent] == ["id-2", "id-0"]
        assert (mine.orphaned, prefill.orphaned, other.orphaned) == (True, False, False)
        world.orphans.linked(OLD, old.send)  # it goes on: what was claimed is not its own any more
        assert world.aborted == []
        world.orphans.adopt(mine.id, mine.key, 5, NEW)
        assert new.sent[-1].admission.accepted
        world.orphans.claim("id", old, [mine])  # the client is back there
        assert new.sent[-1].ending.reason == wire.END_REASON_TAKEN
        assert old.sent[-1].orphan.assignment.id.request_id == "id-0"
        world.orphans.claim("id", old, [mine])  # idempotent
        assert new.sent[-1].ending.reason == wire.END_REASON_TAKEN

    asyncio.run(run())


def test_a_claim_for_another_tenant_takes_nothing() -> None:
    async def run() -> None:
        world, old, new = World(), Wire(OLD), Wire(NEW)
        for each in (old, new):
            world.orphans.linked(each.coordinator, each.send)
        goes_on, ended = attempt("id-0"), attempt("id-1")
        for each in (goes_on, ended):
            each.link, each.assignment.tenant = old, "of-acme"
        world.orphans.ended(ended, wire.Ending(id=ended.id, reason=wire.END_REASON_STOP))
        for tenant in ("", "of-another"):
            world.orphans.claim("id", new, [goes_on, ended], tenant)
        assert (old.sent, new.sent, goes_on.orphaned) == ([], [], False)
        world.orphans.claim("id", new, [goes_on, ended], "of-acme")
        assert len(new.sent) == 2

    asyncio.run(run())
