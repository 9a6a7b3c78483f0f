"""Runs targets/busy.c: a process that checks itself and tells what it saw through a shared file."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "targets"
MODES = ("ppoll", "nanosleep", "futex", "read", "compute")
_FIELDS = ("heartbeat", "deviations", "eintr", "queued", "plain", "other", "release")
_MESSAGE_OFFSET = 64
_PATIENCE_S = 60.0


def compile_target(source: str, folder: Path, *flags: str) -> Path:
    """Compile one of the C targets."""
    program = folder / source.removesuffix(".c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", *flags, "-o", str(program), str(SOURCES / source)], check=True)
    return program


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll for a condition; the patience is only for a test that has already failed."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.001)


def status_field(pid: int, name: str) -> str:
    """A field of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


class BusyTarget:
    """One running target."""

    def __init__(self, program: Path, state_file: Path, mode: str) -> None:
        state_file.write_bytes(bytes(mmap.PAGESIZE))
        with state_file.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.process = subprocess.Popen([str(program), str(state_file), mode])
        self.pid = self.process.pid
        self.mode = mode

    def value(self, field: str) -> int:
        """One counter of ``struct state``."""
        return int(struct.unpack_from("<Q", self._state, 8 * _FIELDS.index(field))[0])

    def release(self) -> None:
        """Let the child of mode vfork end."""
        struct.pack_into("<Q", self._state, 8 * _FIELDS.index("release"), 1)

    def message(self) -> str:
        """The first deviation."""
        return self._state[_MESSAGE_OFFSET : _MESSAGE_OFFSET + 192].split(b"\0")[0].decode()

    def descriptors(self) -> dict[str, str]:
        """Open descriptors and what they are."""
        folder = Path(f"/proc/{self.pid}/fd")
        return {name: os.readlink(folder / name) for name in os.listdir(folder)}

    def wait_rounds(self, rounds: int = 2) -> None:
        """Wait until the main thread has finished this many more rounds."""
        aim = self.value("heartbeat") + rounds
        wait_until(
            lambda: self.value("heartbeat") >= aim or self.process.poll() is not None,
            f"{self.mode} heartbeat ({self.message()})",
        )
        assert self.process.poll() is None, f"the target ended: {self.process.returncode}"

    def check_unharmed(self, *, may_eintr: bool = False) -> None:
        """Untraced, not stopped, running, and it noticed nothing."""
        assert status_field(self.pid, "TracerPid") == "0"
        assert status_field(self.pid, "State")[0] not in "tT"
        self.wait_rounds()
        assert self.value("deviations") == 0, self.message()
        if not may_eintr:
            assert self.value("eintr") == 0

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self._state.close()


@contextmanager
def running_target(program: Path, folder: Path, mode: str) -> Iterator[BusyTarget]:
    """A target that has finished its first rounds."""
    target = BusyTarget(program, folder / f"{mode}.state", mode)
    try:
        if mode != "vfork":
            target.wait_rounds()
        yield target
    finally:
        target.close()
