"""However many requests come at once, a turn of the event loop begins only so many, first come, first served."""

import asyncio

import pytest

from coordinator.turns import Turns, stage


async def _begun(turns: Turns, number: int, order: list[tuple[int, int]], turn: list[int]) -> None:
    await turns.begin()
    order.append((turn[0], number))


async def _counted(turn: list[int]) -> None:
    while True:
        await asyncio.sleep(0)
        turn[0] += 1


def test_a_crowd_begins_in_its_order_and_few_in_each_turn() -> None:
    async def main() -> list[tuple[int, int]]:
        turns, turn, order = Turns(4), [0], list[tuple[int, int]]()
        clock = asyncio.create_task(_counted(turn))
        await asyncio.gather(*(_begun(turns, number, order, turn) for number in range(50)))
        assert len(turns) == 0
        clock.cancel()
        return order

    order = asyncio.run(main())
    assert [number for _, number in order] == list(range(50))
    in_turn = [turn for turn, _ in order]
    assert all(in_turn.count(turn) <= 4 for turn in in_turn)
    assert in_turn[-1] - in_turn[0] < 20, "and no turn is lost"


def test_those_that_begin_in_a_turn_go_through_their_stages_together() -> None:
    async def request(turns: Turns, number: int, order: list[str]) -> None:
        for name, ends in (("read", turns.begin), ("tokens", stage), ("route", stage)):
            order.append(f"{name} {number}")
            await ends()

    async def main() -> list[str]:
        turns, order = Turns(3), list[str]()
        await asyncio.gather(*(request(turns, number, order) for number in range(3)))
        return order

    order = asyncio.run(main())
    assert order == [f"{name} {number}" for name in ("read", "tokens", "route") for number in range(3)]


def test_one_that_finds_room_does_not_wait_and_one_that_comes_later_does_not_overtake() -> None:
    async def main() -> None:
        turns, order = Turns(2), list[tuple[int, int]]()
        for _ in range(2):
            begins = turns.begin()
            begins.send(None)  # the others of this turn come as far as this, which is no wait in the line
            assert not len(turns)
            with pytest.raises(StopIteration):
                begins.send(None)
        early = [asyncio.create_task(_begun(turns, number, order, [0])) for number in range(5)]
        while not len(turns):
            await asyncio.sleep(0)
        await asyncio.gather(_begun(turns, 5, order, [0]), *early)
        assert [number for _, number in order] == list(range(6))

    asyncio.run(main())


def test_clients_that_hang_up_leave_the_line_and_take_nobody_s_place() -> None:
    async def main() -> None:
        turns, turn, order = Turns(1), [0], list[tuple[int, int]]()
        tasks = [asyncio.create_task(_begun(turns, number, order, turn)) for number in range(9)]
        await asyncio.sleep(0)  # all of them have come
        for task in tasks[1:8]:
            task.cancel()
        clock = asyncio.create_task(_counted(turn))
        with pytest.raises(asyncio.CancelledError):
            await tasks[4]
        await tasks[8]
        clock.cancel()
        assert [number for _, number in order] == [0, 8]
        assert turn[0] < 5, "one turn, not eight"

    asyncio.run(main())
