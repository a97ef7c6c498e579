import random
from collections import Counter
from hashlib import blake2b

from kvtransfer.tiers.admission import Admission, FrequencySketch


def name(what: object) -> bytes:
    return blake2b(str(what).encode(), digest_size=16).digest()


def test_a_count_is_never_too_low_and_seldom_too_high():
    chance = random.Random(1)
    sketch, truth = FrequencySketch(1000), Counter()
    for _ in range(9_000):
        number = min(int(chance.paretovariate(0.5)), 5000)
        sketch.add(name(number))
        truth[number] += 1
    seen = {number: min(count, 15) for number, count in truth.items()}
    assert all(sketch.count(name(number)) >= count for number, count in seen.items())
    right = sum(sketch.count(name(number)) == count for number, count in seen.items())
    assert right > 0.98 * len(seen)
    assert sum(sketch.count(name(f"never {number}")) > 0 for number in range(1000)) < 150


def test_counts_are_halved_so_that_what_was_hot_long_ago_gives_way():
    sketch = FrequencySketch(100)
    for _ in range(15):
        sketch.add(name("old"))
    assert sketch.count(name("old")) == 15
    for number in range(1000 - 15):
        sketch.add(name(number))
    assert sketch.count(name("old")) == 7
    for number in range(4 * 1000):
        sketch.add(name(number + 10_000))
    assert sketch.count(name("old")) <= 1


def test_a_hot_block_is_not_given_up_for_one_that_is_new():
    filter_ = Admission(100)
    for _ in range(3):
        filter_.record(name("hot"))
    filter_.record(name("new"))
    assert not filter_.admits(name("new"), name("hot"))
    assert filter_.admits(name("hot"), name("new"))


def test_a_new_block_replaces_one_that_was_used_as_seldom():
    filter_ = Admission(100)
    for what in ("first", "second"):
        filter_.record(name(what))
    assert filter_.admits(name("second"), name("first"))
