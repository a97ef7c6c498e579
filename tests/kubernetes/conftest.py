import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))

from coordinator_harness import run  # noqa: F401 - a fixture
