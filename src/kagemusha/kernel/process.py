"""Other processes: pidfds, death signals, memory maps and sizes.

Facts: a pidfd names a process for good, where a pid may be used again; poll says POLLIN on it when the process
has ended, threads and all. PR_SET_PDEATHSIG acts when the *thread* that forked ends (prctl(2)), so the forking thread
has to live as long as the parent is meant to.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import re
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kagemusha.errors import GuestGoneError
from kagemusha.kernel.libc import LIBC, SYS_PIDFD_GETFD, syscall

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
_MAP_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps. ``perms`` like ``rw-p`` (private) or ``rw-s`` (shared)."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str


def pidfd_open(pid: int) -> int:
    """A pidfd, close-on-exec.

    :raise ProcessLookupError: no such process.
    """
    return os.pidfd_open(pid)


def has_ended(pidfd: int) -> bool:
    """Whether the process is gone."""
    return wait_ended(pidfd, 0)


def wait_ended(pidfd: int, timeout_s: float | None) -> bool:
    """Wait so long (None: for ever) for the end of a process; whether it is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """A copy of another process's file descriptor (pidfd_getfd(2))."""
    return syscall(SYS_PIDFD_GETFD, pidfd, descriptor, 0)


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """Send a signal to exactly this process."""
    signal.pidfd_send_signal(pidfd, number)


def process_of_thread(thread: int) -> int:
    """The process that a thread belongs to.

    :raise OSError: there is no such thread.
    """
    fields = Path(f"/proc/{thread}/status").read_text().split()
    return int(fields[fields.index("Tgid:") + 1])


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; with the pid it is unique until the next boot.

    Source: proc_pid_stat(5), field 22. :raise OSError: there is none.
    """
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[19])


def set_pdeathsig(number: int) -> None:
    """Have the kernel send this signal to the calling process when its parent thread ends."""
    if LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def set_name(name: str) -> None:
    """What ps(1) calls the calling process: at most 15 characters (PR_SET_NAME in prctl(2))."""
    if LIBC.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def close_descriptors_but(kept: set[int]) -> None:
    """Close everything that this process has inherited by fork and does not need.

    A copy keeps alive what the original's owner believes closed: a userfaultfd's registrations, a peer's end of a link.
    """
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) not in kept:
            with suppress(OSError):  # the listing's own is closed already
                os.close(int(entry))


def parse_maps(pid: int) -> list[Mapping]:
    """The memory map, ascending.

    :raise GuestGoneError: the process is gone.
    """
    try:
        text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise GuestGoneError(f"process {pid}: {error.strerror}", operation="read the memory map") from error
    maps = []
    for line in text.splitlines():
        match = _MAP_LINE.match(line)
        if match:
            start, end, perms, offset, device, inode, path = match.groups()
            maps.append(Mapping(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), path))
    return maps


def mapping_at(maps: Sequence[Mapping], address: int) -> Mapping | None:
    """The mapping that holds this address, or None."""
    index = bisect.bisect_right(maps, address, key=lambda mapping: mapping.start) - 1
    return maps[index] if index >= 0 and address < maps[index].end else None


def other_mappers(pid: int, mapping: Mapping) -> list[int]:
    """Processes other than ``pid`` that have the same file or memory object mapped."""
    if mapping.inode == 0:
        return []
    needle = f" {mapping.device} {mapping.inode} "
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != pid:
            with suppress(OSError):  # it ended meanwhile
                text = Path(f"/proc/{entry}/maps").read_text(encoding="utf-8", errors="surrogateescape")
                if needle in text:
                    found.append(int(entry))
    return sorted(found)
