"""`baton serve` as a user meets it: one command, real processes, the clients that people use."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from openai import APIError, OpenAI

from baton.v1 import inference_pb2, inference_pb2_grpc
from cli.model import DEMO_FOLDER
from tests.system.cluster import Cluster, alive

FLOAT32 = ("--dtype", "float32", "--kv-memory", "64MiB", "--no-restart")
ROOT = Path(__file__).resolve().parents[2]
LONG_QUESTION = "What does os.path.join do? " * 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(*FLOAT32) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=cluster.url + "/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def oracle() -> "Oracle":
    return Oracle()


class Oracle:
    """transformers on the bundled model."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
        self.model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
        self.torch = torch

    def continuation(self, token_ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy tokens after the prompt, the end-of-sequence token included."""
        prompt = self.torch.tensor([token_ids])
        with self.torch.inference_mode():
            output = self.model.generate(
                prompt, attention_mask=self.torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False
            )
        tokens: list[int] = output[0, len(token_ids) :].tolist()
        return tokens


def test_it_is_ready_in_ten_seconds_on_a_quiet_machine(cluster: Cluster) -> None:
    # Three times that here: tests run side by side, and start clusters of their own.
    assert cluster.ready_after_s < 30
    assert cluster.get("/health")
    assert cluster.get("/ready")


@pytest.mark.parametrize("text", ["The list type", "A function is " * 60])
def test_completions_are_the_tokens_of_transformers(client: OpenAI, oracle: Oracle, text: str) -> None:
    prompt = oracle.tokenizer.encode(text, add_special_tokens=False)
    expected = oracle.continuation(prompt, 24)
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
    stop = [token for token in expected if token != oracle.model.generation_config.eos_token_id]
    assert answer.choices[0].text == oracle.tokenizer.decode(stop, skip_special_tokens=True)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(expected))


def test_a_streamed_completion_is_the_same_text(client: OpenAI, cluster: Cluster) -> None:
    whole = client.completions.create(model="demo", prompt=LONG_QUESTION, max_tokens=30, temperature=0)
    stream = client.completions.create(
        model="demo", prompt=LONG_QUESTION, max_tokens=30, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_streams_the_tokens_of_transformers(client: OpenAI, oracle: Oracle) -> None:
    messages = [{"role": "user", "content": "What is a generator?"}]
    prompt = oracle.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = oracle.tokenizer.decode(oracle.continuation(prompt, 40), skip_special_tokens=True)
    stream = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=40, temperature=0, stream=True  # type: ignore[arg-type]
    )  # fmt: skip
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=40, temperature=0)  # type: ignore[arg-type]
    assert streamed == expected == whole.choices[0].message.content


def test_a_long_prompt_is_handed_over_through_shared_memory(client: OpenAI, cluster: Cluster) -> None:
    before = cluster.metric("baton_worker_handover_blocks_received_total", worker="decode-0")
    client.completions.create(model="demo", prompt="Something that no cache holds. " * 50, max_tokens=2)
    cluster.wait_for(
        lambda: cluster.metric("baton_worker_handover_blocks_received_total", worker="decode-0") > before,
        "blocks arrive at the decode worker",
    )
    assert cluster.worker("decode-0")["lanes_in_use"] == {"prefill-0": "shm"}
    cluster.wait_for(cluster.is_whole, "every block free or cached")


def test_curl_streams(cluster: Cluster) -> None:
    body = {"model": "demo", "prompt": "The list type", "max_tokens": 8, "stream": True}
    json_type = "Content-Type: application/json"
    answer = subprocess.run(
        ["curl", "-sN", cluster.url + "/v1/completions", "-H", json_type, "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    events = [line.removeprefix("data: ") for line in answer.stdout.splitlines() if line.startswith("data: ")]
    assert len(events) > 3
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "text_completion" for event in events[:-1])


def test_grpc_streams_the_same_tokens_as_http(cluster: Cluster, client: OpenAI) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = inference_pb2.Sampling(max_tokens=16, temperature=0)
        responses = list(
            stub.Generate(inference_pb2.GenerateRequest(text=LONG_QUESTION, sampling=sampling), timeout=60)
        )
    http = client.completions.create(model="demo", prompt=LONG_QUESTION, max_tokens=16, temperature=0)
    assert "".join(response.text for response in responses) == http.choices[0].text


def baton(*words: str) -> str:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", *words], capture_output=True, text=True, timeout=120, check=True
    )
    return run.stdout


def test_the_command_line_clients_answer(cluster: Cluster) -> None:
    assert len(baton("chat", "What is a list?", "--url", cluster.url, "--max-tokens", "20").strip()) > 10
    assert baton("complete", "The list type", "--url", cluster.url, "--max-tokens", "8", "--temperature", "0").strip()
    assert "prefill-0" in baton("status", "--url", cluster.url)
    status = json.loads(baton("status", "--url", cluster.url, "--json"))
    assert {tuple(worker["roles"]) for worker in status["workers"]} == {("prefill",), ("decode",)}
    for worker in status["workers"]:
        assert alive(worker["pid"])
        assert worker["incarnation"]
        assert worker["address"]


def test_a_command_whose_reader_has_enough_ends_without_a_word(cluster: Cluster) -> None:
    words = ["complete", "--url", cluster.url, "--max-tokens", "400", "--temperature", "0", "The list type"]
    command = [sys.executable, "-P", "-m", "cli.main", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("language", ["python", ""])
def test_the_first_requests_of_the_readme_work(cluster: Cluster, language: str) -> None:
    section = (ROOT / "README.md").read_text().partition("## First requests")[2].partition("\n## ")[0]
    blocks = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    examples = [block for block in blocks if "127.0.0.1:" in block]
    assert len(examples) == (2 if language else 1)
    for example in examples:
        here = example.replace("http://127.0.0.1:8000", cluster.url).replace("127.0.0.1:50051", cluster.grpc)
        command = [sys.executable, "-c", here] if language else ["bash", "-c", here]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert len(run.stdout) > 20, run.stderr


def test_a_client_that_hangs_up_frees_its_blocks(cluster: Cluster, client: OpenAI) -> None:
    stream = client.completions.create(
        model="demo", prompt=LONG_QUESTION, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert cluster.worker("decode-0")["blocks"]["held"] >= 0
    stream.close()
    cluster.wait_for(cluster.is_whole, "the aborted request's blocks are free")


def test_no_text_of_a_prompt_is_in_the_log(cluster: Cluster, client: OpenAI) -> None:
    secret = "xylophone zeppelin"
    client.completions.create(model="demo", prompt=f"{secret} " * 40, max_tokens=2)
    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": secret}], max_tokens=2)
    for bad in ({"prompt": secret, "max_tokens": -1}, {"prompt": [secret, 3]}, {"prompt": secret * 10_000}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            cluster.post("/v1/completions", {"model": "demo", **bad})
        assert refused.value.code == 400
        assert secret.split()[0] not in refused.value.read().decode()
    assert "POST '/v1/completions' 400" in cluster.log(), "the log is read to its end"
    assert secret.split()[0] not in cluster.log()


def test_sigterm_lets_a_stream_end_and_takes_no_new_one() -> None:
    with Cluster(*FLOAT32) as cluster:
        client = OpenAI(base_url=cluster.url + "/v1", api_key="unused", max_retries=0, timeout=60)
        stream = client.completions.create(
            model="demo", prompt=LONG_QUESTION, max_tokens=400, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [next(stream)]
        cluster.process.send_signal(signal.SIGTERM)
        cluster.wait_for(lambda: "draining" in cluster.log(), "it drains")
        with pytest.raises(APIError):
            client.completions.create(model="demo", prompt="Hello", max_tokens=1)
        chunks += stream
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 400
        assert cluster.process.wait(30) == 0


def test_mixed_workers_serve_without_any_hand_over() -> None:
    with Cluster("--mixed", "1", *FLOAT32) as cluster:
        answer = cluster.post("/v1/completions", {"model": "demo", "prompt": LONG_QUESTION, "max_tokens": 4})
        assert answer["usage"]["completion_tokens"] >= 1
        assert cluster.metric("baton_worker_handover_blocks_received_total") == 0
        assert cluster.worker("mixed-0")["roles"] == ["prefill", "decode"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_serve(number: signal.Signals) -> None:
    with Cluster(*FLOAT32) as cluster:
        pids = cluster.pids()
        assert len(pids) == 4, "serve, coordinator, prefill, decode"
        status = cluster.stop(number)
        assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--page-size", "12"], "power of two"),
        (["--kv-memory", "lots"], "512MiB"),
        (["--deterministic", "--convert-kv-dtype"], "leave --convert-kv-dtype out"),
        (["--decode", "0"], "--decode"),
        (["--port", "70000"], "65535"),
        (["--lanes", "pigeon"], "pigeon"),
        (["--cores", "one"], "0-3,8"),
        (["--cores", "3-1"], "0-3,8"),
        (["--cores", "0,9998-9999"], "[9998, 9999]"),
    ],
)
def test_a_bad_flag_is_explained_before_anything_starts(words: list[str], message: str) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "serve", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_broken_model_folder_is_explained_before_a_port_opens(tmp_path: Path) -> None:
    for name in DEMO_FOLDER.iterdir():
        if name.suffix in (".json", ".jinja"):
            (tmp_path / name.name).write_bytes(name.read_bytes())
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    run = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "serve", "--model", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "model.safetensors" in run.stderr
    assert "Traceback" not in run.stderr
