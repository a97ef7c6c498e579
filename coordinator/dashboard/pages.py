"""Serves the dashboard: files that everybody may have, as they say nothing, and the feed for those who may see it."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Final

from aiohttp import web

ROOT: Final = "/dashboard"
FEED: Final = f"{ROOT}/feed"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_INDEX: Final = "index.html"
_FILES: Final = {
    ROOT if file.name == _INDEX else f"{ROOT}/{file.name}": (file.read_bytes(), _TYPES[Path(file.name).suffix])
    for file in files(__package__).joinpath("static").iterdir()
    if Path(file.name).suffix in _TYPES
}
PAGES: Final = frozenset({*_FILES, f"{ROOT}/"})
"""Paths that need no key: a browser that opens a page has none yet."""
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Pages:
    def __init__(self, feed: Callable[[], bytes], check: Callable[[web.Request], None]) -> None:
        """`check` raises web.HTTPForbidden for who may not see the feed."""
        self._feed = feed
        self._check = check

    def install(self, app: web.Application) -> None:
        for path in _FILES:
            app.router.add_get(path, self._file)
        app.router.add_get(f"{ROOT}/", self._moved)
        app.router.add_get(FEED, self._figures)

    async def _file(self, http: web.Request) -> web.Response:
        body, type = _FILES[http.path]
        return web.Response(body=body, content_type=type, charset="utf-8", headers=_HEADERS)

    async def _moved(self, http: web.Request) -> web.Response:
        return web.Response(status=308, headers=_HEADERS | {"Location": f"..{ROOT}"})

    async def _figures(self, http: web.Request) -> web.Response:
        self._check(http)
        headers = _HEADERS | {"Cache-Control": "no-store"}
        return web.Response(body=self._feed(), content_type="application/json", headers=headers)
