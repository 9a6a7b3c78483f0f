"""What the kernel tells about written pages: each fact of kernel/pagemap.py, on a real child process."""

from __future__ import annotations

import fcntl
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.harness.huge_pages import huge_pages
from tests.kernel.memory_target import HUGE, PAGE, MemoryTarget, memory_target

from kagemusha.errors import GuestGoneError
from kagemusha.kernel import pagemap
from kagemusha.kernel.pagemap import PagemapScanner, joined, merged
from kagemusha.kernel.vm_rw import require_memory, write_ranges
from kagemusha.model.memory import PAGE_BYTES

pytestmark = pytest.mark.root
CHUNK = HUGE // PAGE
KINDS = ("private", "thp", "shared", "file")


@pytest.fixture(scope="module")
def target() -> Iterator[MemoryTarget]:
    with memory_target() as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_writing_is_seen(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, 64)
    region.write(0, 64)
    assert region.taken() == [(0, 64)]
    assert region.taken() == []
    region.do("poke", 3, 1, 7)
    assert region.written() == [(3, 1)], "looking without taking"
    assert region.taken() == [(3, 1)]
    region.do("kernel-write", 5, 1, 7)
    assert region.taken() == [(5, 1)], "read(2) into the memory"
    at = region.start + 9 * PAGE + 17
    write_ranges(target.pid, np.array([[at, at + 3]], np.uint64), np.array([1, 2, 3], np.uint8))
    assert region.taken() == [(9, 1)], "process_vm_writev from outside"
    region.do("peek", 0, 64)
    assert region.taken() == [], "reading is not writing"


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_come_as_one_range_and_others_apart(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, 3 * CHUNK)
    region.taken()
    region.write(CHUNK - 2, 4)  # across a page table
    region.write(CHUNK + 10)
    region.write(3 * CHUNK - 1)
    assert region.taken() == [(CHUNK - 2, 4), (CHUNK + 10, 1), (3 * CHUNK - 1, 1)]


def test_more_regions_than_the_vector_holds(target: MemoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "VECTOR_REGIONS", 7)
    region = target.region("private", 256)
    scanner = PagemapScanner(target.pid)
    scanner.take_written(region.start, region.length).ranges()
    for page in range(0, 256, 2):
        region.do("poke", page, 1, 1)
    found = region.pages(scanner.take_written(region.start, region.length).ranges())
    assert found == [(page, 1) for page in range(0, 256, 2)]
    assert len(scanner.take_written(region.start, region.length).ranges()) == 0
    scanner.close()


