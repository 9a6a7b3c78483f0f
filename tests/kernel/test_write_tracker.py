"""Whoever copies what a tracker reports has the whole memory, at a cost that follows the memory in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernel.memory_target import HUGE, MADV_PAGEOUT, PAGE, MemoryTarget, Region, memory_target

from kagemusha.kernel.backing import MappedFiles
from kagemusha.kernel.pagemap import PagemapScanner, joined
from kagemusha.kernel.vm_rw import read_ranges
from kagemusha.kernel.write_tracker import BRIDGED_CHUNKS, CHUNK_BYTES, WriteTracker
from kagemusha.model.memory import Bytes, Ranges

pytestmark = pytest.mark.root
CHUNK = CHUNK_BYTES // PAGE
CHUNKS = BRIDGED_CHUNKS + 6
KINDS = ("private", "thp", "shared", "file")


@pytest.fixture(scope="module")
def target() -> Iterator[MemoryTarget]:
    with memory_target() as started:
        yield started


@contextmanager
def tracking(region: Region) -> Iterator[WriteTracker]:
    files = MappedFiles(region.target.pid, region.start, region.length)
    tracker = WriteTracker(region.target.scanner, region.start, region.length, files=files)
    try:
        yield tracker
    finally:
        tracker.close()


@dataclass
class Copy:
    """What a standby has: zeros at first, then what was reported."""

    region: Region
    tracker: WriteTracker
    memory: Bytes

    def take(self) -> list[tuple[int, int]]:
        marked = self.tracker.written()
        ranges: Ranges = joined([marked, self.tracker.take()])
        assert np.array_equal(ranges, marked), "looking without protecting finds the same"
        for start, end in ranges.tolist():
            part = self.memory[start - self.region.start : end - self.region.start]
            read_ranges(self.region.target.pid, np.array([[start, end]], np.uint64), part)
        return self.region.pages(ranges)

    def is_exact(self) -> bool:
        return np.array_equal(self.memory, self.region.contents())


def copy_of(region: Region, tracker: WriteTracker) -> Copy:
    return Copy(region, tracker, np.zeros(region.length, np.uint8))


Step = tuple[str, int, int, int]


def steps(*verbs: str) -> st.SearchStrategy[list[Step]]:
    page = st.one_of(
        st.integers(0, CHUNKS * CHUNK - 1),
        st.integers(0, CHUNKS).map(lambda chunk: min(chunk * CHUNK, CHUNKS * CHUNK - 1)),
        st.integers(1, CHUNKS).map(lambda chunk: chunk * CHUNK - 1),
    )
    count = st.sampled_from((1, 1, 2, 5, CHUNK, 2 * CHUNK))
    return st.lists(st.tuples(st.sampled_from(verbs), page, count, st.integers(0, 255)), max_size=25)


def perform(region: Region, copy: Copy, step: Step) -> None:
    verb, first, count, value = step
    count = min(count, region.length // PAGE - first)
    match verb:
        case "take":
            copy.take()
        case "drop":
            region.drop(first, count)
        case "fork":
            region.target.do("fork")
            region.do("poke", first, 1, value)
            region.target.do("reap")
        case "peek":
            region.do("peek", first, count)
        case _:
            region.do(verb, first, count, value)


# Pages given back go unreported where a file is mapped private: test_pagemap.py.
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=steps("write", "poke", "peek", "drop"), after=steps("write", "poke", "peek", "drop", "fork", "take"))
def test_a_copy_of_what_is_reported_is_exact(
    target: MemoryTarget, kind: str, before: list[Step], after: list[Step]
) -> None:
    region = target.region(kind, CHUNKS * CHUNK)
    with tracking(region) as tracker:
        copy = copy_of(region, tracker)
        for step in (*before, *after):
            if kind != "file" or step[0] != "drop":
                perform(region, copy, step)
        copy.take()
        assert copy.take() == [], "nothing was written meanwhile"
        assert copy.is_exact()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_exists_is_reported_and_nothing_comes_into_being(target: MemoryTarget, kind: str) -> None:
    region = target.region(kind, 64 * CHUNK)
    region.do("poke", 3 * CHUNK + 7, 1, 1)
    region.do("poke", 40 * CHUNK, 1, 1)
    before = resident_kb(target)
    with tracking(region) as tracker:
        copy = copy_of(region, tracker)
        width = CHUNK if kind == "thp" else 1
        first = 3 * CHUNK if kind == "thp" else 3 * CHUNK + 7
        assert copy.take() == [(first, width), (40 * CHUNK, width)]
        assert tracker.known_bytes == 2 * CHUNK_BYTES
        region.do("poke", 3 * CHUNK + 9, 1, 2)
        region.do("poke", 60 * CHUNK + 1, 1, 2)
        first = 60 * CHUNK if kind == "thp" else 60 * CHUNK + 1
        assert copy.take() == [(3 * CHUNK + 9, 1), (first, width)]
        assert copy.take() == []
    assert resident_kb(target) - before <= 4 * width + 256


def resident_kb(target: MemoryTarget) -> int:
    status = Path(f"/proc/{target.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) + int(status.split("VmPTE:")[1].split()[0])


def test_small_gaps_are_scanned_with_their_neighbours_and_large_ones_are_not(target: MemoryTarget) -> None:
    region = target.region("private", 40 * CHUNK)
    with tracking(region) as tracker:
        region.write(5 * CHUNK)
        tracker.take()
        assert tracker.known_bytes == CHUNK_BYTES
        region.write((6 + BRIDGED_CHUNKS) * CHUNK)
        assert region.pages(tracker.take()) == [((6 + BRIDGED_CHUNKS) * CHUNK, 1)]
        assert tracker.known_bytes == (BRIDGED_CHUNKS + 2) * CHUNK_BYTES
        region.write((16 + 2 * BRIDGED_CHUNKS) * CHUNK)
        tracker.take()
        assert tracker.known_bytes == (BRIDGED_CHUNKS + 3) * CHUNK_BYTES


def test_a_range_that_begins_and_ends_inside_chunks(target: MemoryTarget) -> None:
    region = target.region("private", 3 * CHUNK)
    region.write(0, 3 * CHUNK, 9)
    start, pages = region.start + 5 * PAGE, 3 * CHUNK - 8
    tracker = WriteTracker(target.scanner, start, pages * PAGE)
    assert region.pages(tracker.take()) == [(5, pages)]
    region.write(0, 3 * CHUNK, 8)
    assert region.pages(tracker.take()) == [(5, pages)]


@pytest.mark.parametrize("kind", ["shared", "file"])
def test_contents_of_the_file_that_no_page_table_shows(target: MemoryTarget, kind: str) -> None:
    """A backing file that was filled before, or whose pages were swapped out."""
    region = target.region(kind, CHUNKS * CHUNK)
    region.do("file-write", 2 * CHUNK + 3, 1, 55)
    region.write(2 * CHUNK + 4)
    if kind == "shared":
        region.drop(2 * CHUNK + 4)
    assert region.populated() == ([] if kind == "shared" else [(2 * CHUNK + 4, 1)])
    with tracking(region) as tracker:
        copy = copy_of(region, tracker)
        assert copy.take() == [(2 * CHUNK + 3, 2)]
        assert copy.take() == []
        assert copy.is_exact()


def test_files_of_mappings_without_a_name(target: MemoryTarget) -> None:
    region = target.region("shared", 4 * CHUNK)
    assert region.pages(MappedFiles(target.pid, region.start, region.length).contents(region.start, 0)) == []
    region.write(3, 2)
    region.write(2 * CHUNK)
    files = MappedFiles(target.pid, region.start, region.length)
    end = region.start + region.length
    assert region.pages(files.contents(region.start, end)) == [(3, 2), (2 * CHUNK, 1)]
    assert region.pages(files.contents(region.start + 4 * PAGE, region.start + 5 * PAGE)) == [(4, 1)]
    assert region.pages(files.contents(region.start + PAGE, region.start + 3 * PAGE)) == []
    files.close()
    files.close()
    private = target.region("private", 4)
    private.write(0)
    assert region.pages(MappedFiles(target.pid, private.start, private.length).contents(private.start, end)) == []


def test_swapped_out_shared_pages_are_found(target: MemoryTarget) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("host lacks: swap space")
    region = target.region("shared", CHUNKS * CHUNK)
    region.write(7, 4, 3)
    region.do("advise", 7, 4, MADV_PAGEOUT)
    with tracking(region) as tracker:
        copy = copy_of(region, tracker)
        copy.take()
        region.write(9, 1, 4)
        region.do("advise", 9, 1, MADV_PAGEOUT)
        copy.take()
        assert copy.is_exact()


def test_a_scanner_may_serve_several_trackers(target: MemoryTarget) -> None:
    regions = [target.region("private", CHUNK) for _ in range(3)]
    scanner = PagemapScanner(target.pid)
    trackers = [WriteTracker(scanner, region.start, region.length) for region in regions]
    for number, region in enumerate(regions):
        region.write(number)
    found = [region.pages(tracker.take()) for region, tracker in zip(regions, trackers, strict=True)]
    assert found == [[(0, 1)], [(1, 1)], [(2, 1)]]
    scanner.close()
    assert HUGE == CHUNK_BYTES
