"""A protected guest whose every frame is recorded: sites with a recorder, programs in the guest, sockets at the client.

The recorder is there before the guest sends its first frame, so it has all of them, on both ends.
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.harness.commands import LIMIT_S, Command, Role, wait
from tests.harness.site import GUEST_HOST, Site, site

from kagemusha.chaos.recorder import Epochs, Frame, Passage, Recorder, datagram_of, passages
from kagemusha.demo.image import COMMAND_PORT
from kagemusha.demo.processes import signal_together
from kagemusha.demo.topology import CLIENT_ADDRESS
from kagemusha.gate.devices import VM, namespace_name
from kagemusha.gate.rules.matcher import BoundRuleSet, bind
from kagemusha.gate.rules.profiles import load_profile
from kagemusha.guest.accel import READY_LINE
from kagemusha.model.config import NetworkTable
from kagemusha.model.events import EpochCommitted, TakenOver
from kagemusha.model.rules import VmAddresses

MAC: str = NetworkTable.model_fields["mac"].default
ADDRESSES = VmAddresses.parse((MAC,), (GUEST_HOST,))
CLIENT_HOST = CLIENT_ADDRESS.split("/")[0]
OBSERVED_LEASE_MS = 2000  # a machine that stands still for a moment is not a dead one
_SOURCE = Path(__file__).with_name("numbered_stream.c")
_PROGRAM = "/bin/numbered_stream"
_LOAD_PORT = 9000
_NUMBER = struct.Struct("!12xQ")


@dataclass(frozen=True, slots=True)
class Stream:
    """Numbered datagrams from the guest to the client. ``mark``: the payload's first byte, 128 for RTP."""

    mark: int
    from_port: int
    to_port: int

    def number(self, frame: bytes) -> int | None:
        """The number in a frame; None: it is none of this stream."""
        datagram = datagram_of(frame)
        if datagram is None or (datagram.source[1], datagram.target[1]) != (self.from_port, self.to_port):
            return None
        return int(_NUMBER.unpack(datagram.payload)[0])


def profile_rules(name: str) -> BoundRuleSet:
    """The rules of a profile, bound to the guest's addresses: the verdict on any frame."""
    return bind(load_profile(name), ADDRESSES)


