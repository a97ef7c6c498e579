"""Every policy against a plain model of it that searches where the policy keeps order, and the rules of Retention."""

import math
import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.errors import ConfigurationError
from baton.name_changes import Held
from kvtransfer.tiers.retention import POLICIES, Lfu, Lru, Retention, S3Fifo
from kvtransfer.tiers.tenants import NOBODY
from tests.told import Told


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def row(first: int, count: int) -> list[bytes]:
    return [name(first + index) for index in range(count)]


class PlainLru:
    def __init__(self):
        self.used: list[bytes] = []

    def insert(self, entry):
        self.used.append(entry)

    def touch(self, entry):
        self.used.remove(entry)
        self.used.append(entry)

    def remove(self, entry):
        self.used.remove(entry)

    evict = remove

    def victim(self, spared):
        return next((entry for entry in self.used if entry not in spared), None)


class PlainLfu:
    """Searches all entries for the lowest (rank, time of last use)."""

    def __init__(self):
        self.age = self.now = 0
        self.of: dict[bytes, list[int]] = {}  # uses, rank, time

    def use(self, entry):
        self.now += 1
        uses = self.of.get(entry, [0])[0] + 1
        self.of[entry] = [uses, self.age + uses, self.now]

    insert = touch = use

    def remove(self, entry):
        del self.of[entry]

    evict = remove

    def victim(self, spared):
        if not self.of:
            return None
        self.age = min(rank for _, rank, _ in self.of.values())
        free = [(rank, at, entry) for entry, (_, rank, at) in self.of.items() if entry not in spared]
        return min(free)[2] if free else None


class PlainS3Fifo:
    """Lists of [name, uses] in place of ordered dictionaries, as the paper draws them."""

    def __init__(self):
        self.small, self.main, self.ghost = [], [], []

    def insert(self, entry):
        if entry in self.ghost:
            self.ghost.remove(entry)
            self.main.append([entry, 0])
        else:
            self.small.append([entry, 0])

    def touch(self, entry):
        for pair in self.small + self.main:
            if pair[0] == entry:
                pair[1] = min(pair[1] + 1, 3)

    def remove(self, entry):
        self.small = [pair for pair in self.small if pair[0] != entry]
        self.main = [pair for pair in self.main if pair[0] != entry]

    def evict(self, entry):
        if any(pair[0] == entry for pair in self.small):
            self.ghost.append(entry)
            keep = 2 * (len(self.small) + len(self.main))
            self.ghost = self.ghost[-keep:] if keep else []
        self.remove(entry)

    def victim(self, spared):
        if all(pair[0] in spared for pair in self.small + self.main):
            for pair in self.small[:]:  # all of them turn until nothing of them is left to wear off
                self.small.remove(pair)
            return None
        while True:
            if len(self.small) > 0.3 * (len(self.small) + len(self.main)) or not self.main:
                pair = self.small[0]
                if pair[1] == 0 and pair[0] not in spared:
                    return pair[0]
                self.main.append([self.small.pop(0)[0], 0])
            else:
                pair = self.main[0]
                if pair[1] == 0 and pair[0] not in spared:
                    return pair[0]
                entry, uses = self.main.pop(0)
                self.main.append([entry, max(uses - 1, 0)])


