"""Token buckets: never more than the limit over a long time, never less than what is there."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import AnswerForm, Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.failures import FailureKind, RequestFailed
from coordinator.tenants.accounts import Account, KeyHolder
from coordinator.tenants.buckets import Bucket
from coordinator.tenants.gate import _duration
from coordinator.tenants.keys import Key, Secret, Tenant

TAKES = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(0, 100)), max_size=60)


@given(st.integers(1, 100), TAKES)
def test_over_any_time_no_more_begins_than_the_limit_and_debts_are_paid(per_minute: int, takes: list) -> None:
    """Each take: seconds before it, what it says it takes, and what it turns out to take beyond."""
    bucket, now, begun, beyond = Bucket(per_minute, 0.0), 0.0, 0, 0
    for pause_s, amount, more in takes:
        now += pause_s
        wait_s = bucket.wait_s(amount, now)
        if wait_s:
            assert bucket.wait_s(amount, now + wait_s * 0.99 - 1e-6) > 0, "not later than needed"
            now += wait_s + 1e-6
            assert bucket.wait_s(amount, now) == 0, "not earlier than said"
        # What was used before this one is covered by time, but for one minute's worth.
        assert begun + beyond <= per_minute * (1 + now / 60) + 1e-3
        bucket.take(amount, now)
        bucket.take(more, now)
        begun, beyond = begun + amount, beyond + more
        assert bucket.level(now) <= per_minute


def test_what_is_given_back_is_there_again_and_no_more_than_that() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(50, 0.0)
    bucket.take(-50, 0.0)
    bucket.take(-50, 0.0)
    assert bucket.level(0.0) == 60
    assert bucket.full_after_s(0.0) == 0


def test_a_changed_limit_forgives_nothing() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(100, 0.0)
    bucket.set_limit(600, 0.0)
    assert bucket.level(0.0) == -40
    assert bucket.wait_s(1, 0.0) == pytest.approx(4.1)
    bucket.set_limit(None, 0.0)
    assert (bucket.level(0.0), bucket.wait_s(10**9, 0.0)) == (math.inf, 0)
    bucket.set_limit(10, 5.0)
    assert bucket.level(5.0) == 10


@pytest.mark.parametrize(
    ("seconds", "says"), [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (61.25, "1m1.25s")]
)
def test_durations_are_written_as_openai_does(seconds: float, says: str) -> None:
    assert _duration(seconds) == says


@given(st.data())
def test_whatever_comes_of_requests_each_token_is_charged_and_counted_once(data: st.DataObject) -> None:
    now, lines = [0.0], []
    tenant = Tenant(tokens_per_minute=10**9, requests_per_minute=10**6, price_input=1.0, price_output=2.0)
    account = Account("acme", tenant, Secret(b"s" * 32), lines.append, lambda: now[0])
    holder = KeyHolder(account, Key("acme", "id"))
    drawn, take = [0.0], account.tokens.take
    account.tokens.take = lambda amount, at_s: (drawn.__setitem__(0, drawn[0] + amount), take(amount, at_s))[1]
    running: list[Request] = []
    prompts = outputs = charged = 0
    for step in range(data.draw(st.integers(0, 40))):
        now[0] += data.draw(st.sampled_from([0.0, 1.0]))
        event = data.draw(st.sampled_from(["admit", "adopt", "fail", "token", "settle", "end", "elsewhere"]))
        if event in ("admit", "adopt", "fail"):
            request = request_of(f"r-{step}", data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)))
            had = request.output_tokens if event == "adopt" else None
            try:
                with holder.admitting(request, had):
                    if event == "fail":
                        raise RequestFailed(FailureKind.OVERLOADED, "full")
                running.append(request)
                charged += request.prompt_tokens if event == "admit" else 0
            except RequestFailed:
                assert event == "fail"
        elif event == "settle":
            account.settle(now[0])
        elif running:
            request = data.draw(st.sampled_from(running))
            if event == "token":
                request.choices[0].stream.tokens.append(1)
                charged += 1
                continue
            running.remove(request)
            outcome = "moved" if event == "elsewhere" else data.draw(st.sampled_from(["completed", "aborted"]))
            holder.ended(request, outcome)
            holder.ended(request, outcome)  # idempotent
            if outcome != "moved":
                prompts, outputs = prompts + request.prompt_tokens, outputs + request.output_tokens
    for request in running:
        holder.ended(request, "moved")
    usage = account.usage
    assert (usage.input_tokens, usage.output_tokens) == (prompts, outputs)
    assert usage.cost == Decimal(prompts + 2 * outputs) / 1_000_000
    assert sum(usage.requests.values()) == len(lines)
    assert sum(line.used.completion for line in lines) == outputs
    assert (account.num_streams, account.running) == (0, {})
    assert charged == drawn[0], "what was charged is what came"


def request_of(id: str, num_prompt: int, num_choices: int) -> Request:
    request = Request(id, form=AnswerForm(choices_per_prompt=num_choices))
    request.prompt_tokens = num_prompt
    for _ in range(num_choices):
        text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
        Choice(request, 0, [1] * num_prompt, wire.EngineSampling(max_tokens=99), text, False)
    return request
