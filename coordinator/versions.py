"""Which version of the model serves a request, chosen once, when it is admitted.

Weights that differ give other tokens, so workers of several versions stand side by side and never touch each other's
streams: all attempts at a request, hand-overs and prefixes stay within the version that it was admitted to.

1. With `--rollout` the version is a function of the request's user, or else its id, and the weights.
2. A version with a weight and no worker that decodes gets nothing: the others take its share.
3. Where no version with a weight is there, or no file says anything, the oldest that is there serves everything. So
   workers of new weights get no client's request before somebody says so, or nobody else is left. A version whose
   weight is 0, or that has a shadow share, is never taken.
"""

import logging
from collections.abc import Collection
from typing import Any

from coordinator.metrics import Metrics
from coordinator.rollout import Rollout
from coordinator.workers import WorkerRegistry

events = logging.getLogger("baton.events")


class Versions:
    def __init__(self, registry: WorkerRegistry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._default = ""
        """The version that serves where no weights do."""
        self.rollout = Rollout()

    @property
    def serves(self) -> bool:
        """Some version takes clients' requests."""
        return any(not self.rollout.forbids(version) for version in self._registry.ready_versions())

    def choose(self, key: str, besides: Collection[str] = ()) -> str | None:
        """The version for a new request, None if there is none. `besides`: those that have failed it."""
        ready = [version for version in self._registry.ready_versions() if version not in besides]
        weights = {version: weight for version, weight in self.rollout.weights.items() if weight}
        if weights:
            wanted = self.rollout.pick(key, weights)
            if wanted in ready:
                return wanted
            self._metrics.version_absent.labels(wanted).inc()
            there = {version: weight for version, weight in weights.items() if version in ready}
            if there:
                return self.rollout.pick(key, there)
        return self._oldest([version for version in ready if not self.rollout.forbids(version)])

    def _oldest(self, ready: list[str]) -> str | None:
        """By the first worker that it ever had here, however they are started anew."""
        if not ready:
            return None
        before, self._default = self._default, min(ready, key=self._registry.version_starts.__getitem__)
        if before not in ("", self._default):
            events.warning("version %s serves what no weight covers; before it was %s", self._default, before)
        return self._default

    def status(self) -> list[dict[str, Any]]:
        """JSON-ready: a row a version that has workers, a weight or a shadow share."""
        workers = list(self._registry.workers.values())
        rollout, ready = self.rollout, self._registry.ready_versions()
        names = {worker.version for worker in workers} | rollout.weights.keys() | rollout.shadow.keys()
        return [
            {
                "version": name,
                "ready": name in ready,
                "workers": sum(worker.version == name for worker in workers),
                "draining": sum(worker.version == name and worker.heartbeat.draining for worker in workers),
                "weight": rollout.weights.get(name),
                "shadow": rollout.shadow.get(name, 0.0),
                "serves_unweighted": name == self._default,
            }
            for name in sorted(names)
        ]
