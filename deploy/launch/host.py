"""Where on this host one worker should run: its GPU, and the cores and the network card that are nearest to it.

All of it is read from sysfs and nvidia-smi; nothing is changed here. What somebody else decided stays: GPUs named in
CUDA_VISIBLE_DEVICES, cores that this process was given by Slurm, a container or taskset.
"""

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SYSFS = Path("/sys")
SIOCGIFADDR = 0x8915
NVIDIA_SMI_TIMEOUT_S = 60.0


class Problem(Exception):
    """The host cannot run what was asked for. The message says what to change."""


class Gpu(NamedTuple):
    number: int
    """As the driver counts them."""
    uuid: str
    pci: str
    """Address as sysfs writes it, such as 0000:3b:00.0."""


class Nic(NamedTuple):
    """A port of an RDMA card that is up."""

    name: str
    port: int
    device: Path
    """Its folder in sysfs, which says where it is plugged in."""

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class Place(NamedTuple):
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it; empty: hidden on purpose; None: this host has none."""
    cores: frozenset[int] = frozenset()
    """Empty: wherever the process may run already."""
    nic: Nic | None = None
    numa_node: int | None = None


def place(
    rank: int, environ: Mapping[str, str], gpus: Sequence[Gpu], allowed: frozenset[int], sysfs: Path = SYSFS
) -> Place:
    """Of the worker `rank` of this host, which may run on the cores `allowed`. Raises Problem."""
    name = _gpu_of(rank, environ, gpus)
    gpu = next((each for each in gpus if name and (name == str(each.number) or each.uuid.startswith(name))), None)
    nodes = _numa_nodes(sysfs)
    if gpu:
        device = _pci_device(gpu.pci, sysfs)
        node, position = _numa_node(device), gpus.index(gpu)
    else:
        # Neighbours in rank on different nodes, if there are several.
        device, position = None, rank // max(1, len(nodes))
        node = nodes[rank % len(nodes)] if len(nodes) > 1 else None
    cores = _cores(node, gpu, gpus, environ, allowed, sysfs)
    return Place(name, cores, _nearest(active_nics(sysfs), device, node, position), node)


def nvidia_gpus() -> list[Gpu]:
    """As nvidia-smi tells them; none without it. Raises Problem when it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Problem(f"nvidia-smi does not tell the GPUs ({error}); see whether it works by itself") from error
    gpus = []
    for line in found.stdout.splitlines():
        index, uuid, pci = (field.strip() for field in line.split(","))
        domain, _, rest = pci.lower().partition(":")
        gpus.append(Gpu(int(index), uuid, f"{domain[-4:]}:{rest}"))
    return gpus


def _gpu_of(rank: int, environ: Mapping[str, str], gpus: Sequence[Gpu]) -> str | None:
    given = environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(gpu.number) for gpu in gpus] if given is None else [name for name in given.split(",") if name]
    if not visible:
        return given
    if len(visible) == 1 and "SLURM_STEP_ID" in environ:
        return visible[0]  # Slurm has given each task its own
    if rank >= len(visible):
        raise Problem(
            f"worker {rank} of this host takes its GPU number {rank}, and there are {len(visible)}, counted from 0: "
            "start fewer workers, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on processors"
        )
    return visible[rank]


def active_nics(sysfs: Path = SYSFS) -> list[Nic]:
    nics = []
    for state in sorted((sysfs / "class/infiniband").glob("*/ports/*/state")):
        if "ACTIVE" in _text(state):
            card = state.parents[2]
            nics.append(Nic(card.name, int(state.parent.name), (card / "device").resolve()))
    return nics


def _nearest(nics: Sequence[Nic], device: Path | None, node: int | None, position: int) -> Nic | None:
    """The one with most bridges in common with the device, else of its node; neighbours take turns among equals."""
    if not nics:
        return None
    near = {
        nic: (_shared_bridges(nic.device, device), node is not None and _numa_node(nic.device) == node) for nic in nics
    }
    best = [nic for nic in nics if near[nic] == max(near.values())]
    return best[position % len(best)]


def _shared_bridges(one: Path, other: Path | None) -> int:
    """How far down from the root of PCI the way to both is the same: the deeper, the nearer."""
    if other is None:
        return 0
    ways = [path.parts[path.parts.index("devices") + 1 :] for path in (one, other) if "devices" in path.parts]
    shared = 0
    for mine, others in zip(*ways, strict=False) if len(ways) == 2 else ():
        if mine != others:
            break
        shared += 1
    return shared


def _cores(
    node: int | None,
    gpu: Gpu | None,
    gpus: Sequence[Gpu],
    environ: Mapping[str, str],
    allowed: frozenset[int],
    sysfs: Path,
) -> frozenset[int]:
    """Those of the NUMA node, in equal parts for its GPUs; cores that somebody gave us are not divided."""
    near = parse_cpus(_text(sysfs / f"devices/system/node/node{node}/cpulist")) if node is not None else frozenset()
    given = allowed < parse_cpus(_text(sysfs / "devices/system/cpu/online"))
    if not near & allowed or ("SLURM_JOB_ID" in environ and not given):
        return frozenset()  # other jobs of Slurm may run on this host, and where nobody says
    chosen = near & allowed
    if gpu and not given:
        neighbours = [each for each in gpus if _numa_node(_pci_device(each.pci, sysfs)) == node]
        whole = _physical_cores(chosen, sysfs)
        share = len(whole) // len(neighbours)
        first = neighbours.index(gpu) * share
        chosen = frozenset().union(*whole[first : first + share]) or chosen
    return chosen if chosen != allowed else frozenset()


def _physical_cores(cpus: frozenset[int], sysfs: Path) -> list[frozenset[int]]:
    """The threads of each, so that no two workers share one."""
    cores: dict[int, frozenset[int]] = {}
    for cpu in sorted(cpus):
        siblings = parse_cpus(_text(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) & cpus
        cores.setdefault(min(siblings, default=cpu), siblings or frozenset({cpu}))
    return list(cores.values())


def _numa_nodes(sysfs: Path) -> list[int]:
    nodes = (sysfs / "devices/system/node").glob("node[0-9]*")
    return sorted(int(path.name[4:]) for path in nodes if _text(path / "cpulist"))


def _numa_node(device: Path) -> int | None:
    found = _text(device / "numa_node")
    return int(found) if found.isdecimal() else None  # -1: the firmware does not say


def _pci_device(address: str, sysfs: Path) -> Path:
    return (sysfs / "bus/pci/devices" / address).resolve()


def parse_cpus(text: str) -> frozenset[int]:
    """From '0-3,8', as the kernel writes it."""
    cpus: set[int] = set()
    for match in re.finditer(r"(\d+)(?:-(\d+))?", text):
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cpus)


def write_cpus(cpus: frozenset[int]) -> str:
    """What `parse_cpus` reads."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def address_towards(host: str, port: int) -> str:
    """Of this host, on the network where the other is. Sends nothing. Raises Problem."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Problem(f"this host has no way to {host} ({error}); is the address right, and the network up?") from error


def address_of(interface: str) -> str:
    """Its IPv4 address. Raises Problem."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise Problem(
                f"BATON_INTERFACE is '{interface}', which has no IPv4 address here; there are {names}"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def interface_of(address: str) -> str | None:
    """That has this IPv4 address as its first; None for loopback as well, which leads nowhere else."""
    for _, name in socket.if_nameindex():
        try:
            if name != "lo" and address_of(name) == address:
                return name
        except Problem:
            continue
    return None


def _text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def allowed_cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))
