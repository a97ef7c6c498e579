"""How much memory KV blocks get where nobody says it."""

import logging
import re
from pathlib import Path

import torch

log = logging.getLogger(__name__)
CPU_BYTES = 512 << 20
GPU_RESERVE_BYTES = 2 << 30
"""Beside weights and KV: the driver's context, activations, recordings, work space of kernels."""
HOST_SHARE = 0.4
"""Of the memory that the host has available: blocks on a device have a mirror there."""


def kv_bytes(device: torch.device, gpu_share: float) -> int:
    """After the weights have been loaded. May be too little, or nothing."""
    if device.type != "cuda":
        return CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_reserved(device)
    on_device = max(0, min(int(total * gpu_share) - weights, free) - GPU_RESERVE_BYTES)
    on_host = int(host_bytes() * HOST_SHARE)
    if on_host < on_device:
        log.warning("KV blocks get %d MiB: the host has no room to mirror %d MiB", on_host >> 20, on_device >> 20)
    return min(on_device, on_host)


def host_bytes() -> int:
    """Memory that programs could still take without anything being swapped out."""
    match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) << 10 if match else 0
