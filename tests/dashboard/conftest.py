import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))

from coordinator_harness import run  # noqa: F401 - a fixture
from fleet import Fleet

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Not for longer than a module: the driver keeps an event loop in this thread, and other tests want one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium here; make system-packages installs it where it can")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make dev does that")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages in contexts of their own. What the console calls an error, and requests to others, fail the test."""
    contexts: list[Any] = []
    troubles: list[str] = []

    def opened(url: str, expected: tuple[str, ...] = (), **options: Any) -> Any:
        """`expected`: what errors may contain that are none here."""
        context = chromium.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda said: _note(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(url) else troubles.append(f"asks {asked.url}"))

        def _note(text: str) -> None:
            if not any(each in text for each in expected):
                troubles.append(text)

        page.goto(f"{url}/dashboard")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two prefill and two decode workers that answer slowly enough to be watched."""
    with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        pace = ("--step-ms", "30", "--prefill-tokens-per-s", "2000", "--blocks", "256")
        fleet.fakes("p", "prefill", "--workers", "2", *pace)
        fleet.fakes("d", "decode", *pace)
        fleet.fakes("e", "decode", *pace)
        yield fleet
