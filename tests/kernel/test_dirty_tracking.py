"""The dirty set of a whole process, sync rounds and checkpoints over it: what was reported makes an exact copy."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.harness.waiting_process import waiting_process
from tests.harness.wire import run_table
from tests.kernel.busy_target import compile_target
from tests.kernel.memory_target import MemoryTarget, Region, memory_target

from kagemusha.capture.checkpoint import CheckpointCapture
from kagemusha.capture.dirty import DirtyMemory, Found, page_count
from kagemusha.capture.sync import PIECE_BYTES, SMALL_BYTES, SyncRounds, _cut
from kagemusha.errors import BugError, GuestGoneError, UnsupportedError
from kagemusha.kernel.staging import StagingSlot
from kagemusha.kernel.vm_rw import read_ranges
from kagemusha.model.ids import Epoch
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, RUN_DTYPE, Bytes, MemoryImage, RamBlock, Runs

pytestmark = pytest.mark.root
KINDS = ("private", "shared", "thp")
PAGES = 700
PIECE_PAGES = PIECE_BYTES // PAGE_BYTES
SCRIBBLED_BYTES = 32 << 20  # targets/scribble.c


def receive(copy: Bytes, runs: Runs, data: Bytes) -> None:
    """As a standby does. ``copy``: shape (pages, PAGE_BYTES)."""
    offset = 0
    for page, count, _ in runs.tolist():
        size = count * PAGE_BYTES
        copy[page : page + count] = data[offset : offset + size].reshape(-1, PAGE_BYTES)
        offset += size
    assert offset == len(data)


def contents(pid: int, block: RamBlock) -> Bytes:
    """Of a whole block, shape (pages, PAGE_BYTES)."""
    out = np.empty(block.length, np.uint8)
    read_ranges(pid, np.array([[block.host_addr, block.host_addr + block.length]], np.uint64), out)
    return out.reshape(-1, PAGE_BYTES)


@contextmanager
def running_scribbler(program: Path) -> Iterator[tuple[int, MemoryImage]]:
    """A process that writes into its memory without a pause: pid and memory."""
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            blocks = [RamBlock(f"{index}", int(word, 16), SCRIBBLED_BYTES) for index, word in enumerate(words)]
            yield process.pid, MemoryImage(tuple(blocks))
        finally:
            process.kill()


@contextmanager
def standing(pid: int) -> Iterator[None]:
    """The process is stopped inside."""
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Vm:
    """A process with a RAM block of each kind, and what a standby has of it."""

    def __init__(self, target: MemoryTarget, pages: int = PAGES) -> None:
        self.target = target
        self.regions: list[Region] = [target.region(kind, pages, protect=False) for kind in KINDS]
        blocks = [RamBlock(f"{r.index:04}", r.start, r.length) for r in self.regions]
        self.image = MemoryImage(tuple(blocks))
        self.copy = np.zeros((self.image.pages, PAGE_BYTES), np.uint8)

    def page(self, block: int, page: int) -> int:
        """The image page."""
        return self.image.first_pages[block] + page

    def receive(self, runs: Runs, data: Bytes) -> None:
        receive(self.copy, runs, data)

    def pause(self, dirty: DirtyMemory) -> list[tuple[int, int]]:
        """The look and the copy of a pause."""
        return self._copied(dirty, dirty.copy_written)

    def copy_noted(self, dirty: DirtyMemory) -> list[tuple[int, int]]:
        return self._copied(dirty, dirty.copy_noted)

    def _copied(self, dirty: DirtyMemory, copy: Callable[[Bytes], tuple[Found, int]]) -> list[tuple[int, int]]:
        data = np.empty(self.image.pages * PAGE_BYTES, np.uint8)
        found, size = copy(data)
        runs = dirty.runs_of(found)
        self.receive(runs, data[:size])
        return [(page, count) for page, count, _ in runs.tolist()]

    def take(self, dirty: DirtyMemory) -> list[tuple[int, int]]:
        runs = dirty.take()
        data = np.empty(page_count(runs) * PAGE_BYTES, np.uint8)
        assert dirty.read(runs, data) == len(data)
        self.receive(runs, data)
        return [(page, count) for page, count, _ in runs.tolist()]

    def is_exact(self) -> bool:
        return all(
            np.array_equal(self.copy[first : first + r.length // PAGE_BYTES].ravel(), r.contents())
            for first, r in zip(self.image.first_pages, self.regions, strict=True)
        )


@pytest.fixture(scope="module")
def target() -> Iterator[MemoryTarget]:
    with memory_target() as started:
        yield started


@contextmanager
def unchanged_descriptors(pid: int) -> Iterator[None]:
    """Neither we nor the process have more open behind the block."""
    folders = [Path("/proc/self/fd"), Path(f"/proc/{pid}/fd")]
    before = [len(list(folder.iterdir())) for folder in folders]
    yield
    assert [len(list(folder.iterdir())) for folder in folders] == before


def tracked(pid: int) -> int:
    """Mappings under write protection."""
    return sum(
        line.startswith("VmFlags") and " uw" in line for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
    )


# --- the dirty set ----------------------------------------------------------------------------------------------


def test_pages_are_counted_in_the_image(target: MemoryTarget) -> None:
    vm = Vm(target)
    vm.regions[0].write(5, 2)
    vm.regions[1].write(PAGES - 1)
    with DirtyMemory(target.pid, vm.image) as dirty:
        assert vm.take(dirty) == [(vm.page(0, 5), 2), (vm.page(1, PAGES - 1), 1)]
        vm.regions[1].do("poke", 0, 1, 9)
        vm.regions[0].do("kernel-write", 6, 1, 9)
        assert vm.take(dirty) == [(vm.page(0, 6), 1), (vm.page(1, 0), 1)]
        assert vm.take(dirty) == []
    assert vm.is_exact()


def test_contents_that_only_the_file_knows(target: MemoryTarget) -> None:
    """Nothing in the page table of the process: a backing file that was filled before."""
    vm = Vm(target)
    vm.regions[1].do("file-write", 9, 1, 77)
    assert vm.regions[1].populated() == []
    with DirtyMemory(target.pid, vm.image) as dirty:
        assert vm.take(dirty) == [(vm.page(1, 9), 1)]
    assert vm.is_exact()


Step = tuple[str, int, int, int, int]
WRITES = ("write", "poke", "peek", "kernel-write")


def steps(*verbs: str) -> st.SearchStrategy[list[Step]]:
    return st.lists(
        st.tuples(
            st.sampled_from((*WRITES, *verbs)),
            st.integers(0, len(KINDS) - 1),
            st.integers(0, PAGES - 1),
            st.sampled_from((1, 1, 3, 400)),
            st.integers(0, 255),
        ),
        max_size=20,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=steps(), after=steps("take"))
def test_what_is_reported_makes_an_exact_copy(target: MemoryTarget, before: list[Step], after: list[Step]) -> None:
    vm = Vm(target)
    act(vm, None, before)
    with DirtyMemory(target.pid, vm.image) as dirty:
        vm.take(dirty)
        act(vm, dirty, after)
        vm.take(dirty)
        assert vm.take(dirty) == []
    assert vm.is_exact()


def act(vm: Vm, dirty: DirtyMemory | None, steps: list[Step]) -> None:
    for verb, block, first, count, value in steps:
        if verb in WRITES:
            vm.regions[block].do(verb, first, min(count, PAGES - first), value)
        elif dirty is not None:
            {"take": vm.take, "ahead": DirtyMemory.take_ahead, "noted": vm.copy_noted, "pause": vm.pause}[verb](dirty)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=steps(), after=steps("ahead", "ahead", "noted", "pause", "pause"))
def test_what_pauses_copy_makes_an_exact_copy(target: MemoryTarget, before: list[Step], after: list[Step]) -> None:
    """Pauses without a look ahead and looks ahead without a pause are among them."""
    vm = Vm(target)
    act(vm, None, before)
    with DirtyMemory(target.pid, vm.image) as dirty:
        vm.take(dirty)
        act(vm, dirty, after)
        vm.pause(dirty)
        assert vm.is_exact()


def test_a_pause_copies_what_was_noted_and_what_is_marked(target: MemoryTarget) -> None:
    vm = Vm(target)
    private, shared, _ = vm.regions
    private.write(0, 20)
    with DirtyMemory(target.pid, vm.image) as dirty:
        vm.take(dirty)
        private.write(3, 1, 2)
        dirty.take_ahead()
        private.write(5, 1, 2)
        dirty.take_ahead()  # the pause that was to come did not
        private.write(4, 1, 2)
        shared.write(7, 1, 2)  # where nothing was before
        assert vm.pause(dirty) == [(vm.page(0, 3), 3), (vm.page(1, 7), 1)]
        dirty.take_ahead()
        private.write(9, 1, 2)
        assert vm.pause(dirty) == [(vm.page(0, 4), 1), (vm.page(0, 9), 1)], "4 was still marked"
        dirty.take_ahead()
        assert vm.pause(dirty) == [(vm.page(0, 9), 1)]
    assert vm.is_exact()


def test_marks_are_taken_off_while_the_process_writes(tmp_path: Path) -> None:
    """At full speed, all over its memory, which it also gives back: what it has when it stands is what was copied."""
    program = compile_target("scribble.c", tmp_path)
    with running_scribbler(program) as (pid, image), DirtyMemory(pid, image) as dirty:
        copy = np.zeros((image.pages, PAGE_BYTES), np.uint8)
        out = np.empty(2 * image.pages * PAGE_BYTES, np.uint8)
        for epoch in range(40):
            dirty.take_ahead()
            with standing(pid):
                for look in (dirty.copy_noted, dirty.copy_written)[epoch % 2 :]:
                    found, size = look(out)
                    receive(copy, dirty.runs_of(found), out[:size])
                for block, first in zip(image.blocks, image.first_pages, strict=True):
                    ours = contents(pid, block)
                    differing = (ours != copy[first : first + len(ours)]).any(axis=1)
                    assert not differing.any(), (epoch, block.name, np.flatnonzero(differing)[:9])


def test_data_of_direct_io_arrive_in_a_page_that_was_protected_meanwhile(target: MemoryTarget) -> None:
    """Unmarked; but the page was marked when they set out."""
    vm = Vm(target)
    private = vm.regions[0]
    private.write(0, 8)
    with DirtyMemory(target.pid, vm.image) as dirty:
        vm.take(dirty)
        assert vm.pause(dirty) == []
        if error := private.do("pin", 3, 2):
            pytest.skip(f"host lacks: io_uring ({os.strerror(error)})")
        dirty.take_ahead()
        private.do("arrive", 4, 1, 99)
        assert not len(target.scanner.written(private.start, 8 * PAGE_BYTES).ranges())
        assert vm.pause(dirty) == [(vm.page(0, 3), 2)]
    assert vm.is_exact()


def test_the_destination_must_be_large_enough(target: MemoryTarget) -> None:
    vm = Vm(target)
    vm.regions[0].write(0, 3)
    with DirtyMemory(target.pid, vm.image) as dirty:
        runs = dirty.take()
        with pytest.raises(BugError):
            dirty.read(runs, np.empty(3 * PAGE_BYTES - 1, np.uint8))
        assert dirty.read(run_table(), np.empty(0, np.uint8)) == 0


def test_closing_leaves_nothing_behind(target: MemoryTarget) -> None:
    vm = Vm(target)
    before = tracked(target.pid)
    with unchanged_descriptors(target.pid):
        dirty = DirtyMemory(target.pid, vm.image)
        assert tracked(target.pid) == before + len(KINDS)
        with pytest.raises(UnsupportedError, match="another userfaultfd"):
            DirtyMemory(target.pid, vm.image)
        vm.regions[0].write(3)
        assert vm.take(dirty) == [(vm.page(0, 3), 1)]
        dirty.close()
        dirty.close()
    assert tracked(target.pid) == before
    with unchanged_descriptors(target.pid), DirtyMemory(target.pid, vm.image) as again:
        assert vm.take(again) == [(vm.page(0, 3), 1)]


@pytest.mark.parametrize("fault", ["not mapped", "beyond its end"])
def test_an_image_that_does_not_fit_the_process(target: MemoryTarget, fault: str) -> None:
    """The blocks before the wrong one are let go again."""
    vm = Vm(target)
    before = tracked(target.pid)
    wrong = RamBlock("~", 1 << 46, PAGE_BYTES) if fault == "not mapped" else beyond(vm.image.blocks[-1])
    with unchanged_descriptors(target.pid), pytest.raises((OSError, UnsupportedError)):
        DirtyMemory(target.pid, MemoryImage((*vm.image.blocks[:-1], wrong)))
    assert tracked(target.pid) == before
    assert target.region("private", 1, protect=False).start, "the process is alive"


def beyond(block: RamBlock) -> RamBlock:
    return dataclasses.replace(block, length=block.length + (1 << 40))


def test_a_process_that_is_gone() -> None:
    with waiting_process(16) as child:
        child.touch(0, 3, 7)
        with DirtyMemory(child.pid, child.image) as dirty:
            runs = dirty.take()
            child.end()
            with pytest.raises(GuestGoneError):
                dirty.take()
            with pytest.raises(GuestGoneError):
                dirty.read(runs, np.empty(PAGE_BYTES, np.uint8))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(GuestGoneError):
            DirtyMemory(child.pid, child.image)
        assert len(os.listdir("/proc/self/fd")) == before


# --- sync rounds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slot(target: MemoryTarget) -> StagingSlot:
    return StagingSlot(Vm(target, 3 * PIECE_PAGES).image.pages)


def handed_out(rounds: SyncRounds, slot: StagingSlot, vm: Vm) -> int:
    """Receive the pieces of this round; returns their bytes."""
    total = 0
    assert rounds.left_bytes == rounds.round_bytes
    while (piece := rounds.next_piece(1, slot)) is not None:
        assert (piece.slot, piece.round) == (1, rounds.round)
        assert 0 < piece.data_bytes <= PIECE_BYTES
        vm.receive(slot.runs[: piece.runs].copy(), slot.data[: piece.data_bytes])
        total += piece.data_bytes
        assert rounds.left_bytes == rounds.round_bytes - total
    assert rounds.left_bytes == 0
    return total


def test_rounds_hand_out_everything_and_end_when_little_is_left(target: MemoryTarget, slot: StagingSlot) -> None:
    vm = Vm(target, 3 * PIECE_PAGES)
    private = vm.regions[0]
    private.write(100, 2 * PIECE_PAGES, 1)
    vm.regions[1].write(PIECE_PAGES - 1, PIECE_PAGES + 2, 2)
    with DirtyMemory(target.pid, vm.image) as dirty:
        rounds = SyncRounds(dirty, dirty.take)
        assert handed_out(rounds, slot, vm) == (3 * PIECE_PAGES + 2) * PAGE_BYTES
        private.write(200, PIECE_PAGES, 3)
        assert rounds.next_round()
        assert (rounds.round, rounds.round_bytes) == (2, PIECE_BYTES)
        private.write(PIECE_PAGES, 10, 4)  # in this round's dirty set, and again in the next one's
        assert handed_out(rounds, slot, vm) == PIECE_BYTES
        assert rounds.next_round()
        assert handed_out(rounds, slot, vm) == 10 * PAGE_BYTES
        private.write(7, 1, 5)
        assert not rounds.next_round(), "what came last was little"
        assert rounds.round == 3
        assert vm.take(dirty) == [(vm.page(0, 7), 1)], "the rest is the first checkpoint's"
    assert vm.is_exact()


def test_rounds_end_when_they_do_not_shrink(target: MemoryTarget, slot: StagingSlot) -> None:
    vm = Vm(target, 3 * PIECE_PAGES)
    pages = SMALL_BYTES // PAGE_BYTES + 100
    with DirtyMemory(target.pid, vm.image) as dirty:
        rounds = SyncRounds(dirty, dirty.take)
        for value in range(10):
            handed_out(rounds, slot, vm)
            vm.regions[0].write(0, pages, value)
            if not rounds.next_round():
                break
        assert rounds.round == 3
        vm.take(dirty)
    assert vm.is_exact()


def test_an_empty_guest(target: MemoryTarget, slot: StagingSlot) -> None:
    vm = Vm(target)
    with DirtyMemory(target.pid, vm.image) as dirty:
        rounds = SyncRounds(dirty, dirty.take)
        assert handed_out(rounds, slot, vm) == 0
        assert rounds.next_round()
        assert handed_out(rounds, slot, vm) == 0
        assert not rounds.next_round()


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 60),
)
def test_pieces_are_the_runs_they_were_cut_from(gaps_and_counts: list[tuple[int, int]], limit: int) -> None:
    page, runs = 0, np.empty(len(gaps_and_counts), RUN_DTYPE)
    for index, (gap, count) in enumerate(gaps_and_counts):
        runs[index] = (page + gap, count, RUN_DATA)
        page += gap + count
    pieces: list[int] = []
    rest: Runs = runs
    while len(rest):
        left = page_count(rest)
        piece, rest = _cut(rest, limit)
        assert page_count(piece) == min(limit, left)
        pieces += [page + i for page, count, _ in piece.tolist() for i in range(count)]
    assert pieces == [page + i for page, count, _ in runs.tolist() for i in range(count)]


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_two_parts(target: MemoryTarget, slot: StagingSlot) -> None:
    """What was written last, by the device save for instance, is the second part; its pages win."""
    vm = Vm(target)
    vm.regions[0].write(0, 8)
    with DirtyMemory(target.pid, vm.image) as dirty:
        vm.take(dirty)
        vm.regions[0].write(1, 4, 1)
        dirty.take_ahead()
        capture = CheckpointCapture(Epoch(9), 1, slot, dirty)
        assert capture.copy_noted() == 4 * PAGE_BYTES
        assert capture.copy_noted() == capture.copy_pages() == 0
        vm.regions[0].write(3, 1, 2)
        vm.regions[2].write(0, 512, 3)
        assert capture.copy_pages() == 513 * PAGE_BYTES
        sealed = capture.finish(b"devices")
    assert (sealed.epoch, sealed.slot, sealed.parts, sealed.device_bytes) == (9, 1, (1, 2), 7)
    assert sealed.data_bytes == capture.data_bytes == 517 * PAGE_BYTES
    assert bytes(slot.device[:7]) == b"devices"
    vm.receive(slot.runs[: capture.runs].copy(), slot.data[: sealed.data_bytes])
    assert vm.is_exact()


def test_an_epoch_in_which_nothing_was_written(target: MemoryTarget, slot: StagingSlot) -> None:
    vm = Vm(target)
    with DirtyMemory(target.pid, vm.image) as dirty:
        capture = CheckpointCapture(Epoch(1), 0, slot, dirty)
        assert capture.copy_noted() == capture.copy_pages() == 0
        sealed = capture.finish(b"")
    assert (sealed.parts, sealed.data_bytes, capture.runs) == ((), 0, 0)


def test_more_than_a_slot_takes(target: MemoryTarget) -> None:
    small = StagingSlot(1)
    vm = Vm(target)
    vm.regions[0].write(0, 600)
    with DirtyMemory(target.pid, vm.image) as dirty, pytest.raises(BugError):
        CheckpointCapture(Epoch(1), 0, small, dirty).copy_pages()
