"""Names of KV blocks: a chained hash, so that equal names mean equal content anywhere in the cluster.

    name[i] = H(name[i-1], tokens of block i)        name[-1] = H(model fingerprint, adapter, tenant salt)

The chain is that of vLLM's prefix cache. H is BLAKE2b cut to 128 bits: collision-resistant, so no tenant can craft
a prompt that is served from another's block.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from baton.token_ids import pack

NAME_BYTES = 16


@lru_cache(maxsize=1024)
def root_name(model_fingerprint: str, adapter: str = "", cache_salt: str = "") -> bytes:
    """Parent of every first block: what computes the KV, and who may share it."""
    digest = blake2b(digest_size=NAME_BYTES, person=b"baton-root")
    for part in (model_fingerprint, adapter, cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def tenant_name(cache_salt: str) -> bytes:
    """What tiers know the tenant of a salt by; empty for requests without one."""
    return blake2b(cache_salt.encode(), digest_size=NAME_BYTES, person=b"baton-tenant").digest() if cache_salt else b""


def block_name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block that holds `token_ids` and follows the block named `parent`."""
    return packed_block_name(parent, pack(token_ids))


def packed_block_name(parent: bytes, tokens: bytes) -> bytes:
    """The same of `baton.token_ids`."""
    return blake2b(parent + tokens, digest_size=NAME_BYTES).digest()
