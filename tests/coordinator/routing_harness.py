"""A table of workers for tests of routing: a row is a few words."""

from typing import Any

import numpy as np

from coordinator.policies.base import Cached, Work
from coordinator.routing import Route, Router
from coordinator.worker_table import IDLE, Fixed, Group, Load, WorkerTable

USUAL = Fixed(0, 0, 0, context_tokens=1600, kv_bytes_per_token=1000, max_running=64)
GROUP = Group("v", "f", 16)


class Workers:
    """`Workers(p=prefill(), d=decode(requests=3))`"""

    def __init__(self, **described: dict[str, Any]) -> None:
        self.table = WorkerTable()
        self.rows: dict[str, int] = {}
        for id, figures in described.items():
            fixed = {name: value for name, value in figures.items() if name in Fixed._fields}
            load = {name: value for name, value in figures.items() if name in Load._fields}
            row = self.rows[id] = self.table.add(id, GROUP, USUAL._replace(**fixed))
            self.table.put(row, IDLE._replace(**({"free_tokens": 1600} | load)))

    def router(self, policy: str = "least_loaded", local_prefill_tokens: int = 64) -> Router:
        return Router(self.table, policy, local_prefill_tokens)

    def choose(self, work: Work, router: Router | None = None) -> Route | None:
        return (router or self.router()).choose(work, self.table.candidates("v"))

    def route(self, work: Work, router: Router | None = None) -> Route:
        route = self.choose(work, router)
        assert route is not None
        return route

    def cached(self, **tokens: int | tuple[int, int, int]) -> Cached:
        """So many leading tokens in the pool of these workers, or in (pool, pool or host, any tier)."""
        columns = np.zeros((3, len(self.table)), np.int64)
        for id, its in tokens.items():
            columns[:, self.rows[id]] = its
        return Cached(columns)


def decode(**figures: Any) -> dict[str, Any]:
    return {"decodes": 1} | figures


def prefill(**figures: Any) -> dict[str, Any]:
    return {"prefills": 1} | figures


def mixed(**figures: Any) -> dict[str, Any]:
    return {"prefills": 1, "decodes": 1} | figures


def standby(**figures: Any) -> dict[str, Any]:
    return {"prefills": 1, "stands_in": 1} | figures
