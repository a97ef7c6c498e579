"""Token ids on the wire: octets that a peer of any byte order reads alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.block_names import block_name, packed_block_name
from baton.errors import PeerError
from baton.token_ids import count, pack, unpack


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_what_was_packed_comes_out(token_ids: list[int]) -> None:
    octets = pack(token_ids)
    assert octets == b"".join(each.to_bytes(4, "little") for each in token_ids)
    assert unpack(octets) == token_ids
    assert count(octets) == len(token_ids)


def test_what_is_cut_or_too_large_is_refused() -> None:
    with pytest.raises(PeerError, match="7 bytes"):
        unpack(pack([1, 2])[:-1])
    with pytest.raises(OverflowError):
        pack([2**32])


def test_a_block_has_one_name_however_its_tokens_are_given() -> None:
    assert block_name(b"parent", [1, 2, 3]) == packed_block_name(b"parent", pack([1, 2, 3]))
