"""The small client behind `baton complete`, `baton chat` and `baton status`."""

import asyncio

import pytest
from coordinator_harness import running

from baton.client import AsyncClient, Client, ClientError


def test_the_client_streams_text_lists_models_and_sees_workers(run) -> None:
    async def main() -> None:
        async with running() as system, AsyncClient(system.url) as client:
            await system.worker(token_at=system.says("one two three"))
            deltas = [delta async for delta in client.complete("x", max_tokens=50)]
            assert "".join(delta.text for delta in deltas) == "one two three"
            assert deltas[-1].finish_reason == "stop"
            chat = [delta.text async for delta in client.chat([{"role": "user", "content": "x"}], temperature=0)]
            assert "".join(chat) == "one two three"
            assert await client.models() == ["demo"]
            assert [worker["id"] for worker in (await client.status())["workers"]] == ["decode-0"]

    run(main())


def test_errors_come_in_the_servers_words(run) -> None:
    async def main() -> None:
        async with running(worker_return_s=0.2) as system, AsyncClient(system.url) as client:
            with pytest.raises(ClientError, match="no worker that can decode") as raised:
                await anext(aiter(client.complete("x")))
            assert raised.value.status == 503
            worker = await system.worker()
            with pytest.raises(ClientError, match="temperature must be") as raised:
                await anext(aiter(client.complete("x", temperature=-1)))
            assert raised.value.status == 400
            worker.pause_at = 2
            deltas = aiter(client.complete("x", max_tokens=9))
            await anext(deltas)
            await worker.stop()
            with pytest.raises(ClientError, match="no worker that can decode this is left"):
                async for _ in deltas:
                    pass

    run(main())


def test_nobody_there_says_how_to_start_one(run) -> None:
    async def main() -> None:
        async with AsyncClient("http://127.0.0.1:9") as client:
            with pytest.raises(ClientError, match="baton serve"):
                await client.status()

    run(main())


def test_of_several_addresses_one_that_can_serve_is_asked(run) -> None:
    async def main() -> None:
        async with running() as drains, running() as serves:
            await drains.worker()
            drains.coordinator.dispatcher.draining = True
            await serves.worker(token_at=serves.says("one two"))
            addresses = f"http://127.0.0.1:9,{drains.url},{serves.url}"
            async with AsyncClient(addresses) as client:
                assert "".join([delta.text async for delta in client.complete("x", max_tokens=9)]) == "one two"
            serves.coordinator.dispatcher.draining = True
            async with AsyncClient(addresses) as client:
                with pytest.raises(ClientError, match="shutting down"):
                    await anext(aiter(client.complete("x")))

    run(main())


def test_what_came_by_a_closing_connection_is_asked_again_at_once(run) -> None:
    """Nobody has it, so nobody is asked for it."""

    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.token_at = system.says("one two")
            taken = 0

            async def front(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal taken
                taken += 1
                head = await reader.readuntil(b"\r\n\r\n")
                if taken > 1:
                    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", system.ports.http)
                    up_writer.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                    up_writer.write(await reader.read(1 << 16))
                    writer.write(await up_reader.read())
                    up_writer.close()
                writer.close()

            server = await asyncio.start_server(front, "127.0.0.1", 0)
            async with server, AsyncClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
                assert "".join([delta.text async for delta in client.complete("x", max_tokens=9)]) == "one two"
            assert taken == 2
            assert system.metric("baton_requests_resumed_total", how="unknown") == 0

    run(main())


def test_the_synchronous_client_does_the_same(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker(token_at=system.says("one two three"))

            def use() -> list[str]:
                with Client(system.url) as client:
                    words = [delta.text for delta in client.complete("x", max_tokens=50)]
                    words += [delta.text for delta in client.chat([{"role": "user", "content": "x"}])]
                    return [*words, *client.models(), client.status()["state"]]

            words = await asyncio.get_running_loop().run_in_executor(None, use)
            assert "".join(words) == "one two three" * 2 + "demo" + "ready"

    run(main())
