"""Token ids as workers get them and as blocks are named by: 32 bits each, little endian, one behind the other.

A list of Python's numbers is ten times as long and has to be walked for every message; octets are copied.
"""

import sys
from array import array
from collections.abc import Sequence

from baton.errors import PeerError

TOKEN_BYTES = 4


def pack(token_ids: Sequence[int]) -> bytes:
    """Raises OverflowError for what is no 32-bit number."""
    if len(token_ids) == 1:  # as each is that a client gets: an array takes five times as long
        return token_ids[0].to_bytes(TOKEN_BYTES, "little")
    numbers = array("I", token_ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def unpack(octets: bytes) -> list[int]:
    """Raises PeerError where they are cut within a token."""
    if len(octets) % TOKEN_BYTES:
        raise PeerError(f"{len(octets)} bytes are no whole number of token ids of {TOKEN_BYTES} bytes")
    numbers = array("I", octets)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def count(octets: bytes) -> int:
    """Tokens in there."""
    return len(octets) // TOKEN_BYTES
