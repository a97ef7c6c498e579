"""What a host has that matters for moving and keeping KV blocks, each found out by trying it where that is possible."""

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from baton.compiled import Unavailable
from baton.errors import BatonError, ConfigurationError
from kernels.cpu import build
from kvtransfer.memory import PoolMemory

_IO_URING_SETUP: Final = 425  # the number of the system call, on every architecture
_PAGE: Final = 4096


class Fact(NamedTuple):
    what: str
    found: str
    meaning: str = ""


def host_facts(folder: str | None) -> list[Fact]:
    """`folder`: also tried as a place for blocks on a disk. Raises ConfigurationError when it is none."""
    facts = [_processor(), _pool(), _dev_shm(), _locked_memory(), _ptrace(), _io_uring()]
    if folder is not None:
        facts.append(_direct_io(Path(folder)))
    return [*facts, _native_kernels(), _gpu()]


def _processor() -> Fact:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Fact("processor", f"{len(os.sched_getaffinity(0))} cores for this process, {_gib(memory)} of memory")


def _pool() -> Fact:
    try:
        PoolMemory.create(1, _PAGE).close()
    except BatonError as error:
        return Fact("shared memory", f"no: {error}", "no worker can run here")
    limit = _read("/sys/fs/cgroup/memory.max")
    bound = f"; this control group may use {_gib(int(limit))}" if limit.isdecimal() else ""
    return Fact("shared memory", f"memfd works{bound}", "pools count as memory of their worker")


def _dev_shm() -> Fact:
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        return Fact("/dev/shm", f"no: {error.strerror}", "only UCX and NIXL would use it")
    return Fact("/dev/shm", f"{_gib(found.f_bavail * found.f_frsize)} free", "only UCX and NIXL use it")


def _locked_memory() -> Fact:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Fact("locked memory", "unlimited", "network cards can read and write pools")
    return Fact("locked memory", f"{limit >> 10} KiB", "RDMA pins whole pools: it needs `ulimit -l unlimited`")


def _ptrace() -> Fact:
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    match scope:
        case "":
            return Fact("ptrace", "not restricted", "lane cma reads processes of the same user")
        case "0":
            return Fact("ptrace", "kernel.yama.ptrace_scope is 0", "lane cma reads processes of the same user")
    meaning = "lane cma needs 0 or the capability SYS_PTRACE; lane shm does not"
    return Fact("ptrace", f"kernel.yama.ptrace_scope is {scope}", meaning)


def _io_uring() -> Fact:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 0, None)
    code = ctypes.get_errno()
    if code in (errno.EFAULT, errno.EINVAL):  # it looked at the arguments, which are none
        return Fact("io_uring", "works")
    return Fact("io_uring", f"no: {os.strerror(code)}", "blocks on a disk are read by threads, which is as fast")


def _direct_io(folder: Path) -> Fact:
    what = f"O_DIRECT in {folder}"
    if not folder.is_dir():
        raise ConfigurationError(f"--folder is '{folder}', which is no folder")
    page = mmap.mmap(-1, _PAGE)  # memory that begins at a page, as O_DIRECT wants it
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                os.pwritev(fd, [page], 0)
                os.preadv(fd, [page], 0)
            finally:
                os.close(fd)
    except OSError as error:
        return Fact(what, f"no: {error.strerror}", "blocks kept there go through the page cache as well")
    finally:
        page.close()
    free = os.statvfs(folder)
    return Fact(what, f"works, {_gib(free.f_bavail * free.f_frsize)} free", "blocks kept there bypass the page cache")


def _native_kernels() -> Fact:
    try:
        build.library()
    except Unavailable as error:
        return Fact("native kernels", f"no: {error}", "torch computes on the processor, slower")
    return Fact("native kernels", "ready")


def _gpu() -> Fact:
    import torch  # takes seconds, and only this needs it

    if not torch.cuda.is_available():
        return Fact("GPU", "none that torch sees")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Fact("GPU", ", ".join(names))


def _read(path: str) -> str:
    """Empty where there is no such file."""
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
