"""A child process with memory of any kind, which does to it what it is told."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from kagemusha.kernel.pagemap import PagemapScanner
from kagemusha.kernel.uffd import UserFault, steal_userfaultfd
from kagemusha.kernel.vm_rw import read_ranges
from kagemusha.model.memory import Bytes, Ranges

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
MADV_PAGEOUT = 21  # linux/mman.h; the mmap module has no name for it

_PROGRAM = """
import ctypes, mmap, os, struct, sys
maps, files, bases = [], [], []
reading, writing = os.pipe()
child = 0

class Ring:
    # io_uring with one entry: a read into a registered buffer, whose pages are pinned from its registration on
    def __init__(self, address, size):
        self.call = ctypes.CDLL(None, use_errno=True).syscall
        params = (ctypes.c_uint32 * 30)()
        self.file = self.checked(425, 1, params)
        tail, array = params[11], params[16]
        self.ring = mmap.mmap(self.file, array + 4, offset=0)
        self.tail = ctypes.c_uint32.from_buffer(self.ring, tail)
        self.entry = mmap.mmap(self.file, 64, offset=0x10000000)
        self.checked(427, self.file, 0, (ctypes.c_uint64 * 2)(address, size), 1)
    def read(self, source, address, size):
        self.entry[:] = struct.pack("<BBHiQQII32x", 4, 0, 0, source, 2**64 - 1, address, size, 0)
        self.tail.value += 1
        self.checked(426, self.file, 1, 1, 1, None, 0)
    def checked(self, *words):
        answer = self.call(*words)
        if answer < 0:
            raise OSError(ctypes.get_errno(), "io_uring")
        return answer

ring = None
for line in sys.stdin:
    verb, *words = line.split()
    numbers = [int(word) for word in words if word.isdigit()]
    answer = 0
    if verb == "map":
        kind, size = words[0], int(words[1])
        file = -1
        if kind == "hugetlb":
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
        elif kind == "hugetlb-shared":
            file = os.memfd_create("target", os.MFD_HUGETLB)
            os.ftruncate(file, size)
            area = mmap.mmap(file, size)
        elif kind == "hugetlb-file":
            file = os.memfd_create("target", os.MFD_HUGETLB)
            os.ftruncate(file, size)
            with mmap.mmap(file, size) as filled:
                filled[size - 1] = 1
            area = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)
        elif kind in ("shared", "file"):
            file = os.memfd_create("target")
            os.ftruncate(file, size + 2 * (2 << 20))
            flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
            area = mmap.mmap(file, size + (2 << 20), flags=flags, offset=2 << 20)
        else:
            area = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        bases.append(-start % (2 << 20))
        if not kind.startswith("hugetlb"):
            area.madvise(mmap.MADV_HUGEPAGE if kind == "thp" else mmap.MADV_NOHUGEPAGE)
        maps.append(area)
        files.append(file)
        answer = start + bases[-1]
    elif verb == "fork":
        child = os.fork()
        if child == 0:
            os.read(reading, 1)
            os._exit(0)
    elif verb == "reap":
        os.write(writing, b"x")
        os.waitpid(child, 0)
    else:
        region, first, count = numbers[:3]
        area, base = maps[region], bases[region] + first * 4096
        if verb == "write":
            area[base : base + count * 4096] = bytes([numbers[3]]) * (count * 4096)
        elif verb == "poke":
            area[base] = numbers[3]
        elif verb == "peek":
            for page in range(count):
                answer = area[base + page * 4096]
        elif verb == "advise":
            area.madvise(numbers[3], base, count * 4096)
        elif verb == "kernel-write":
            os.write(writing, bytes([numbers[3]]) * 8)
            os.readv(reading, [memoryview(area)[base : base + 8]])
        elif verb == "pin":
            try:
                ring = Ring(ctypes.addressof(ctypes.c_char.from_buffer(area)) + base, count * 4096)
            except OSError as error:
                answer = error.errno
        elif verb == "arrive":
            os.write(writing, bytes([numbers[3]]) * 8)
            ring.read(reading, ctypes.addressof(ctypes.c_char.from_buffer(area)) + base, 8)
        elif verb == "file-write":
            os.pwrite(files[region], bytes([numbers[3]]) * 8, base + (2 << 20))
        elif verb == "child-write":
            inner = os.fork()
            if inner == 0:
                area[base] = numbers[3]
                os._exit(0)
            os.waitpid(inner, 0)
    print(answer, flush=True)
