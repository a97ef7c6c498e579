"""Requests whose KV goes to, or comes from, another worker's pool."""

import pytest

from baton.errors import InvalidRequestError
from engine.blocks import Owner, OwnerKind
from engine.requests import BlockCounts, EndReason, Handover
from tests.engine.stand_in import PAGE, World, make_request, undisturbed

GIVE, TAKE = Handover.GIVE, Handover.TAKE


def first_output(prompt: list[int]) -> int:
    return undisturbed(make_request("x", prompt), 64).outputs[0]


def reserved_world(prompt: list[int], max_tokens: int = 4, **options: int) -> World:
    world = World(**options)
    world.add(make_request("taken", prompt, TAKE, max_tokens=max_tokens))
    world.step()
    assert "taken" in world.reserved
    return world


def test_a_giver_announces_blocks_chunk_by_chunk_and_hands_over_with_the_first_token() -> None:
    world = World(num_blocks=8, max_batch_tokens=10)
    # 1. The first chunk fills two blocks, the third is not final.
    world.add(make_request("given", list(range(18)), GIVE))
    (computed,) = world.step().computed
    assert (computed.first_block, len(computed.block_ids), computed.num_tokens, computed.last) == (0, 2, 8, False)
    assert list(computed.generations) == world.allocator.generations[list(computed.block_ids)].tolist()
    # 2. The last chunk closes the offer in the same output as the token and the end.
    output = world.step()
    (computed,) = output.computed
    assert (computed.first_block, len(computed.block_ids), computed.num_tokens, computed.last) == (2, 3, 18, True)
    assert [(token.index, token.token_id) for token in output.tokens] == [(0, first_output(list(range(18))))]
    assert [(ended.reason, ended.num_output_tokens) for ended in output.ended] == [(EndReason.HANDED_OVER, 1)]
    # 3. The lease holds the blocks; nothing is computed any more.
    assert world.allocator.counts() == BlockCounts(total=8, free=3, cached=0, held=0, leased=5, quarantined=0)
    assert not world.engine.has_work()
    # 4. Released, once: the pool is whole, the scheduler is empty.
    assert world.release_lease("given")
    assert not world.release_lease("given")
    world.assert_idle()


def test_blocks_are_announced_group_of_layers_by_group_while_the_step_runs() -> None:
    world = World(max_batch_tokens=12, early=True)
    # 1. Something that a second prompt shares.
    world.add(make_request("a", list(range(1, 9)), max_tokens=1))
    world.run_to_the_end()
    # 2. What is cached is announced in full before the step, the rest while it is computed.
    world.add(make_request("b", list(range(1, 26)), Handover.GIVE))
    output = world.step()
    assert world.announced_layers == [("b", 2, 5), ("b", 5, 2), ("b", 5, 4), ("b", 5, 5)]
    assert output.computed == []
    # 3. The partial block comes with the last chunk; that it was the last is known with the token.
    (computed,) = world.step().computed
    assert world.announced_layers[4:] == [("b", 7, 2), ("b", 7, 4), ("b", 7, 5), ("b", 7, 5)]
    assert (computed.first_block, computed.block_ids, computed.num_tokens, computed.last) == (7, (), 25, True)
    world.run_to_the_end()


def test_what_was_announced_while_a_step_ran_is_leased_however_it_ends() -> None:
    world = World(early=True)
    world.add(make_request("a", [1, 2, 3, 4, 5], Handover.GIVE, max_tokens=1))
    world.step()
    assert world.ended["a"] is EndReason.LENGTH
    assert world.leases == {"a"}
    assert world.allocator.counts().leased == 2
    world.run_to_the_end()


def test_a_givers_cached_blocks_are_announced_first() -> None:
    world = World(max_batch_tokens=8)
    world.add(make_request("before", list(range(12))))
    world.run_to_the_end()
    world.add(make_request("given", list(range(23)), GIVE))
    cached, computed = world.step().computed
    assert (cached.first_block, len(cached.block_ids), cached.num_tokens) == (0, 3, 12)
    assert (computed.first_block, len(computed.block_ids), computed.num_tokens) == (3, 2, 20)
    (computed,) = world.step().computed
    assert (computed.first_block, len(computed.block_ids), computed.num_tokens, computed.last) == (5, 1, 23, True)
    world.run_to_the_end()


