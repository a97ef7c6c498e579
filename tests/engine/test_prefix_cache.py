"""Equal prompts share their leading blocks, and only they do."""

from hypothesis import given, settings
from hypothesis import strategies as st

import engine.prefix_cache
from baton.block_names import block_name, root_name
from engine.blocks import BlockAllocator, Owner, OwnerKind
from engine.prefix_cache import NameChain, PrefixCache

PAGE = 4
ROOT = root_name("model")
OWNER = Owner(OwnerKind.REQUEST, "owner")
UNBOUNDED = 1 << 40


def cached(allocator: BlockAllocator, cache: PrefixCache, token_ids: list[int], root: bytes = ROOT) -> list[int]:
    names = NameChain(root, PAGE, UNBOUNDED).extend(token_ids)
    blocks = allocator.allocate(OWNER, len(names)) or []
    for name, block in zip(names, blocks, strict=True):
        cache.insert(name, block)
    allocator.release_all(OWNER)
    return blocks


def test_only_full_blocks_before_the_first_difference_are_found() -> None:
    allocator = BlockAllocator(8)
    cache = PrefixCache(allocator)
    blocks = cached(allocator, cache, list(range(12)))
    for token_ids, num_hits in (
        (list(range(12)), 3),
        (list(range(11)), 2),
        (list(range(40)), 3),
        ([0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11], 1),
        ([99, *range(1, 12)], 0),
        ([], 0),
    ):
        assert cache.lookup(NameChain(ROOT, PAGE, UNBOUNDED).extend(token_ids)) == blocks[:num_hits]


def test_another_tenant_finds_nothing() -> None:
    allocator = BlockAllocator(8)
    cache = PrefixCache(allocator)
    cached(allocator, cache, list(range(8)))
    other = NameChain(root_name("model", cache_salt="other"), PAGE, UNBOUNDED)
    assert cache.lookup(other.extend(list(range(8)))) == []


def test_equal_tokens_at_another_place_have_another_name() -> None:
    names = NameChain(ROOT, PAGE, UNBOUNDED).extend([7] * 5 * PAGE)
    assert len(set(names)) == 5


def test_tokens_beyond_the_shareable_bound_have_no_names() -> None:
    assert len(NameChain(ROOT, PAGE, 11).extend(list(range(40)))) == 2
    assert NameChain(ROOT, PAGE, 0).extend(list(range(40))) == []
    assert NameChain(ROOT, PAGE, -1).extend(list(range(40))) == []


def test_the_first_block_of_a_name_keeps_it() -> None:
    allocator = BlockAllocator(2)
    cache = PrefixCache(allocator)
    first, second = allocator.allocate(OWNER, 2) or []
    assert cache.insert(b"name", first)
    assert not cache.insert(b"name", second)
    assert cache.lookup([b"name"]) == [first]
    allocator.release_all(OWNER)
    assert (allocator.counts().cached, allocator.counts().free) == (1, 1)
    cache.check()


def test_a_prompt_that_loses_a_middle_block_is_found_up_to_there() -> None:
    allocator = BlockAllocator(3)
    cache = PrefixCache(allocator)
    names = NameChain(ROOT, PAGE, UNBOUNDED).extend(list(range(12)))
    blocks = cached(allocator, cache, list(range(12)))
    allocator.share(OWNER, [blocks[0], blocks[2]])
    allocator.allocate(Owner(OwnerKind.REQUEST, "other"), 1)
    assert cache.lookup(names) == blocks[:1]
    cache.check()


def test_each_block_is_named_once_however_often_the_sequence_grows(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        engine.prefix_cache, "block_name", lambda parent, ids: calls.append(ids) or block_name(parent, ids)
    )
    chain, token_ids = NameChain(ROOT, PAGE, UNBOUNDED), []
    for token in range(4 * PAGE + 1):
        token_ids.append(token)
        chain.extend(token_ids)
    assert calls == [list(range(start, start + PAGE)) for start in range(0, 4 * PAGE, PAGE)]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=30), st.integers(0, 40), st.integers(0, 30))
def test_names_do_not_depend_on_how_the_sequence_grew(token_ids: list[int], bound: int, cut: int) -> None:
    grown = NameChain(ROOT, PAGE, bound)
    grown.extend(token_ids[:cut])
    assert grown.extend(token_ids) == NameChain(ROOT, PAGE, bound).extend(token_ids)


def test_blocks_at_risk_are_said_once_until_they_are_used_again() -> None:
    allocator = BlockAllocator(8)
    cache = PrefixCache(allocator)
    old, young = cached(allocator, cache, list(range(12))), cached(allocator, cache, list(range(50, 62)))

    def said(count: int) -> list[int]:
        return [each.block for each in cache.newly_at_risk(count)]

    assert said(2) == [], "two are free"
    assert said(4) == old[1:], "the end of a prompt goes first and is named last"
    assert said(4) == []
    assert said(6) == [young[2], old[0]]
    allocator.share(OWNER, old)
    assert said(4) == young[1:2]
    allocator.release_all(OWNER)
    assert said(8) == [*old, young[0]]
    assert allocator.allocate(OWNER, 3)
    assert cache.num_evicted_unsaid == 0
    assert said(1) == []
    cached(allocator, cache, list(range(100, 108)))
    assert cache.num_evicted_unsaid == 0, "they were said, and not used since"
