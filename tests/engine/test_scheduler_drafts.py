"""Speculative decoding: guesses make streams faster and never different.

The stand-in world checks every token and every position of KV; wrong guesses leave garbage in theirs.
"""

import pytest

from engine.engine import Engine
from engine.requests import EndReason, Handover
from tests.engine.stand_in import PAGE, StandInRunner, World, make_request, shareable_tokens, undisturbed

RIGHT, WRONG = True, False


def drafts(world: World) -> list[tuple[str, int]]:
    """(request, guesses) of the last plan."""
    return [(s.request_id, s.num_drafts) for s in world.runner.plans[-1].sequences]


def decoding(prompt: list[int], pattern: list[bool], max_tokens: int = 12, **options: int) -> World:
    """A world in which request "a" has its first token, and from now on `pattern` is guessed."""
    world = World(**options)
    world.add(make_request("a", prompt, max_tokens=max_tokens))
    world.step()
    world.drafter.pattern = [pattern]
    return world


@pytest.mark.parametrize(
    ("pattern", "num_tokens"),
    [([RIGHT] * 5, 6), ([WRONG] * 5, 1), ([RIGHT, RIGHT, WRONG, RIGHT], 3), ([], 1)],
)
def test_a_step_gives_the_right_guesses_and_one_token_more(pattern: list[bool], num_tokens: int) -> None:
    world = decoding([1, 2, 3], pattern)
    output = world.step()
    assert drafts(world) == [("a", len(pattern))]
    assert [token.index for token in output.tokens] == list(range(1, 1 + num_tokens))
    # The next step goes on behind what was right.
    world.step()
    assert world.runner.plans[-1].sequences[0].start == 3 + num_tokens
    world.run_to_the_end()


def test_counters_tell_how_many_guesses_were_right() -> None:
    world = decoding([1, 2, 3], [RIGHT, RIGHT, WRONG])
    world.step()
    counters = world.engine.counters
    assert (counters["draft_tokens"], counters["draft_tokens_accepted"], counters["generated_tokens"]) == (3, 2, 4)
    world.run_to_the_end()


@pytest.mark.parametrize("num_blocks", [2, 9])
def test_no_guess_goes_beyond_the_greatest_length(num_blocks: int) -> None:
    world = decoding([1] * 3, [RIGHT] * 20, max_tokens=6, num_blocks=num_blocks, max_batch_tokens=40)
    # Eight positions are computed, the ninth token is the last: four guesses and one more token.
    assert [ended.reason for ended in world.step().ended] == [EndReason.LENGTH]
    assert drafts(world) == [("a", 4)]
    world.assert_idle()


def test_the_last_token_is_not_guessed_for() -> None:
    world = decoding([1] * 3, [RIGHT], max_tokens=2)
    world.step()
    assert drafts(world) == [("a", 0)]
    assert world.drafter.asked == []
    world.assert_idle()


def test_a_stop_token_among_the_guesses_ends_the_stream_there() -> None:
    prompt = [3, 1, 2]
    outputs = undisturbed(make_request("x", prompt, max_tokens=9), 64).outputs
    at = next(index for index in range(2, 9) if outputs[index] not in outputs[:index])
    world = World()
    world.add(make_request("stops", prompt, max_tokens=9, stop=(outputs[at],)))
    world.step()
    world.drafter.pattern = [[RIGHT] * 7]
    output = world.step()
    assert [token.token_id for token in output.tokens] == outputs[1 : at + 1]
    assert [(ended.reason, ended.num_output_tokens) for ended in output.ended] == [(EndReason.STOP, at + 1)]
    counters = world.engine.counters
    assert (counters["generated_tokens"], counters["draft_tokens_accepted"]) == (at + 1, at)
    world.assert_idle()


def test_only_blocks_of_accepted_tokens_are_cached() -> None:
    world = decoding([1, 2, 3], [RIGHT, WRONG, RIGHT, RIGHT, RIGHT, RIGHT], max_tokens=30)
    world.step()
    # Positions 3 to 9 were written, those up to 4 are right.
    tokens = world.runner.streams["a"].tokens
    root = world.runner.streams["a"].request.cache_root
    assert world.engine.num_cached_tokens(tokens, root, 3) == 4
    world.abort("a")
    world.step()
    world.add(make_request("b", tokens[:20]))
    assert world.step().started[0].num_cached_tokens == 4
    world.run_to_the_end()


def test_guesses_come_after_single_tokens_and_prompts() -> None:
    world = World(max_batch_tokens=10)
    for name in ("a", "b"):
        world.add(make_request(name, [ord(name)], max_tokens=20))
    world.step()
    world.drafter.pattern = [[RIGHT] * 6]
    # 1. Alone they share the batch, the older first.
    world.step()
    assert drafts(world) == [("a", 6), ("b", 2)]
    # 2. A prompt takes all that the two tokens leave.
    world.add(make_request("long", [7] * 11, max_tokens=2))
    world.step()
    assert drafts(world) == [("a", 0), ("b", 0), ("long", 0)]
    assert world.runner.plans[-1].num_tokens == 10
    # 3. Its last chunk leaves something.
    world.step()
    assert drafts(world) == [("a", 5), ("b", 0), ("long", 0)]
    world.run_to_the_end()