def test_a_giver_whose_prompt_is_cached_whole_announces_its_own_copy() -> None:
    world = World()
    world.add(make_request("before", list(range(8))))
    world.run_to_the_end()
    world.add(make_request("given", list(range(8)), GIVE))
    cached, computed = world.step().computed
    ((source, target),) = world.runner.plans[-1].copies
    assert computed.last
    assert (cached.num_tokens, computed.block_ids) == (4, (target,))
    assert source not in (target, *cached.block_ids)
    world.run_to_the_end()


def test_a_giver_that_announced_is_never_preempted() -> None:
    world = World(num_blocks=8, max_batch_tokens=5)
    # 1. A decoding request and a giver in mid-prompt share a full pool.
    world.add(make_request("decodes", [1] * 4, max_tokens=20))
    world.add(make_request("given", [2] * 26, GIVE))
    while not world.announced:
        world.step()
    # 2. The decoding request, though older, is the one that waits.
    while "given" not in world.ended:
        world.step()
    assert world.engine.counters["preemptions"] == 1
    assert world.ended["given"] is EndReason.HANDED_OVER
    # 3. It cannot go on before the lease ends, and the engine does not spin.
    world.step()
    world.step()
    assert not world.engine.has_work()
    assert world.engine.load().waiting == 1
    assert world.release_lease("given")
    assert world.engine.has_work()
    world.run_to_the_end()


@pytest.mark.parametrize("reason", [EndReason.STOP, EndReason.LENGTH])
def test_a_giver_whose_first_token_ends_the_stream_leaves_no_lease(reason: EndReason) -> None:
    prompt = [4, 3, 2, 1, 0]
    stop, max_tokens = ((first_output(prompt),), 9) if reason is EndReason.STOP else ((), 1)
    world = World()
    world.add(make_request("given", prompt, GIVE, max_tokens=max_tokens, stop=stop))
    output = world.step()
    assert [(ended.reason, ended.num_output_tokens) for ended in output.ended] == [(reason, 1)]
    assert output.computed == []
    world.assert_idle()


def test_kv_that_was_cast_serves_its_own_request_and_no_other() -> None:
    world = World()
    world.add(make_request("taken", list(range(8)), TAKE, max_tokens=6))
    world.step()
    world.deliver("taken", 8)
    assert world.receive("taken", 8, with_first_token=True, same_bits=False)
    world.run_to_the_end()
    world.assert_idle()
    assert world.allocator.counts().cached == 0
    world.add(make_request("again", list(range(9))))
    assert world.step().started[0].num_cached_tokens == 0
    world.run_to_the_end()
    assert world.allocator.counts().cached > 0


def test_an_expired_lease_stays_quarantined_until_its_reader_is_resolved() -> None:
    world = World(num_blocks=4)
    world.add(make_request("given", list(range(10)), GIVE))
    world.step()
    assert world.quarantine_lease("given")
    assert world.allocator.counts().quarantined == 3
    # Repeated and late messages change nothing.
    assert not world.quarantine_lease("given")
    assert not world.release_lease("given")
    assert not world.abort("given")
    with pytest.raises(InvalidRequestError):
        world.engine.add(make_request("given", [1]))
    assert world.resolve("given")
    assert not world.resolve("given")
    world.assert_idle()


def test_a_taker_decodes_from_what_it_received_and_computes_nothing_of_the_prompt() -> None:
    # 1. Reserved at its turn: the prompt and room for the first new token.
    world = World()
    stream = world.add(make_request("taken", list(range(8)), TAKE))
    (reserved,) = world.step().reserved
    assert (len(reserved.block_ids), reserved.num_cached_blocks) == (3, 0)
    assert not world.engine.has_work()
    assert (world.engine.load().running, world.engine.load().waiting_prefill_tokens) == (1, 0)
    # 2. Everything arrives, with the first token, which comes out once more.
    assert world.receive_all("taken")
    output = world.step()
    assert [(token.index, token.token_id) for token in output.tokens] == list(enumerate(stream.outputs[:2]))
    # 3. Only decode steps ran.
    world.run_to_the_end()
    assert world.engine.counters["prompt_tokens_computed"] == 0
    assert world.engine.counters["prompt_tokens_received"] == 8
    assert world.engine.counters["generated_tokens"] == 3


