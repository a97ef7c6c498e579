"""A browser on an operator's machine opens somebody's page: the page gets nothing out of a coordinator there."""

import socket

import pytest
from coordinator_harness import DECODE, running

from coordinator.limits import is_name_of_this_machine

OPERATORS = ("/status", "/metrics", "/v1/cache/pins", "/dashboard/feed")


def test_a_page_whose_name_was_made_to_lead_here_is_not_taken_for_this_machine(run) -> None:
    async def scenario() -> None:
        async with running() as system:
            for path in OPERATORS:
                bad = ("evil.example", f"evil.example:{system.ports.http}", "127.0.0.1.evil.example")
                good = ("127.0.0.1", "localhost:1", "[::1]:1", socket.gethostname())
                for host, code in [(host, 403) for host in bad] + [(host, 200) for host in good]:
                    async with system.http.get(path, headers={"Host": host}) as answer:
                        assert answer.status == code, (path, host)
            bad_host = {"Host": "evil.example"}
            async with system.http.post("/drain", json={"version": "v"}, headers=bad_host) as answer:
                assert answer.status == 403
            async with system.http.get("/v1/requests/cmpl-some-request/trace", headers=bad_host) as answer:
                assert answer.status == 403

    run(scenario())


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("LOCALHOST", True), ("10.0.0.7", True),
     ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("[", False)],
)  # fmt: skip
def test_names_of_this_machine_are_addresses_localhost_and_its_own(host: str, is_ours: bool) -> None:
    assert is_name_of_this_machine(host) is is_ours


def test_a_page_can_send_no_request_that_changes_anything_and_read_no_answer(run) -> None:
    """What a browser sends across origins without asking first is not JSON; when it asks first, nobody says yes."""

    async def scenario() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            foreign = {"Origin": "https://evil.example"}
            for path in ("/drain", "/v1/completions", "/v1/chat/completions", "/v1/cache/pins", "/tokenize"):
                for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                    headers = foreign | {"Content-Type": kind}
                    async with system.http.post(path, data=b'{"prompt": "x"}', headers=headers) as answer:
                        assert answer.status == 415, path
                asks = foreign | {"Access-Control-Request-Method": "POST"}
                async with system.http.options(path, headers=asks) as answer:
                    assert answer.status == 405
                    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
            async with system.http.get("/v1/models", headers=foreign) as answer:
                assert not [name for name in answer.headers if name.lower().startswith("access-control")]
            assert worker.assignments == []

    run(scenario())
