"""What the tests of a pair of workers have in common."""

import pytest

from engine.outside import Sources


@pytest.fixture(autouse=True)
def blocks_are_worth_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a busy machine has measured: computing a block of a tiny model takes hardly longer than loading it."""
    unknown = property(lambda self: None, lambda self, seconds: None)
    monkeypatch.setattr(Sources, "block_compute_s", unknown, raising=False)
