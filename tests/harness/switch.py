"""A switch in a network namespace of its own: a bridge whose ports are taps, both ends in the test's hands.

What is written to a port's tap comes in on that port, synchronously; what the bridge sends through it is read there.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
from tests.harness.conditions import wait_until
from tests.harness.gate import ETHERTYPE, PLAIN, WAIT_S, flood, ip, unique

from kagemusha.gate import devices
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.switched import vm
from kagemusha.gate.switched.plane import SwitchPlane
from kagemusha.gate.switched.vm import VmPort
from kagemusha.kernel import netns
from kagemusha.kernel.bridge import BridgeLinks
from kagemusha.kernel.netlink import IFF_NOARP, IFF_UP
from kagemusha.kernel.tap import FRAME_BYTES_MAX, OFFLOADS, VNET_HEADER_BYTES, open_tap

HOSTS, CLIENTS = ("ha", "hb"), ("ca", "cb")
BRIDGE = "br0"
ANYBODY = bytes.fromhex("0200c0ffee01")  # nobody's address: flooded
TAG = struct.pack("!HH", 0x8100, 42)
VM1, VM2, VM3 = (bytes.fromhex(f"5254000000{number:02x}") for number in (1, 2, 3))
STRANGER = bytes.fromhex("020000000099")
QUEUE_FRAMES = 300_000


def made(source: bytes, number: int, *, to: bytes = ANYBODY, size: int = 100, tag: bytes = b"") -> bytes:
    """An Ethernet frame that tells its number; ``tag``: of four bytes, in front of the ethertype."""
    body = struct.pack("!Q", number) + bytes((number + offset) & 0xFF for offset in range(size - 22))
    return to + source + tag + struct.pack("!H", ETHERTYPE) + body


def number_in(frame: bytes) -> int:
    return int(struct.unpack_from("!Q", frame, 14)[0])


class Switch:
    """The bridge's surroundings. The thread is in its namespace for as long as it lasts."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.links = stack.enter_context(BridgeLinks())
        self._fds: dict[str, int] = {}
        self.plane: SwitchPlane | None = None
        for name in (*HOSTS, *CLIENTS):
            self.add_tap(name)

    def add_tap(self, name: str) -> None:
        self._fds[name] = open_tap(name, offloads=OFFLOADS)
        self._stack.callback(os.close, self._fds[name])
        self.links.change(name, txqlen=QUEUE_FRAMES)
        self.links.without_queue(name)
        self.links.set_flags(name, flags=IFF_UP | IFF_NOARP, mask=IFF_UP | IFF_NOARP)

    def add_veth(self, name: str) -> None:
        ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")

    def open(self, hosts: Sequence[str] = HOSTS, clients: Sequence[str] = CLIENTS) -> SwitchPlane:
        self.plane = SwitchPlane.open(BRIDGE, host_ports=hosts, client_ports=clients)
        for name in (*hosts, *clients):
            devices.wait_forwarding(self.links, name)
        return self.plane

    def add_vm(self, name: str, mac: bytes, owner: str | None, mode: GateMode = GateMode.HOLD) -> VmPort:
        assert self.plane is not None
        return self.plane.add_vm(name, mac, owner=owner, mode=mode)

    def send_packet(self, port: str, packet: bytes) -> None:
        os.write(self._fds[port], packet)

    def send(self, port: str, mac: bytes, *numbers: int, to: bytes = ANYBODY, size: int = 100) -> None:
        for number in numbers:
            os.write(self._fds[port], PLAIN + made(mac, number, to=to, size=size))

    def flood(self, port: str, mac: bytes, seconds: float) -> AbstractContextManager[int]:
        """As ``gate.flood``, with this address."""
        return flood(self._fds[port], seconds, PLAIN + made(mac, 0))

    def packets(self, port: str) -> list[bytes]:
        """What has left through a port so far, virtio-net headers included."""
        found = []
        while True:
            try:
                found.append(os.read(self._fds[port], FRAME_BYTES_MAX))
            except BlockingIOError:
                return found

    def frames(self, port: str, mac: bytes | None = None) -> list[bytes]:
        """Test frames among them, from this address if one is given."""
        found = [packet[VNET_HEADER_BYTES:] for packet in self.packets(port)]
        kind = struct.pack("!H", ETHERTYPE)
        return [frame for frame in found if kind in (frame[12:14], frame[16:18]) and mac in (None, frame[6:12])]

    def numbers(self, port: str, count: int = 0, mac: bytes | None = None) -> list[int]:
        """Their numbers; waits until there are ``count``."""
        got: list[int] = []

        def enough() -> bool:
            got.extend(map(number_in, self.frames(port, mac)))
            return len(got) >= count

        wait_until(enough, f"{count} frames through {port}, only {got}")
        return got

    def device_names(self) -> set[str]:
        return {link.name for link in self.links.all()}


@contextmanager
def switch() -> Iterator[Switch]:
    """Four ports, no bridge yet."""
    name = f"kgs-{unique()}"
    netns.create(name)
    fd = netns.open_named(name)
    try:
        with netns.entered(fd):
            devices.silence_ipv6("all")
            with ExitStack() as stack, pytest.MonkeyPatch.context() as patience:
                patience.setattr(vm, "ANSWER_S", WAIT_S)  # a gate process that the machine keeps waiting is not frozen
                here = Switch(stack)
                try:
                    yield here
                finally:
                    if here.plane is not None:
                        here.plane.close()
    finally:
        os.close(fd)
        netns.remove(name)


def packet_socket(device: str) -> socket.socket:
    """Sends frames out of a device, past the bridge."""
    made_socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made_socket.bind((device, 0))
    return made_socket