def test_a_taker_reserves_only_what_its_cache_lacks() -> None:
    world = World()
    world.add(make_request("before", list(range(9))))
    world.run_to_the_end()
    world.add(make_request("taken", [*range(8), 50, 51], TAKE))
    output = world.step()
    assert output.started[0].num_cached_tokens == 8
    assert output.reserved[0].num_cached_blocks == 2
    assert world.receive_all("taken")
    world.run_to_the_end()
    assert world.engine.counters["prompt_tokens_received"] == 2


@pytest.mark.parametrize("with_first_token", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3, 4, 9, 12])
def test_what_did_not_arrive_is_computed_here(num_tokens: int, with_first_token: bool) -> None:
    world = reserved_world(list(range(12)))
    world.scribble("taken")
    world.deliver("taken", num_tokens)
    assert world.receive("taken", num_tokens, with_first_token)
    output = world.step()
    assert [token.index for token in output.tokens] == ([0, 1] if with_first_token else [0])
    world.run_to_the_end()
    # The last prompt token is computed again where only its logits were missing.
    assert world.engine.counters["blocks_copied_on_write"] == 0
    again = num_tokens == 12 and not with_first_token
    assert world.engine.counters["prompt_tokens_computed"] == 12 - num_tokens + again


def test_a_cached_prompt_whose_transfer_failed_is_copied_before_it_is_written() -> None:
    world = World()
    world.add(make_request("before", list(range(8))))
    world.run_to_the_end()
    world.add(make_request("taken", list(range(8)), TAKE))
    assert world.step().reserved[0].num_cached_blocks == 2
    assert world.receive("taken", 0, with_first_token=False)
    world.step()
    assert len(world.runner.plans[-1].copies) == 1
    world.run_to_the_end()


def test_received_blocks_can_be_shared_at_once() -> None:
    world = reserved_world(list(range(9)))
    world.receive_all("taken")
    world.add(make_request("second", [*range(8), 77]))
    assert world.step().started[0].num_cached_tokens == 8
    world.run_to_the_end()


@pytest.mark.parametrize("reason", [EndReason.STOP, EndReason.LENGTH])
def test_a_first_token_that_ends_the_stream_ends_it(reason: EndReason) -> None:
    prompt = [4, 3, 2, 1, 0]
    stop, max_tokens = ((first_output(prompt),), 9) if reason is EndReason.STOP else ((), 1)
    world = World()
    world.add(make_request("taken", prompt, TAKE, max_tokens=max_tokens, stop=stop))
    world.step()
    world.receive_all("taken")
    output = world.step()
    assert [token.index for token in output.tokens] == [0]
    assert [ended.reason for ended in output.ended] == [reason]
    world.assert_idle()


def test_late_and_repeated_deliveries_change_nothing() -> None:
    world = World(max_running=1)
    world.add(make_request("taken", list(range(6)), TAKE, max_tokens=6))
    world.add(make_request("waiting", list(range(6)), TAKE))
    world.step()
    assert not world.engine.receive("waiting", 6, 1), "not its turn yet"
    assert not world.engine.receive("nobody", 6, 1)
    assert world.receive_all("taken")
    assert not world.engine.receive("taken", 0, 1)
    world.step()
    world.run_to_the_end()
    assert not world.engine.receive("taken", 6, 1)
    world.assert_idle()


def test_more_positions_than_the_request_has_are_refused() -> None:
    world = reserved_world(list(range(6)))
    with pytest.raises(ValueError, match="7 positions"):
        world.engine.receive("taken", 7, None)
    world.run_to_the_end()


