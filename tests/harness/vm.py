"""One real QEMU with the demo's guest: its monitors, its console, a shell inside it."""

from __future__ import annotations

import functools
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kagemusha.demo.image import COMMAND_PORT, build_image, default_cache_dir
from kagemusha.demo.options import DemoOptions
from kagemusha.demo.sides import SERIAL_FILE, Machine, qemu_command
from kagemusha.errors import KageError
from kagemusha.guest.accel import KERNEL_WORDS, QEMU, READY_LINE, usable_accelerator
from kagemusha.guest.qmp import QmpSession
from kagemusha.kernel.process import set_pdeathsig

LIMIT_S = 120.0
PATTERN_LINE = re.compile(r"PATTERN-OK passes=(\d+) written_pages=(\d+)")


@functools.cache
def demo_machine() -> Machine:
    """What the demo boots, with the accelerator that works here."""
    image = build_image()
    accelerator = usable_accelerator(image.kernel, image.initrd, default_cache_dir())
    append = f"{KERNEL_WORDS} kage.ip=10.0.2.15/24 kage.gw=10.0.2.2"
    return Machine(QEMU, accelerator, image.kernel, image.initrd, append)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What both sides are made of. ``programs``: what the guest runs, for its kernel command line."""

    vcpus: int = 1
    ram_mb: int = 256
    arguments: tuple[str, ...] = ()
    programs: str = ""

    def command(self) -> tuple[str, ...]:
        machine = demo_machine()
        command = qemu_command(
            machine, DemoOptions(ram_mb=self.ram_mb, vcpus=self.vcpus, qemu_arguments=self.arguments)
        )
        append = f"{machine.append} {self.programs}"
        return tuple(append if word == machine.append else word for word in command)


@dataclass
class Vm:
    """A running QEMU. ``monitor`` is for kage, ``operator`` for somebody else; each takes one client at a time."""

    folder: Path
    process: subprocess.Popen[bytes]
    command_port: int
    monitor: Path = field(init=False)
    operator: Path = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = self.folder / "qmp"
        self.operator = self.folder / "operator"

    @property
    def pid(self) -> int:
        return self.process.pid

    def console(self) -> str:
        """All that the guest has printed."""
        serial = self.folder / SERIAL_FILE
        return serial.read_text(errors="replace") if serial.exists() else ""

    def run(self, command: str) -> str:
        """Run shell lines in the guest; return what they print."""
        with socket.create_connection(("127.0.0.1", self.command_port), timeout=LIMIT_S) as connection:
            connection.sendall(f"{command}\nexit\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def boots(self) -> int:
        """How often the guest came up."""
        return self.console().count(READY_LINE)

    def wait_boots(self, count: int) -> None:
        """Wait until the guest is up for the ``count``-th time."""
        self._wait(lambda: self.boots() >= count, f"the guest is up for time {count}")

    def passes(self) -> int:
        """How often ``pattern`` has read all of its memory since the guest came up; fails if it found damage."""
        text = self.console().rpartition(READY_LINE)[2]
        assert "PATTERN-BAD" not in text, text[-1000:]
        found = PATTERN_LINE.findall(text)
        return int(found[-1][0]) if found else -1

    def wait_passes(self, count: int) -> None:
        """Wait until ``pattern`` has read its memory this often."""
        self._wait(lambda: self.passes() >= count, f"pattern has read its memory {count} times")

    def connect(self, path: Path) -> QmpSession:
        """Open a monitor of a QEMU that may be just starting."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                return QmpSession.connect(path)
            except KageError:
                assert self.process.poll() is None, f"QEMU exited with {self.process.returncode}"
                assert time.monotonic() < deadline, f"no monitor on {path}"
                time.sleep(0.01)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"QEMU exited with {self.process.returncode}"
            assert time.monotonic() < deadline, f"never happened: {what}; the console ends: {self.console()[-2000:]}"
            time.sleep(0.02)


@contextmanager
def started(folder: Path, command: tuple[str, ...], *more: str) -> Iterator[Vm]:
    """Start QEMU with two monitors; it ends with the block, or with us."""
    folder.mkdir(exist_ok=True)
    port = _free_port()
    command += ("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:{COMMAND_PORT}")
    command += ("-device", "virtio-net-pci,netdev=n0,romfile=")
    command += ("-qmp", "unix:qmp,server=on,wait=off", "-qmp", "unix:operator,server=on,wait=off")
    process = subprocess.Popen(
        [*command, *more], cwd=folder, stdin=subprocess.DEVNULL, preexec_fn=lambda: set_pdeathsig(signal.SIGKILL)
    )
    try:
        yield Vm(folder, process, port)
    finally:
        process.kill()
        process.wait()


@contextmanager
def bare_vm(folder: Path, *arguments: str) -> Iterator[Vm]:
    """A QEMU without a guest, in its firmware: for what is asked of QEMU alone."""
    command = (QEMU, "-accel", "tcg", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none")
    with started(folder, command, *arguments) as vm:
        yield vm


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
