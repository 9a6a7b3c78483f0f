"""The dirty set of a guest, and reading it.

Asynchronous userfaultfd write protection marks what was written; PAGEMAP_SCAN returns the marks, and takes them off by
setting the protection again in the same step, if it is asked to. Both work on QEMU's memory map, so writes by KVM, TCG,
device emulation and the kernel on QEMU's behalf are all seen; writes of other processes are not, which is
why guest/ refuses memory that is shared.

Protecting again interrupts every CPU that runs QEMU, once for each page table, so it is done just before a pause and
not in it (docs/adr/0006-protect-ahead.md)::

    guest runs        take_ahead   stop                     copy_written      cont      take_ahead
    ------------------ | --------- |                        |                 | -------- | ---
    written here: mark taken off   marked still: both are copied              and these marks are taken off now,
    and noted                                                                 so these few pages are copied again

Invariant: a page whose mark was taken off is noted here until it is handed out. What is copied in a pause are the noted
and the marked pages, hence all that were written since they were last copied in a pause, or more.

That is also right for direct I/O, whose data arrive unmarked where a page was protected on their way: the page was
marked when they set out, so it is noted, and ``stop`` drains them before it is copied. What is copied while the guest
runs, in the first synchronisation, would miss them: there the guest must stand for the look (:meth:`DirtyMemory.take`).
Order that keeps a running guest's copy right otherwise: protect first, read after. A write between the two is in the
copy *and* marked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from kagemusha.errors import BugError, GuestGoneError
from kagemusha.kernel.backing import MappedFiles
from kagemusha.kernel.pagemap import PagemapScanner, joined
from kagemusha.kernel.uffd import UserFault, steal_userfaultfd
from kagemusha.kernel.vm_rw import read_ranges, read_vectors, require_memory, vectors_of
from kagemusha.kernel.write_tracker import WriteTracker
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, RUN_DTYPE, Bytes, MemoryImage, RamBlock, Ranges, Runs

_EMPTY = np.empty(0, RUN_DTYPE)

Found = list[tuple[int, Ranges]]
"""Ranges of host addresses by the index of their block; blocks without any are left out."""


@dataclass(frozen=True, slots=True)
class _Pages:
    """Pages that are ready to be copied: made before the pause, which waits for nothing but the copy then.

    :ivar vectors: all of them as (address, length) pairs, shape (k, 2).
    :ivar size: bytes of all.
    """

    found: Found
    vectors: Ranges
    size: int

    @classmethod
    def of(cls, found: Found) -> _Pages:
        vectors = vectors_of(np.concatenate([ranges for _, ranges in found]))
        return cls(found, vectors, int(vectors[:, 1].sum()))


_NONE = _Pages([], np.empty((0, 2), np.uint64), 0)


class DirtyMemory:
    """Dirty tracking of all RAM blocks of one QEMU process.

    Closing it takes the write protection away and leaves the process as it was found.
    """

    def __init__(self, pid: int, image: MemoryImage) -> None:
        """Make the userfaultfd inside the process, take it over, protect every block.

        :raise UnsupportedError: kernel or process do not allow it.
        :raise GuestGoneError: the process is gone.
        """
        self._pid = pid
        self._image = image
        self._trackers: list[WriteTracker] = []
        with ExitStack() as resources, self._present():
            self._scanner = resources.enter_context(closing(PagemapScanner(pid)))
            fault = resources.enter_context(UserFault(steal_userfaultfd(pid)))
            fault.enable()
            for block in image.blocks:
                fault.register_write_protect(block.host_addr, block.length)
                self._trackers.append(resources.enter_context(closing(self._tracker(block))))
            self._resources = resources.pop_all()
        self._noted = _NONE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the tracking; the kernel removes all protection with the last descriptor. May be called twice."""
        self._resources.close()

    def take(self) -> Runs:
        """Pages written since they were last handed out, ascending, protected again. The first call returns the pages
        that exist; a page that was in no answer so far reads as zero.

        The guest must stand if they are read while it runs.

        :raise GuestGoneError: the process is gone.
        """
        self._note(WriteTracker.take)
        pages, self._noted = self._noted, _NONE
        return self.runs_of(pages.found)

    def take_ahead(self) -> None:
        """Protect again what was written, and note it for the next pause. The guest may run.

        :raise GuestGoneError: the process is gone.
        """
        self._note(WriteTracker.take_known)

    def copy_noted(self, out: Bytes) -> tuple[Found, int]:
        """Copy what is noted one behind the other into ``out``, the most of what :meth:`copy_written` would copy, which
        has to follow in the same pause for the rest.

        :return: ranges by block, for :meth:`runs_of`, and the bytes copied.
        :raise BugError: ``out`` is too small.
        :raise GuestGoneError: the process is gone.
        """
        pages = self._noted
        if pages.size > len(out):
            raise BugError(f"{pages.size} bytes of pages do not fit into {len(out)}", operation="copy pages")
        if pages.size:
            with self._present():
                read_vectors(self._pid, pages.vectors, out[: pages.size])
            self._noted = _NONE
        return pages.found, pages.size

    def copy_written(self, out: Bytes) -> tuple[Found, int]:
        """As :meth:`copy_noted`, but all that was written since it was last handed out: the guest's pause waits for
        this, and the guest must stand. Nothing is protected by it but what it finds where nothing was before.
        """
        self._note(WriteTracker.written)
        return self.copy_noted(out)

    def _note(self, look: Callable[[WriteTracker], Ranges]) -> None:
        with self._present():
            fresh = {index: ranges for index, tracker in enumerate(self._trackers) if len(ranges := look(tracker))}
            # What was seen of one that has died is not all there was. Reading tells that by itself, scanning does not.
            require_memory(self._pid, self._image.blocks[0].host_addr)
        if fresh:
            for index, ranges in self._noted.found:
                fresh[index] = joined([fresh[index], ranges]) if index in fresh else ranges
            self._noted = _Pages.of(sorted(fresh.items()))

    def runs_of(self, found: Found) -> Runs:
        """Ranges of host addresses by block as runs of image pages."""
        return np.concatenate([self._runs(index, ranges) for index, ranges in found]) if found else _EMPTY

    def read(self, runs: Runs, out: Bytes) -> int:
        """Copy the pages of ``runs`` one behind the other into ``out``; returns the bytes.

        :raise BugError: ``out`` is too small.
        :raise GuestGoneError: the process is gone.
        """
        size = page_count(runs) * PAGE_BYTES
        if size > len(out):
            raise BugError(f"{size} bytes of pages do not fit into {len(out)}", operation="copy pages")
        if size:
            with self._present():
                read_ranges(self._pid, self._image.host_ranges(runs), out[:size])
        return size

    @contextmanager
    def _present(self) -> Iterator[None]:
        """The process may die whenever it is looked at."""
        try:
            yield
        except ProcessLookupError as error:
            raise GuestGoneError(f"process {self._pid} is gone", operation="track the guest's memory") from error

    def _tracker(self, block: RamBlock) -> WriteTracker:
        files = MappedFiles(self._pid, block.host_addr, block.length) if block.page_bytes <= PAGE_BYTES else None
        return WriteTracker(self._scanner, block.host_addr, block.length, files=files, page_bytes=block.page_bytes)

    def _runs(self, index: int, ranges: Ranges) -> Runs:
        pages = self._image.ranges_of_block(index, ranges)
        runs = np.empty(len(pages), RUN_DTYPE)
        runs["page"] = pages[:, 0]
        runs["count"] = pages[:, 1] - pages[:, 0]
        runs["kind"] = RUN_DATA
        return runs


def page_count(runs: Runs) -> int:
    """Number of pages in the runs."""
    return int(runs["count"].sum(dtype=np.int64))
