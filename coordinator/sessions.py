"""Which requests belong together."""

from hashlib import blake2b

from baton.token_ids import TOKEN_BYTES

FIRST_TOKENS = 256


def session_of(user: str, cache_salt: str, prompt: bytes) -> int:
    """64 bits: of the user where the client names one, or else of a conversation, which its first tokens tell. `prompt`
    is packed (`baton.token_ids`)."""
    key = user.encode() if user else prompt[: TOKEN_BYTES * FIRST_TOKENS]
    digest = blake2b(key, digest_size=8, key=blake2b(cache_salt.encode(), digest_size=16).digest()).digest()
    return int.from_bytes(digest, "little")
