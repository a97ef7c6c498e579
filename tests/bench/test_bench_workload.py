"""Load comes when it should, and asks for what it should: seeded, and by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigurationError
from cli.bench.arrivals import arrivals, spread
from cli.bench.content import WORDS, Content
from cli.bench.files import Asked, read
from cli.bench.options import LoadOptions, WorkloadOptions
from cli.bench.workload import Session, Turn, sessions, warmup

WORD_CONTENT = Content(7, list(range(100, 200)), list(WORDS), 1.0)


def gaps(rate: float, burstiness: float, number: int) -> np.ndarray:
    times = list(itertools.islice(arrivals(rate, burstiness, np.random.default_rng(3)), number))
    return np.diff([0.0, *times])


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_their_distribution(burstiness: float) -> None:
    seen = gaps(50.0, burstiness, 200_000)
    assert seen.mean() == pytest.approx(1 / 50, rel=0.02)
    assert seen.var() == pytest.approx(1 / (burstiness * 50**2), rel=0.04)


def test_a_poisson_process_has_as_much_variance_as_mean_in_each_second() -> None:
    times = np.cumsum(gaps(20.0, 1.0, 40_000))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(20, rel=0.02)
    assert counts.var() == pytest.approx(20, rel=0.1)


def test_a_metronome_and_all_at_once() -> None:
    assert gaps(4.0, float("inf"), 5).tolist() == [0.25] * 5
    assert gaps(float("inf"), 1.0, 5).tolist() == [0.0] * 5


def test_times_on_a_grid_are_spread_over_it_and_stay_in_order() -> None:
    times = [0.0] * 1000 + [3.0] * 2000 + [9.0]
    seen = list(spread(iter(times), 3.0, np.random.default_rng(1)))
    assert seen == sorted(seen)
    assert len(seen) == len(times)
    assert np.mean(seen[:1000]) == pytest.approx(1.5, abs=0.1)
    assert all(3 <= each < 6 for each in seen[1000:3000])
    assert 9 <= seen[-1] < 12


def drawn(load: LoadOptions, number: int, asked: list[Asked] | None = None, **workload: object) -> list[Session]:
    options = WorkloadOptions(**workload)  # type: ignore[arg-type]
    return list(itertools.islice(sessions(load, options, 11, asked), number))


def test_the_same_seed_asks_the_same_and_another_asks_otherwise() -> None:
    load = LoadOptions(rate=5.0)
    first, again = drawn(load, 20, length_spread=0.5), drawn(load, 20, length_spread=0.5)
    assert first == again
    other = list(itertools.islice(sessions(load, WorkloadOptions(length_spread=0.5), 12, None), 20))
    assert first != other
    assert WORD_CONTENT.token_ids(first[0].turns[0].segments) != WORD_CONTENT.token_ids(first[1].turns[0].segments)


def test_lengths_are_spread_evenly_around_what_was_asked() -> None:
    seen = [each.turns[0] for each in drawn(LoadOptions(), 5000, input_tokens=100, output_tokens=40, length_spread=0.5)]
    assert (min(each.tokens for each in seen), max(each.tokens for each in seen)) == (50, 150)
    assert np.mean([each.tokens for each in seen]) == pytest.approx(100, rel=0.02)
    assert np.mean([each.output_tokens for each in seen]) == pytest.approx(40, rel=0.02)


def test_prompts_share_prefixes_token_by_token_and_nothing_else() -> None:
    asked = drawn(LoadOptions(), 40, input_tokens=10, prefix_tokens=30, prefixes=2)
    prompts = [WORD_CONTENT.token_ids(each.turns[0].segments) for each in asked]
    assert {len(each) for each in prompts} == {40}
    assert len({tuple(each[:30]) for each in prompts}) == 2
    assert len({tuple(each[30:]) for each in prompts}) == 40


def test_warm_up_shares_the_prefixes_of_what_is_measured_and_no_prompt() -> None:
    load, workload = LoadOptions(warmup=8), WorkloadOptions(input_tokens=10, prefix_tokens=30)
    measured = drawn(load, 50, input_tokens=10, prefix_tokens=30)
    warm, hot = (
        {tuple(WORD_CONTENT.token_ids(each.turns[0].segments)) for each in some}
        for some in (warmup(load, workload, 11, None), measured)
    )
    assert len(warm) == 8
    assert {each[:30] for each in warm} == {each[:30] for each in hot}
    assert not warm & hot


def test_requests_end_the_run_turns_included_and_seconds_end_an_open_loop() -> None:
    asked = drawn(LoadOptions(requests=7), 100, turns=3)
    assert [len(each.turns) for each in asked] == [3, 3, 1]
    timed = drawn(LoadOptions(rate=100.0, duration_s=2.0), 10_000)
    assert len(timed) == pytest.approx(200, rel=0.3)
    assert all(each.at_s is not None and each.at_s < 2.0 for each in timed)


def test_words_are_as_many_as_tokens_were_asked_for() -> None:
    turn = drawn(LoadOptions(), 1, input_tokens=25, prefix_tokens=5)[0].turns[0]
    assert len(WORD_CONTENT.text(turn.segments).split()) == 30
    halves = Content(7, [], list(WORDS), 2.0)
    assert len(halves.text(turn.segments).split()) == 2 + 12


# Files

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:06.9799600,110,27
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 52, "hash_ids": [0, 7, 9]}
{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 8]}
"""
SHARE_GPT = [
    {"id": "a", "conversations": [
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "one two"},
        {"from": "gpt", "value": "x" * 40}, {"from": "human", "value": "three"}, {"from": "gpt", "value": "y" * 80},
        {"from": "human", "value": "nobody answers"},
    ]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "only the model speaks"}]},
]  # fmt: skip


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_azures_trace_keeps_its_times_and_lengths(tmp_path: Path) -> None:
    seen = read(written(tmp_path, "a.csv", AZURE), 0, 128)
    assert seen.kind == "Azure's trace"
    asked = drawn(LoadOptions(), 9, seen.asked, file="a.csv", speed=2.0)
    assert [each.at_s for each in asked] == pytest.approx([0.0, 0.026, 1.5], abs=1e-6)
    assert [each.turns[0].tokens for each in asked] == [4808, 3180, 110]
    assert [each.turns[0].output_tokens for each in asked] == [10, 8, 27]


