"""Which requests belong together."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

FIRST_TOKENS = 256


def session_of(user: str, cache_salt: str, prompt: Sequence[int]) -> int:
    """64 bits: of the user where the client names one, or else of a conversation, which its first tokens tell."""
    key = user.encode() if user else array("I", prompt[:FIRST_TOKENS]).tobytes()
    digest = blake2b(key, digest_size=8, key=blake2b(cache_salt.encode(), digest_size=16).digest()).digest()
    return int.from_bytes(digest, "little")
