"""The port for monitors: probes of an orchestrator, Prometheus, routers. Plain HTTP, no key, and nothing of a request.

/health    200 while this process can do its work, 503 when only a new one could
/ready     200 while it takes new work
/metrics   and other pages of what it counts, where it counts anything
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from baton.errors import ConfigurationError

_CLOSE_TIMEOUT_S = 1.0
Handler = Callable[[web.Request], Awaitable[web.Response]]
Page = Callable[[], Awaitable[bytes]]
Trouble = Callable[[], str]
"""What is wrong at the moment; empty when nothing is."""


@asynccontextmanager
async def monitored(
    host: str, port: int, unhealthy: Trouble, unready: Trouble, pages: Mapping[str, Page] | None = None
) -> AsyncIterator[int]:
    """Serves the port until the end of the block; 0 takes a free one, -1 none. Yields the port.

    Raises ConfigurationError when it cannot be opened.
    """
    if port < 0:
        yield -1
        return
    app = web.Application()
    app.router.add_get("/health", _answering(unhealthy, "alive"))
    app.router.add_get("/ready", _answering(unready, "ready"))
    for path, page in (pages or {}).items():
        app.router.add_get(path, _counting(page))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_TIMEOUT_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"--monitor-port {port} on {host} cannot be opened: {error.strerror or error}; choose another"
            ) from error
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def _answering(trouble: Trouble, well: str) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        reason = trouble()
        return web.json_response({"status": reason or well}, status=503 if reason else 200)

    return answer


def _counting(page: Page) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=await page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    return answer
