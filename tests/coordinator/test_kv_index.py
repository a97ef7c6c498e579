"""The index knows exactly what the messages that arrived say, in any order of changes, gaps, snapshots and losses."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.block_names import block_name, root_name
from baton.errors import PeerError
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from coordinator.block_keys import KEY_BYTES, RUN, BlockKeys, KeyMemo
from coordinator.kv_index import ASK_AGAIN_S, TIDY_KEYS, TIERS, KvIndex, WorkerCaches

POOL, HOST, DISK = TIERS
NUM_ROWS, NUM_KEYS = 12, 12


def packed(keys: Sequence[int]) -> bytes:
    return b"".join(key.to_bytes(KEY_BYTES, "little") for key in keys)


def message(
    sequence: int, stored: Sequence[int] = (), removed: Sequence[int] = (), tier: int = POOL, snapshot: bool = False
) -> wire.KvEvents:
    change = wire.KvChange(tier=tier, stored=packed(stored), removed=packed(removed))  # type: ignore[arg-type]
    return wire.KvEvents(sequence=sequence, snapshot=snapshot, changes=[change])


def flat(keys: BlockKeys) -> list[int]:
    return [key for part in keys for key in part]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Naive:
    """Sets of keys by worker and tier, and a loop."""

    def __init__(self) -> None:
        self.held: dict[int, dict[int, set[int]]] = {}

    def apply(self, row: int, message: wire.KvEvents) -> None:
        if message.snapshot:
            self.held[row] = {tier: set() for tier in TIERS}
        for change in message.changes:
            for octets, put in ((change.removed, False), (change.stored, True)):
                for at in range(0, len(octets), KEY_BYTES):
                    key = int.from_bytes(octets[at : at + KEY_BYTES], "little")
                    its = self.held[row][change.tier]
                    its.add(key) if put else its.discard(key)

    def match(self, keys: Sequence[int]) -> list[list[int]]:
        depths = [[0] * NUM_ROWS for _ in TIERS]
        for row, tiers in self.held.items():
            for level in range(len(TIERS)):
                here = set().union(*(tiers[tier] for tier in TIERS[: level + 1]))
                depths[level][row] = next((at for at, key in enumerate(keys) if key not in here), len(keys))
        return depths


KEYS = st.lists(st.integers(0, NUM_KEYS - 1), max_size=8)


class Play:
    def __init__(self, draw: st.DataObject) -> None:
        self.draw = draw.draw
        self.index, self.naive = KvIndex(10_000, Clock()), Naive()
        self.caches: dict[int, WorkerCaches] = {}
        self.sent: dict[int, int] = {}

    def step(self) -> None:
        row = self.draw(st.integers(0, NUM_ROWS - 1))
        action = self.draw(st.sampled_from(["tell"] * 8 + ["snapshot", "lose a message", "lose the worker"]))
        if row not in self.caches:
            self.caches[row], self.sent[row] = self.index.open(row), 0
            self.naive.held[row] = {tier: set() for tier in TIERS}
            action = "snapshot"
        if action == "lose the worker":
            self.index.close(self.caches.pop(row))
            del self.naive.held[row]
            return
        self.sent[row] += 1
        if action == "lose a message":
            return
        tier = self.draw(st.sampled_from(TIERS))
        said = message(self.sent[row], self.draw(KEYS), self.draw(KEYS), tier, action == "snapshot")
        follows = self.caches[row].sequence + 1 == self.sent[row]
        before = self.index.gaps
        self.index.apply(self.caches[row], said)
        assert self.index.gaps - before == (not follows and not said.snapshot)
        self.naive.apply(row, said)

    def check(self) -> None:
        prompt = self.draw(st.lists(st.integers(0, NUM_KEYS - 1), max_size=10, unique=True))
        cut = self.draw(st.integers(0, len(prompt)))
        parts = [part for part in (prompt[:cut], prompt[cut:]) if part]
        assert np.broadcast_to(self.index.match(parts, NUM_ROWS), (3, NUM_ROWS)).tolist() == self.naive.match(prompt)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_index_equals_a_naive_model_under_any_order_of_events_gaps_snapshots_and_losses(
    draw: st.DataObject,
) -> None:
    play = Play(draw)
    for _ in range(draw.draw(st.integers(0, 60))):
        play.step()
        play.check()
    for caches in play.caches.values():
        play.index.close(caches)
    while play.index.num_entries:
        play.index.tidy()
    assert len(play.index) == 0


def test_keys_of_a_prompt_are_computed_only_as_far_as_somebody_can_match() -> None:
    root, tokens = root_name("model"), list(range(70))
    names = [block_name(root, tokens[:16])]
    names.append(block_name(names[0], tokens[16:32]))
    expected = [int.from_bytes(name[:KEY_BYTES], "little") for name in names]
    keys = BlockKeys(root, 16, pack(tokens))
    index = KvIndex(100)
    caches = index.open(0)
    index.apply(caches, message(1, expected[:1], snapshot=True))
    assert index.match(keys, 1)[0, 0] == 1
    assert keys.num_computed == 2, "the second told that nobody is left"
    assert len(flat(keys)) == 4, "the last block is not full"
    assert flat(keys)[:2] == expected
    other_tenant = BlockKeys(root_name("model", cache_salt="tenant"), 16, pack(tokens))
    assert not set(flat(other_tenant)) & set(flat(keys))


def test_what_prompts_have_in_common_is_hashed_once_and_has_the_same_keys() -> None:
    root, tokens, memo = root_name("model"), list(range(1000)), KeyMemo()
    expected = flat(BlockKeys(root, 4, pack(tokens)))
    assert len(expected) == 250
    for prompt in (tokens, tokens[:700], [*tokens[:500], 7, *tokens[501:]]):
        keys = BlockKeys(root, 4, pack(prompt), memo)
        assert flat(keys) == flat(BlockKeys(root, 4, pack(prompt))) == flat(keys)
    assert flat(BlockKeys(root, 4, pack(tokens[:998]), memo)) == expected[:249]
    again = BlockKeys(root, 4, pack(tokens), memo)
    assert next(iter(again)) == expected[:RUN]
    assert again.num_computed == RUN, "a whole run comes out of the memory"
    cut = [*tokens[:68], 7, 8, *tokens[70:]]
    begun, fresh = BlockKeys(root, 4, pack(cut), memo), flat(BlockKeys(root, 4, pack(cut)))
    for _, part in zip(range(3), begun, strict=False):
        assert len(part) in (1, RUN)
    assert begun.num_computed == RUN + 2
    again = BlockKeys(root, 4, pack(cut), memo)
    parts = iter(again)
    assert [next(parts), next(parts)] == [fresh[:RUN], fresh[RUN : RUN + 2]], "as far as somebody has read"
    assert flat(again) == fresh
    other = BlockKeys(root_name("model", cache_salt="tenant"), 4, pack(tokens), memo)
    assert next(iter(other)) != expected[:1]
    assert other.num_computed == 1


def test_a_gap_is_asked_for_once_and_what_was_known_stays_until_the_snapshot() -> None:
    clock = Clock()
    index = KvIndex(100, clock)
    caches = index.open(0)
    assert not index.apply(caches, message(1, [1, 2, 3], snapshot=True))
    assert index.apply(caches, message(3, [4])), "2 was missing"
    assert not index.apply(caches, message(5, [5])), "4 too, but it has been asked already"
    assert not index.beat(caches, 5)
    assert index.match([[1, 2, 3, 4, 5]], 1)[0, 0] == 5
    clock.now_s += ASK_AGAIN_S + 0.1
    assert index.beat(caches, 5), "a snapshot that does not come is asked for again"
    assert not index.beat(caches, 5)
    assert not index.apply(caches, message(6, [1], snapshot=True))
    assert not index.apply(caches, message(7, [2]))
    assert index.match([[1, 2, 3]], 1)[0, 0] == 2
    assert (index.gaps, index.snapshots) == (2, 2)


def test_a_worker_that_begins_without_a_snapshot_is_asked_for_one() -> None:
    index = KvIndex(100)
    caches = index.open(0)
    assert index.apply(caches, message(1, [1]))
    assert not caches.told


def test_messages_that_were_announced_and_do_not_come_are_a_reason_to_ask() -> None:
    clock = Clock()
    index = KvIndex(100, clock)
    caches = index.open(0)
    index.apply(caches, message(1, [1], snapshot=True))
    assert not index.beat(caches, 4), "they may be on their way"
    assert caches.lag == 3
    clock.now_s += 0.5
    assert caches.lag_s(clock.now_s) == 0.5
    assert index.beat(caches, 4)
    assert not index.beat(caches, 4)
    index.apply(caches, message(5, snapshot=True))
    assert (caches.lag, caches.lag_s(clock.now_s)) == (0, 0.0)


def test_memory_is_bounded_and_what_is_refused_is_counted() -> None:
    index = KvIndex(10)
    caches = index.open(0)
    index.apply(caches, message(1, range(14), snapshot=True))
    assert (index.num_entries, index.refused) == (10, 4)
    assert index.match([range(14)], 1)[0, 0] == 10
    index.apply(caches, message(2, [20], removed=[0]))
    assert index.match([[20]], 1)[0, 0] == 1, "what is removed makes room"
    index.apply(caches, message(3, range(10), snapshot=True))
    assert (index.num_entries, index.refused) == (10, 4), "what is void makes room at once where it is needed"


def test_a_lost_worker_is_forgotten_at_once_and_its_memory_bit_by_bit() -> None:
    index = KvIndex(10 * TIDY_KEYS)
    lost, other = index.open(0), index.open(1)
    keys = range(3 * TIDY_KEYS)
    index.apply(lost, message(1, keys, snapshot=True))
    index.apply(other, message(1, [0, 1], snapshot=True))
    index.close(lost)
    again = index.open(0)
    assert index.match([keys], 2)[0].tolist() == [0, 2]
    turns = 0
    while index.num_entries > 2:
        before = index.num_entries
        index.beat(again, 0)
        turns += 1
        assert before - index.num_entries <= TIDY_KEYS
    assert turns > 2
    assert len(index) == 2


def test_many_holders_are_told_apart_by_depth() -> None:
    index = KvIndex(10_000)
    for row in range(100):
        index.apply(index.open(row), message(1, range(row), snapshot=True))
    np.testing.assert_array_equal(index.match([range(100)], 100)[0], np.arange(100))


def test_names_that_are_none_are_refused_and_a_tier_of_newer_workers_is_left_alone() -> None:
    index = KvIndex(100)
    caches = index.open(0)
    with pytest.raises(PeerError, match="7 bytes"):
        index.apply(caches, wire.KvEvents(sequence=1, changes=[wire.KvChange(tier=POOL, stored=b"1234567")]))
    index.apply(caches, message(1, [1], tier=99, snapshot=True))
    assert len(index) == 0
