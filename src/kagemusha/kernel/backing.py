"""What the files behind a process's memory hold, whether its page table shows it or not.

Facts: a page of a shared mapping that was never touched in this process, or was swapped out or written back, has no
entry in the page table, so PAGEMAP_SCAN does not name it; its contents are there all the same. lseek(2) with
SEEK_DATA and SEEK_HOLE lists what a tmpfs file (memfd, shared anonymous memory) or a file on disk holds, swapped pages
included; a hole of any size takes a microsecond. /proc/PID/map_files opens the file of a mapping even where its
name is gone; that needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.

hugetlbfs does not tell its holes: its files look full. It counts its pages, though (st_blocks in stat(2)), also those
that are mapped nowhere. Pages that a private mapping has of its own are not the file's, and not counted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np

from kagemusha.errors import UnsupportedError
from kagemusha.kernel.process import Mapping, other_mappers, parse_maps
from kagemusha.model.memory import PAGE_BYTES, Ranges

STAT_BLOCK_BYTES = 512


class MappedFiles:
    """The files mapped in ``[start, start + length)`` of a process, as they are mapped now."""

    def __init__(self, pid: int, start: int, length: int, *, maps: Sequence[Mapping] | None = None) -> None:
        """Open them.

        :param maps: the process's memory map, if the caller has it.
        :raise GuestGoneError: the process is gone.
        :raise UnsupportedError: a file may not be opened.
        """
        self._pid = pid
        self._files: list[tuple[int, Mapping]] = []
        try:
            for mapping in parse_maps(pid) if maps is None else maps:
                if mapping.inode and mapping.start < start + length and mapping.end > start:
                    self._files.append((_open(pid, mapping), mapping))
        except BaseException:
            self.close()
            raise

    def contents(self, start: int, end: int) -> Ranges:
        """Pages of ``[start, end)`` for which a file holds data, as ``[start, end)`` addresses, ascending.

        Shape (k, 2); empty for anonymous private memory. In a private mapping these are the pages as the process
        sees them until it writes to them. All pages, if the file is hugetlbfs's.
        """
        if not self._files:
            return np.empty((0, 2), np.uint64)
        found: list[tuple[int, int]] = []
        for file, mapping in self._files:
            shift = mapping.start - mapping.offset
            first, last = max(start, mapping.start) - shift, min(end, mapping.end) - shift
            found.extend([(data + shift, hole + shift) for data, hole in _extents(file, first, last)])
        return np.array(found, np.uint64).reshape(-1, 2)

    def may_hide_more(self, shown_bytes: int) -> bool:
        """Whether files of hugetlbfs may hold pages besides the ``shown_bytes`` that the page table shows of the range.

        What it shows of a private mapping need not be the file's, so there any page of the file may be one.
        """
        private = any("p" in mapping.perms for _, mapping in self._files)
        sizes = {
            (mapping.device, mapping.inode): os.fstat(file).st_blocks * STAT_BLOCK_BYTES
            for file, mapping in self._files
        }
        return sum(sizes.values()) > (0 if private else shown_bytes)

    def other_mappers(self) -> list[int]:
        """Other processes that would see what is written into the range, because they have a file of it mapped."""
        shared = {(mapping.device, mapping.inode): mapping for _, mapping in self._files if "s" in mapping.perms}
        return sorted({pid for mapping in shared.values() for pid in other_mappers(self._pid, mapping)})

    def close(self) -> None:
        """Close the files. May be called twice."""
        files, self._files = self._files, []
        for file, _ in files:
            os.close(file)


def _open(pid: int, mapping: Mapping) -> int:
    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            f"cannot look into the file behind memory {mapping.start:#x}-{mapping.end:#x} of process {pid}: "
            f"{error.strerror}",
            operation="list file contents",
        ) from error


def _extents(file: int, start: int, end: int) -> list[tuple[int, int]]:
    """Data extents of the file in ``[start, end)``, grown to whole pages."""
    extents = []
    while start < end:
        try:
            first = os.lseek(file, start, os.SEEK_DATA)
            if first >= end:
                break
            hole = os.lseek(file, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind this
                break
            raise
        first -= first % PAGE_BYTES
        start = min(end, -(-hole // PAGE_BYTES) * PAGE_BYTES)
        extents.append((first, start))
    return extents
