"""What the benchmarks against peers promise, as far as it can be seen without any peer installed."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import random_model
from benchmarks.engine_peers import NAIVE, Case, Contest, add_rows, check_shape
from benchmarks.peers import arrivals, write_gguf
from benchmarks.peers import environments as environments_module
from benchmarks.peers import process as process_module
from benchmarks.peers.environments import Environment, Recipe, Unavailable, ensure, find
from benchmarks.peers.process import HERE, PeerProcess, run_script
from benchmarks.peers.protocol import Timed
from benchmarks.report import Report

RECIPE = Recipe("Peer", (("peer", "helper"),), frozenset({"peer", "helper"}), ("harm",), preload="libfast.so")
OWN = Environment(Path(sys.executable), {})
DECODE = Case(2, 8, 4, 1, "> 1 tok/s", ">= 1.6")


def environment_with(root: Path, *names: str) -> Path:
    folder = root / "peer"
    for name in names:
        about = folder / "lib" / "python3" / "site-packages" / f"{name}-1.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
    return folder


def fake_pip(folder: Path, script: str) -> None:
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_an_environment_is_used_only_when_it_holds_what_the_recipe_says(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="helper, peer not installed"):
        find(RECIPE, tmp_path)
    folder = environment_with(tmp_path, "peer", "Helper", "harm")
    with pytest.raises(Unavailable, match="harm must be removed"):
        find(RECIPE, tmp_path)
    (folder / "lib" / "python3" / "site-packages" / "harm-1.dist-info" / "METADATA").unlink()
    with pytest.raises(Unavailable, match=r"libfast\.so is not in"):
        find(RECIPE, tmp_path)
    (folder / "lib" / "libfast.so").touch()
    assert find(RECIPE, tmp_path).variables == {"LD_PRELOAD": str(folder / "lib" / "libfast.so")}


def test_an_install_that_fails_says_what_pip_said(tmp_path: Path) -> None:
    fake_pip(tmp_path / "peer", "echo nobody knows $5; exit 1")
    with pytest.raises(Unavailable, match=r"pip install.*failed: nobody knows peer"):
        ensure(RECIPE, tmp_path)


def test_an_install_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(tmp_path / "peer", "sleep 60")
    start = time.monotonic()
    with pytest.raises(Unavailable, match="not done at the deadline"):
        ensure(Recipe("Peer", (("peer",),), frozenset({"peer"}), deadline_s=0.3), tmp_path)
    assert time.monotonic() - start < 30


def test_default_environments_are_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments_module.default_root() == tmp_path / "baton" / "peers"


SIDE = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from protocol import Timed, answer_lines, claim_output
class Side:
    def next_tokens(self, prompts):
        print("a library says hello")
        return [len(prompt) for prompt in prompts]
    def decode(self, prompt, batch, new_tokens):
        return Timed(2.0, batch * new_tokens, [len(prompt) + 1 + new_tokens] * batch, [7])
    def prefill(self, prompt):
        if prompt == [0]:
            sys.exit("out of luck")
        time.sleep(60)
answer_lines(Side(), claim_output(), "a stand-in")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "side.py").write_text(SIDE)
    return str(tmp_path / "side.py")


def test_a_peer_answers_whatever_its_libraries_print(script: str) -> None:
    with PeerProcess("peer", OWN, script) as peer:
        assert peer.wait_until_ready() == "a stand-in"
        assert peer.next_tokens([[1, 2], [3]]) == [2, 1]
        assert peer.decode([1] * 8, 2, 4) == Timed(2.0, 8, [13, 13], [7])
        assert peer.decode([1] * 8, 2, 4).rate == 4.0


def test_a_peer_that_dies_is_skipped_with_its_last_words(script: str) -> None:
    with PeerProcess("peer", OWN, script) as peer:
        peer.wait_until_ready()
        with pytest.raises(Unavailable, match=r"it ended.*out of luck"):
            peer.prefill([0])


def test_a_peer_that_hangs_is_skipped_and_ended(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "QUIT_TIMEOUT_S", 0.1)
    with PeerProcess("peer", OWN, script, answer_s=0.3) as peer:
        peer.wait_until_ready()
        with pytest.raises(Unavailable, match="no answer within"):
            peer.prefill([1])


def test_a_script_that_fails_or_is_late_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit('no such model')")
    (tmp_path / "late.py").write_text("import time; time.sleep(60)")
    with pytest.raises(Unavailable, match="no such model"):
        run_script(OWN, str(tmp_path / "bad.py"), timeout_s=30)
    with pytest.raises(Unavailable, match="not done after"):
        run_script(OWN, str(tmp_path / "late.py"), timeout_s=0.3)


def test_no_script_of_the_peers_hides_a_package_from_them() -> None:
    packages = {"vllm", "llama_cpp", "gguf", "transformers", "torch", "numpy"} | set(sys.stdlib_module_names)
    assert not packages & {path.stem for path in HERE.glob("*.py")}


class StandIn:
    """Generates `missing` tokens too few; its model is another one when `shift` is not 0."""

    def __init__(self, seconds: float = 1.0, missing: int = 0, shift: int = 0) -> None:
        self.seconds, self.missing, self.shift = seconds, missing, shift

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        return [sum(prompt) + self.shift for prompt in prompts]

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        lengths = [len(prompt) + 1 + new_tokens - self.missing] * batch
        return Timed(self.seconds, batch * (new_tokens - self.missing), lengths, [])

    def prefill(self, prompt: list[int]) -> Timed:
        return Timed(self.seconds, len(prompt), [len(prompt) + 1], [])


def test_only_sides_that_did_the_same_work_are_compared() -> None:
    contest = Contest({"Baton": StandIn(1.0), "llama.cpp": StandIn(2.0), NAIVE: StandIn(0.5, missing=1)})
    contest.measure(DECODE, [1] * 8)
    contest.sides["llama.cpp"] = StandIn(4.0)  # slower this time: the best counts
    contest.measure(DECODE, [1] * 8)
    assert contest.best == {(DECODE.name, "Baton"): 8.0, (DECODE.name, "llama.cpp"): 4.0}
    assert "12" in contest.skipped[NAIVE]
    with pytest.raises(SystemExit, match=r"Baton: .*12"):
        Contest({"Baton": StandIn(missing=1)}).measure(DECODE, [1] * 8)
    with pytest.raises(Unavailable):
        check_shape(DECODE, Timed(1.0, 7, [13, 13], []))


def test_a_side_that_computes_another_model_is_left_out() -> None:
    contest = Contest({"Baton": StandIn(), "llama.cpp": StandIn(shift=1), NAIVE: StandIn()})
    report = Report("test")
    contest.check_same_model(report, [[1, 2], [3]])
    assert list(contest.sides) == ["Baton", NAIVE]
    assert "another model" in contest.skipped["llama.cpp"]
    assert [(row.name.rsplit(" ")[-1], row.met) for row in report.rows] == [("Baton", True), ("llama.cpp", False)]


def test_rows_carry_the_ratio_to_the_best_peer_and_to_each(tmp_path: Path) -> None:
    contest = Contest()
    contest.best = {(DECODE.name, name): rate for name, rate in (("Baton", 9.0), ("llama.cpp", 6.0), (NAIVE, 3.0))}
    report = Report("test")
    add_rows(report, contest, DECODE, 18.0)
    report.finish(tmp_path / "rows.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    ours = rows["decode 2 x 8: Baton"]
    assert (ours["versus"], ours["ratio"], ours["met"]) == ("best peer, llama.cpp", 1.5, True)
    best = rows["decode 2 x 8: llama.cpp"]
    assert (best["ratio"], best["goal"], best["met"]) == (1.5, ">= 1.6", False)
    assert rows[f"decode 2 x 8: {NAIVE}"]["ratio"] == 3.0
    assert rows["decode 2 x 8: limit of the machine"]["ratio"] == 0.5


def test_without_peers_there_are_still_rows_of_ours() -> None:
    contest, report = Contest(best={(DECODE.name, "Baton"): 9.0}), Report("test")
    add_rows(report, contest, DECODE, 18.0)
    assert [row.met for row in report.rows] == [True, None]


def test_gguf_has_the_bits_of_the_folder_with_heads_paired_as_llama_cpp_rotates(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(4).bfloat16(), "lm_head.weight": torch.randn(6, 4).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = {tensor.name: tensor.bits for tensor in write_gguf.read_tensors(tmp_path / "model.safetensors")}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name] == tensor.view(torch.uint16).numpy()).all()
    rows = np.arange(12, dtype=np.uint16).reshape(12, 1)
    assert write_gguf.pair_neighbours(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert write_gguf.gguf_name("model.layers.3.self_attn.q_proj.weight") == "blk.3.attn_q.weight"


SHAPE = arrivals.Shape(num_streams=2, stream_tokens=3, stream_new_tokens=5, long_tokens=9, num_long=1, vocabulary=50)


def test_gaps_are_those_between_the_tokens_of_one_stream() -> None:
    running = [[0.0, 1.0, 3.0, 3.5], [0.5, 2.5]]
    assert arrivals.gaps(running, [0, 0], [3, 1]) == [1.0, 2.0, 0.5, 2.0]
    assert arrivals.gaps(running, [1, 1], [2, 1]) == [2.0]


def test_a_stream_that_ends_early_fails_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "CALM_S", 0.05)

    async def follow(prompt: list[int], max_tokens: int, times: list[float]) -> None:
        for _ in range(max_tokens):
            await asyncio.sleep(0)
            times.append(time.perf_counter())

    with pytest.raises(RuntimeError, match="ended before"):
        asyncio.run(arrivals.measure(follow, SHAPE))


def test_a_random_model_of_before_gets_the_config_of_today_and_keeps_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    random_model.write(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == random_model.config()
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
