"""A guest, and the gate on the way of its frames: what goes on without any of our processes.

The gate belongs to the kernel: it works while everything on the node is frozen but the node itself, and it looks at the
lease for every frame.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING

from kagemusha.protocol.simulate.clock import Clock

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.agenda import Agenda
    from kagemusha.protocol.simulate.judge import Judge


class Guest:
    """One instance of the VM, numbered in the order in which they come to life.

    ``progress``: frames sent; ``left``: the newest that left; ``node``: where it runs; ``qemu``: what its QEMU is
    called at the arbiter; ``adopted``: it was there before its worker, and outlives it. A standby's QEMU does not.
    """

    __slots__ = ("adopted", "left", "node", "number", "progress", "qemu", "running")

    def __init__(self, number: int, node: int, qemu: str, progress: int = 0, *, adopted: bool = False) -> None:
        self.number = number
        self.node = node
        self.qemu = qemu
        self.adopted = adopted
        self.progress = progress
        self.left = 0
        self.running = True

    def __repr__(self) -> str:
        return f"guest {self.number}"


class Mode(enum.Enum):
    """What the gate does with a frame."""

    PASS = "pass"
    HOLD = "hold"
    WAIT = "wait"
    CLOSED = "closed"


NEVER = -1
Frame = tuple[Guest, int]
"""Whose, and the guest's progress when it was sent."""


class Gate:
    """A node's gate. The lease is looked at unless it passes."""

    __slots__ = ("_agenda", "_clock", "_judge", "_open", "_sealed", "_until_ns", "guest", "mode", "up", "wall_lease")

    def __init__(self, agenda: Agenda, clock: Clock, judge: Judge) -> None:
        self._agenda = agenda
        self._clock = clock
        self._judge = judge
        self.guest: Guest | None = None
        self.up = True
        self.wall_lease = False
        self.reset()
        judge.gates.append(self)

    def reset(self) -> None:
        """As built: closed and empty."""
        self.mode = Mode.CLOSED
        self._until_ns = NEVER
        self._open: list[Frame] = []
        self._sealed: deque[tuple[int, list[Frame]]] = deque()

    @property
    def leased(self) -> bool:
        """Whether the lease is valid."""
        if self.wall_lease:
            return self._clock.wall(self._agenda.now) < self._until_ns
        return self._clock.read(self._agenda.now) < self._until_ns

    def lease(self, until_ns: int) -> None:
        """Frames may leave until then; never shortened."""
        self._until_ns = max(self._until_ns, until_ns)

    def reaches(self) -> bool:
        """Whether the guest's frames may reach the network now, if it sends some."""
        guest = self.guest
        if guest is None or not guest.running or not self.up:
            return False
        return self.mode is Mode.PASS or (self.mode is Mode.HOLD and self.leased)

    def take(self, guest: Guest, progress: int, *, transmit: bool) -> None:
        """A frame of the guest. ``transmit``: its class is not held."""
        if self.mode is Mode.PASS:
            self._judge.frame_left(guest, progress, held=False, transmit=transmit)
        elif self.mode is Mode.HOLD:
            if not transmit:
                self._open.append((guest, progress))
            elif self.leased:
                self._judge.frame_left(guest, progress, held=False, transmit=True)

    def seal(self, epoch: int) -> list[Frame]:
        """All frames held so far are this epoch's; which they are."""
        sealed, self._open = self._open, []
        self._sealed.append((epoch, sealed))
        return sealed

    def send_ahead(self, frames: list[Frame]) -> None:
        """What another instance has sent goes, ahead of all that waits."""
        for guest, progress in frames:
            self._judge.frame_left(guest, progress, held=True, transmit=False)

    def release(self, epoch: int) -> None:
        """Frames of epochs up to this one go; the lease decides whether they get anywhere."""
        sealed = self._sealed
        leased = self.leased
        while sealed and sealed[0][0] <= epoch:
            for guest, progress in sealed.popleft()[1]:
                if leased:
                    self._judge.frame_left(guest, progress, held=True, transmit=False)

    def pass_all(self) -> None:
        """Everything goes, now and from now on."""
        self.mode = Mode.PASS
        for _, frames in self._sealed:
            for guest, progress in frames:
                self._judge.frame_left(guest, progress, held=False, transmit=False)
        self._sealed.clear()
        waiting, self._open = self._open, []
        for guest, progress in waiting:
            self._judge.frame_left(guest, progress, held=False, transmit=False)

    def close(self) -> None:
        """Nothing goes any more; what waits is lost."""
        self.mode = Mode.CLOSED
        self._open.clear()
        self._sealed.clear()

    def worker_died(self) -> None:
        """The gate's process died too, and what it held."""
        self.close()

    def worker_back(self) -> None:
        """It is closed already."""
