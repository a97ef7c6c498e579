"""What is written in one turn of the event loop leaves at its end, in order and whole, whatever becomes of others."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from baton import cork as module
from baton.cork import Cork


class Inner:
    """A connection's transport, and what happened to it and to the others of its test, in order."""

    def __init__(self, name: str, order: list[tuple[str, Any]]) -> None:
        self.name, self.order, self.closing, self.broken, self.unsent = name, order, False, False, 0

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        if self.broken:
            raise RuntimeError("it is broken")
        self.order.append((self.name, data))

    def write_eof(self) -> None:
        self.order.append((self.name, "eof"))

    def close(self) -> None:
        self.closing = True
        self.order.append((self.name, "close"))

    def abort(self) -> None:
        self.closing = True
        self.order.append((self.name, "abort"))

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str, default: object = None) -> str:
        return name + " of " + self.name


def pair(cork: Cork) -> tuple[Any, Any, Inner, Inner, list[tuple[str, Any]]]:
    order: list[tuple[str, Any]] = []
    a, b = Inner("a", order), Inner("b", order)
    return cork.transport(a), cork.transport(b), a, b, order  # type: ignore[arg-type]


def test_the_first_write_of_a_turn_leaves_at_once_and_the_others_at_its_end_one_for_each_connection() -> None:
    async def main() -> None:
        a, b, _, _, order = pair(Cork())
        a.write(b"first")
        assert order == [("a", b"first")]
        for number in range(3):
            a.write(b"a%d" % number)
            b.writelines([b"b", b"%d" % number])
        assert a.get_write_buffer_size() == 6
        assert len(order) == 1
        await asyncio.sleep(0)
        assert order[1:] == [("a", b"a0a1a2"), ("b", b"b0b1b2")]
        assert a.get_write_buffer_size() == 0
        b.write(b"next")
        assert order[3:] == [("b", b"next")]
        assert a.get_extra_info("name") == "name of a"

    asyncio.run(main())


def test_a_long_turn_keeps_nothing_back_for_longer_than_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        clock = SimpleNamespace(now=5.0)
        monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
        a, b, _, _, order = pair(Cork())
        b.write(b"first")
        clock.now += 1.0
        a.write(b"a")
        clock.now += module.MAX_HELD_S / 2
        b.write(b"b")
        assert order == [("b", b"first")]
        clock.now += module.MAX_HELD_S
        b.write(b"c")  # on any of them
        assert order[1:] == [("a", b"a"), ("b", b"bc")]
        a.write(b"d")
        assert len(order) == 3, "its time begins anew"
        await asyncio.sleep(0)
        assert order[3:] == [("a", b"d")]

    asyncio.run(main())


def test_much_and_what_must_wait_anyway_is_not_held_back() -> None:
    """Whoever writes must see at once that a connection takes no more."""

    async def main() -> None:
        a, b, inner, _, order = pair(Cork())
        b.write(b"first")
        much = bytes(module.MAX_HELD_BYTES)
        a.write(b"a")
        assert not a.stuck
        inner.unsent = len(much)
        a.write(much)
        assert order[1:] == [("a", b"a" + much)]
        assert a.stuck
        a.write(b"behind")
        b.write(b"b")
        assert order[2:] == [("a", b"behind")]
        assert a.get_write_buffer_size() == len(much)
        await asyncio.sleep(0)
        assert order[3:] == [("b", b"b")]

    asyncio.run(main())


def test_who_says_that_it_has_said_all_has_said_what_was_held_back() -> None:
    async def main() -> None:
        a, b, _, _, order = pair(Cork())
        b.write(b"first")
        a.write(b"a")
        b.write(b"b")
        a.write_eof()
        b.close()
        assert order[1:] == [("a", b"a"), ("a", "eof"), ("b", b"b"), ("b", "close")]
        await asyncio.sleep(0)
        assert len(order) == 5

    asyncio.run(main())


def test_a_connection_that_cannot_be_written_to_is_hung_up_on_and_the_others_are_written() -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        a, b, inner, _, order = pair(Cork())
        inner.broken = True
        b.write(b"first")
        a.write(b"lost")
        b.write(b"b")
        await asyncio.sleep(0)
        assert order[1:] == [("a", "abort"), ("b", b"b")]
        assert isinstance(told[0]["exception"], RuntimeError)
        b.write(b"first")
        a.write(b"nobody reads it")
        await asyncio.sleep(0)
        assert len(order) == 4

    asyncio.run(main())