def test_a_page_written_between_the_calls_of_a_scan(target: MemoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may end short of where it has looked: the next one looks at pages again that the first has told."""
    region = target.region("private", 2048)
    region.taken()
    odd = range(1, 2048, 2)
    for page in odd:
        region.do("poke", page, 1, 1)
    calls = 0

    def scan(descriptor: int, request: int, argument: bytearray) -> int:
        nonlocal calls
        calls += 1
        count: int = fcntl.ioctl(descriptor, request, argument)
        if calls == 1:
            region.do("poke", 2046, 1, 1)
            region.do("poke", 1501, 1, 1)
        return count

    monkeypatch.setattr(pagemap, "fcntl", SimpleNamespace(ioctl=scan))
    found = region.taken()
    monkeypatch.undo()
    left = region.taken()
    told = {page for first, count in found + left for page in range(first, first + count)}
    assert told == {*odd, 2046}
    assert (1501, 1) in left or calls > 1
    assert [first for first, _ in found] == sorted(first for first, _ in found)


def test_a_result_does_not_change_with_the_next_scan(target: MemoryTarget) -> None:
    region = target.region("private", 64)
    region.write(0, 64)
    first = target.scanner.take_written(region.start, region.length).ranges()
    copy = first.copy()
    region.do("poke", 60, 1, 2)
    target.scanner.take_written(region.start, region.length).ranges()
    assert np.array_equal(first, copy)
    assert first.flags.c_contiguous
    assert first.dtype == np.uint64


@pytest.mark.parametrize("kind", KINDS)
def test_holes_count_as_written_until_they_are_protected(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, 4 * CHUNK)
    region.write(CHUNK + 5)
    exists = [(CHUNK, CHUNK)] if kind == "thp" else [(CHUNK + 5, 1)]
    assert region.populated() == exists
    assert region.taken() == [(0, 4 * CHUNK)]
    assert region.taken() == []
    assert region.populated() == [(0, 4 * CHUNK)], "the markers are told as swapped pages"
    region.do("peek", 9)
    assert region.taken() == [], "reading a protected hole"
    region.do("poke", 9, 1, 1)
    region.do("poke", 2 * CHUNK + 1, 1, 1)
    assert region.taken() == [(9, 1), (2 * CHUNK + 1, 1)], "one page of a hole is one page"
    target.fault.unregister(region.start, region.length)
    left = [pages for pages in region.populated() if kind != "shared" or pages != (9, 1)]
    assert (0, 4 * CHUNK) not in left, "the markers go with the registration"
    region.protect()


@pytest.mark.parametrize("kind", KINDS)
def test_arming_protects_holes_and_names_only_what_exists(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, 4 * CHUNK)
    region.write(CHUNK + 5)
    exists = [(CHUNK, CHUNK)] if kind == "thp" else [(CHUNK + 5, 1)]
    assert region.pages(target.scanner.arm(region.start, region.length)) == exists
    assert region.pages(target.scanner.arm(region.start, region.length)) == []
    assert region.taken() == []
    region.do("poke", 2 * CHUNK + 9, 1, 1)
    assert region.pages(target.scanner.arm(region.start, region.length)) == [(2 * CHUNK + 9, 1)]


def test_the_shared_zero_page_is_a_hole(target: MemoryTarget) -> None:
    region = target.region("private", 8)
    region.do("peek", 2, 3)
    region.write(6)
    assert region.populated() == [(6, 1)]
    assert region.pages(target.scanner.arm(region.start, region.length)) == [(6, 1)]
    region.do("poke", 3, 1, 1)
    assert region.taken() == [(3, 1)]


@pytest.mark.parametrize("kind", ["private", "thp"])
@pytest.mark.parametrize(("first", "count"), [(3, 2), (CHUNK, CHUNK)], ids=["some pages", "a whole page table"])
def test_private_memory_given_back_counts_as_written(target: MemoryTarget, kind: str, first: int, count: int) -> None:
    """The balloon's MADV_DONTNEED, on clean pages and on pages written just before."""
    region = target.region(kind, 3 * CHUNK)
    region.write(0, 3 * CHUNK)
    region.taken()
    region.drop(first, count)
    assert region.written() == [(first, count)]
    assert region.do("peek", first) == 0
    assert region.taken() == [(first, count)], "reading it does not hide it"
    assert region.taken() == []
    region.write(first, count, 9)
    region.drop(first, count)
    assert region.taken() == [(first, count)]
    assert region.taken() == []
    region.do("peek", first, count)
    assert region.taken() == [], "it reads as zero, as was told"
    region.do("poke", first, 1, 1)
    assert region.taken() == [(first, 1)]


def test_shared_memory_keeps_its_contents_when_given_back(target: MemoryTarget) -> None:
    region = target.region("shared", CHUNK)
    region.write(0, 8, 5)
    region.taken()
    region.drop(2, 2)
    assert region.taken() == []
    assert region.do("peek", 2) == 5
    assert region.taken() == []
    region.write(5, 1, 6)
    region.drop(5)
    assert region.taken() == [(5, 1)], "written, then unmapped"
    assert region.do("peek", 5) == 6


def test_a_private_copy_of_a_file_page_given_back_is_not_reported(target: MemoryTarget) -> None:
    region = target.region("file", CHUNK)
    region.write(0, 8, 5)
    region.taken()
    region.drop(2, 2)
    assert region.taken() == [], "the gap in what can be tracked"
    assert region.do("peek", 2) == 0
    assert region.taken() == []


@pytest.mark.parametrize(("first", "count"), [(3, 2), (CHUNK, CHUNK)], ids=["some pages", "a whole page table"])
def test_a_hole_punched_into_shared_memory_is_not_reported(target: MemoryTarget, first: int, count: int) -> None:
    """The gap in what can be tracked: see write_tracker.py. Once this fails, the kernel has closed it."""
    region = target.region("shared", 3 * CHUNK)
    region.write(0, 3 * CHUNK, 5)
    region.taken()
    region.punch(first, count)
    assert region.taken() == []
    assert region.do("peek", first) == 0
    assert region.taken() == []
    region.write(first, count, 6)
    region.punch(first, count)
    assert region.taken() == [(first, count)], "written, then punched"


def test_writes_past_the_page_table_are_not_seen(target: MemoryTarget) -> None:
    region = target.region("shared", 8)
    region.write(0, 8)
    region.taken()
    region.do("file-write", 3, 1, 77)
    assert region.do("peek", 3) == 77
    region.do("child-write", 4, 1, 78)
    assert region.do("peek", 4) == 78
    assert region.taken() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_changes_nothing(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, CHUNK)
    region.write(0, CHUNK)
    region.taken()
    target.do("fork")
    try:
        assert region.taken() == []
        region.do("poke", 4, 1, 2)
        assert region.taken() == [(4, 1)], "copied on write and reported"
        region.do("poke", 4, 1, 3)
        assert region.taken() == [(4, 1)]
    finally:
        target.do("reap")
    region.do("poke", 4, 1, 4)
    region.do("poke", 6, 1, 4)
    assert region.taken() == [(4, 1), (6, 1)]


def test_a_huge_page_is_reported_whole_once_and_then_page_by_page(target: MemoryTarget) -> None:
    region = target.region("thp", 2 * CHUNK)
    region.do("poke", 7, 1, 1)
    if region.populated() != [(0, CHUNK)]:
        pytest.skip("host lacks: a free transparent huge page")
    assert region.taken() == [(0, 2 * CHUNK)]
    region.do("poke", 9, 1, 2)
    assert region.taken() == [(9, 1)]


@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-shared"])
def test_hugetlb(kind: str) -> None:
    with huge_pages(8 * HUGE), memory_target() as target:
        region = target.region(kind, 4 * CHUNK)
        region.do("poke", 0, 1, 5)
        region.do("poke", CHUNK, 1, 5)
        assert region.populated() == [(0, 2 * CHUNK)]
        assert region.taken() == [(0, 2 * CHUNK)], "holes are not reported"
        assert region.populated() == [(0, 2 * CHUNK)], "and get no markers"
        assert region.taken() == []
        region.do("poke", 3, 1, 6)
        assert region.taken() == [(0, CHUNK)], "never smaller than its page"
        region.do("peek", 2 * CHUNK)
        assert region.taken() == [(2 * CHUNK, CHUNK)], "reading a hole makes a page"
        region.drop(CHUNK, CHUNK)
        assert region.taken() == [], "the gap in what can be tracked"
        assert region.do("peek", CHUNK) == (0 if kind == "hugetlb" else 5)
        assert region.taken() == []


def test_swapped_pages_keep_their_state(target: MemoryTarget) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("host lacks: swap space")
    for kind in ("private", "shared"):
        region = target.region(kind, 32)
        region.write(0, 32)
        region.taken()
        region.write(3)
        for page in (3, 4):
            region.do("advise", page, 1, 21)
        assert region.taken() == [(3, 1)]
        region.do("peek", 3, 2)
        assert region.taken() == []


def test_unregistered_memory_and_a_process_that_is_gone() -> None:
    with memory_target() as target:
        region = target.region("private", 8, protect=False)
        region.write(0, 8)
        for call in (region.taken, region.written):
            with pytest.raises(PermissionError):
                call()
        assert region.populated() == [(0, 8)], "this needs no registration"
        region.protect()
        target.kill()
        for call in (region.taken, region.written, region.populated):
            with suppress(ProcessLookupError):  # as some kernels say
                assert call() == []
        with pytest.raises(ProcessLookupError):
            require_memory(target.pid, region.start)
        with pytest.raises(GuestGoneError):
            PagemapScanner(target.pid)


def test_the_ioctl_is_supported_where_these_tests_run() -> None:
    assert pagemap.supported()
    assert PAGE_BYTES == mmap.PAGESIZE


@given(st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8), max_size=4))
def test_joined_names_each_page_once(lists: list[list[tuple[int, int]]]) -> None:
    parts = []
    for ranges in lists:
        pages = np.zeros(80, np.bool_)
        for first, count in ranges:
            pages[first : first + count] = True
        parts.append(np.flatnonzero(np.diff(pages, prepend=False, append=False)).reshape(-1, 2).astype(np.uint64))
    found = joined(parts)
    expected = sorted({page for part in parts for start, end in part.tolist() for page in range(start, end)})
    assert [page for start, end in found.tolist() for page in range(start, end)] == expected
    assert bool((found[1:, 0] > found[:-1, 1]).all()), "neighbours are one range"
    assert np.array_equal(merged(found), found)
