"""The demo guest's SIPp answers calls whose requests come again, in every order that a network or a replay makes."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from itertools import count
from pathlib import Path

import pytest
from tests.harness.conditions import PATIENCE_S, wait_until

from kagemusha.switch_demo.phones import sipp_root

HOST = "127.0.0.1"
CALLS = count(1)
TWICE = (
    ("INVITE", "ACK", "BYE"),
    ("INVITE", "INVITE", "ACK", "BYE"),  # what the restored guest has answered already comes once more
    ("INVITE", "INVITE", "INVITE", "ACK", "ACK", "BYE"),
    ("INVITE", "ACK", "INVITE", "BYE"),
    ("INVITE", "ACK", "INVITE", "ACK", "BYE"),
    ("INVITE", "BYE"),  # the ACK was lost
    ("INVITE", "ACK", "BYE", "BYE"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A SIPp as the guest runs it; its port."""
    folder = tmp_path_factory.mktemp("sipp")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
    scenario = folder / "answer.xml"
    scenario.write_bytes(files("kagemusha.demo").joinpath("guest/answer.xml").read_bytes())
    root = sipp_root()
    libraries = str(root / "usr/lib/x86_64-linux-gnu")
    process = subprocess.Popen(
        [root / "usr/bin/sipp", "-sf", scenario, "-i", HOST, "-p", str(port), "-nostdin"],
        cwd=folder,
        env={**os.environ, "LD_LIBRARY_PATH": libraries, "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_bound(process, port)
        yield port
    finally:
        process.kill()
        process.wait()


def wait_bound(process: subprocess.Popen[bytes], port: int) -> None:
    """Until it listens: till then nobody else can be refused the port."""

    def bound() -> bool:
        assert process.poll() is None, "SIPp has ended"
        return f":{port:04X} " in Path("/proc/net/udp").read_text()

    wait_until(bound, "SIPp listens")


class Caller:
    """One call's messages."""

    def __init__(self, server: int) -> None:
        self._call = f"{next(CALLS)}-{os.getpid()}@{HOST}"
        self._to = f"To: <sip:service@{HOST}>"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((HOST, 0))
        self._socket.connect((HOST, server))
        self._socket.settimeout(PATIENCE_S)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, method: str) -> None:
        number = 2 if method == "BYE" else 1
        here = "{}:{}".format(*self._socket.getsockname())
        lines = [
            f"{method} sip:service@{HOST} SIP/2.0",
            f"Via: SIP/2.0/UDP {here};branch=z9hG4bK-{self._call}-{method}",
            f"From: <sip:caller@{here}>;tag=1",
            self._to if method == "INVITE" else f"{self._to};tag=answered",
            f"Call-ID: {self._call}",
            f"CSeq: {number} {method}",
            f"Contact: <sip:caller@{here}>",
            "Max-Forwards: 70",
            "Content-Length: 0",
            "",
            "",
        ]
        self._socket.send("\r\n".join(lines).encode())

    def wait_answer(self, method: str) -> None:
        """Until a 200 to this request is there."""
        while True:
            message = self._socket.recv(4096).decode()
            if message.startswith("SIP/2.0 200 ") and f" {method}\r\n" in message:
                return


@pytest.mark.parametrize("requests", TWICE, ids="-".join)
def test_a_call_is_answered_to_its_end_whatever_comes_again(server: int, requests: tuple[str, ...]) -> None:
    with Caller(server) as caller:
        confirmed = False
        for request in requests:
            caller.send(request)
            confirmed |= request == "ACK"
            if request != "ACK" and not (request == "INVITE" and confirmed):
                caller.wait_answer(request)


def test_what_comes_again_need_not_wait_for_an_answer(server: int) -> None:
    """As a replay gives it: all at once."""
    with Caller(server) as caller:
        caller.send("INVITE")
        caller.wait_answer("INVITE")
        for request in ("INVITE", "ACK", "BYE"):
            caller.send(request)
        caller.wait_answer("BYE")
