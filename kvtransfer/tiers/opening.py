"""How the disk tier starts: it finds a folder that is its own, and what the segment files in it claim to hold."""

import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from baton.errors import ConfigurationError
from baton.files import replace_file, writable_folder
from kvtransfer.tiers.files import Files, aligned_buffers
from kvtransfer.tiers.records import PAGE_BYTES, Claim, RecordFormat
from kvtransfer.tiers.segments import Segment

SMALL_FILES_BYTES: Final = 64 << 10
"""Kept back for the folder itself and the small files in it."""

_MIN_SEGMENT_BYTES: Final = 64 << 20
_MAX_SEGMENTS: Final = 512
"""Every segment is an open file, of which a process may have 1024 unless somebody raised the limit."""
_MAX_SEATS: Final = 64
_NUM_SCANNERS: Final = 8
_LAYOUT_FILE: Final = "layout.txt"
_SEGMENT_FILE: Final = re.compile(r"segment-(\d{8})\.kv")

OnError = Callable[[str, OSError], None]


class FoundSegment(NamedTuple):
    segment: Segment
    claims: list[tuple[int, Claim]]
    """(slot, claim) of every whole record page of the tier's layout."""


class Found(NamedTuple):
    """`unused_bytes`: what files take that are named like segments and cannot be used."""

    segments: list[FoundSegment]
    unused_bytes: int


def segment_file(number: int) -> str:
    return f"segment-{number:08d}.kv"


def next_number(files: Files) -> int:
    """Of a segment file that does not exist yet."""
    matches = [_SEGMENT_FILE.fullmatch(file) for file in files.listdir()]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def charge(num_bytes: int) -> int:
    """What a file counts for: its bytes, and what the filesystem may need to note where they are."""
    return num_bytes + (num_bytes >> 10) + SMALL_FILES_BYTES


def slots_of_a_segment(usable_bytes: int, slot_bytes: int, segment_bytes: int | None) -> int:
    """Segments have 64 MiB, or a 512th of the capacity where that is more, or an eighth where that is less.

    Raises ConfigurationError when not even one fits.
    """
    wanted = segment_bytes or min(max(_MIN_SEGMENT_BYTES, usable_bytes // _MAX_SEGMENTS), usable_bytes // 8)
    num_slots = max(1, wanted // slot_bytes)
    needed = charge(num_slots * slot_bytes)
    if needed > usable_bytes:
        raise ConfigurationError(
            f"a disk tier of {usable_bytes + SMALL_FILES_BYTES} bytes is too small for one segment of {num_slots} "
            f"blocks; give it at least {needed + SMALL_FILES_BYTES} bytes"
        )
    return num_slots


def take_seat(folder: Path, layout: str, fingerprint: str, open_files: Callable[[Path], Files]) -> Files:
    """The first subfolder of this layout that no other process uses, locked. Raises ConfigurationError."""
    for seat in range(_MAX_SEATS):
        path = folder / f"{layout}-{seat}"
        try:
            if not (path / _LAYOUT_FILE).exists():
                writable_folder(path)
                replace_file(path / _LAYOUT_FILE, fingerprint)
            if (path / _LAYOUT_FILE).read_bytes() != fingerprint.encode():
                raise ConfigurationError(f"{path} belongs to another layout; remove it or choose another folder")
            files = open_files(path)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            if files.lock():
                return files
        except OSError as error:
            files.close()
            raise _unusable(path, error) from error
        files.close()
    raise ConfigurationError(f"{folder}: {_MAX_SEATS} workers use this folder already; choose another one")


def find_segments(files: Files, record_format: RecordFormat, on_error: OnError) -> Found:
    """Every readable segment, opened, oldest file first. Foreign files and cut-off ends are passed over."""
    names = sorted(file for file in files.listdir() if _SEGMENT_FILE.fullmatch(file))
    with ThreadPoolExecutor(_NUM_SCANNERS) as pool:
        found = list(pool.map(lambda file: _open_segment(files, record_format, file, on_error), names))
    segments = [one for one in found if isinstance(one, FoundSegment)]
    return Found(segments, sum(one for one in found if isinstance(one, int)))


def _open_segment(files: Files, record_format: RecordFormat, file: str, on_error: OnError) -> FoundSegment | int:
    """The segment, or the bytes that the file takes without being one."""
    fd, num_bytes = -1, 0
    try:
        status = files.stat(file)
        num_bytes = status.st_blocks * 512
        num_slots = status.st_size // record_format.slot_bytes
        if not stat.S_ISREG(status.st_mode):
            return num_bytes
        if num_slots == 0:  # cut off between its creation and its allocation
            files.unlink(file)
            return 0
        fd = files.open(file)
        segment = Segment(file, fd, num_slots, charge(max(status.st_size, num_bytes)))
        return FoundSegment(segment, _claims(files, record_format, segment))
    except OSError as error:
        on_error("opened", error)
        if fd >= 0:
            files.close_file(fd)
        return num_bytes


def _claims(files: Files, record_format: RecordFormat, segment: Segment) -> list[tuple[int, Claim]]:
    (page,), claims = aligned_buffers(1, PAGE_BYTES), []
    for slot in range(segment.num_slots):
        offset = slot * record_format.slot_bytes + record_format.page_offset
        if files.preadv(segment.fd, [page], offset) != PAGE_BYTES:
            continue
        claim = record_format.read_page(page)
        if claim is not None:
            claims.append((slot, claim))
    return claims


def _unusable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be used: {error.strerror}; choose another folder")
