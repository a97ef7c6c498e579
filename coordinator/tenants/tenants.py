"""The tenants that the file behind `--keys` has, and their accounts at this coordinator.

Every coordinator counts for itself: with several of them a tenant that asks all may use each limit as often as there
are coordinators.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from coordinator.delivery import Request
from coordinator.failures import FailureKind, RequestFailed
from coordinator.metric_families import counters, gauges
from coordinator.tenants.accounts import Account, Ended, KeyHolder
from coordinator.tenants.audit import AuditLog
from coordinator.tenants.keys import MAX_FILE_BYTES, MAX_KEY_CHARACTERS, Keys, digest_of, parse_keys
from coordinator.watched_file import WatchedFile

events = logging.getLogger("baton.events")
POLL_S = 0.25
"""A change is taken up at the second look that sees it: a key that was taken out is refused within a second."""


class Tenants(Collector):
    def __init__(
        self, path: Path, audit_log: Path | None, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ConfigurationError for files that are no good."""
        self._clock = clock
        self._file = WatchedFile("--keys", path, parse_keys, POLL_S, MAX_FILE_BYTES, secret=True)
        self.accounts: dict[str, Account] = {}
        self._holders: dict[bytes, KeyHolder] = {}
        self._denied = Counter({"missing": 0, "malformed": 0, "unknown": 0, "expired": 0})
        self._file_errors = 0
        self.revoke: Callable[[Request], None] = lambda request: None
        """Ends what a tenant that is gone has running. Set by the server."""
        self.audit = AuditLog(audit_log, model, self._file.content.secret) if audit_log else None
        self._take(self._file.content)

    async def watch(self) -> None:
        """Until cancelled."""
        await self._file.watch(self._changed, self._broken)

    def close(self) -> None:
        """Everything that has ended is in the audit log, if that can be written."""
        if self.audit is not None:
            self.audit.close()

    def caller(self, authorization: str | None) -> KeyHolder:
        """Whose key this is. `authorization`: `Bearer` and the key. Raises RequestFailed."""
        scheme, _, text = (authorization or "").partition(" ")
        key = text.strip()
        if not authorization:
            raise self._deny("missing", "an API key is needed here: send it as Authorization: Bearer KEY")
        if scheme.lower() != "bearer" or not key or not key.isascii() or len(key) > MAX_KEY_CHARACTERS:
            raise self._deny("malformed", "Authorization must be: Bearer, a space, and an API key")
        holder = self._holders.get(digest_of(key))
        if holder is None:
            raise self._deny("unknown", "the API key is not known here; it may have been revoked")
        if holder.key.expires_at <= time.time():
            raise self._deny("expired", "the API key has expired; ask for a new one")
        return holder

    def _deny(self, reason: str, message: str) -> RequestFailed:
        self._denied[reason] += 1
        return RequestFailed(FailureKind.UNAUTHENTICATED, message)

    def _changed(self, keys: Keys) -> None:
        if self.audit is not None:
            self.audit.change_secret(keys.secret)
        self._take(keys)
        events.info("--keys: %d tenants, %d keys", len(keys.tenants), len(keys.by_digest))

    def _broken(self) -> None:
        self._file_errors += 1

    def _take(self, keys: Keys) -> None:
        for name, tenant in keys.tenants.items():
            if name in self.accounts:
                self.accounts[name].configure(tenant, keys.secret)
            else:
                self.accounts[name] = Account(name, tenant, keys.secret, self._ended, self._clock)
        # An account whose tenant is gone stays, for what it used.
        self._holders = {digest: KeyHolder(self.accounts[key.tenant], key) for digest, key in keys.by_digest.items()}
        for name, account in self.accounts.items():
            account.removed = name not in keys.tenants
            for request in list(account.running) if account.removed else ():
                self.revoke(request)

    def _ended(self, ended: Ended) -> None:
        if self.audit is not None:
            self.audit.write(ended)

    def collect(self) -> Iterator[Metric]:
        """For Prometheus. Tenants are as many as somebody wrote into the file."""
        requests = counters("baton_tenant_requests")
        refused = counters("baton_tenant_refused")
        tokens = counters("baton_tenant_tokens")
        cost = counters("baton_tenant_cost")
        streams = gauges("baton_tenant_streams")
        for name, account in self.accounts.items():
            usage = account.usage
            for outcome, number in usage.requests.items():
                requests.add_metric([name, outcome], number)
            for reason, number in usage.refused.items():
                refused.add_metric([name, reason], number)
            for kind in ("input", "cached", "output"):
                tokens.add_metric([name, kind], getattr(usage, f"{kind}_tokens"))
            cost.add_metric([name], float(usage.cost))
            streams.add_metric([name], account.num_streams)
        yield from (requests, refused, tokens, cost, streams)
        denied = counters("baton_keys_denied")
        for reason, number in self._denied.items():
            denied.add_metric([reason], number)
        yield denied
        yield counters("baton_keys_file_errors", self._file_errors)
        if self.audit is not None:
            lines = counters("baton_audit_lines")
            for event, number in self.audit.counts.items():
                lines.add_metric([event], number)
            yield lines
