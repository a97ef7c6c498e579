import mmap
import random
import threading
import time
from hashlib import blake2b

import numpy as np
import pytest

from baton.errors import ConfigurationError
from kvtransfer.tiers.base import COUNTED, TierState
from kvtransfer.tiers.host import HostTier

BLOCK = 256


def name(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def row(first: int, count: int) -> list[bytes]:
    return [name(first + index) for index in range(count)]


def content(of: bytes, num_bytes: int = BLOCK) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(of, "little")).integers(0, 256, num_bytes, np.uint8)


def soon() -> float:
    return time.monotonic() + 60


def tier(num_slots: int, **options) -> HostTier:
    return HostTier(num_slots * BLOCK, BLOCK, **options)


def has(host: HostTier, entry: bytes) -> bool:
    into = np.zeros(host.block_bytes, np.uint8)
    found = host.get(entry, into, soon())
    assert not found or (into == content(entry, host.block_bytes)).all()
    return found


def counter(host: HostTier, what: str) -> float:
    return host.counters[f"kv_host_{what}"]


def test_what_was_put_comes_back_and_what_was_not_is_a_miss():
    host = tier(4)
    block = content(name(1))
    assert host.put(name(1), block)
    block[:] = 0
    assert has(host, name(1))
    assert not has(host, name(2))
    assert host.holds([name(1), name(2)]) == [True, False]
    assert (counter(host, "stored"), counter(host, "loaded"), counter(host, "misses")) == (1, 1, 1)
    assert counter(host, "bytes") == BLOCK
    assert {f"kv_host_{what}" for what in COUNTED} <= set(host.counters)
    assert host.status.state is TierState.ON


def test_it_never_holds_more_than_its_slots_and_counts_what_goes():
    host = tier(8, policy="lru")
    for entry in row(0, 30):
        assert host.put(entry, content(entry))
    assert host.holds(row(0, 30)) == [False] * 22 + [True] * 8
    assert all(has(host, entry) for entry in row(22, 8))
    assert counter(host, "evicted") == 22
    assert counter(host, "bytes") == 8 * BLOCK


def test_a_block_that_is_held_is_not_stored_again():
    host = tier(2)
    assert host.put(name(1), content(name(1)))
    assert host.put(name(1), content(name(1)))
    assert counter(host, "stored") == 1


def test_pinned_blocks_stay_and_nothing_else_fits_when_all_are_pinned():
    host = tier(3, policy="lru")
    for entry in row(0, 3):
        host.put(entry, content(entry))
    assert host.pin([*row(0, 3), name(9)]) == [True, True, True, False]
    assert host.pin([name(0)]) == [True]
    assert not host.put(name(9), content(name(9)))
    assert counter(host, "refused") == 1
    host.unpin([name(0), name(1)])
    assert host.put(name(9), content(name(9)))
    assert host.holds(row(0, 3)) == [True, False, True], "block 0 was pinned twice"
    with pytest.raises(KeyError):
        host.unpin([name(1)])


def test_a_row_that_is_pinned_counts_as_used_tail_first():
    host = tier(4, policy="lru")
    for entry in row(0, 4):
        host.put(entry, content(entry))
    host.pin(row(0, 4))
    for entry in row(0, 4):
        assert has(host, entry), "a get of a pinned block must not turn the order round"
    host.unpin(row(0, 4))
    host.put(name(9), content(name(9)))
    assert host.holds(row(0, 4)) == [True, True, True, False]


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_block_whose_bytes_changed_is_a_miss_and_goes(is_pinned):
    memory = mmap.mmap(-1, 4 * BLOCK)
    host = tier(4, buffer=memory)
    host.put(name(1), content(name(1)))
    if is_pinned:
        host.pin([name(1)])
    place = memory[:].index(content(name(1)).tobytes())
    memory[place + 7] ^= 1
    assert not has(host, name(1))
    assert counter(host, "checksum_failures") == 1
    assert host.holds([name(1)]) == [False]
    if is_pinned:
        assert not host.put(name(1), content(name(1))), "its slot may not get new content while it is pinned"
        assert not has(host, name(1))
        assert host.pin([name(1)]) == [False]
        host.unpin([name(1)])
    assert counter(host, "bytes") == 0
    assert host.put(name(1), content(name(1)))
    assert has(host, name(1))


def test_unused_blocks_go_when_their_time_is_over():
    now = [0.0]
    host = tier(4, ttl_s=60, clock=lambda: now[0])
    for entry in row(0, 2):
        host.put(entry, content(entry))
    now[0] = 40
    assert has(host, name(0))
    now[0] = 70
    assert host.holds(row(0, 2)) == [True, False]
    assert counter(host, "expired") == 1
    now[0] = 110
    assert not has(host, name(0))
    assert counter(host, "bytes") == 0


def test_a_pinned_prefix_outlives_a_flood_until_its_time_is_over():
    now = [0.0]
    host = tier(8, pinned_share=0.5, clock=lambda: now[0])
    assert host.pin_prefix("system", row(0, 3), ttl_s=100)
    assert not host.pin_prefix("too much", row(100, 2), ttl_s=100)
    for entry in row(0, 40):
        host.put(entry, content(entry))
    assert host.holds(row(0, 3)) == [True] * 3
    now[0] = 101
    for entry in row(200, 40):
        host.put(entry, content(entry))
    assert host.holds(row(0, 3)) == [False] * 3
    host.pin_prefix("system", row(239, 1), ttl_s=100)
    host.unpin_prefix("system")
    host.put(name(999), content(name(999)))


