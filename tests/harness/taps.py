"""A gate's three devices as taps, both ends in the test's hands: what is written to vm0 is read from up0 or hold0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.harness.gate import PLAIN, unique

from kagemusha.gate import devices
from kagemusha.gate.devices import HOLD, UPLINK, VM
from kagemusha.kernel import netns
from kagemusha.kernel.bpf import HoldCount
from kagemusha.kernel.netlink import IFF_NOARP, IFF_UP, Links
from kagemusha.kernel.tap import FRAME_BYTES_MAX, OFFLOADS, VNET_HEADER_BYTES, open_tap

QUEUE_FRAMES = 400_000


class Taps:
    """Descriptors and indices of the three, in a namespace of their own, up and mute."""

    def __init__(self, links: Links, stack: ExitStack) -> None:
        self.links = links
        self._fds: dict[str, int] = {}
        self.index: dict[str, int] = {}
        self.count = HoldCount()
        stack.callback(self.count.close)
        for name in (VM, UPLINK, HOLD):
            self._fds[name] = open_tap(name, offloads=OFFLOADS)
            stack.callback(os.close, self._fds[name])
            self.index[name] = links.get(name).index
            links.change(name, txqlen=QUEUE_FRAMES, mtu=9000)
            links.without_queue(name)
            links.set_flags(name, flags=IFF_UP | IFF_NOARP, mask=IFF_UP | IFF_NOARP)
        links.add_clsact(VM)

    @property
    def vm_fd(self) -> int:
        return self._fds[VM]

    def attach(self, program: int) -> None:
        self.links.set_ingress_program(self.index[VM], program)

    def send(self, frame: bytes, header: bytes = PLAIN) -> None:
        os.write(self.vm_fd, header + frame)

    def _read(self, name: str) -> list[bytes]:
        packets = []
        while True:
            try:
                packets.append(os.read(self._fds[name], FRAME_BYTES_MAX))
            except BlockingIOError:
                return packets

    def sent(self) -> list[bytes]:
        """Frames that have left through up0, without their vnet headers."""
        return [packet[VNET_HEADER_BYTES:] for packet in self.sent_packets()]

    def sent_packets(self) -> list[bytes]:
        return self._read(UPLINK)

    def held(self) -> list[bytes]:
        """Frames that have come to hold0, likewise."""
        return [packet[VNET_HEADER_BYTES:] for packet in self.held_packets()]

    def held_packets(self) -> list[bytes]:
        return self._read(HOLD)


@contextmanager
def taps() -> Iterator[Taps]:
    """The thread is in the devices' namespace for as long as they last."""
    name = f"kgt-{unique()}"
    netns.create(name)
    fd = netns.open_named(name)
    try:
        with netns.entered(fd):
            devices.silence_ipv6("all")
            with ExitStack() as stack:
                yield Taps(stack.enter_context(Links()), stack)
    finally:
        os.close(fd)
        netns.remove(name)
