"""Keeping a shared store within its size: one worker at a time walks its folder and deletes what is too much or old.

Which one is said by a lease file that holds its token and that it renews as it goes; its age, like that of every block,
is by the filesystem's clock. Two that both think they are the one, for a moment, do harm to nobody: they delete the
same files.
"""

import contextlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtransfer.tiers.records import PAGE_BYTES, RecordFormat
from kvtransfer.tiers.tenants import NOBODY

BLOCK_SUFFIX: Final = ".kv"
FOLDER_DIGITS: Final = 3
SPARE_S: Final = 120.0
"""No sweep deletes what was used in the last so many seconds, so a pin holds for that long against every worker."""
LEASE_S: Final = 300.0
"""A sweeper that has not said for so long that it lives is dead, and so is whoever writes a block for that long."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep left, in bytes, and how many blocks it deleted: for their age, and for lack of room."""

    num_bytes: int
    num_expired: int
    num_evicted: int
    num_over_share: int
    """Because their tenant had more than its share."""


class Sweeper:
    """One worker's part in it. Only `stop` may be called while another call runs. Every method raises OSError."""

    def __init__(
        self, folder: Path, record_format: RecordFormat, capacity_bytes: int, ttl_s: float, tenant_share: float
    ) -> None:
        self.stopped = threading.Event()
        self._format = record_format
        self._tenant_bytes = int(tenant_share * capacity_bytes)
        """What one tenant may have. At the capacity nothing has to be counted."""
        self._folder = folder
        self._lease = folder / "sweeper"
        self._token = secrets.token_hex(8)
        self._capacity_bytes = capacity_bytes
        self._ttl_s = ttl_s

    def stop(self) -> None:
        """A sweep that runs ends at the next folder."""
        self.stopped.set()

    def sweep(self, pinned: frozenset[str]) -> Swept | None:
        """Delete what nobody used for `ttl_s`, then the longest unused down to nine tenths of the capacity.

        None when another worker sweeps. `pinned`, names in hex, and what was used in the last SPARE_S stay. Memory
        stays small however many blocks there are: a first walk adds up bytes by the minute of their last use, a second
        one deletes. Where tenants have shares and the store holds more than one of them, another walk between the two
        reads whose each block is, which is an operation more a block.
        """
        now = self._take_lease()
        if now is None:
            return None
        bytes_of_minute: Counter[int] = Counter()
        for _, status in self._blocks(now):
            bytes_of_minute[int(status.st_mtime // 60)] += _allocated(status)
        keep_from = 60 * _oldest_minute_to_keep(bytes_of_minute, self._capacity_bytes)
        num_bytes, num_expired, num_evicted, num_over_share = sum(bytes_of_minute.values()), 0, 0, 0
        is_shared_out = self._tenant_bytes < min(num_bytes, self._capacity_bytes)
        keep_tenant_from = self._tenants_over_share(now) if is_shared_out else {}
        keep_all_from = max(keep_tenant_from.values(), default=0)
        for path, status in self._blocks(now):
            age = now - status.st_mtime
            is_expired = age >= self._ttl_s
            is_over_share = status.st_mtime < keep_all_from and status.st_mtime < keep_tenant_from.get(
                self._tenant_of(path), 0
            )
            is_due = is_expired or ((status.st_mtime < keep_from or is_over_share) and age >= SPARE_S)
            if is_due and path.stem not in pinned:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                num_bytes -= _allocated(status)
                num_expired += is_expired
                num_over_share += is_over_share and not is_expired
                num_evicted += not is_over_share and not is_expired
        return Swept(num_bytes, num_expired, num_evicted, num_over_share) if self._renew_lease() else None

    def give_up_lease(self) -> None:
        """Let another worker sweep at once."""
        with contextlib.suppress(FileNotFoundError):
            if self._lease.read_text() == self._token:
                self._lease.unlink()

    def _tenants_over_share(self, now: float) -> dict[bytes, int]:
        """Since when, in seconds, the blocks of each tenant with more than its share were used that it may keep."""
        bytes_of: dict[bytes, Counter[int]] = {}
        for path, status in self._blocks(now):
            if (tenant := self._tenant_of(path)) != NOBODY:
                bytes_of.setdefault(tenant, Counter())[int(status.st_mtime // 60)] += _allocated(status)
        minutes = {tenant: _oldest_minute_to_keep(its, self._tenant_bytes) for tenant, its in bytes_of.items()}
        return {tenant: 60 * minute for tenant, minute in minutes.items() if minute}

    def _tenant_of(self, path: Path) -> bytes:
        """As the block's record says; nobody's where that cannot be read."""
        page = bytearray(PAGE_BYTES)
        with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            file.seek(self._format.page_offset)
            file.readinto(page)
        claim = self._format.read_page(memoryview(page))
        return claim.tenant if claim is not None else NOBODY

    def _blocks(self, now: float) -> Iterator[tuple[Path, os.stat_result]]:
        """All blocks, as long as the lease is this worker's. Deletes what interrupted writes left behind."""
        for folder in self._folder.iterdir():
            if len(folder.name) != FOLDER_DIGITS:
                continue
            if not self._renew_lease():
                return
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # others delete and rename meanwhile
                    status = path.stat()
                    if path.suffix == BLOCK_SUFFIX:
                        yield path, status
                    elif now - status.st_mtime > LEASE_S:
                        path.unlink()

    def _take_lease(self) -> float | None:
        """The filesystem's time, when the lease is this worker's from now on."""
        claim = self._lease.with_suffix(f".{self._token}")
        claim.write_text(self._token)
        now = claim.stat().st_mtime
        with contextlib.suppress(FileNotFoundError):
            if self._lease.read_text() != self._token and now - self._lease.stat().st_mtime < LEASE_S:
                claim.unlink()
                return None
        claim.replace(self._lease)
        return now

    def _renew_lease(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if self._lease.read_text() == self._token and not self.stopped.is_set():
                os.utime(self._lease)
                return True
        return False


def _oldest_minute_to_keep(bytes_of_minute: Counter[int], max_bytes: int) -> int:
    """What is older has to go so that a tenth of `max_bytes` is free again; 0 when nothing has to go."""
    excess = sum(bytes_of_minute.values()) - max_bytes
    if excess <= 0:
        return 0
    excess += max_bytes // 10
    for minute in sorted(bytes_of_minute):
        excess -= bytes_of_minute[minute]
        if excess <= 0:
            return minute + 1
    return max(bytes_of_minute) + 1


def _allocated(status: os.stat_result) -> int:
    """Bytes in whole pages: what filesystems say is allocated lags behind on some of them."""
    return -(-status.st_size // PAGE_BYTES) * PAGE_BYTES
