"""A worker's link for tests of what stands before it: what the worker is told is looked at."""

from collections import deque

from baton.v1 import worker_link_pb2 as wire


class Outbox(deque[wire.CoordinatorMessage]):
    reads = True

    def send(self, message: wire.CoordinatorMessage) -> bool:
        if self.reads:
            self.append(message)
        return self.reads

    def abort(self) -> None:
        """There is nobody to hang up on."""
