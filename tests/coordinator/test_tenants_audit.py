"""The audit log: every line there once and whole, and whoever takes one out or changes one is found out."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from cli import audit as command
from cli.main import parse
from coordinator.delivery import Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.tenants import audit
from coordinator.tenants.accounts import Ended
from coordinator.tenants.audit import AuditLog, verify
from coordinator.tenants.keys import Secret

SECRET = Secret(b"s" * 32)


def ended(number: int, prompt: tuple[int, ...] = (1, 2, 3)) -> Ended:
    request = Request(f"cmpl-{number}")
    text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
    Choice(request, 0, list(prompt), wire.EngineSampling(max_tokens=9), text, False)
    return Ended(request, request.usage(), "0a1b2c3d4e5f", "completed", "acme")


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def written(path: Path, *numbers: int) -> AuditLog:
    """A log that has these, and is closed."""
    log = AuditLog(path, "demo", SECRET)
    for number in numbers:
        log.write(ended(number))
    log.close()
    return log


def ids(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [line["request"] for line in lines if line["event"] == "request"]


def test_lines_say_who_got_what_and_nothing_of_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, "demo", SECRET)
    log.write(ended(1))
    log.write(ended(2, (1, 2, 3)))
    log.write(ended(3, (1, 2, 4)))
    log.close()
    assert path.stat().st_mode & 0o777 == 0o600
    opened, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (opened["event"], opened["after"]) == ("opened", "")
    assert [line["request"] for line in lines] == ["cmpl-1", "cmpl-2", "cmpl-3"]
    one = lines[0]
    assert (one["tenant"], one["key"], one["model"], one["outcome"]) == ("acme", "0a1b2c3d4e5f", "demo", "completed")
    assert one["time"].endswith("Z")
    assert lines[0]["prompts"] == lines[1]["prompts"] != lines[2]["prompts"]
    other = AuditLog(tmp_path / "other", "demo", Secret(b"t" * 32))
    other.write(ended(1))
    other.close()
    assert json.loads((tmp_path / "other").read_text().splitlines()[1])["prompts"] != one["prompts"], "keyed"
    assert log.counts == {"written": 4, "failed": 0, "dropped": 0}
    assert verify([path], SECRET) == (4, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:2] + lines[3:], "does not follow line 1"),
        (lambda lines: lines[1:], "lines before it are missing"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "does not follow"),
        (lambda lines: [*lines[:2], lines[2].replace(b"acme", b"acne"), *lines[3:]], "was changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b'"output":0', b'"output":9'), *lines[3:]], "was changed"),
        (lambda lines: [*lines[:2], lines[2][:40] + b"\n", *lines[3:]], "no whole line"),
        (lambda lines: [*lines, lines[2]], "does not follow"),
        (lambda lines: [*lines[:2], *lines[5:]], "lines before it are missing"),
        (lambda lines: [b"[]\n", *lines], "no whole line"),
        (lambda lines: [b'{"log":[],"n":{},"chain":"' + b"0" * 32 + b'"}\n', *lines], "no whole line"),
    ],
)
def test_who_takes_a_line_out_or_changes_one_is_found_out(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 1, 2, 3, 4)
    written(path, 5, 6)  # a coordinator was started again
    lines = path.read_bytes().splitlines(keepends=True)
    assert verify([path], SECRET) == (8, [])
    path.write_bytes(b"".join(change(lines)))
    num_right, problems = verify([path], SECRET)
    assert any(says in problem for problem in problems), problems
    assert num_right >= 3
    path.write_bytes(b"".join(lines))
    assert verify([path], Secret(b"t" * 32))[0] == 0


def test_a_file_that_was_put_away_is_followed_by_a_new_one(tmp_path: Path) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path, "demo", SECRET)
    log.write(ended(1))
    until(lambda: log.counts["written"] == 2)
    path.rename(old)
    log.write(ended(2))
    log.close()
    assert (ids(old), ids(path)) == (["cmpl-1"], ["cmpl-2"])
    assert verify([old, path], SECRET) == (4, [])
    lines = old.read_bytes().splitlines(keepends=True)
    old.write_bytes(lines[0])
    assert verify([old, path], SECRET)[1] == [f"{path}:1: lines before it are missing"]


def test_several_coordinators_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, "demo", SECRET) for _ in range(3)]

    def fill(number: int) -> None:
        for at in range(100):
            logs[number].write(ended(1000 * number + at))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    assert len(set(ids(path))) == len(ids(path)) == 300
    assert verify([path], SECRET) == (303, [])


def test_a_full_disk_costs_no_line_that_may_wait_and_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, full = tmp_path / "audit.jsonl", threading.Event()
    monkeypatch.setattr(audit, "RETRY_S", 0.005)
    monkeypatch.setattr(audit, "MAX_WAITING_LINES", 4)
    write = os.write

    def writes(fd: int, data: bytes) -> int:
        if not full.is_set():
            return write(fd, data)
        if len(data) > 60:
            return write(fd, data[:60])
        raise OSError(errno.ENOSPC, "No space left on device")

    log = AuditLog(path, "demo", SECRET)
    log.write(ended(1))
    until(lambda: log.counts["written"] == 2)
    monkeypatch.setattr(os, "write", writes)
    full.set()
    log.write(ended(2))
    until(lambda: log.counts["failed"] > 2)
    for number in range(3, 10):
        log.write(ended(number))
    assert log.counts["dropped"] == 3
    full.clear()
    until(lambda: log.counts["written"] == 2 + 5 + 1)
    log.close()
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    lines = [json.loads(line) for line in whole]
    assert [line.get("request") for line in lines[1:3]] == ["cmpl-1", "cmpl-2"]
    assert [line["lines"] for line in lines if line["event"] == "dropped"] == [3]
    assert [line["request"] for line in lines if line["event"] == "request"] == [f"cmpl-{at}" for at in range(1, 7)]
    num_right, problems = verify([path], SECRET)
    assert num_right == 8
    assert problems
    assert all("no whole line" in problem for problem in problems)


def test_after_a_full_device_a_new_file_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(audit, "RETRY_S", 0.005)
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/dev/full")
    log = AuditLog(path, "demo", SECRET)
    log.write(ended(1))
    until(lambda: log.counts["failed"] > 2)
    path.unlink()
    until(lambda: log.counts["written"] == 2)
    log.close()
    assert ids(path) == ["cmpl-1"]
    assert verify([path], SECRET)[1] == []


def test_a_torn_last_line_and_a_lost_line_end_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 1)
    with path.open("ab") as file:
        file.write(b'{"log":"half a li')
    written(path, 2)
    assert [problem.partition(": ")[0] for problem in verify([path], SECRET)[1]] == [f"{path}:3"]
    path.unlink()
    written(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    written(path, 2)
    assert verify([path], SECRET) == (4, [])


def test_another_secret_begins_another_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, "demo", SECRET)
    log.write(ended(1))
    log.change_secret(SECRET)
    log.change_secret(Secret(b"t" * 32))
    log.write(ended(2))
    log.close()
    assert verify([path], SECRET)[0] == 2
    assert verify([path], Secret(b"t" * 32))[0] == 2


def test_a_place_that_cannot_be_written_to_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--audit-log .* cannot be written: No such file"):
        AuditLog(tmp_path / "no" / "audit.jsonl", "demo", SECRET)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, path = tmp_path / "keys.toml", tmp_path / "audit.jsonl"
    keys.write_text('secret = "0123456789abcdef0123456789abcdef"')
    keys.chmod(0o600)
    log = AuditLog(path, "demo", audit_secret(keys))
    for number in range(30):
        log.write(ended(number))
    log.close()
    arguments = parse(["audit", "verify", str(path), "--keys", str(keys)])
    assert command.run(arguments) == 0
    assert "31 lines are right, 0 are not" in capsys.readouterr().out
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line.replace("acme", "acne") for line in lines))
    assert command.run(arguments) == 1
    told = capsys.readouterr().out
    assert "was changed" in told
    assert "and 10 more" in told
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        command.run(parse(["audit", "verify", str(tmp_path / "none"), "--keys", str(keys)]))


def audit_secret(keys: Path) -> Secret:
    from coordinator.tenants.keys import parse_keys

    return parse_keys(keys.read_text()).secret