def test_mooncakes_trace_shares_its_blocks(tmp_path: Path) -> None:
    seen = read(written(tmp_path, "m.jsonl", MOONCAKE), 0, 128)
    first, second = drawn(LoadOptions(), 9, seen.asked, file="m.jsonl")
    assert [each.tokens for each in first.turns[0].segments] == [512, 512, 76]
    one, other = (WORD_CONTENT.token_ids(each.turns[0].segments) for each in (first, second))
    assert (len(one), len(other)) == (1100, 600)
    assert one[:512] == other[:512]
    assert one[512:600] != other[512:]
    assert second.at_s == 3.0


def test_a_rate_takes_the_place_of_the_times_of_a_file(tmp_path: Path) -> None:
    seen = read(written(tmp_path, "m.jsonl", MOONCAKE), 0, 128)
    asked = drawn(LoadOptions(rate=1000.0), 9, seen.asked, file="m.jsonl")
    assert all(each.at_s is not None and each.at_s < 1 for each in asked)


def test_sharegpt_has_texts_and_turns(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", json.dumps(SHARE_GPT))
    seen = read(path, 0, 128)
    assert len(seen.asked) == 1
    assert drawn(LoadOptions(), 9, seen.asked, file=path)[0].turns == (Turn((), "one two", 10, 0.0),)
    both = drawn(LoadOptions(), 9, seen.asked, file=path, turns=5)[0].turns
    assert [each.text for each in both] == ["one two", "three"]
    assert [each.output_tokens for each in both] == [10, 20]


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    text = '{"prompt": "hello there"}\n\n{"prompt": "bye", "output_tokens": 3}\n'
    seen = read(written(tmp_path, "p.jsonl", text), 0, 64)
    assert [(each.texts, each.answers) for each in seen.asked] == [(("hello there",), (64,)), (("bye",), (3,))]


def test_what_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    seen = read(written(tmp_path, "a.csv", AZURE), 3500, 128)
    assert (len(seen.asked), seen.left_out) == (2, 1)
    with pytest.raises(ConfigurationError, match="no request of at most 5 tokens"):
        read(written(tmp_path, "a.csv", AZURE), 5, 128)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no kind that is known"),
        ("hello", "no kind that is known"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnever,1,2\n", "line 2 is not a time and two numbers"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,1\n", "line 2 is not a time and two"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp', "line 2 is no JSON object"),
        ('{"timestamp": 0, "input_length": "many", "output_length": 1}', "line 1 has no timestamp"),
        ('[{"conversations": [{"from": "human"}]}]', "no such fields"),
        ('[{"conversations"', "is broken"),
        ('{"prompt": ["a secret text"]}', "line 1 has no text as its prompt"),
    ],
)
def test_broken_files_say_where_and_tell_nothing_of_a_text(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        read(written(tmp_path, "f", text), 0, 128)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_not_there_says_so() -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read("/nowhere/at/all", 0, 128)
