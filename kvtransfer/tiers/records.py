"""What a block looks like on disk.

A segment file is a row of slots of one size, each aligned to 4 KiB, and nothing else:

    slot 0                                   slot 1
    ┌───────────────────────┬───┬────────────┬───────────────────────┬───┬────────────┬──
    │ block                 │ 0 │ record page│ block                 │ 0 │ record page│ ...
    └───────────────────────┴───┴────────────┴───────────────────────┴───┴────────────┴──
      block_bytes             │   4096
                              └ zeros up to a multiple of 4096

    record page, little-endian
       0   8  magic "BATON-KV"
       8   4  format version
      12   4  zero
      16  16  name of the block
      32  16  hash of the layout: its fingerprint and block_bytes
      48   8  block_bytes
      56   8  sequence: higher is later, over all files of a folder
      64  16  xxh3_128 of the block
      80  16  tenant, zeros for none
      96   8  when it was stored, in Unix seconds
     104      zeros
    4088   8  xxh3_64 of the 4088 bytes before it

The page stands behind its block, so that one write brings both and, in the order of the file, the page last: a block
costs one operation, and the page of a write that was cut off is usually not there. Nothing relies on that order. A page
only says what a slot claims to hold; the claim counts once the block's checksum has been compared, which every load
does. So blocks of writes that were torn, reordered, dropped or overwritten halfway are misses.
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple

import xxhash

from kvtransfer.tiers.tenants import NOBODY

PAGE_BYTES: Final = 4096
FORMAT_VERSION: Final = 1
_MAGIC: Final = b"BATON-KV"
_CLAIM: Final = struct.Struct("<8sI4x16s16sQQ16s16sQ")
_PAGE_CHECKSUM: Final = struct.Struct("<Q")
_CHECKED_BYTES: Final = PAGE_BYTES - _PAGE_CHECKSUM.size
_MAX_SEQUENCE: Final = 1 << 63
"""Beyond what any tier reaches; a page that claims more would let the next sequence overflow."""


class Claim(NamedTuple):
    """What a record page says about the block before it."""

    name: bytes
    sequence: int
    checksum: bytes
    tenant: bytes
    stored_at: int
    """Unix seconds."""


def layout_hash(fingerprint: str, block_bytes: int) -> bytes:
    """16 bytes that differ for blocks that must not be mixed up."""
    digest = blake2b(digest_size=16, person=b"baton-layout")
    digest.update(block_bytes.to_bytes(8, "little"))
    digest.update(fingerprint.encode())
    return digest.digest()


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """Slots for blocks of one layout."""

    layout: bytes
    block_bytes: int

    @property
    def page_offset(self) -> int:
        """Where in its slot the record page starts."""
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def slot_bytes(self) -> int:
        return self.page_offset + PAGE_BYTES

    def seal(self, slot: memoryview, name: bytes, sequence: int, tenant: bytes, stored_at: int) -> None:
        """Complete a slot whose first `block_bytes` are the block; slot: [slot_bytes]."""
        checksum = xxhash.xxh3_128_digest(slot[: self.block_bytes])
        slot[self.block_bytes :] = bytes(self.slot_bytes - self.block_bytes)
        page = slot[self.page_offset :]
        _CLAIM.pack_into(
            page, 0, _MAGIC, FORMAT_VERSION, name, self.layout, self.block_bytes, sequence, checksum, tenant, stored_at
        )
        _PAGE_CHECKSUM.pack_into(page, _CHECKED_BYTES, xxhash.xxh3_64_intdigest(page[:_CHECKED_BYTES]))

    def read_page(self, page: memoryview) -> Claim | None:
        """The claim of a record page, [4096]; None when it is no whole page of this format and layout."""
        magic, version, name, layout, block_bytes, sequence, checksum, tenant, stored_at = _CLAIM.unpack_from(page)
        if (magic, version, layout, block_bytes) != (_MAGIC, FORMAT_VERSION, self.layout, self.block_bytes):
            return None
        if _PAGE_CHECKSUM.unpack_from(page, _CHECKED_BYTES)[0] != xxhash.xxh3_64_intdigest(page[:_CHECKED_BYTES]):
            return None
        if sequence >= _MAX_SEQUENCE:
            return None
        return Claim(name, sequence, checksum, tenant if any(tenant) else NOBODY, stored_at)

    def is_block(self, slot: memoryview, name: bytes) -> bool:
        """Whether a slot, [slot_bytes], holds the block of that name, every byte of it as it was stored."""
        claim = self.read_page(slot[self.page_offset :])
        if claim is None or claim.name != name:
            return False
        return xxhash.xxh3_128_digest(slot[: self.block_bytes]) == claim.checksum

    def block(self, slot: memoryview) -> memoryview:
        return slot[: self.block_bytes]
