"""What monitors, routers and autoscalers read of a coordinator, and where."""

import asyncio

import aiohttp
from coordinator_harness import PREFILL, running, until

from baton.v1.worker_link_pb2 import BlockCounts

NAMES = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")


async def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


def value_of(text: str, name: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return float(line.rsplit(" ", 1)[1])


def test_monitors_need_no_key_and_see_a_coordinator_get_ready_and_drain(run) -> None:
    async def scenario() -> None:
        async with running(monitor_port=0) as system:
            port = system.ports.monitor
            assert (await get(port, "/health"))[0] == 200
            assert (await get(port, "/ready"))[0] == 503
            await system.worker()
            assert (await get(port, "/ready"))[0] == 200
            # From elsewhere, or through a proxy: as before at the port of clients.
            assert (await get(system.ports.http, "/metrics", Forwarded="for=10.0.0.9"))[0] == 403
            status, text = await get(port, "/metrics", Forwarded="for=10.0.0.9")
            assert status == 200
            assert "baton_requests_total" in text
            await system.coordinator.drain()
            assert (await get(port, "/ready"))[0] == 503
            assert (await get(port, "/health"))[0] == 200, "whoever drains is not to be killed"

    run(scenario())


def test_routers_read_streams_and_kv_by_the_names_of_vllm(run) -> None:
    async def scenario() -> None:
        async with running(monitor_port=0) as system:
            text = (await get(system.ports.monitor, "/metrics"))[1]
            for name in NAMES:
                assert value_of(text, f'vllm:{name}{{model_name="demo"}}') == 0
            worker = await system.worker()
            worker.takes_up.clear()
            worker.pause_at = 1
            worker.heartbeat.blocks.MergeFrom(BlockCounts(total=100, free=40, cached=35, held=25))
            prefills = await system.worker("prefill-0", PREFILL)
            prefills.heartbeat.blocks.held = 4096  # its KV is on its way to decode
            prompts = [system.openai.completions.create(model="demo", prompt=each, max_tokens=3) for each in ("A", "B")]
            answers = [asyncio.create_task(each) for each in prompts]

            def load() -> tuple[float, ...]:
                return tuple(system.metric(f"vllm:{name}", model_name="demo") for name in NAMES)

            await until(lambda: load() == (2, 0, 0.25))
            worker.takes_up.set()
            await until(lambda: load() == (0, 2, 0.25))
            worker.go.set()
            await asyncio.gather(*answers)
            status, text = await get(system.ports.monitor, "/metrics/load")
            assert (status, value_of(text, "vllm:kv_cache_usage_perc")) == (200, 0.25)
            assert len([line for line in text.splitlines() if not line.startswith("#")]) == 4
            assert value_of(text, "vllm:cache_config_info") == 1
            assert load() == (0, 0, 0.25)

    run(scenario())


def test_the_first_request_without_a_worker_shows_as_an_increase(run) -> None:
    """Of a counter that is there before: an increase from nothing to 1 is none to Prometheus."""

    async def scenario() -> None:
        async with running(monitor_port=0) as system:
            name = 'baton_requests_refused_total{reason="unavailable"}'
            assert value_of((await get(system.ports.monitor, "/metrics"))[1], name) == 0
            async with system.http.post("/v1/completions", json={"model": "demo", "prompt": "Hi"}) as answer:
                assert answer.status == 503
            assert value_of((await get(system.ports.monitor, "/metrics"))[1], name) == 1

    run(scenario())
