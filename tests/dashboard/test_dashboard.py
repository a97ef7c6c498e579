"""The page in a real browser: what an operator sees, by mouse and by keyboard, in both themes."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet
from tenant_files import KeyFile

pytestmark = pytest.mark.usefixtures("chromium")  # first: without it nothing is started
Open = Callable[..., Any]
ELSEWHERE = {"extra_http_headers": {"X-Forwarded-For": "203.0.113.9"}}
"""As if from another machine."""
HTML = "<img src=x onerror=alert(1)>&amp;"


def until(page: Any, script: str, timeout_s: float = 15.0) -> None:
    """The driver's own wait needs `eval` in the page, which the page's policy forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(script):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {script}\n{page.inner_text('body')}"
        page.wait_for_timeout(50)


def body_rows(page: Any, table: str) -> list[str]:
    return page.locator(f"#{table} tbody tr").all_inner_texts()


def test_it_loads_offline_and_shows_workers_and_requests_on_their_way(fleet: Fleet, open_page: Open) -> None:
    page = open_page(fleet.url)
    for _ in range(3):
        fleet.stream("word " * 50, 400)
    until(page, "document.querySelector('[data-stage=decode] .value')?.textContent === '3'")
    until(page, "document.querySelectorAll('#streams tbody tr[data-key*=\"/\"]').length === 3")
    assert page.locator("#pulse").inner_text() == "live"
    workers = body_rows(page, "workers")
    assert [row.split()[0] for row in workers] == ["p-prefill-0", "p-prefill-1", "d-decode-0", "e-decode-0"]
    assert all("ready" in row for row in workers)
    assert "All well" in page.locator("#verdict-line").inner_text()
    # Figures move: tokens come, and the latencies of this minute have bars.
    until(page, "/^[1-9]/.test(document.querySelector('#tiles .tile .value')?.textContent)")
    until(page, "document.querySelectorAll('.histogram rect[height]:not([height=\"0\"])').length > 2")
    assert "joined" in page.locator("#journal").inner_text()


def test_a_killed_worker_is_shown_as_lost_and_its_requests_as_recovered(tmp_path: Path, open_page: Open) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.fakes("d", "decode", "--step-ms", "20")
        page = open_page(fleet.url)
        for _ in range(3):
            fleet.stream("hello", 150)
        fleet.wait_for(lambda feed: feed["on_their_way"]["stages"]["decode"] == 3, "three streams")
        fleet.kill("d")
        fleet.fakes("e", "decode", "--step-ms", "20")  # only now: to start takes longer than the streams, sometimes
        until(page, "/d-decode-0 died/.test(document.querySelector('#verdict').textContent)")
        until(page, "document.querySelector('#verdict').dataset.level === 'warn'")  # bad until the page knows of e
        lost = page.locator("#workers tr", has_text="d-decode-0")
        assert "lost" in lost.inner_text()
        until(page, "/3 completed elsewhere/.test(document.querySelector('#losses tbody').textContent)")
        again = page.locator("#fault-counts div", has_text="Attempts begun again")
        assert again.inner_text().split("\n")[1].startswith("3")


def test_the_playground_streams_a_chat_and_stops_it(fleet: Fleet, open_page: Open) -> None:
    page = open_page(fleet.url)
    page.get_by_role("tab", name="Playground").click()
    until(page, "document.querySelector('#model').value === 'demo'")
    page.locator("#max-tokens").fill("2000")
    page.locator("#question").fill("Tell me of relays")
    page.locator("#question").press("Enter")
    until(page, "document.querySelector('.messages .model .said')?.textContent.length > 40")
    early = page.locator(".messages .model .said").inner_text()
    until(page, f"document.querySelector('.messages .model .said').textContent.length > {len(early)}")
    page.locator("#question").press("Escape")
    until(page, "/^stopped · first token after/.test(document.querySelector('.messages .model .note').textContent)")
    assert "Tell me of relays" in page.locator(".messages .user").inner_text()
    fleet.wait_for(lambda feed: not _chats(feed), "the stopped chat is aborted")
    # Nothing of it is in the other view.
    page.get_by_role("tab", name="Cluster").click()
    until(page, "!document.querySelector('#cluster').hidden")
    assert "relays" not in page.locator("#cluster").inner_text()
    page.get_by_role("tab", name="Playground").click()
    page.locator("#max-tokens").fill("5")
    page.locator("#question").fill("Again")
    page.get_by_role("button", name="Send").click()
    until(page, "/5 tokens/.test(document.querySelector('.messages li:last-child .note').textContent)")


def _chats(feed: dict[str, Any]) -> list[Any]:
    return [row for row in feed["on_their_way"]["shown"] if row["max_tokens"] == 2000]


