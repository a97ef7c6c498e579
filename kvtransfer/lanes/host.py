"""Whether two processes share a host."""

import functools
from pathlib import Path


@functools.cache
def boot_id() -> str:
    """Names this boot of this kernel: the same in all of its containers. 'unknown' where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