def test_a_bound_on_prompt_tokens_is_no_bound_on_guesses() -> None:
    world = decoding([1, 2, 3], [], max_tokens=20, max_batch_tokens=16)
    world.add(make_request("long", [7] * 11, max_tokens=2))
    plan = world.engine._scheduler.plan(prompt_tokens=2, drafts={"a": [9] * 5})
    assert [(len(s.token_ids), s.num_drafts) for s in plan.sequences] == [(6, 5), (2, 0)]


def test_a_piece_of_a_prompt_that_is_one_token_long_is_no_token_to_guess_after() -> None:
    world = decoding([1, 2, 3], [], max_tokens=20, max_batch_tokens=16)
    world.add(make_request("long", [7] * 11, max_tokens=2))
    plan = world.engine._scheduler.plan(prompt_tokens=1, drafts={"a": [9] * 2, "long": [7] * 2, "nobody": [1]})
    assert [(s.request_id, len(s.token_ids), s.num_drafts) for s in plan.sequences] == [("a", 3, 2), ("long", 1, 0)]


def test_guesses_take_no_block_that_somebodys_next_token_needs() -> None:
    world = World(num_blocks=5, max_batch_tokens=16)
    for name in ("old", "young"):
        world.add(make_request(name, [len(name)] * 7, max_tokens=8))
    world.step()
    # One block is left, and two may need one: guesses stay in the blocks that are there.
    world.drafter.pattern = [[WRONG] * 6]
    world.step()
    assert drafts(world) == [("old", 0), ("young", 0)]
    assert world.engine.counters["preemptions"] == 0
    world.run_to_the_end()


def test_guesses_take_no_block_from_the_head_of_the_line() -> None:
    world = decoding([1] * 6, [WRONG] * 7, max_tokens=20, num_blocks=7)
    world.add(make_request("large", [2] * 23, max_tokens=2))
    world.step()
    # Five blocks are available and six are wanted; the block at hand has room for one guess.
    assert drafts(world) == [("a", 1)]
    assert world.allocator.counts().held == 2
    world.run_to_the_end()


def test_where_only_places_are_wanted_guesses_may_take_blocks() -> None:
    world = decoding([1] * 6, [WRONG] * 7, max_tokens=20, max_running=1)
    world.add(make_request("next", [2] * 5))
    world.step()
    assert drafts(world) == [("a", 7)]
    assert world.allocator.counts().held == 4
    world.run_to_the_end()


def test_blocks_that_were_cached_long_ago_make_room_for_guesses() -> None:
    world = World(num_blocks=8)
    world.add(make_request("before", [5] * 24, max_tokens=1))
    world.run_to_the_end()
    world.add(make_request("a", [1] * 6, max_tokens=20))
    world.step()
    world.drafter.pattern = [[RIGHT] * 7]
    world.step()
    assert drafts(world) == [("a", 7)]
    world.run_to_the_end()


def test_a_giver_is_not_guessed_for() -> None:
    world = World(max_batch_tokens=4)
    world.drafter.pattern = [[RIGHT] * 3]
    world.add(make_request("given", [1, 2, 3, 4, 5], Handover.GIVE))
    world.step()
    world.step()
    assert (drafts(world), len(world.outputs["given"])) == ([("given", 0)], 1)
    assert world.drafter.asked == []
    world.run_to_the_end()


def test_guesses_of_a_taker_are_written_into_its_own_copy() -> None:
    world = World()
    world.add(make_request("before", list(range(2 * PAGE))))
    world.run_to_the_end()
    world.add(make_request("taken", list(range(2 * PAGE)), Handover.TAKE, max_tokens=9))
    world.step()
    assert world.receive("taken", 0, with_first_token=False)
    world.drafter.pattern = [[RIGHT, WRONG, RIGHT]]
    output = world.step()
    assert (drafts(world), len(world.runner.plans[-1].copies)) == ([("taken", 3)], 1)
    assert len(output.tokens) == 2
    world.run_to_the_end()


def test_a_drafter_that_wants_nothing_is_not_asked() -> None:
    world = decoding([1, 2, 3], [RIGHT])
    world.drafter.pattern = []
    world.run_to_the_end()
    assert world.drafter.asked == []
    assert world.engine.counters["draft_tokens"] == 0


def test_an_engine_without_a_drafter_decodes_token_by_token() -> None:
    runner = StandInRunner(64)
    engine = Engine(
        runner,
        num_blocks=8,
        page_size=PAGE,
        max_batch_tokens=8,
        max_running=2,
        max_model_tokens=64,
        shareable_tokens=shareable_tokens,
    )
    request = make_request("a", [1, 2, 3], max_tokens=5)
    stream = runner.expect(request)
    engine.add(request)
    assert [[token.token_id for token in engine.step().tokens] for _ in range(5)] == [[t] for t in stream.outputs]
