"""A host's network where the switch holds: it lets out what its guest sends, to the switch, and no process is needed.

It works while everything on the node is frozen but the node itself, and when the worker is dead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kagemusha.protocol.simulate.agenda import Process
from kagemusha.protocol.simulate.guest import Frame, Guest, Mode

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.switch_ports import Ports
    from kagemusha.protocol.simulate.world import World


class Uplink:
    """Of one node. To hold is the switch's business; but what a guest sends before it may be heard waits here."""

    def __init__(self, world: World, node: int, ports: Ports) -> None:
        self._world, self._node, self._ports = world, node, ports
        self._wire = Process(f"wire {node}")
        self._latest = 0.0
        self.guest: Guest | None = None
        self.mode = Mode.CLOSED
        self._waiting: list[tuple[Guest, int, bool]] = []
        self.up = True
        world.judge.gates.append(self)

    def reset(self) -> None:
        """As built."""
        self.mode = Mode.CLOSED
        self._waiting.clear()

    def reaches(self) -> bool:
        """Whether the guest's frames may reach the network now, if it sends some."""
        guest = self.guest
        if guest is None or not guest.running or not self.up or self.mode in (Mode.CLOSED, Mode.WAIT):
            return False
        return self._ports.takes(self._node)

    def take(self, guest: Guest, progress: int, *, transmit: bool) -> None:
        """A frame of the guest: it is at the switch some time later, behind those before."""
        if self.mode is Mode.CLOSED or not self.up:
            return
        if self.mode is Mode.WAIT:
            self._waiting.append((guest, progress, transmit))
            return
        agenda = self._world.agenda
        self._latest = max(self._latest, agenda.now + self._world.network.delay_s())
        arrive = self._ports.arrive
        agenda.later(self._latest - agenda.now, self._wire, arrive, self._node, guest, progress, transmit)

    def lease(self, until_ns: int) -> None:
        """There is none."""

    def send_ahead(self, frames: list[Frame]) -> None:
        """There are none: what was held is at the switch."""
        assert not frames

    def pass_all(self) -> None:
        """Everything goes; first what has waited."""
        self.mode = Mode.PASS
        waiting, self._waiting = self._waiting, []
        for guest, progress, transmit in waiting:
            self.take(guest, progress, transmit=transmit)

    def close(self) -> None:
        """Nothing goes any more."""
        self.mode = Mode.CLOSED

    def worker_died(self) -> None:
        """It goes on."""

    def worker_back(self) -> None:
        """The next worker finds what the last one has left, and closes it."""
        self.mode = Mode.CLOSED
