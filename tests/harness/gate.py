"""A host in a network namespace of its own: a bridge, a client port, and a Python guest behind a real gate."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kagemusha.gate import devices
from kagemusha.gate.namespace import GateNetwork
from kagemusha.gate.process import GateClient, spawn_gate
from kagemusha.kernel import netns
from kagemusha.kernel.netlink import Links
from kagemusha.kernel.output_channel import OutputChannel
from kagemusha.model.config import NetworkTable

ETHERTYPE = 0x88B5  # IEEE 802 local experimental
SOL_PACKET, PACKET_VNET_HDR = 263, 15
PLAIN = bytes(10)
GUEST_MAC = bytes.fromhex("525400aa0001")
ROLE = "primary"
LONG_QUEUE = 500_000  # frames that wait for a gate process which a busy machine keeps waiting
WAIT_S = 30.0  # for an answer that comes at once unless the machine is overloaded
_serial = itertools.count()


def unique() -> str:
    return f"t{os.getpid()}x{next(_serial)}"


def ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True).stdout


def frame(number: int, size: int = 100) -> bytes:
    """An Ethernet frame that tells its number; its content depends on it."""
    body = struct.pack("!Q", number) + bytes((number + offset) & 0xFF for offset in range(size - 22))
    return b"\xff" * 6 + GUEST_MAC + struct.pack("!H", ETHERTYPE) + body


def number_of(data: bytes) -> int:
    return int(struct.unpack_from("!Q", data, 14)[0])


def tcp_superframe(payload_bytes: int) -> bytes:
    """A TCP segment of many MSS with the checksum left to the NIC, as a guest's virtio driver gives it."""
    tcp = struct.pack("!HHIIBBHHH", 1234, 80, 1, 1, 5 << 4, 0x10, 1024, 0, 0)
    payload = os.urandom(payload_bytes)
    total = 20 + len(tcp) + len(payload)
    address = bytes((10, 9, 0, 2)) + bytes((10, 9, 0, 1))
    header = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, total, 7, 0x4000, 64, 6, 0) + address)
    check = sum(struct.unpack("!10H", header))
    header[10:12] = struct.pack("!H", ~((check & 0xFFFF) + (check >> 16)) & 0xFFFF)
    pseudo = sum(struct.unpack("!4H", address)) + 6 + len(tcp) + len(payload)
    folded = (pseudo & 0xFFFF) + (pseudo >> 16)
    tcp = tcp[:16] + struct.pack("!H", folded) + tcp[18:]
    ethernet = b"\xff" * 6 + GUEST_MAC + b"\x08\x00"
    vnet = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)  # NEEDS_CSUM, TCPV4
    return vnet + ethernet + bytes(header) + tcp + payload


@contextmanager
def flood(tap_fd: int, seconds: float, packet: bytes = PLAIN + frame(0)) -> Iterator[int]:
    """A process that sends as fast as the kernel takes it, numbers from 0 on, for a bounded time; its pidfd."""
    pid = os.fork()
    if pid == 0:
        try:
            data = bytearray(packet)
            until = time.monotonic() + seconds
            number = 0
            while time.monotonic() < until:
                struct.pack_into("!Q", data, len(PLAIN) + 14, number)
                os.write(tap_fd, data)
                number += 1
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(pidfd)


class Listener:
    """Everything that comes in on a device of the thread's namespace, kept in a large socket buffer."""

    def __init__(self, device: str, *, protocol: int = ETHERTYPE, vnet: bool = False) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
        if vnet:
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.bind((device, protocol))
        self._socket.setblocking(False)

    def arrived(self) -> list[bytes]:
        """What has come in so far. Writing a tap delivers before it returns, so this needs no waiting."""
        frames: list[bytes] = []
        while True:
            try:
                data, address = self._socket.recvfrom(1 << 17)
            except BlockingIOError:
                return frames
            if address[2] != socket.PACKET_OUTGOING:
                frames.append(data)

    def wait_for(self, count: int) -> list[bytes]:
        """At least ``count`` frames."""
        frames = self.arrived()
        self._socket.settimeout(WAIT_S)
        try:
            while len(frames) < count:
                data, address = self._socket.recvfrom(1 << 17)
                if address[2] != socket.PACKET_OUTGOING:
                    frames.append(data)
        finally:
            self._socket.setblocking(False)
        return frames + self.arrived()

    def close(self) -> None:
        self._socket.close()


class Lab:
    """The host's side. The thread is in its namespace for as long as the lab lasts."""

    def __init__(self, vm: str) -> None:
        self.vm = vm
        self.host = f"kgh-{vm}"
        self.network: GateNetwork | None = None
        self.gate: GateClient | None = None
        self.client: Listener

    def build(
        self, *, network: NetworkTable | None = None, hold_bytes: int = 64 << 20
    ) -> tuple[GateNetwork, GateClient]:
        built = self.build_network(network)
        return built, self.spawn_gate(hold_bytes)

    def build_network(self, network: NetworkTable | None = None, *, switched: bool = False) -> GateNetwork:
        self.network = GateNetwork.build(self.vm, ROLE, network or NetworkTable(bridge="br0"), switched=switched)
        self.network.lease.forever()  # tests that are about the lease begin one of their own
        return self.network

    def spawn_gate(self, hold_bytes: int = 64 << 20, *, copies: OutputChannel | None = None) -> GateClient:
        assert self.network is not None
        self.gate = spawn_gate(self.network, hold_bytes=hold_bytes, copies=copies)
        return self.gate

    def send(self, *numbers: int, size: int = 100) -> None:
        """The guest sends."""
        assert self.network is not None
        for number in numbers:
            os.write(self.network.tap_fd, PLAIN + frame(number, size))

    def send_in(self, data: bytes) -> None:
        """The client sends to the guest."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("client", 0))
            sender.send(data)

    def numbers(self, count: int = 0) -> list[int]:
        """Numbers of the frames the client has got; waits until there are ``count``."""
        return [number_of(data) for data in self.client.wait_for(count)]

    def close(self) -> None:
        if self.gate is not None:
            self.gate.close()
        if self.network is not None:
            self.network.close()


@contextmanager
def lab() -> Iterator[Lab]:
    """A host with bridge ``br0`` and a client at ``client``, mute but for what tests send."""
    made = Lab(unique())
    netns.create(made.host)
    fd = netns.open_named(made.host)
    try:
        with netns.entered(fd):
            devices.silence_ipv6("all")
            ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            ip("link", "add", "client", "type", "veth", "peer", "name", "port")
            ip("link", "set", "port", "master", "br0", "up")
            ip("link", "set", "client", "up")
            ip("link", "set", "br0", "up")
            with Links() as links:
                devices.wait_forwarding(links, "port")
            made.client = Listener("client")
            try:
                yield made
            finally:
                made.client.close()
                made.close()
    finally:
        os.close(fd)
        netns.remove(made.host)


def namespaces(vm: str) -> set[str]:
    """Names that have to do with this lab's VM; other programs make namespaces at any time."""
    return {name for name in os.listdir(netns.NAMED) if vm in name}


def device_names(namespace: str) -> set[str]:
    fd = netns.open_named(namespace)
    try:
        with netns.entered(fd):
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
            return {line.split(":")[0].strip() for line in lines}
    finally:
        os.close(fd)