def test_aborted_while_blocks_arrive_they_are_kept_from_everyone_until_resolved() -> None:
    world = reserved_world(list(range(10)), num_blocks=4)
    # 1. Aborted while a transfer may still write: the client hears at once, the blocks are quarantined.
    assert world.abort("taken")
    assert world.allocator.counts().quarantined == 3
    assert [ended.reason for ended in world.step().ended] == [EndReason.ABORTED]
    # 2. A request that needs them waits, and the engine does not spin.
    world.add(make_request("next", [9] * 8, max_tokens=2))
    world.step()
    assert not world.engine.has_work()
    # 3. The late write hits nobody; after it the blocks are free.
    world.scribble("taken")
    assert not world.engine.receive("taken", 10, 1)
    assert world.resolve("taken")
    assert world.engine.has_work()
    world.run_to_the_end()


def test_an_aborted_taker_quarantines_what_its_giver_may_write_or_read() -> None:
    world = World(num_blocks=8)
    world.add(make_request("before", list(range(8))))
    world.run_to_the_end()
    world.add(make_request("taken", list(range(12)), TAKE))
    world.step()
    world.abort("taken")
    counts = world.allocator.counts()
    assert (counts.quarantined, counts.cached) == (4, 0)
    world.resolve("taken")
    assert world.allocator.counts().cached == 2
    world.step()
    world.assert_idle()


def test_a_taker_that_was_preempted_computes_its_prompt_itself() -> None:
    world = World(num_blocks=5, max_batch_tokens=16)
    world.add(make_request("old", [1] * 7, max_tokens=12))
    world.step()
    world.add(make_request("taken", [2] * 7, TAKE, max_tokens=12))
    world.step()
    world.receive_all("taken")
    world.run_to_the_end()
    assert world.engine.counters["preemptions"] >= 1
    assert world.engine.counters["prompt_tokens_received"] == 7
    assert world.ended == {"old": EndReason.LENGTH, "taken": EndReason.LENGTH}


@pytest.mark.parametrize("old_tokens", [3, 16])
def test_the_order_of_arrival_holds_although_a_taker_joins_late(old_tokens: int) -> None:
    world = World(num_blocks=7, max_batch_tokens=16)
    world.add(make_request("old", [1] * 7, max_tokens=old_tokens))
    world.add(make_request("middle", [2] * 8, max_tokens=12))
    world.add(make_request("taken", [3] * 8, TAKE, max_tokens=12))
    # 1. The taker holds its blocks, so the middle one has to make room.
    world.step()
    world.step()
    assert world.engine.load().waiting == 1
    # 2. The taker runs now. Whether one of the two waits or both do, the world looks at their order.
    world.receive_all("taken")
    world.run_to_the_end()
    assert world.engine.counters["preemptions"] >= 2


def test_a_growing_request_does_not_take_blocks_from_one_that_is_receiving() -> None:
    world = World(num_blocks=5, max_batch_tokens=16)
    world.add(make_request("grows", [1] * 7, max_tokens=12))
    world.step()
    world.add(make_request("taken", [2] * 8, TAKE, max_tokens=4))
    for _ in range(6):
        world.step()
    assert world.engine.counters["preemptions"] == 1
    assert world.allocator.counts().held == 3
    assert not world.engine.has_work()
    world.run_to_the_end()


def test_takers_are_admitted_without_budget_and_up_to_the_number_of_running_requests() -> None:
    world = World(max_batch_tokens=4, max_running=3)
    world.add(make_request("local", [1] * 8))
    for number in range(3):
        world.add(make_request(f"taken{number}", [2] * 5, TAKE))
    assert [event.request_id for event in world.step().reserved] == ["taken0", "taken1"]
    world.run_to_the_end()