"""


@dataclass
class Region:
    """Memory of the child; pages count from its start, which lies on 2 MiB."""

    target: MemoryTarget
    index: int
    start: int
    length: int

    def do(self, verb: str, first: int, count: int = 1, *more: int) -> int:
        """Have the child do this with these pages."""
        return self.target.do(verb, self.index, first, count, *more)

    def write(self, first: int, count: int = 1, value: int = 1) -> None:
        """Fill whole pages."""
        self.do("write", first, count, value)

    def drop(self, first: int, count: int = 1) -> None:
        """MADV_DONTNEED."""
        self.do("advise", first, count, mmap.MADV_DONTNEED)

    def punch(self, first: int, count: int = 1) -> None:
        """MADV_REMOVE: a hole in the file behind it."""
        self.do("advise", first, count, mmap.MADV_REMOVE)

    def protect(self) -> None:
        """Register it; nothing is protected yet."""
        self.target.fault.register_write_protect(self.start, self.length)

    def taken(self) -> list[tuple[int, int]]:
        """Pages written since the last look, as (first, count); protected again."""
        return self.pages(self.target.scanner.take_written(self.start, self.length).ranges())

    def written(self) -> list[tuple[int, int]]:
        """Pages written since the last look, left as they are."""
        return self.pages(self.target.scanner.written(self.start, self.length).ranges())

    def populated(self) -> list[tuple[int, int]]:
        """Pages that exist."""
        return self.pages(self.target.scanner.populated(self.start, self.length).ranges())

    def pages(self, ranges: Ranges) -> list[tuple[int, int]]:
        """Address ranges as (first page, count)."""
        return [((start - self.start) // PAGE, (end - start) // PAGE) for start, end in ranges.tolist()]

    def contents(self) -> Bytes:
        """Every byte, read from outside. Fills its holes: do that at the end of a test."""
        out = np.zeros(self.length, np.uint8)
        read_ranges(self.target.pid, np.array([[self.start, self.start + self.length]], np.uint64), out)
        return out


class MemoryTarget:
    """The child, a scanner of its memory and a userfaultfd of it."""

    def __init__(self, process: subprocess.Popen[str], stack: ExitStack) -> None:
        self._process = process
        self.pid = process.pid
        self.scanner = PagemapScanner(self.pid)
        stack.callback(self.scanner.close)
        self.fault = stack.enter_context(UserFault(steal_userfaultfd(self.pid)))
        self.fault.enable()
        self._regions = 0

    def do(self, verb: str, *words: object) -> int:
        """One command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, (verb, *words))) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the child ended at {verb} {words}"
        return int(answer)

    def region(self, kind: str, pages: int, *, protect: bool = True) -> Region:
        """New memory: private, thp, shared (a memfd), file (a memfd mapped private), hugetlb, hugetlb-shared,
        hugetlb-file (mapped private, its last page not empty).
        """
        region = Region(self, self._regions, self.do("map", kind, pages * PAGE), pages * PAGE)
        self._regions += 1
        if protect:
            region.protect()
        return region

    def kill(self) -> None:
        """End it and wait for that."""
        self._process.kill()
        self._process.wait()


@contextmanager
def memory_target() -> Iterator[MemoryTarget]:
    """Start the child."""
    with (
        subprocess.Popen(
            [sys.executable, "-S", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        ExitStack() as stack,
    ):
        try:
            yield MemoryTarget(process, stack)
        finally:
            process.kill()
