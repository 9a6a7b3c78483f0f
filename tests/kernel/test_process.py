"""Other processes, as /proc and the kernel tell of them."""

from __future__ import annotations

import itertools
import mmap
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kagemusha
from kagemusha.errors import GuestGoneError
from kagemusha.kernel.process import (
    Mapping,
    mapping_at,
    other_mappers,
    parse_maps,
    pidfd_getfd,
    pidfd_open,
    pidfd_send_signal,
)

PAGE = mmap.PAGESIZE
SOURCE_ROOT = str(Path(kagemusha.__file__).parents[1])

# Maps descriptor 0 the way it is told, touches it, tells its pid, waits.
MAPPER = """
import mmap, sys
area = mmap.mmap(int(sys.argv[1]), 4096, flags=getattr(mmap, sys.argv[2]), prot=mmap.PROT_READ)
area[0]
print("mapped", flush=True)
sys.stdin.read()
"""

# A parent whose child asks to die with it; both wait.
FAMILY = f"""
import os, signal, sys
sys.path.insert(0, {SOURCE_ROOT!r})
from kagemusha.kernel.process import set_pdeathsig
if os.fork() == 0:
    set_pdeathsig(signal.SIGKILL)
    print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""


def own_mapping(address: int) -> Mapping:
    found = mapping_at(parse_maps(os.getpid()), address)
    assert found is not None
    return found


def address_of(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, np.uint8).ctypes.data)


@pytest.mark.parametrize(
    "name", ["plain", "with two  blanks", "line\nbreak", "tail (deleted)", "7f0000-7f1000 rw-p 0 0:1 7 x"]
)
def test_a_mapped_file_is_described_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(3 * PAGE))
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), PAGE, offset=2 * PAGE)
    mapping = own_mapping(address_of(area))
    status = path.stat()
    assert (mapping.start, mapping.end) == (address_of(area), address_of(area) + PAGE)
    assert (mapping.perms, mapping.offset, mapping.inode) == ("rw-s", 2 * PAGE, status.st_ino)
    major, minor = (int(part, 16) for part in mapping.device.split(":"))
    assert (major, minor) == (os.major(status.st_dev), os.minor(status.st_dev))
    assert mapping.path == str(path).replace("\n", "\\012")


def test_every_line_is_understood_and_ascending() -> None:
    maps = parse_maps(os.getpid())
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert abs(len(maps) - len(lines)) <= 2, "reading may change it"
    assert all(first.end <= second.start for first, second in itertools.pairwise(maps))
    assert {"[stack]", "[heap]", "[vdso]"} <= {mapping.path for mapping in maps}


def test_mapping_at_its_borders() -> None:
    def made(start: int, end: int) -> Mapping:
        return Mapping(start, end, "rw-p", 0, "00:00", 0, "")

    maps = [made(10, 20), made(20, 30), made(50, 60)]
    found = {address: mapping_at(maps, address) for address in (9, 10, 19, 20, 29, 30, 49, 50, 59, 60)}
    assert found == {
        9: None,
        10: maps[0],
        19: maps[0],
        20: maps[1],
        29: maps[1],
        30: None,
        49: None,
        50: maps[2],
        59: maps[2],
        60: None,
    }
    assert mapping_at([], 5) is None


@pytest.mark.root
@pytest.mark.parametrize("flags", ["MAP_SHARED", "MAP_PRIVATE"])
def test_other_processes_that_map_the_same_memory_are_found(flags: str) -> None:
    file = os.memfd_create("shared")
    os.ftruncate(file, PAGE)
    area = mmap.mmap(file, PAGE)
    mapping = own_mapping(address_of(area))
    assert other_mappers(os.getpid(), mapping) == []
    with subprocess.Popen(
        [sys.executable, "-S", "-c", MAPPER, str(file), flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(file,),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        assert other_mappers(os.getpid(), mapping) == [process.pid]
        assert other_mappers(process.pid, mapping) == [os.getpid()]
        process.kill()
    assert other_mappers(os.getpid(), mapping) == []
    os.close(file)


def test_anonymous_private_memory_has_no_other_mappers() -> None:
    area = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert other_mappers(os.getpid(), own_mapping(address_of(area))) == []


@pytest.mark.root
def test_a_descriptor_of_another_process_is_the_same_file() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        pidfd = pidfd_open(child.pid)
        assert not os.get_inheritable(pidfd)
        copy = pidfd_getfd(pidfd, 0)
        assert child.stdin is not None
        assert os.fstat(copy).st_ino == os.fstat(child.stdin.fileno()).st_ino
        assert not os.get_inheritable(copy)
        os.close(copy)
        with pytest.raises(OSError, match="Bad file"):
            pidfd_getfd(pidfd, 999)
        assert select.select([pidfd], [], [], 0)[0] == []
        pidfd_send_signal(pidfd, signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
        assert select.select([pidfd], [], [], 0)[0] == [pidfd]
        with pytest.raises(ProcessLookupError):
            pidfd_send_signal(pidfd, signal.SIGTERM)
        os.close(pidfd)


def test_a_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = pidfd_open(int(parent.stdout.readline()))
        assert select.select([child], [], [], 0)[0] == []
        parent.kill()
        parent.wait()
        assert select.select([child], [], [], 20)[0] == [child]
        os.close(child)


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    with pytest.raises(GuestGoneError):
        parse_maps(child.pid)
    with pytest.raises(ProcessLookupError):
        pidfd_open(child.pid)