def test_everything_is_reached_by_keyboard_and_where_the_focus_is_can_be_seen(fleet: Fleet, open_page: Open) -> None:
    page = open_page(fleet.url)
    until(page, "document.querySelector('#pulse').dataset.state === 'live'")
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(focused)
        if name == "BODY" or name in seen:
            break
        seen.append(name)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline not in ("none", "") or name == "recent", name
    for wanted in ("skip", "tab-cluster", "pause", "key-open", "theme", "filter", "scroll"):
        assert any(name.startswith(wanted) for name in seen), (wanted, seen)
    # Tabs by arrows, as screen readers announce them.
    page.locator("#tab-cluster").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "tab-playground"
    page.locator("#playground").wait_for(state="visible")  # the page shows it when the browser tells it of the address
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "tab-cluster"
    page.locator("#cluster").wait_for(state="visible")
    page.locator("#pause").press("Enter")
    assert page.locator("#pulse").inner_text() == "paused"
    page.locator("#pause").press(" ")
    # The dialog takes the focus, Escape gives it back.
    page.locator("#key-open").press("Enter")
    assert page.evaluate(focused) == "key"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "key-open"
    # The filter leaves what matches.
    page.locator("#filter").fill("e-dec")
    until(page, "document.querySelectorAll('#workers tbody tr').length === 1")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes_and_the_choice_of_one_is_kept(
    fleet: Fleet, open_page: Open, theme: str
) -> None:
    page = open_page(fleet.url, color_scheme=theme)
    until(page, "document.querySelector('#pulse').dataset.state === 'live'")
    for selector in ("body", ".facts", ".tile .name", "th", "#verdict-line", ".good", ".stages .note", "button"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    other = "dark" if theme == "light" else "light"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").select_option(other)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    for selector in ("body", ".tile .name", "th"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == other


CONTRAST = """selector => {
  const numbers = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((value) => value / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const node = document.querySelector(selector);
  let behind = node;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [one, other] = [light(getComputedStyle(node).color), light(getComputedStyle(behind).backgroundColor)].sort();
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
}"""  # noqa: E501 - a formula


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, KeyFile]]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = KeyFile(folder / "keys.toml", ops='scopes = ["infer", "operate"]', app="")
    with Fleet(folder, "--keys", str(keys.path)) as fleet:
        fleet.fakes(HTML, "decode")
        yield fleet, keys


def test_names_of_workers_are_text_and_the_policy_refuses_whatever_else_would_be_html(
    guarded: tuple[Fleet, KeyFile], open_page: Open
) -> None:
    page = open_page(guarded[0].url, expected=("Content Security Policy", "TrustedHTML"))
    until(page, "document.querySelectorAll('#workers tbody tr[data-key*=img]').length === 1")
    assert HTML in body_rows(page, "workers")[0]
    assert page.locator("main img").count() == 0
    page.evaluate("""() => {
        window.violated = [];
        document.addEventListener("securitypolicyviolation",
            (event) => window.violated.push(event.violatedDirective));
    }""")
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"1\">x</b>')")
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    until(page, "window.violated.includes('style-src-attr')")


def test_who_may_not_see_it_reads_why_and_an_operators_key_opens_it_in_this_tab_alone(
    guarded: tuple[Fleet, KeyFile], open_page: Open
) -> None:
    fleet, keys = guarded
    page = open_page(fleet.url, expected=("Failed to load resource",), **ELSEWHERE)
    until(page, "!document.querySelector('#refused').hidden")
    assert not page.locator("#cluster").is_visible()
    said = page.locator("#refused").inner_text()
    assert "scope operate" in said
    assert "ssh -L" in said
    page.locator("#refused-key").click()
    page.locator("#key").fill(keys.keys["app"])  # without the scope
    page.locator("#key").press("Enter")
    until(page, "/With this key/.test(document.querySelector('#refused-why').textContent)")
    page.locator("#refused-key").click()
    page.locator("#key").fill(keys.keys["ops"])
    page.locator("#key").press("Enter")
    until(page, "document.querySelector('#pulse').dataset.state === 'live'")
    page.locator("#cluster").wait_for(state="visible")
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"
    assert page.evaluate("document.cookie") == ""
    assert page.evaluate("sessionStorage.getItem('baton-key')") == keys.keys["ops"]
    page.locator("#key-open").click()
    page.locator("#key-forget").click()
    until(page, "!document.querySelector('#refused').hidden")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_clients_key_is_enough_for_the_playground(guarded: tuple[Fleet, KeyFile], open_page: Open) -> None:
    fleet, keys = guarded
    page = open_page(fleet.url, expected=("Failed to load resource",), **ELSEWHERE)
    page.get_by_role("tab", name="Playground").click()
    until(page, "document.querySelector('#key-dialog').open")
    page.locator("#key").fill(keys.keys["app"])
    page.locator("#key").press("Enter")
    until(page, "document.querySelector('#model').value === 'demo'")
    page.locator("#max-tokens").fill("4")
    page.locator("#question").fill("Hello")
    page.locator("#question").press("Enter")
    until(page, "/4 tokens/.test(document.querySelector('.messages .model .note')?.textContent)")


def test_it_says_so_when_the_coordinator_does_not_answer_and_goes_on_when_it_does(
    fleet: Fleet, open_page: Open
) -> None:
    page = open_page(fleet.url, expected=("Failed to load resource",))
    until(page, "document.querySelector('#pulse').dataset.state === 'live'")
    page.context.set_offline(True)
    until(page, "document.querySelector('#pulse').dataset.state === 'stale'")
    assert re.match(r"no answer for \d+", page.locator("#pulse").inner_text())
    page.context.set_offline(False)
    until(page, "document.querySelector('#pulse').dataset.state === 'live'")


def test_two_hundred_workers_keep_it_quick(tmp_path: Path, open_page: Open) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.fakes("w", "prefill+decode", "--workers", "100")
        feed = fleet.wait_for(lambda feed: feed["num_workers"] == 200, "200 workers")
        assert len(feed["workers"]) == 200
        page = open_page(fleet.url)
        until(page, "document.querySelectorAll('#workers tbody tr').length === 200")
        page.evaluate("""() => {
            window.busy = 0;
            new PerformanceObserver((list) => list.getEntries().forEach((each) => (window.busy += each.duration)))
                .observe({ entryTypes: ["longtask"] });
        }""")
        begun = time.monotonic()
        page.wait_for_timeout(3000)
        busy = page.evaluate("window.busy") / 1e3 / (time.monotonic() - begun)
        assert busy < 0.4, f"the page is busy for {busy:.0%} of the time"
        page.locator("#filter").fill("decode-7")
        until(page, "document.querySelectorAll('#workers tbody tr').length === 11")