def test_a_later_attempt_takes_over_prompt_and_delivered_tokens() -> None:
    world = World()
    stream = world.add(make_request("taken", [5, 6, 7], TAKE, max_tokens=6, num_delivered=3))
    world.step()
    assert len(world.reserved["taken"]) == -(-7 // PAGE)
    world.receive_all("taken")
    output = world.step()
    assert [token.index for token in output.tokens] == [3, 4]
    world.run_to_the_end()
    assert world.outputs["taken"] == stream.outputs


def test_a_placed_giver_owns_nothing_here_and_writes_only_what_it_was_lent() -> None:
    prompt = list(range(18))
    world = World(num_blocks=8, max_batch_tokens=6)
    # 1. Two blocks are in the cache here, the reader has one.
    world.add(make_request("before", prompt[:8]))
    world.run_to_the_end()
    before = world.allocator.counts()
    request = world.placed(make_request("given", prompt, GIVE), num_cached_blocks=1)
    assert request.placement is not None
    world.add(request)
    # 2. What the reader lacks is copied, the rest computed, and nothing of this pool is kept longer than the step.
    (computed,) = world.step().computed
    assert world.runner.plans[-1].copies[0][1] == request.placement.block_ids[1]
    assert computed.block_ids == request.placement.block_ids[: computed.num_tokens // PAGE]
    assert world.allocator.counts() == before
    # 3. The last chunk ends the request; its blocks are the reader's, so that there is no lease.
    world.run_to_the_end()
    assert world.ended["given"] is EndReason.HANDED_OVER
    assert world.outputs["given"] == [first_output(prompt)]
    assert not world.release_lease("given")
    assert world.engine.num_cached_tokens(prompt, request.cache_root, len(prompt)) == 8, "other pools are not searched"


def test_a_placed_giver_whose_prompt_is_cached_whole_computes_the_last_token_in_the_lent_block() -> None:
    world = World()
    world.add(make_request("before", list(range(8))))
    world.run_to_the_end()
    world.add(world.placed(make_request("given", list(range(8)), GIVE), num_cached_blocks=0))
    (computed,) = world.step().computed
    assert (computed.num_tokens, computed.last) == (8, True)
    world.run_to_the_end()


def test_a_placed_giver_needs_no_room_in_a_full_pool() -> None:
    world = World(num_blocks=4)
    world.add(make_request("taken", list(range(13)), TAKE, max_tokens=3))
    world.step()
    assert world.allocator.counts().held == 4
    world.add(world.placed(make_request("given", list(range(12)), GIVE), num_cached_blocks=0))
    world.step()
    assert world.ended["given"] is EndReason.HANDED_OVER
    world.run_to_the_end()


def test_an_aborted_placed_giver_leaves_nothing() -> None:
    world = World(max_batch_tokens=8)
    world.add(world.placed(make_request("given", list(range(20)), GIVE), num_cached_blocks=0))
    world.step()
    world.abort("given")
    assert world.allocator.counts().free == world.allocator.num_blocks
    world.run_to_the_end()


def test_a_taker_goes_on_in_other_blocks_while_its_giver_may_still_write() -> None:
    prompt = list(range(17))
    world = reserved_world(prompt, num_blocks=12)
    fenced = world.reserved["taken"]
    # 1. Two blocks are final when the giver falls silent; it keeps what is behind them, and may read them too.
    world.deliver("taken", 2 * PAGE)
    world.receive("taken", 2 * PAGE, with_first_token=False, fenced=True)
    assert world.allocator.counts().quarantined == 5
    # 2. The request runs on beside it, and shares the final ones.
    world.step()
    world.scribble("taken")
    assert world.engine.counters["prompt_tokens_computed"] == len(prompt) - 2 * PAGE
    # 3. The giver has stopped: everything can be handed out again.
    world.lower_fence("taken")
    assert set(world.allocator.blocks_of(Owner(OwnerKind.REQUEST, "taken"))) & set(fenced) == set(fenced[:2])
    world.run_to_the_end()


def test_a_taker_that_finds_no_other_blocks_waits_for_its_giver_to_stop() -> None:
    world = reserved_world(list(range(17)), num_blocks=5, max_tokens=2)
    world.receive("taken", 0, with_first_token=False, fenced=True)
    world.step()
    assert not world.engine.has_work()
    world.scribble("taken")
    world.lower_fence("taken")
    world.run_to_the_end()
    assert world.ended["taken"] is EndReason.LENGTH