@pytest.mark.parametrize(("policy", "plain"), [(Lru, PlainLru), (Lfu, PlainLfu), (S3Fifo, PlainS3Fifo)])
@pytest.mark.parametrize("seed", range(8))
def test_a_policy_chooses_what_a_plain_search_would_choose(policy, plain, seed):
    chance = random.Random(seed)
    fast, slow, held = policy(), plain(), []
    for _ in range(3000):
        spared = set(chance.sample(held, len(held) // 4))
        step = chance.random()
        if step < 0.4 or not held:
            new = name(chance.randrange(60))
            if new in held:
                fast.touch(new), slow.touch(new)
            else:
                if len(held) >= 20:
                    victim = fast.victim(spared)
                    assert victim == slow.victim(spared)
                    fast.evict(victim), slow.evict(victim)
                    held.remove(victim)
                fast.insert(new), slow.insert(new)
                held.append(new)
        elif step < 0.95:
            used = held[min(int(chance.expovariate(0.2)), len(held) - 1)]
            fast.touch(used), slow.touch(used)
        else:
            gone = held.pop(chance.randrange(len(held)))
            fast.remove(gone), slow.remove(gone)
        assert len(fast) == len(held)
    assert len(held) > 5


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_policy_has_no_victim_when_everything_is_spared_and_one_again_afterwards(policy):
    order, names = policy(), row(0, 50)
    assert order.victim(()) is None
    for entry in names:
        order.insert(entry)
        order.touch(entry)
    assert order.victim(set(names)) is None
    assert order.victim(set(names[1:])) == names[0]
    left = set(names)
    while left:
        victim = order.victim(())
        order.evict(victim)
        left.remove(victim)
    assert len(order) == 0


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_victim_takes_as_long_among_many_entries_as_among_few(policy):
    def seconds(count):
        order = policy()
        for entry in row(0, count):
            order.insert(entry)
        start = time.thread_time()
        for number in range(2000):
            victim = order.victim(())
            order.evict(victim)
            order.insert(name(count + number))
            order.touch(name(count + number))
        return time.thread_time() - start

    few, many = (min(seconds(count) for _ in range(3)) for count in (500, 50_000))
    assert many < 20 * few, f"{many:.4f} s against {few:.4f} s"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_loses_its_tail_before_its_head(policy):
    kept = Retention(100, policy)
    chain = row(0, 8)
    kept.insert(chain, 0)
    kept.touch(chain, 1)
    order = []
    while (victim := kept.victim()) is not None:
        kept.evict(victim)
        order.append(victim)
    assert order == chain[::-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_that_grew_in_pieces_loses_its_tail_first_once_it_is_touched(policy):
    kept = Retention(100, policy)
    chain = row(0, 9)
    for start in (0, 3, 6):
        kept.insert(chain[start : start + 3], start)
    kept.touch(chain, 9)
    for deepest in (8, 7, 6):
        victim = kept.victim()
        assert victim == chain[deepest] or policy == "s3fifo"  # a FIFO keeps the order of arrival between the pieces
        kept.evict(victim)


def test_one_pass_of_entries_used_once_leaves_what_is_used_again_alone():
    for policy, survives in (("s3fifo", True), ("lru", False)):
        kept = Retention(100, policy)
        kept.insert(row(0, 20), 0)
        kept.touch(row(0, 20), 1)
        for number in range(1000, 1500):
            if len(kept) >= kept.capacity:
                kept.evict(kept.victim())
            kept.insert([name(number)], 2)
        assert all(entry in kept for entry in row(0, 20)) == survives


def test_unused_entries_are_due_after_their_time_and_used_ones_are_not():
    kept = Retention(10, ttl_s=60)
    kept.insert(row(0, 4), 0)
    kept.touch(row(0, 2), 50)
    assert kept.expired(59) == []
    assert set(kept.expired(61)) == set(row(2, 2))
    assert kept.expired(61, spared={name(2)}) == [name(3)]
    for entry in row(2, 2):
        kept.remove(entry)
    assert set(kept.expired(110)) == set(row(0, 2))
    assert Retention(10).expired(math.inf) == []


def test_a_pinned_prefix_stays_until_it_is_unpinned_or_its_time_is_over():
    for ending in ("unpinned", "over"):
        kept = Retention(8, pinned_share=0.5, ttl_s=1000)
        kept.insert(row(0, 4), 0)
        assert kept.pin_prefix("system", row(0, 4), until=100, now=0)
        for number in range(10, 30):
            if len(kept) >= 8:
                kept.evict(kept.victim())
            kept.insert([name(number)], number)
            kept.touch(row(0, 4), number)
        assert all(entry in kept for entry in row(0, 4))
        if ending == "unpinned":
            kept.unpin_prefix("system", 30)
        else:
            assert kept.expired(99) == []
            assert kept.expired(100) == []
        gone = set()
        while (victim := kept.victim()) is not None:
            kept.evict(victim)
            gone.add(victim)
        assert gone >= set(row(0, 4))


def test_a_pinned_prefix_does_not_expire_for_lack_of_use():
    kept = Retention(8, ttl_s=10)
    kept.insert(row(0, 3), 0)
    kept.pin_prefix("system", row(0, 2), until=100, now=0)
    assert kept.expired(50) == [name(2)]
    kept.remove(name(2))
    assert kept.expired(100) == [], "a pin that ends counts as a use"
    assert set(kept.expired(110)) == set(row(0, 2))


def test_pinned_prefixes_that_share_their_head_keep_it_until_the_last_one_goes():
    kept = Retention(20, pinned_share=0.5)
    head, one, two = row(0, 2), row(2, 2), row(4, 2)
    kept.insert(head + one + two, 0)
    assert kept.pin_prefix("one", head + one, math.inf, 0)
    assert kept.pin_prefix("two", head + two, math.inf, 0)
    kept.unpin_prefix("one", 1)
    evicted = set()
    while (victim := kept.victim()) is not None:
        kept.evict(victim)
        evicted.add(victim)
    assert evicted == set(one)


def test_pins_beyond_their_share_are_refused_and_change_nothing():
    kept = Retention(20, pinned_share=0.25)
    kept.insert(row(0, 10), 0)
    assert kept.pin_prefix("fits", row(0, 4), math.inf, 0)
    assert not kept.pin_prefix("does not", row(4, 2), math.inf, 0)
    assert not kept.pin_prefix("fits", row(0, 6), math.inf, 0), "renewed beyond the share"
    evicted = set()
    while (victim := kept.victim()) is not None:
        kept.evict(victim)
        evicted.add(victim)
    assert evicted == set(row(4, 6))
    kept.unpin_prefix("fits", 1)
    kept.unpin_prefix("fits", 1)
    kept.unpin_prefix("unknown", 1)
    assert kept.victim() is not None


def test_a_prefix_can_be_pinned_before_it_comes():
    kept = Retention(4, pinned_share=0.5)
    assert kept.pin_prefix("system", row(0, 2), math.inf, 0)
    kept.insert(row(0, 2), 1)
    assert kept.victim() is None
    kept.remove(name(0))
    kept.unpin_prefix("system", 2)
    assert kept.victim() == name(1)
    assert len(kept) == 1


def fill(kept: Retention, tenant: bytes, names: list[bytes]) -> list[bytes]:
    """Insert one by one; what had to go."""
    gone = []
    for entry in names:
        if len(kept) >= kept.capacity or kept.num_over(tenant, 1):
            victim = kept.victim(tenant)
            kept.evict(victim)
            gone.append(victim)
        kept.insert([entry], 0, tenant)
    return gone


def test_a_tenant_at_its_share_gives_up_its_own_entries_longest_unused_first():
    kept = Retention(10, "lru", tenant_share=0.4)
    assert fill(kept, b"a", row(0, 4)) == []
    kept.touch(row(0, 1), 1)
    assert fill(kept, b"a", row(100, 2)) == row(1, 2), "although there is room"
    assert fill(kept, b"b", row(200, 4)) == []
    assert fill(kept, NOBODY, row(300, 2)) == []
    assert fill(kept, NOBODY, row(310, 8)) == [*row(3, 1), *row(0, 1), *row(100, 2), *row(200, 4)], "not limited"
    assert kept.num_over(NOBODY, 100) == 0
    assert fill(kept, b"a", row(400, 2)) == row(300, 2)


def test_a_tenant_whose_entries_are_all_spared_or_pinned_brings_no_more():
    kept = Retention(10, tenant_share=0.2, pinned_share=0.5)
    kept.insert(row(0, 2), 0, b"a")
    kept.pin_prefix("one", row(0, 1), math.inf, 0)
    assert kept.victim(b"a") == name(1)
    assert kept.victim(b"a", spared={name(1)}) is None
    assert kept.victim(b"b") == name(1)


def test_tenants_are_not_counted_where_one_may_have_everything():
    kept = Retention(4)
    assert fill(kept, b"a", row(0, 4)) == []
    assert kept.num_over(b"a", 1) == 0
    assert kept.victim(b"a") == kept.victim(b"b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity": 0},
        {"policy": "clock"},
        {"ttl_s": 0},
        {"pinned_share": 1.5},
        {"tenant_share": 0},
        {"tenant_share": 1.1},
    ],
)
def test_unusable_settings_are_a_configuration_error(wrong):
    with pytest.raises(ConfigurationError):
        Retention(**{"capacity": 10, **wrong})


def test_more_entries_than_the_capacity_are_an_error():
    kept = Retention(2)
    kept.insert(row(0, 2), 0)
    kept.insert(row(0, 2), 1)
    with pytest.raises(ValueError, match="capacity"):
        kept.insert([name(9)], 1)


class RetentionMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order: counts are right, and pins, shares and times are kept."""

    @initialize(policy=st.sampled_from(list(POLICIES)))
    def start(self, policy):
        self.kept = Retention(8, policy, ttl_s=20, pinned_share=0.5, tenant_share=0.5)
        self.now = 0.0
        self.held: dict[bytes, tuple[bytes, float]] = {}
        self.pins: dict[str, tuple[list[bytes], float]] = {}
        self.told: Told | None = None

    @rule()
    def watch(self):
        self.kept.changes.watch()
        before = self.kept.changes.take()
        assert self.told is not None or before is None
        self.told = Told(Held(list(self.kept), before))

    @rule()
    def hear(self):
        if self.told is not None:
            self.told.hear(self.kept.changes.take())
            assert self.told.names == self.held.keys()

    def teardown(self):
        if hasattr(self, "kept"):
            self.hear()

    def pinned(self):
        return {entry for names, _ in self.pins.values() for entry in names}

    def count(self, tenant):
        return sum(of == tenant for of, _ in self.held.values())

    @rule(number=st.integers(0, 15), tenant=st.sampled_from([b"a", b"b", NOBODY]), busy=st.sets(st.integers(0, 15)))
    def insert(self, number, tenant, busy):
        entry = name(number)
        is_full = tenant != NOBODY and self.count(tenant) == 4
        assert self.kept.num_over(tenant, 1) == is_full
        if entry not in self.held and (is_full or len(self.held) == 8):
            spared = {name(other) for other in busy}
            victim = self.kept.victim(tenant, spared)
            open_to_it = [
                other
                for other, (of, _) in self.held.items()
                if other not in self.pinned() | spared and (of == tenant or not is_full)
            ]
            assert (victim in open_to_it) if open_to_it else (victim is None)
            if victim is None:
                return
            self.kept.evict(victim)
            del self.held[victim]
        self.kept.insert([entry], self.now, tenant)
        self.held[entry] = (self.held.get(entry, (tenant, 0))[0], self.now)

    @rule(numbers=st.lists(st.integers(0, 15), max_size=5))
    def touch(self, numbers):
        self.kept.touch([name(number) for number in numbers], self.now)
        for number in numbers:
            if name(number) in self.held:
                self.held[name(number)] = (self.held[name(number)][0], self.now)

    @rule(number=st.integers(0, 15))
    def remove(self, number):
        if name(number) in self.held:
            self.kept.remove(name(number))
            del self.held[name(number)]

    @rule(key=st.sampled_from("xyz"), numbers=st.lists(st.integers(0, 15), max_size=5), seconds=st.integers(1, 30))
    def pin(self, key, numbers, seconds):
        names = [name(number) for number in numbers]
        others = {entry for other, (held, _) in self.pins.items() if other != key for entry in held}
        assert self.kept.pin_prefix(key, names, self.now + seconds, self.now) == (len(others | set(names)) <= 4)
        if len(others | set(names)) <= 4:
            before = self.pinned()
            self.pins[key] = (names, self.now + seconds)
            self.freed(before)

    @rule(key=st.sampled_from("xyz"))
    def unpin(self, key):
        before = self.pinned()
        self.kept.unpin_prefix(key, self.now)
        self.pins.pop(key, None)
        self.freed(before)

    def freed(self, before):
        for entry in before - self.pinned():
            if entry in self.held:
                self.held[entry] = (self.held[entry][0], self.now)

    @rule(seconds=st.integers(1, 15))
    def pass_time(self, seconds):
        self.now += seconds
        before = self.pinned()
        self.pins = {key: pin for key, pin in self.pins.items() if pin[1] > self.now}
        self.freed(before)
        due = {e for e, (_, used) in self.held.items() if self.now - used >= 20 and e not in self.pinned()}
        assert set(self.kept.expired(self.now)) == due
        for entry in due:
            self.kept.remove(entry)
            del self.held[entry]

    @invariant()
    def agrees(self):
        assert len(self.kept) == len(self.held)
        assert all(entry in self.kept for entry in self.held)


RetentionMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_events_keeps_pins_shares_and_times = RetentionMachine.TestCase
