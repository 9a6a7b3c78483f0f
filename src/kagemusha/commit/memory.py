"""The waiting QEMU's memory: made empty before a synchronisation, then written from outside.

A page that was never sent counts as zero on both sides. The fresh QEMU has already filled some pages
(firmware, option ROMs), so these are zeroed first; from then on "not sent" and "zero" mean the same.

Only complete, verified checkpoints come here, except during the first synchronisation, when the standby
holds no checkpoint that a partial write could spoil.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np

from kagemusha.kernel.fault_point import reach
from kagemusha.kernel.pagemap import PagemapScanner
from kagemusha.kernel.vm_rw import write_ranges
from kagemusha.model.faults import Fault
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, Bytes, MemoryImage, Ranges, Runs

ZERO_BYTES = 1 << 20


class StandbyMemory:
    """All RAM blocks of the waiting QEMU process."""

    def __init__(self, pid: int, image: MemoryImage) -> None:
        self._pid = pid
        self._image = image
        self._zeros = np.zeros(ZERO_BYTES, np.uint8)

    @property
    def pages(self) -> int:
        """Length of the image in pages."""
        return self._image.pages

    def clear(self) -> int:
        """Zero every page that exists; returns the bytes written."""
        total = 0
        with closing(PagemapScanner(self._pid)) as scanner:
            for block in self._image.blocks:
                ranges = scanner.populated(block.host_addr, block.length).ranges()
                self._write_zeros(ranges)
                total += int((ranges[:, 1] - ranges[:, 0]).sum())
        return total

    def write(self, runs: Runs, data: Bytes) -> None:
        """Write runs in their order; ``data`` holds the contents of the DATA runs one behind the other.

        A page named twice ends up as the last run says.
        """
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
