"""Real TCP through the switch's gate: superframes, checksums left to the NIC, ARP, both directions."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.harness.conditions import wait_until
from tests.harness.gate import WAIT_S, ip, unique
from tests.harness.switch import BRIDGE

from kagemusha.gate import devices
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.switched.plane import SwitchPlane
from kagemusha.gate.switched.vm import VmPort
from kagemusha.kernel import netns
from kagemusha.model.ids import Epoch

pytestmark = pytest.mark.root
PAYLOAD = os.urandom(1 << 20) * 8
PORT = 7001


@contextmanager
def namespace() -> Iterator[tuple[str, int]]:
    name = f"kgs-{unique()}"
    netns.create(name)
    fd = netns.open_named(name)
    try:
        yield name, fd
    finally:
        os.close(fd)
        netns.remove(name)


def serve(listener: socket.socket) -> None:
    """Send what is asked for, after its digest has come."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(WAIT_S)
        received = hashlib.sha256()
        size = 0
        while size < len(PAYLOAD):
            data = connection.recv(1 << 20)
            assert data
            received.update(data)
            size += len(data)
        connection.sendall(received.digest() + PAYLOAD)


class Epochs:
    """Seals and releases, over and over, as a host does."""

    def __init__(self, vm: VmPort) -> None:
        self._vm = vm
        self._stop = threading.Event()
        self.held = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        epoch = 0
        while not self._stop.is_set():
            epoch += 1
            self._vm.gate.seal(Epoch(epoch))
            self.held += self._vm.gate.wait_sealed(Epoch(epoch), WAIT_S).frames
            self._vm.gate.release(Epoch(epoch))
            self._stop.wait(0.002)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_tcp_both_ways_through_the_gate_arrives_whole() -> None:
    with ExitStack() as stack:
        _, here_fd = stack.enter_context(namespace())
        guest, guest_fd = stack.enter_context(namespace())
        client, client_fd = stack.enter_context(namespace())
        stack.enter_context(netns.entered(here_fd))
        devices.silence_ipv6("all")
        for port, peer, address in (("ha", guest, "10.9.0.2/24"), ("ca", client, "10.9.0.1/24")):
            ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", peer)
            ip("-n", peer, "addr", "add", address, "dev", "eth0")
            ip("-n", peer, "link", "set", "eth0", "up")
        plane = SwitchPlane.open(BRIDGE, host_ports=["ha"], client_ports=["ca"])
        stack.callback(plane.close)
        with netns.entered(guest_fd):
            mac = address_of("eth0")
            listener = socket.create_server(("10.9.0.2", PORT))
        stack.enter_context(listener)
        vm = plane.add_vm("one", mac, owner="ha", mode=GateMode.HOLD)
        epochs = Epochs(vm)
        stack.callback(epochs.stop)
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        stack.callback(server.join)
        with netns.entered(client_fd):
            connection = socket.create_connection(("10.9.0.2", PORT), timeout=WAIT_S)
        with connection:
            connection.sendall(PAYLOAD)
            received = bytearray()
            while len(received) < 32 + len(PAYLOAD):
                data = connection.recv(1 << 20)
                assert data
                received += data
        assert bytes(received[:32]) == hashlib.sha256(PAYLOAD).digest()
        assert bytes(received[32:]) == PAYLOAD
        epochs.stop()
        assert epochs.held > 0
        wait_until(lambda: vm.gate.statistics().held_frames == vm.given, "what was given is held")
        statistics = vm.gate.statistics()
        assert statistics.dropped_frames == statistics.discarded_frames == 0


def address_of(device: str) -> bytes:
    """The MAC address, in the thread's namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as probe:
        probe.bind((device, 0))
        address: bytes = probe.getsockname()[4]
        return address