def test_a_tenant_has_its_share_and_others_blocks_stay():
    host = tier(8, tenant_share=0.25)
    for entry in row(0, 4):
        host.put(entry, content(entry))
    for entry in row(100, 50):
        assert host.put(entry, content(entry), b"loud")
    assert host.holds(row(0, 4)) == [True] * 4
    assert host.holds(row(100, 50)) == [False] * 48 + [True] * 2
    assert (counter(host, "over_share"), counter(host, "evicted")) == (48, 0)
    assert counter(host, "bytes") == 6 * BLOCK


def test_blocks_that_a_tenant_brings_at_the_same_moment_stay_within_its_share():
    host = tier(64, tenant_share=0.125)
    start = threading.Barrier(4)

    def put(first: int) -> None:
        start.wait()
        for entry in row(first, 100):
            host.put(entry, content(entry), b"loud")

    threads = [threading.Thread(target=put, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sum(host.holds(row(1000 * number, 100))) for number in range(4)) == 8


def test_the_filter_keeps_blocks_seen_once_from_pushing_out_hot_ones():
    for filtered in (True, False):
        host = tier(8, policy="lru", admission=filtered)
        for entry in row(0, 8):
            host.put(entry, content(entry))
        for entry in row(0, 8):
            has(host, entry)
        taken = [host.put(entry, content(entry)) for entry in row(100, 20)]
        assert host.holds(row(0, 8)) == [filtered] * 8
        assert taken == [not filtered] * 20
        assert counter(host, "not_admitted") == counter(host, "refused") == (20 if filtered else 0)


def test_a_get_after_its_deadline_is_a_miss():
    host = tier(2)
    host.put(name(1), content(name(1)))
    assert not host.get(name(1), np.zeros(BLOCK, np.uint8), time.monotonic() - 1)
    assert counter(host, "timeouts") == counter(host, "misses") == 1


def test_a_block_or_name_of_another_size_is_an_error():
    host = tier(2)
    for wrong in (lambda: host.put(b"short", content(name(1))), lambda: host.put(name(1), content(name(1), BLOCK + 1))):
        with pytest.raises(ValueError, match="bytes"):
            wrong()
    with pytest.raises(ValueError, match="bytes"):
        host.get(name(1), np.zeros(BLOCK - 1, np.uint8), soon())


def test_memory_of_the_caller_is_used_and_stays_the_callers():
    memory = mmap.mmap(-1, 3 * BLOCK + 5)
    host = HostTier(3 * BLOCK, BLOCK, buffer=memory)
    host.put(name(1), content(name(1)))
    assert content(name(1)).tobytes() in memory[:]
    host.close(soon())
    memory.close()


@pytest.mark.parametrize(
    ("capacity", "options"),
    [
        (BLOCK - 1, {}),
        (1 << 50, {}),
        (4 * BLOCK, {"buffer": memoryview(bytearray(3 * BLOCK))}),
        (4 * BLOCK, {"buffer": memoryview(bytes(4 * BLOCK))}),
        (4 * BLOCK, {"policy": "none"}),
    ],
)
def test_unusable_settings_are_a_configuration_error(capacity, options):
    with pytest.raises(ConfigurationError):
        HostTier(capacity, BLOCK, **options)


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo"])
def test_it_behaves_as_a_dictionary_that_forgets(policy):
    chance = random.Random(3)
    host, pins = tier(12, policy=policy), []
    for _ in range(3000):
        entry = name(chance.randrange(40))
        step = chance.random()
        if step < 0.4:
            assert host.put(entry, content(entry)) or len(set(pins)) == 12
        elif step < 0.8:
            assert host.holds([entry]) == [has(host, entry)]
        elif step < 0.9 or not pins:
            pins += [entry] if host.pin([entry])[0] else []
        else:
            host.unpin([pins.pop(chance.randrange(len(pins)))])
        assert all(host.holds(pins))
    assert counter(host, "stored") - counter(host, "evicted") == counter(host, "bytes") / BLOCK <= 12


def test_many_threads_at_once_never_see_a_wrong_byte():
    block_bytes, failures = 64 << 10, []
    host = HostTier(12 * block_bytes, block_bytes)
    contents = {entry: content(entry, block_bytes) for entry in row(0, 40)}
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        chance, into = random.Random(seed), np.zeros(block_bytes, np.uint8)
        start.wait(10)
        for _ in range(600):
            entry = name(chance.randrange(40))
            if chance.random() < 0.5:
                host.put(entry, contents[entry])
            elif host.get(entry, into, soon()) and not (into == contents[entry]).all():
                failures.append(entry)
            if chance.random() < 0.2 and host.pin([entry])[0]:
                if not host.get(entry, into, soon()):
                    failures.append(entry)
                host.unpin([entry])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert counter(host, "checksum_failures") == 0
    assert counter(host, "evicted") > 100, "slots were reused under the readers"
    held = sum(host.holds(row(0, 40)))
    assert held == 12 == counter(host, "bytes") / block_bytes
