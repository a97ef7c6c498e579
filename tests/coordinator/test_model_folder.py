"""What --model may say, with a stand-in of the hub on loopback."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from urllib.parse import urlparse

import pytest

from baton.config import ModelOptions
from baton.errors import ModelError
from baton.model_folder import resolve_model, served_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"never fetched",
    "consolidated.safetensors": b"never fetched",
    "onnx/model.safetensors": b"never fetched",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows org/small (also as revision v1) and org/gated."""

    fetched: list[str]

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if path in ("/api/models/org/small/revision/main", "/api/models/org/small/revision/v1"):
            self._answer(json.dumps({"id": "org/small", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/org/small/revision/"):
            self._answer(b"", 404, "RevisionNotFound")
        elif path == f"/api/models/org/small/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith(f"/org/small/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/small/resolve/{COMMIT}/")
            if self.command == "GET":
                self.fetched.append(name)
            self._answer(FILES[name], etag=sha1(FILES[name]).hexdigest())
        elif "org/gated" in path:
            self._answer(b"", 403, "GatedRepo")
        else:
            self._answer(b"", 404, "RepoNotFound")

    do_HEAD = do_GET

    def _answer(self, data: bytes, status: int = 200, error: str = "", etag: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "X-Error-Code": error, "ETag": etag, "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of the stand-in and the names of files fetched from it."""
    handler = type("FreshHub", (Hub,), {"fetched": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.fetched
        server.shutdown()


CODE = """
import sys
from pathlib import Path
from baton.config import ModelOptions
from baton.errors import ModelError
from baton.model_folder import resolve_model
try:
    model = ModelOptions(model=sys.argv[1], revision=sys.argv[2])
    print(resolve_model(model, Path("/demo"), weights=sys.argv[3] == "True"))
except ModelError as error:
    print("ModelError:", error)
"""


def resolve(home: Path, endpoint: str, model: str, revision: str = "", weights: bool = True, **environment: str) -> str:
    """In a process of its own, because the hub library reads its environment when imported."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    command = [sys.executable, "-c", CODE, model, revision, str(weights)]
    run = subprocess.run(command, env=clean | settings, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.strip()


def test_a_hub_id_is_fetched_once_and_only_what_is_needed(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, fetched = hub
    folder = Path(resolve(tmp_path, endpoint, "org/small"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    }
    assert len(fetched) == 4
    assert resolve(tmp_path, endpoint, "org/small", "v1") == str(folder)
    assert len(fetched) == 4
    assert resolve(tmp_path, "http://127.0.0.1:9", "org/small", HF_HUB_OFFLINE="1") == str(folder)


def test_a_coordinator_fetches_no_weights(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, fetched = hub
    folder = Path(resolve(tmp_path, endpoint, "org/small", weights=False))
    assert sorted(path.name for path in folder.iterdir()) == sorted(fetched)
    assert set(fetched) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert resolve(tmp_path, "http://127.0.0.1:9", "org/small", weights=False, HF_HUB_OFFLINE="1") == str(folder)


@pytest.mark.parametrize(
    ("model", "revision", "environment", "says"),
    [
        ("org/nothing", "", {}, "neither a folder nor a model on"),
        ("org/gated", "", {}, "gated; accept its licence"),
        ("org/small", "nowhere", {}, "no revision 'nowhere'; change --revision"),
        ("org/small", "", {"HF_HUB_OFFLINE": "1"}, "not in the local cache and HF_HUB_OFFLINE is set"),
        ("org/small", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ("not a name!", "", {}, "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_fetched_says_what_to_change(
    tmp_path: Path, hub: tuple[str, list[str]], model: str, revision: str, environment: dict[str, str], says: str
) -> None:
    answer = resolve(tmp_path, environment.pop("HF_ENDPOINT", hub[0]), model, revision, **environment)
    assert answer.startswith(f"ModelError: --model {model} ")
    assert says in answer


def test_demo_and_folders_need_no_hub(tmp_path: Path) -> None:
    assert resolve_model(ModelOptions(), tmp_path / "demo") == tmp_path / "demo"
    assert resolve_model(ModelOptions(model=str(tmp_path)), Path("/demo")) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/folder", "./no", "../no", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(model: str) -> None:
    with pytest.raises(ModelError, match=f"--model {model} does not exist"):
        resolve_model(ModelOptions(model=model), Path("/demo"))


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(ModelOptions(model=str(tmp_path / "model.safetensors")), Path("/demo"))


def test_the_served_name_is_the_last_part_of_the_model(tmp_path: Path) -> None:
    assert served_name(ModelOptions()) == "demo"
    assert served_name(ModelOptions(model="Qwen/Qwen3-0.6B")) == "Qwen3-0.6B"
    assert served_name(ModelOptions(model=str(tmp_path / "llama") + "/")) == "llama"
    assert served_name(ModelOptions(model="x/y", served_name="mine")) == "mine"
