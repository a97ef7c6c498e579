"""Tickets: what a coordinator gives to a worker with an attempt, so that any coordinator can go on with the request.

The worker keeps it beside the assignment and gives both back (`Orphan`). The assignment says what a worker has to know;
the ticket the rest: who asked, in which form, with which stop strings, and which other choices there are.

    version (1 byte) | CRC-32 of the body (4 bytes, little endian) | body, MessagePack
"""

import zlib
from collections.abc import Sequence

import msgspec

from baton.errors import BatonError
from coordinator.delivery import AnswerForm, Choice

VERSIONS = (1, 2)
"""Of those that belong to nobody in particular, which every coordinator can read, and of those of a tenant."""
MAX_TICKETS_BYTES = 4 << 20
"""All tickets of one request together; a larger one ends with its coordinator."""
TOKEN_BYTES = 5
"""At most, in MessagePack."""
_HEAD_BYTES = 5


class TicketError(BatonError):
    """The message says what is wrong and holds nothing of the ticket."""


class TicketPrompt(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One prompt and how its choices are sampled where they differ from those of other prompts."""

    token_ids: list[int]
    """Empty for the prompt of the assignment that came with the ticket."""
    max_tokens: int
    seed: int
    """Of its first choice."""


class Ticket(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    request_id: str
    choice: int
    """Number of the one that the attempt is for."""
    cached_tokens: int
    """Of its prompt, as its usage says; known from the second attempt on."""
    created_unix_s: int
    model: str
    cache_salt: str
    form: AnswerForm
    resume_s: float
    prompts: list[TicketPrompt]
    tenant: str = ""
    """Whose it is; not in version 1."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Ticket).decode


def issue(choice: Choice, model: str) -> bytes:
    """Empty where it would be too large."""
    request = choice.request
    firsts = request.choices[:: request.form.choices_per_prompt]
    num_bytes = TOKEN_BYTES * sum(first.num_prompt_tokens for first in firsts) if len(firsts) > 1 else 0
    if num_bytes * len(request.choices) > MAX_TICKETS_BYTES:
        return b""
    prompts = [_prompt(first, known=first.prompt_index == choice.prompt_index) for first in firsts]
    form, salt = request.form, request.cache_salt
    ticket = Ticket(
        request.id, choice.number, choice.cached_tokens, request.created_unix_s, model, salt, form, request.resume_s,
        prompts, request.caller.tenant,
    )  # fmt: skip
    version, fields = (
        (2, msgspec.structs.astuple(ticket)) if ticket.tenant else (1, msgspec.structs.astuple(ticket)[:-1])
    )
    body = _encode(fields)
    return bytes([version]) + zlib.crc32(body).to_bytes(4, "little") + body


def _prompt(first: Choice, known: bool) -> TicketPrompt:
    return TicketPrompt([] if known else first.prompt, first.sampling.max_tokens, first.sampling.seed)


def read(data: bytes) -> Ticket:
    """Raises TicketError for what is no ticket of this version."""
    if not data:
        raise TicketError("the attempt came without a ticket")
    if len(data) > MAX_TICKETS_BYTES:
        raise TicketError(f"the ticket has {len(data)} bytes; at most {MAX_TICKETS_BYTES} are possible")
    if data[0] not in VERSIONS:
        raise TicketError(f"the ticket has version {data[0]}, this coordinator reads {VERSIONS}")
    body = data[_HEAD_BYTES:]
    if zlib.crc32(body).to_bytes(4, "little") != data[1:_HEAD_BYTES]:
        raise TicketError("the ticket is damaged")
    try:
        ticket = _decode(body)
    except (msgspec.DecodeError, RecursionError):
        raise TicketError("the ticket is not understood") from None
    if not 0 <= ticket.choice < ticket.form.choices_per_prompt * len(ticket.prompts):
        raise TicketError("the ticket contradicts itself")
    return ticket


def num_choices(ticket: Ticket) -> int:
    return ticket.form.choices_per_prompt * len(ticket.prompts)


def same_request(one: Ticket, other: Ticket) -> bool:
    """Both are of one request, whatever their choices."""

    def shape(prompts: Sequence[TicketPrompt]) -> list[tuple[int, int]]:
        return [(prompt.max_tokens, prompt.seed) for prompt in prompts]

    return (one.request_id, one.created_unix_s, one.cache_salt, one.form, one.tenant) == (
        other.request_id, other.created_unix_s, other.cache_salt, other.form, other.tenant,
    ) and shape(one.prompts) == shape(other.prompts)  # fmt: skip
