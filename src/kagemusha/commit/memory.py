"""The waiting QEMU's memory: made empty before a synchronisation, then written from outside.

A page that was never sent counts as zero on both sides. But the fresh QEMU has already filled some pages
(firmware, option ROMs), an earlier session has filled many, and a file that QEMU has opened as it was has those of a
former guest. So these are zeroed first; from then on "not sent" and "zero" mean the same.

The page table does not show all of them, as on the primary (:mod:`kagemusha.kernel.backing`).

Invariant: nobody but :class:`StandbyMemory` writes to a waiting QEMU's memory, so what it has cleared is clear until it
writes. A guest that was let run has ended the waiting, and its memory is not cleared any more.

Only complete, verified checkpoints come here, except during the first synchronisation, when the standby
holds no checkpoint that a partial write could spoil.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from kagemusha.errors import UnsupportedError
from kagemusha.kernel.backing import MappedFiles
from kagemusha.kernel.fault_point import reach
from kagemusha.kernel.pagemap import PagemapScanner, joined
from kagemusha.kernel.process import Mapping, parse_maps
from kagemusha.kernel.vm_rw import write_ranges
from kagemusha.model.faults import Fault
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, Bytes, MemoryImage, RamBlock, Ranges, Runs

ZERO_BYTES = 1 << 20


class StandbyMemory:
    """All RAM blocks of the waiting QEMU process."""

    def __init__(self, pid: int, image: MemoryImage) -> None:
        """:raise GuestGoneError: the process is gone."""
        self._pid = pid
        self._image = image
        self._zeros = np.zeros(ZERO_BYTES, np.uint8)
        self._has_files = _has_files(parse_maps(pid), image)
        self._is_clear = False

    @property
    def pages(self) -> int:
        """Length of the image in pages."""
        return self._image.pages

    def clear(self) -> int:
        """Zero every page that holds anything; returns the bytes written.

        Does nothing if nothing was written since the last time. With a large guest it takes longer than a primary waits
        for its welcome; the pages still exist afterwards, so it would take as long when that primary calls again.

        :raise GuestGoneError: the process is gone.
        :raise UnsupportedError: a file behind the memory cannot be looked into, or is another process's memory, too.
            Nothing was written.
        """
        if self._is_clear:
            return 0
        with closing(PagemapScanner(self._pid)) as scanner:
            # To read the map takes longer than to look for the pages, and memory that has no file gets none.
            maps = parse_maps(self._pid) if self._has_files else []
            contents = [self._contents(block, scanner, maps) for block in self._image.blocks]
        for ranges in contents:
            self._write_zeros(ranges)
        self._is_clear = True
        return sum(int((ranges[:, 1] - ranges[:, 0]).sum()) for ranges in contents)

    def write(self, runs: Runs, data: Bytes) -> None:
        """Write runs in their order; ``data`` holds the contents of the DATA runs one behind the other.

        A page named twice ends up as the last run says.
        """
        self._is_clear = False
        offset = 0
        for part in _ascending_parts(runs):
            is_data = part["kind"] == RUN_DATA
            size = int(part["count"][is_data].sum(dtype=np.int64)) * PAGE_BYTES
            if size:
                ranges = self._image.host_ranges(part[is_data])
                write_ranges(self._pid, ranges, data[offset : offset + size])
                reach(Fault.STANDBY_APPLYING)
            if not is_data.all():
                self._write_zeros(self._image.host_ranges(part[~is_data]))
            offset += size

    def _contents(self, block: RamBlock, scanner: PagemapScanner, maps: Sequence[Mapping]) -> Ranges:
        """Pages of the block that may be other than zero, as address ranges."""
        start, end = block.host_addr, block.host_addr + block.length
        shown = scanner.populated(start, block.length).ranges()
        with closing(MappedFiles(self._pid, start, block.length, maps=maps)) as files:
            # Two QEMUs on one host with the same file: this would be the end of the other's guest.
            if others := files.other_mappers():
                raise UnsupportedError(
                    f"the memory of RAM block {block.name!r} is shared with process {', '.join(map(str, others))}",
                    operation="clear the standby's memory",
                    hint="each QEMU needs a memory file of its own",
                )
            if block.page_bytes <= PAGE_BYTES:
                return joined([shown, files.contents(start, end)])
            if files.may_hide_more(int((shown[:, 1] - shown[:, 0]).sum())):
                return np.array([[start, end]], np.uint64)
            return shown

    def _write_zeros(self, ranges: Ranges) -> None:
        """Zero these address ranges, in groups no larger than the buffer of zeros."""
        pieces = _split(ranges, ZERO_BYTES)
        sizes = (pieces[:, 1] - pieces[:, 0]).astype(np.int64)
        groups = (np.cumsum(sizes) - 1) // ZERO_BYTES
        borders = np.flatnonzero(np.diff(groups)) + 1
        for group, lengths in zip(np.split(pieces, borders), np.split(sizes, borders), strict=True):
            size = int(lengths.sum())
            if size <= ZERO_BYTES:
                write_ranges(self._pid, group, self._zeros[:size])
                continue
            # A group may be longer than the buffer by less than a piece; its pieces go out one by one then.
            for piece, length in zip(group, lengths, strict=True):
                write_ranges(self._pid, piece[np.newaxis, :], self._zeros[: int(length)])


def _has_files(maps: Sequence[Mapping], image: MemoryImage) -> bool:
    """Whether a file is behind any of the blocks."""
    files = [mapping for mapping in maps if mapping.inode]
    return any(
        file.start < block.host_addr + block.length and file.end > block.host_addr
        for block in image.blocks
        for file in files
    )


def _ascending_parts(runs: Runs) -> list[Runs]:
    """Cut where a run does not begin behind the one before it."""
    if len(runs) < 2:
        return [runs] if len(runs) else []
    ends = runs["page"][:-1] + runs["count"][:-1]
    cuts = np.flatnonzero(runs["page"][1:] < ends) + 1
    return list(np.split(runs, cuts))


def _split(ranges: Ranges, limit: int) -> Ranges:
    """The same ranges, none longer than ``limit`` bytes."""
    sizes = (ranges[:, 1] - ranges[:, 0]).astype(np.int64)
    counts = np.maximum(1, -(-sizes // limit))
    starts = np.repeat(ranges[:, 0].astype(np.int64), counts)
    ends = np.repeat(ranges[:, 1].astype(np.int64), counts)
    order = np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.empty((len(starts), 2), np.uint64)
    pieces[:, 0] = starts + order * limit
    pieces[:, 1] = np.minimum(starts + (order + 1) * limit, ends)
    return pieces
