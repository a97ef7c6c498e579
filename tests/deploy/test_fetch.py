"""What the init container fetches is what its pod then finds, offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.coordinator.test_model_folder import FILES, hub, resolve
from tests.deploy.manifests import objects, pods, render

__all__ = ["hub"]  # a fixture
SMALL = {"config.json", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("revision", ["", "v1"])
@pytest.mark.parametrize(("part", "wanted"), [("coordinator", SMALL), ("decode", {*SMALL, "model.safetensors"})])
def test_what_is_fetched_is_enough_and_nothing_is_fetched_in_vain(
    tmp_path: Path, hub: tuple[str, list[str]], part: str, wanted: set[str], revision: str
) -> None:
    endpoint, fetched = hub
    values = {"model": {"name": "org/small", "source": "hub", "revision": revision}}
    (pod,) = (pod for pod in pods(objects(render(values))) if pod.words()[0] == part)
    (fetch,) = pod.spec["initContainers"]
    program = Path(sys.executable).with_name(fetch["command"][0])
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HOME": str(tmp_path)}
    command = [str(program), *fetch["command"][1:], *fetch["args"]]
    subprocess.run(command, env=clean | env, check=True, timeout=60, capture_output=True)
    assert set(fetched) == wanted
    weights = part != "coordinator"
    folder = Path(resolve(tmp_path, "http://127.0.0.1:9", "org/small", revision, weights, HF_HUB_OFFLINE="1"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in wanted}
