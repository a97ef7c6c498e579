"""The rule that finds the request that kills workers: nobody else ends, and the guilty one kills few."""

import random
from types import SimpleNamespace

import pytest

from baton.token_ids import pack
from coordinator.suspects import PROGRESS_TOKENS, PROMPT_MEMORY_S, Suspects
from coordinator.workers import Leg


class Stream:
    """A request with one stream, and where it is."""

    def __init__(self, prompt: int = 1) -> None:
        self.cache_salt = ""
        self.tokens: list[int] = []
        self.first_index = 0
        self.prompt = [prompt]
        self.choices = [SimpleNamespace(request=self, stream=self, stream_id="s", packed_prompt=pack(self.prompt))]

    def begin(self) -> None:
        self.first_index = len(self.tokens)

    def go_on(self, num_tokens: int) -> None:
        self.tokens += [0] * num_tokens

    def leg(self, decode: bool = True, paired: bool = False) -> Leg:
        leg = Leg(self.choices[0], 1, SimpleNamespace(id="w"), decode, 1)
        leg.first_index, leg.paired = self.first_index, paired
        return leg


def test_after_a_death_all_that_were_there_are_suspects_and_none_is_isolated() -> None:
    suspects, streams = Suspects(), [Stream() for _ in range(9)]
    assert suspects.died([stream.leg() for stream in streams], alone=False) == []
    assert all(suspects.suspected(stream) and not suspects.isolated(stream) for stream in streams)
    assert len(suspects) == 9


def test_two_deaths_at_one_place_isolate_and_two_more_alone_convict() -> None:
    suspects, stream, other = Suspects(), Stream(), Stream()
    suspects.died([stream.leg(), other.leg()], alone=False)
    assert suspects.died([stream.leg()], alone=False) == []
    assert suspects.isolated(stream)
    assert not suspects.isolated(other)
    assert suspects.died([stream.leg()], alone=True) == []
    assert suspects.died([stream.leg()], alone=True) == [stream]


def test_deaths_in_company_never_end_a_request_nor_does_one_more_alone() -> None:
    suspects, stream = Suspects(), Stream()
    assert suspects.died([stream.leg()], alone=True) == []
    for _ in range(10):
        assert suspects.died([stream.leg(), Stream().leg()], alone=False) == []


def test_a_stream_that_got_on_between_two_deaths_stays_in_company() -> None:
    suspects, stream = Suspects(), Stream()
    for _ in range(2):
        stream.begin()
        stream.go_on(PROGRESS_TOKENS)
        suspects.died([stream.leg()], alone=False)
    assert not suspects.isolated(stream)


def test_a_worker_that_waited_for_another_ones_blocks_makes_a_lesser_suspect() -> None:
    suspects, waiting, prefilling = Suspects(), Stream(), Stream()
    for _ in range(2):
        suspects.died([waiting.leg(decode=True, paired=True), prefilling.leg(decode=False, paired=True)], alone=False)
    assert suspects.isolated(prefilling)
    assert not suspects.isolated(waiting)
    suspects.died([waiting.leg(decode=True, paired=True)], alone=False)
    assert suspects.isolated(waiting), "nor is that an alibi for ever"


def test_the_legs_of_one_request_are_one_suspect() -> None:
    suspects, stream = Suspects(), Stream()
    suspects.died([stream.leg(), stream.leg()], alone=False)
    assert not suspects.isolated(stream)


def test_an_isolated_request_that_gets_on_alone_is_acquitted_once() -> None:
    suspects, stream = Suspects(), Stream()
    for _ in range(2):
        suspects.died([stream.leg()], alone=False)
    assert suspects.acquit(stream)
    assert not suspects.isolated(stream)
    suspects.died([stream.leg()], alone=False)
    assert suspects.isolated(stream)
    assert not suspects.acquit(stream)
    assert suspects.isolated(stream)


def test_poison_that_is_sent_again_begins_isolated_for_a_while_and_kills_once() -> None:
    now = [0.0]
    suspects, stream = Suspects(lambda: now[0]), Stream(7)
    for alone in (False, False, True, True):
        poison = suspects.died([stream.leg()], alone)
    assert poison == [stream]
    suspects.forget(stream)
    again, other = Stream(7), Stream(8)
    suspects.begin(again)
    suspects.begin(other)
    assert suspects.isolated(again)
    assert not suspects.suspected(other)
    assert suspects.died([again.leg()], alone=True) == [again]
    now[0] = PROMPT_MEMORY_S * 2
    later = Stream(7)
    suspects.begin(later)
    assert not suspects.suspected(later)


@pytest.mark.parametrize("seed", range(300))
def test_whatever_dies_no_innocent_ends_and_poison_kills_seven_at_most(seed: int) -> None:
    """Fleets with operators that kill workers at random, and one request that does so in ways of its own."""
    rng = random.Random(seed)
    suspects = Suspects()
    streams = [Stream(number) for number in range(12)]
    poison = streams[0]
    same_place = rng.random() < 0.5
    place = rng.randrange(60)
    waits = rng.random() < 0.5
    kills, ended = 0, False
    for _ in range(60):
        if ended:
            break
        poison.begin()
        alone = suspects.isolated(poison)
        company = [] if alone else rng.sample(streams[1:], rng.randrange(12))
        for stream in company:
            stream.begin()
            stream.go_on(rng.choice([0, 3, 40]))
        step = max(0, place - len(poison.tokens)) if same_place else rng.choice([0, 5, 15, 16, 50])
        if alone and step >= PROGRESS_TOKENS and rng.random() < 0.7:
            poison.go_on(PROGRESS_TOKENS)
            if suspects.acquit(poison):  # and the cell opens: company comes, and then it kills
                poison.go_on(step - PROGRESS_TOKENS)
                alone, step = False, 0
            else:
                step -= PROGRESS_TOKENS
        poison.go_on(step)
        paired = waits and not alone and rng.random() < 0.5
        legs = [poison.leg(decode=True, paired=paired), *(stream.leg() for stream in company)]
        kills += 1
        convicted = suspects.died(legs, alone)
        assert convicted in ([], [poison])
        ended = bool(convicted)
    assert ended
    assert kills <= (4 if same_place and place < PROGRESS_TOKENS and not waits else 7)
