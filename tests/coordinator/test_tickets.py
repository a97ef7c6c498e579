"""Tickets: what was issued is read again; anything else is refused by name, whoever sends it."""

import random
import zlib

import msgspec
import pytest

from baton.v1 import worker_link_pb2 as wire
from coordinator import tickets
from coordinator.delivery import AnswerForm, Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.tenants.caller import Caller
from coordinator.tickets import TicketError

FORM = AnswerForm(chat=True, include_usage=True, stop=("\n\n", "Ende"), choices_per_prompt=2)


def request_of(prompts: list[list[int]], form: AnswerForm = FORM) -> Request:
    request = Request("cmpl-1", "salt", form, 12.5)
    for index, prompt in enumerate(prompts):
        for number in range(form.choices_per_prompt):
            sampling = wire.EngineSampling(max_tokens=9 + index, seed=2**64 - 1 - index + number * 0)
            text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
            Choice(request, index, prompt, sampling, text, False)
    return request


def test_a_ticket_says_what_the_assignment_does_not() -> None:
    request = request_of([[1, 2, 3], [4, 5]])
    choice = request.choices[3]
    choice.cached_tokens = 2
    ticket = tickets.read(tickets.issue(choice, "demo"))
    assert (ticket.request_id, ticket.choice, ticket.cached_tokens) == ("cmpl-1", 3, 2)
    assert (ticket.model, ticket.cache_salt, ticket.form, ticket.resume_s) == ("demo", "salt", FORM, 12.5)
    assert ticket.created_unix_s == request.created_unix_s
    assert [prompt.token_ids for prompt in ticket.prompts] == [[1, 2, 3], []], "its own prompt is in the assignment"
    assert [(prompt.max_tokens, prompt.seed) for prompt in ticket.prompts] == [(9, 2**64 - 1), (10, 2**64 - 2)]
    assert tickets.num_choices(ticket) == 4
    other = tickets.read(tickets.issue(request.choices[0], "demo"))
    assert tickets.same_request(ticket, other)
    assert not tickets.same_request(ticket, tickets.read(tickets.issue(request_of([[1]]).choices[0], "demo")))


def test_a_request_whose_tickets_would_be_too_large_goes_without() -> None:
    small, large = [1] * 1000, [70_000] * 400_000
    assert tickets.issue(request_of([large]).choices[0], "demo"), "a prompt alone is in the assignment"
    assert tickets.issue(request_of([small, small]).choices[0], "demo")
    assert tickets.issue(request_of([large, small]).choices[0], "demo") == b""
    with pytest.raises(TicketError, match="without a ticket"):
        tickets.read(b"")


def test_what_is_no_ticket_of_this_version_is_refused_with_the_reason() -> None:
    good = tickets.issue(request_of([[1, 2, 3]]).choices[1], "demo")

    def sealed(body: bytes) -> bytes:
        return good[:1] + zlib.crc32(body).to_bytes(4, "little") + body

    for data, says in (
        (bytes([99]) + good[1:], "version 99"),
        (good[:-1], "damaged"),
        (good[:3], "damaged"),
        (good + b"\0", "damaged"),
        (bytes(tickets.MAX_TICKETS_BYTES + 1), "bytes"),
        (sealed(b"\xc1"), "not understood"),
        (sealed(msgspec.msgpack.encode([1, 2, 3])), "not understood"),
        (sealed(b"\x91" * 5000), "not understood"),
    ):
        with pytest.raises(TicketError, match=says):
            tickets.read(data)
    contradicting = tickets.read(good)
    contradicting.choice = 2
    with pytest.raises(TicketError, match="contradicts"):
        tickets.read(sealed(msgspec.msgpack.encode(contradicting)))


def test_without_a_tenant_a_ticket_is_one_that_older_coordinators_read() -> None:
    request = request_of([[1, 2, 3]])
    assert tickets.issue(request.choices[0], "demo")[0] == 1
    request.caller = type("Holder", (Caller,), {"tenant": "acme"})()
    ticket = tickets.issue(request.choices[0], "demo")
    assert (ticket[0], tickets.read(ticket).tenant) == (2, "acme")


def test_no_damaged_bit_is_overlooked() -> None:
    good = tickets.issue(request_of([[1, 2, 3], [4]]).choices[0], "demo")
    randomly = random.Random(5)
    for _ in range(500):
        at = randomly.randrange(8 * len(good))
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        with pytest.raises(TicketError):
            tickets.read(bytes(bad))