def shell(hosts: Site, command: str) -> str:
    """Run shell lines in the guest over the network; what they print."""
    with hosts.to_guest(COMMAND_PORT) as connection:
        connection.sendall(f"{command}\nexit\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def start_streams(hosts: Site, interval_us: int, *streams: Stream) -> None:
    """Have the guest send them to the client from now on. The client's ports take them in and are never read."""
    program = hosts.folder / "numbered_stream"
    subprocess.run(["gcc", "-O2", "-static", "-s", "-o", program, _SOURCE], check=True)
    with hosts.within(hosts.topology.client):
        server = socket.create_server((CLIENT_HOST, _LOAD_PORT))
        for stream in streams:
            sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            hosts.keep(sink.close)
            sink.bind((CLIENT_HOST, stream.to_port))
    with server:
        thread = threading.Thread(target=_serve, args=(server, program.read_bytes()), name="program")
        thread.start()
        words = " ".join(f"{each.mark}:{each.from_port}:{each.to_port}" for each in streams)
        started = shell(
            hosts,
            f"nc {CLIENT_HOST} {_LOAD_PORT} </dev/null >{_PROGRAM} && chmod +x {_PROGRAM} && "
            f"({_PROGRAM} {CLIENT_HOST} {interval_us} {words} </dev/null >/dev/null 2>&1 &) && echo started",
        )
        thread.join(LIMIT_S)
    assert started == "started\n"


def _serve(server: socket.socket, content: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(content)


class Ticker:
    """Sends numbered datagrams from the client, one every ``interval_s``, on a thread of its own."""

    def __init__(self, hosts: Site, target: tuple[str, int], content: bytes, interval_s: float) -> None:
        with hosts.within(hosts.topology.client):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._target, self._content, self._interval_s = target, content, interval_s
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        number = 0
        while not self._enough.wait(self._interval_s):
            number += 1
            with suppress(OSError):
                self._socket.sendto(self._content + number.to_bytes(8), self._target)


class Observed:
    """A guest that is protected, and what passes between it and its client.

    :ivar profile: of its rules.
    """

    def __init__(self, hosts: Site, recorder: Recorder, profile: str, changes: Mapping[str, object]) -> None:
        self.hosts = hosts
        self.recorder = recorder
        self.rules = profile_rules(profile)
        self._changes = {"rules.profile": profile, "lease.duration_ms": OBSERVED_LEASE_MS, **changes}
        recorder.add("client", hosts.topology.client, "eth0")
        self.primary = hosts.start("primary", self._of("primary"))
        self.observe("primary")
        self.primary.wait(lambda: READY_LINE in self.primary.console(), "the guest is up")
        self.standby: Command

    def _of(self, role: Role) -> Mapping[str, object]:
        other = "standby." if role == "primary" else "primary."
        return {key: value for key, value in self._changes.items() if not key.startswith(other)}

    def observe(self, role: Role) -> None:
        """Record at the gate of one side from now on, which is before its guest runs."""
        command = self.primary if role == "primary" else self.standby

        def added() -> bool:
            try:
                self.recorder.add(role, namespace_name(self.hosts.name, role), VM)
            except OSError:  # not made yet
                return False
            return True

        command.wait(added, "its gate is there")

    def protect(self) -> None:
        """Start the standby; the guest is protected when this returns."""
        with self.primary.changes("PROTECTED"):
            self.standby = self.hosts.standby(self._of("standby"))
            self.observe("standby")

    def wait_epochs(self, count: int) -> None:
        """Until so many more checkpoints are committed."""
        wanted = len(self.primary.of(EpochCommitted)) + count
        self.primary.wait(lambda: len(self.primary.of(EpochCommitted)) >= wanted, f"{count} more checkpoints")

    def kill(self) -> None:
        """Host A dies: SIGKILL of all that runs there, QEMU first."""
        targets = sorted(self.primary.left(), key=lambda each: not each.is_qemu)
        assert len(signal_together(targets, signal.SIGKILL).names) == len(targets) >= 4
        self.primary.wait_gone()

    def taken_over(self) -> TakenOver:
        """Wait until the guest runs on host B."""
        return self.standby.wait_event(TakenOver)

    def epochs(self) -> Epochs:
        """What the primary has reported as committed."""
        return Epochs(self.primary.of(EpochCommitted))

    def passages(self) -> list[Passage]:
        """Every frame of the guest on host A, with its arrival at the client before the takeover, if there was one.

        Every frame that arrived there until then is one of these.
        """
        took_over = self.standby.of(TakenOver)
        end_ns = int(took_over[0].decided_t * 1e9) if took_over else time.monotonic_ns()
        arrived = [frame for frame in self.recorder.frames("client") if frame.t_ns < end_ns]
        found: list[Passage] = []

        def explained() -> bool:  # the recorder may have heard the client's side first
            found[:], strangers = passages(self.recorder.frames("primary"), arrived)
            return strangers == []

        wait(explained, "every frame at the client has come from the guest")
        return found

    def after_takeover(self) -> list[Frame]:
        """What has arrived since the takeover."""
        decided_ns = int(self.taken_over().decided_t * 1e9)
        return [frame for frame in self.recorder.frames("client") if frame.t_ns >= decided_ns]


@contextmanager
def observed(
    profile: str, changes: Mapping[str, object] | None = None, *, programs: str = "", arguments: Sequence[str] = ()
) -> Iterator[Observed]:
    """Boot a guest under these rules; it is not protected yet.

    :param changes: of the configuration of both sides (``Site.settings``).
    :param programs: what the guest runs, for its kernel command line; ``arguments``: of QEMU.
    """
    with site() as hosts, Recorder(MAC) as recorder:
        command = list(hosts.guest(*arguments, programs=programs))
        yield Observed(hosts, recorder, profile, {"vm.command": command, **(changes or {})})
