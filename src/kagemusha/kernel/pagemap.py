"""The PAGEMAP_SCAN ioctl (Documentation/admin-guide/mm/pagemap.rst, Linux 6.7): which pages were written.

::

    struct pm_scan_arg { u64 size, flags, start, end, walk_end, vec, vec_len, max_pages,
                             category_inverted, category_mask, category_anyof_mask, return_mask; }   // 96 bytes
    struct page_region { u64 start, end, categories; }                                                // 24 bytes

Facts (each has a test):

* With PM_SCAN_WP_MATCHING the call returns the pages that match *and* write-protects them, in one step per page
  table under its lock: no write through a page table falls between.
* What does not go through the page table is not seen: writes by other processes that map the memory, pwrite(2) to the
  file behind it, and data that arrive in pages which were pinned *before* they were protected (direct I/O under
  way). So protect a guest's memory only while its I/O is drained.
* PAGE_IS_WRITTEN means: not write-protected by userfaultfd. A hole (a page never touched, or given back) counts as
  written too until a scan has protected it, which leaves a marker in it; a marker is told as PAGE_IS_SWAPPED. After
  a scan that matched holes :meth:`PagemapScanner.populated` therefore names them as well, and each costs a page table
  entry. Closing the userfaultfd removes the markers.
* What happens to a protected page that is given back depends on what backs it::

      private memory, MADV_DONTNEED          hole, counts as written, reads as zero; also if written just before
      shared memory, MADV_DONTNEED           still protected, contents kept (they are the file's)
      shared memory, punched hole            still protected: NOT reported, reads as zero
      private mapping of a file, DONTNEED    still protected: NOT reported, reads as the file
      hugetlbfs, MADV_DONTNEED               still protected: NOT reported; private ones read as zero

* A private page that is swapped out keeps its state. A shared one leaves a hole, which counts as written if the page
  was; populated() does not name it, only the file knows it (:mod:`kagemusha.kernel.backing`).
* Of a process that is gone, or whose memory is just being taken down, a scan finds nothing or fails with ESRCH: which
  of them depends on the kernel. Who has to know asks afterwards (:func:`kagemusha.kernel.vm_rw.require_memory`).
* Neighbouring pages with equal categories come as one region.
* A call that found more than 512 regions says that it ended short of where it did, so going on from there looks at
  pages again; in a process that runs, some have been written meanwhile.
* Where a huge page maps the memory, one entry stands for 2 MiB; the kernel splits it at the first write after it
  was protected, so a small write is reported small. Memory of hugetlbfs is never split, and its holes are neither
  reported nor protected.
* Reading a hole (process_vm_readv too) maps the shared zero page in private memory, but allocates a page in shared
  memory and in hugetlbfs: do not read what does not exist.

Measured on a 2-core virtual machine, nothing dirty: 1 GiB in 4 KiB pages 0.3 ms (0.7 ms where the categories of each
page are asked for), in 2 MiB pages 0.03 ms, in markers 1.2 ms, in holes without markers nothing. First protection of
1 GiB: 17 ms in 4 KiB pages, 0.2 to 1 ms in 2 MiB pages, 14 ms in holes.

The scanner owns its vector; the kernel writes into it only during the call. It decides nothing about what to
scan: see :mod:`kagemusha.kernel.write_tracker`.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence

import numpy as np

from kagemusha.errors import GuestGoneError
from kagemusha.model.memory import Ranges

_ARGUMENT = struct.Struct("<12Q")
assert _ARGUMENT.size == 96
PAGEMAP_SCAN = (3 << 30) | (_ARGUMENT.size << 16) | (ord("f") << 8) | 16

PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5

VECTOR_REGIONS = 65536
_U64 = struct.Struct("<Q")
_START_OFFSET, _WALK_END_OFFSET = 2 * 8, 4 * 8
_NO_RANGES = np.empty((0, 2), np.uint64)
_NO_REGIONS = np.empty((0, 3), np.uint64)


class Scan:
    """One scan of one range, to be made again and again: all of its argument but the end is packed once.

    A guest's pause waits for the scans of it, most of which find nothing.
    """

    def __init__(
        self,
        pagemap: int,
        vector: Ranges,
        start: int,
        length: int,
        flags: int,
        *,
        mask: int,
        returned: int,
        inverted: int = 0,
        any_of: int = 0,
    ) -> None:
        self._pagemap = pagemap
        self._vector = vector
        self._end = start + length
        self._argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size,
                flags,
                start,
                self._end,
                0,
                vector.ctypes.data,
                VECTOR_REGIONS,
                0,
                inverted,
                mask,
                any_of,
                returned,
            )
        )

    def ranges(self) -> Ranges:
        """What the scan finds, as ``[start, end)`` addresses, ascending, shape (k, 2)."""
        regions = self.regions()
        return merged(np.ascontiguousarray(regions[:, :2])) if len(regions) else _NO_RANGES

    def regions(self) -> Ranges:
        """Regions with their categories, shape (k, 3), ascending, of as many calls as the kernel makes necessary.

        A call that found many regions may end short of where it has looked, so the next one looks at some of it again:
        a page that was written meanwhile is in both.

        :raise OSError: the range is not registered for asynchronous write protection.
        """
        argument = self._argument
        found = []
        while True:
            count = fcntl.ioctl(self._pagemap, PAGEMAP_SCAN, argument)
            if count:
                found.append(self._vector[:count].copy())
            (walk_end,) = _U64.unpack_from(argument, _WALK_END_OFFSET)
            if walk_end >= self._end:
                break
            argument = bytearray(argument)
            _U64.pack_into(argument, _START_OFFSET, walk_end)
        if not found:
            return _NO_REGIONS
        if len(found) == 1:
            return found[0]
        regions = np.concatenate(found)
        return regions[np.argsort(regions[:, 0], kind="stable")]


class PagemapScanner:
    """Scans one process's memory."""

    def __init__(self, pid: int) -> None:
        """:raise GuestGoneError: the process is gone."""
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise GuestGoneError(f"process {pid}: {error.strerror}", operation="open pagemap") from error
        self._vector = np.zeros((VECTOR_REGIONS, 3), np.uint64)

    def close(self) -> None:
        """Give up the descriptor; no scan may be made afterwards."""
        os.close(self._pagemap)

    def take_written(self, start: int, length: int) -> Scan:
        """Pages written since they were last protected; protected with the scan.

        Its :class:`OSError`: the range is not registered for asynchronous write protection, or the process is gone.
        """
        flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        return self._scan(start, length, flags, mask=PAGE_IS_WRITTEN, returned=PAGE_IS_WRITTEN)

    def written(self, start: int, length: int) -> Scan:
        """As :meth:`take_written`, but nothing is changed."""
        return self._scan(start, length, PM_SCAN_CHECK_WPASYNC, mask=PAGE_IS_WRITTEN, returned=PAGE_IS_WRITTEN)

    def populated(self, start: int, length: int) -> Scan:
        """Pages with contents of their own, in memory or swapped out; not those that map the shared zero page.

        Holes that an earlier scan protected count as swapped out.
        """
        return self._scan(
            start,
            length,
            0,
            inverted=PAGE_IS_PFNZERO,
            mask=PAGE_IS_PFNZERO,
            any_of=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            returned=PAGE_IS_PRESENT,
        )

    def arm(self, start: int, length: int) -> Ranges:
        """Protect every page and every hole; returns the pages that exist and were written since last protected.

        Not while the process runs: a page that comes into being during the scan may be protected and told as a hole.

        Pages that map the shared zero page count as holes here.

        :raise OSError: as :meth:`take_written`.
        """
        flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        asked = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO
        regions = self._scan(start, length, flags, mask=0, returned=asked).regions()
        kinds = regions[:, 2]
        exists = (kinds & np.uint64(PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) != 0
        own = (kinds & np.uint64(PAGE_IS_WRITTEN | PAGE_IS_PFNZERO)) == np.uint64(PAGE_IS_WRITTEN)
        return merged(regions[exists & own, :2])

    def _scan(
        self,
        start: int,
        length: int,
        flags: int,
        *,
        mask: int,
        returned: int,
        inverted: int = 0,
        any_of: int = 0,
    ) -> Scan:
        return Scan(
            self._pagemap,
            self._vector,
            start,
            length,
            flags,
            mask=mask,
            returned=returned,
            inverted=inverted,
            any_of=any_of,
        )


def supported() -> bool:
    """Whether this kernel knows the ioctl, tried on ourselves."""
    argument = bytearray(_ARGUMENT.pack(_ARGUMENT.size, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
    except OSError:
        return False
    return True


def joined(parts: Sequence[Ranges]) -> Ranges:
    """All pages of several lists of ranges, each once, ascending."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return np.empty((0, 2), np.uint64)
    if len(parts) == 1:
        return merged(parts[0])
    ranges = np.concatenate(parts)
    return merged(ranges[np.argsort(ranges[:, 0], kind="stable")])


def merged(ranges: Ranges) -> Ranges:
    """Join ascending ranges that touch or overlap (a region ends where a page table or the vector ended)."""
    if len(ranges) < 2:
        return ranges
    ends = np.maximum.accumulate(ranges[:, 1])
    breaks = np.flatnonzero(ranges[1:, 0] > ends[:-1])
    if len(breaks) == len(ranges) - 1:
        return ranges
    out = np.empty((len(breaks) + 1, 2), np.uint64)
    out[0, 0] = ranges[0, 0]
    out[1:, 0] = ranges[breaks + 1, 0]
    out[:-1, 1] = ends[breaks]
    out[-1, 1] = ends[-1]
    return out
