import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))
sys.path.insert(0, str(Path(__file__).parent))

from coordinator_harness import run  # noqa: F401 - a fixture
