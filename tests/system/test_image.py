"""The guest image boots under plain QEMU, and its witness program finds each kind of damage to its memory."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from kagemusha.demo.image import COMMAND_PORT, REDIS_PORT, GuestImage, build_image, default_cache_dir
from kagemusha.guest import accel
from kagemusha.guest.accel import KERNEL_WORDS, QEMU, READY_LINE, accelerator_arguments, usable_accelerator

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("image")]
LIMIT_S = 120.0
APPEND = f"{KERNEL_WORDS} kage.ip=10.0.2.15/24 kage.gw=10.0.2.2"


@dataclass(frozen=True, slots=True)
class Guest:
    """A booted guest on QEMU's user network: ``redis_port`` and ``command_port`` lead into it."""

    serial: Path
    redis_port: int
    command_port: int

    def console(self) -> str:
        return self.serial.read_text(errors="replace")

    def wait_console(self, condition: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + LIMIT_S
        while not condition(text := self.console()):
            assert time.monotonic() < deadline, f"the console never said it; its end: {text[-2000:]}"
            time.sleep(0.05)
        return text

    def run(self, command: str) -> str:
        """Run shell lines in the guest; return what they print."""
        with socket.create_connection(("127.0.0.1", self.command_port), timeout=LIMIT_S) as connection:
            connection.sendall(f"{command}\nexit\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return build_image()


@contextmanager
def booted(image: GuestImage, folder: Path, *, vcpus: int = 1, append: str = "") -> Iterator[Guest]:
    guest = Guest(folder / "serial", free_port(), free_port())
    guest.serial.touch()
    forwards = f"hostfwd=tcp:127.0.0.1:{guest.redis_port}-:{REDIS_PORT}"
    forwards += f",hostfwd=tcp:127.0.0.1:{guest.command_port}-:{COMMAND_PORT}"
    accelerator = usable_accelerator(image.kernel, image.initrd, default_cache_dir())
    command = [QEMU, *accelerator_arguments(accelerator, vcpus), "-machine", "q35", "-m", "256"]
    command += ["-smp", str(vcpus), "-nodefaults", "-display", "none", "-serial", f"file:{guest.serial}"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", f"{APPEND} {append}"]
    command += ["-netdev", f"user,id=n0,{forwards}", "-device", "virtio-net-pci,netdev=n0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        guest.wait_console(lambda text: READY_LINE in text)
        yield guest
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def guest(image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with booted(image, tmp_path_factory.mktemp("guest"), append="kage.run=echo%20first kage.run2=echo%20second") as one:
        yield one


def test_image_is_built_once(image: GuestImage) -> None:
    steps: list[str] = []
    assert build_image(progress=steps.append) == image
    assert steps == []
    assert image.initrd.stat().st_size < 40_000_000
    assert {"redis-server", "busybox-static", "iperf3", "sip-tester", "libc6"} <= image.packages.keys()


def test_redis_answers_from_outside(guest: Guest) -> None:
    with redis.Redis(port=guest.redis_port, socket_timeout=LIMIT_S) as client:
        client.set("epoch", 7)
        assert client.get("epoch") == b"7"
        assert client.config_get("save") == {"save": ""}


def test_programs_of_the_kernel_command_line_run(guest: Guest) -> None:
    guest.wait_console(lambda text: {"first", "second"} <= set(text.split()))


def test_programs_and_devices_are_there(guest: Guest) -> None:
    assert "SIPp v3" in guest.run("sipp -v")
    assert "iperf 3" in guest.run("iperf3 --version")
    drivers = guest.run("ls /sys/bus/virtio/drivers").split()
    assert {"virtio_net", "virtio_blk", "virtio_console", "virtio_balloon"} <= set(drivers)


def start_pattern(guest: Guest, size_mb: int, rate_mb_s: int) -> Callable[[], str]:
    """Start ``pattern`` in the guest; returns what reads its output so far."""
    guest.run(f"pattern {size_mb} {rate_mb_s} >/tmp/pattern.out 2>&1 </dev/null &")
    return lambda: guest.run("cat /tmp/pattern.out")


def wait_text(read: Callable[[], str], expression: str) -> re.Match[str]:
    deadline = time.monotonic() + LIMIT_S
    while not (match := re.search(expression, text := read())):
        assert time.monotonic() < deadline, f"no {expression!r} in: {text[-2000:]}"
        time.sleep(0.2)
    return match


# Shell lines of the guest that set `page` to the number of the first page of the buffer: the one anonymous
# mapping of pattern outside heap and stack.
FIND_BUFFER = """pid=$(pidof pattern)
start=$(grep '^7.* rw-p 00000000 00:00 0 *$' /proc/$pid/maps | head -n 1 | cut -d- -f1)
page=$((0x$start / 4096))"""


def peek(number: int) -> str:
    """Shell lines that copy a page of the buffer to /tmp/page."""
    source = f"dd if=/proc/$pid/mem of=/tmp/page bs=4096 count=1 skip=$((page + {number})) 2>/dev/null"
    return f"{FIND_BUFFER}\n{source}\n"


def poke(number: int, source: str) -> str:
    """Shell lines that overwrite a page of the buffer."""
    target = f"of=/proc/$pid/mem bs=4096 count=1 seek=$((page + {number})) conv=notrunc 2>/dev/null"
    return f"{FIND_BUFFER}\ndd if={source} {target}\n"


@pytest.mark.parametrize(
    "fault", ["damaged", *(pytest.param(each, marks=pytest.mark.long) for each in ("stale", "misplaced"))]
)
def test_pattern_finds_damage(guest: Guest, fault: str) -> None:
    read = start_pattern(guest, size_mb=4, rate_mb_s=0 if fault == "misplaced" else 4)
    wait_text(read, r"PATTERN-OK passes=[1-9]")
    if fault == "damaged":
        guest.run(poke(5, "/dev/zero"))
    elif fault == "misplaced":
        guest.run(peek(5) + poke(6, "/tmp/page"))
    else:
        guest.run(peek(5) + "cp /tmp/page /tmp/old")
        wait_text(lambda: guest.run(peek(5) + "cmp -s /tmp/page /tmp/old || echo rewritten"), "rewritten")
        guest.run(poke(5, "/tmp/old"))
    assert wait_text(read, r"PATTERN-BAD fault=(\w+)")[1] == fault
    assert guest.run("pidof pattern") == ""


@pytest.mark.long
def test_reboot_in_the_guest(image: GuestImage, tmp_path: Path) -> None:
    with booted(image, tmp_path, vcpus=2, append="kage.run=pattern%2016%202") as guest:
        assert guest.run("nproc").strip() == "2"
        guest.wait_console(lambda text: "PATTERN-OK passes=1" in text)
        guest.run("reboot")
        text = guest.wait_console(lambda text: text.count(READY_LINE) == 2)
        assert "PATTERN-BAD" not in text


def test_accelerator_answer_is_kept(image: GuestImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "TRIAL_LIMIT_S", 4.0)  # whatever the answer is
    first = usable_accelerator(image.kernel, image.initrd, tmp_path)
    kept = list(tmp_path.iterdir())
    assert [path.read_text() for path in kept] == ([first] if Path("/dev/kvm").exists() else [])
    assert usable_accelerator(image.kernel, image.initrd, tmp_path) == first
