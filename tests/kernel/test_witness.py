"""The guest's memory witness as a process of the host: what it says when asked, and what when its memory is hurt."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tests.harness.conditions import wait_until
from tests.harness.etcd import free_port

from kagemusha.chaos.exchanges import NUMBER, Condition, condition_of
from kagemusha.kernel.vm_rw import read_ranges, write_ranges
from kagemusha.model.memory import Bytes, Ranges

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="host lacks: gcc"),
    pytest.mark.skipif(os.geteuid() != 0, reason="host lacks: root, to write another process's memory"),
]
PAGE = 4096
SIZE_MB = 2


class Witness:
    """A running witness that is asked at ``port``."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def line(self) -> str:
        """By TCP; its end is the connection's."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    def condition(self) -> Condition:
        return condition_of(self.line())

    def answer(self, question: bytes) -> bytes:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
            asking.settimeout(10)
            asking.connect(("127.0.0.1", self.port))
            asking.send(question)
            return asking.recv(4096)

    @property
    def buffer(self) -> int:
        """Address of its first page: the one mapping that holds nothing else is found by what it begins with."""
        for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(word, 16) for word in span.split("-"))
            if rights == "rw-p" and end - start >= SIZE_MB << 20 and self.read(start, 8).tobytes() == b"MGAPEGAK":
                return start
        raise AssertionError("no buffer")

    def read(self, address: int, size: int) -> Bytes:
        out = np.empty(size, np.uint8)
        read_ranges(self.process.pid, span(address, size), out)
        return out

    def write(self, address: int, data: Bytes) -> None:
        write_ranges(self.process.pid, span(address, data.size), data)


def span(address: int, size: int) -> Ranges:
    return np.array([[address, address + size]], np.uint64)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("witness")
    source = folder / "pattern.c"
    source.write_bytes((resources.files("kagemusha.demo") / "guest" / "pattern.c").read_bytes())
    made = folder / "pattern"
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", made, source], check=True)
    return made


@contextmanager
def running(program: Path, rate_mb_s: float) -> Iterator[Witness]:
    port = free_port()
    command = [str(program), str(SIZE_MB), str(rate_mb_s), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True) as process:
        witness = Witness(process, port)
        try:
            wait_until(lambda: reachable(port), "the witness can be asked")
            witness.condition()  # connections are taken before, answers come after its pages are written
            yield witness
        finally:
            process.kill()


def reachable(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_tells_that_it_is_sound_and_goes_on(program: Path) -> None:
    with running(program, 8) as witness:
        before = witness.condition()
        assert before.damage == ""
        wait_until(lambda: witness.condition().written_pages > before.written_pages, "it writes")
        wait_until(lambda: witness.condition().passes > before.passes, "it reads")
        assert witness.condition().damage == ""


def test_an_answer_carries_the_question_s_number(program: Path) -> None:
    with running(program, 8) as witness:
        for number in (0, 77, 2**64 - 1):
            data = witness.answer(NUMBER.pack(number))
            assert NUMBER.unpack_from(data) == (number,)
            assert condition_of(data[NUMBER.size :].decode()).damage == ""
        assert witness.answer(NUMBER.pack(5) + b"x" * 1000)[: NUMBER.size] == NUMBER.pack(5)


def test_what_is_no_question_gets_no_answer(program: Path) -> None:
    with running(program, 8) as witness, closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
        asking.settimeout(10)
        asking.connect(("127.0.0.1", witness.port))
        for size in (0, 1, NUMBER.size - 1):
            asking.send(b"x" * size)
        asking.send(NUMBER.pack(9))
        assert asking.recv(4096)[: NUMBER.size] == NUMBER.pack(9)


@pytest.mark.parametrize("rate_mb_s", [0, 8], ids=["it only reads", "it writes"])
@pytest.mark.parametrize("kind", ["damaged", "one bit", "zeroed", "misplaced", "stale"])
def test_hurt_memory_is_told_for_good(program: Path, kind: str, rate_mb_s: int) -> None:
    with running(program, rate_mb_s) as witness:
        start = witness.buffer
        place = start + 300 * PAGE
        first = witness.read(place, PAGE)
        if kind == "stale":
            if rate_mb_s:
                wait_until(lambda: witness.read(place + 16, 8).tolist() != first[16:24].tolist(), "a newer generation")
            else:  # nothing is ever written anew: a page of another generation stands for one that is too new
                first = page_of(300, 5)
        changed = {
            "damaged": np.full(PAGE, 0xAA, np.uint8),
            "one bit": first ^ np.eye(1, PAGE, 2000, dtype=np.uint8)[0],
            "zeroed": np.zeros(PAGE, np.uint8),
            "misplaced": witness.read(start + 301 * PAGE, PAGE),
            "stale": first,
        }[kind]
        witness.write(place, changed)
        wait_until(lambda: witness.condition().damage != "", "the damage is told")
        told = witness.condition().damage
        expected = {"misplaced": "misplaced", "stale": "stale"}.get(kind, "damaged")
        assert f"fault={expected} page=300 " in told
        witness.write(place, first)  # nothing is good again for looking good again
        assert witness.condition().damage == told
        assert witness.answer(NUMBER.pack(3))[NUMBER.size :].decode() == told + "\n"


def page_of(number: int, generation: int) -> Bytes:
    """A page as the witness writes it (demo/guest/pattern.c)."""
    magic, mask = 0x4B4147455041474D, (1 << 64) - 1

    def following(x: int) -> int:
        return (x * 6364136223846793005 + 1442695040888963407) & mask

    x, words = following(number ^ generation << 32 ^ magic), []
    for _ in range(PAGE // 8 - 4):
        x = following(x)
        words.append(x)
    total = (magic + number + generation + sum(words)) & mask
    return np.array([magic, number, generation, total, *words], np.uint64).view(np.uint8)


def test_without_a_port_it_ends_at_the_first_fault(program: Path) -> None:
    with subprocess.Popen([program, str(SIZE_MB), "0"], stdout=subprocess.PIPE, text=True) as process:
        witness = Witness(process, 0)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("PATTERN-OK")
        witness.write(witness.buffer, np.zeros(PAGE, np.uint8))
        told, _ = process.communicate(timeout=30)
    assert told.splitlines()[-1].startswith("PATTERN-BAD fault=damaged page=0 ")
    assert process.returncode == 1


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_bad_port_is_refused(program: Path, port: str) -> None:
    done = subprocess.run([program, "1", "1", port], capture_output=True, text=True, check=False)
    assert (done.returncode, "usage" in done.stderr) == (2, True)


def test_a_port_in_use_is_told(program: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        command = [str(program), "1", "1", str(other.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "in use" in done.stderr) == (2, True)
