"""What the server needs of whatever handles the frames at the switch.

Nothing here may wait for long: one thread serves all VMs, and their guests stand meanwhile. What takes time is begun,
and reported when it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kagemusha.model.ids import Epoch
from kagemusha.protocol.gate import Demand
from kagemusha.protocol.output import OutputTotals
from kagemusha.wire.switch import FlowTold


@dataclass(frozen=True, slots=True)
class SealDone:
    """The oldest seal that was asked for is done: frames and bytes that the epoch has, and frames dropped."""

    frames: int
    size: int
    dropped: int


@dataclass(frozen=True, slots=True)
class RulesDone:
    """The rule version with this XXH3-64 digest decides from now on."""

    digest: int


@dataclass(frozen=True, slots=True)
class RulesFailed:
    """It cannot be put into force; the one before stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class DemandGrew:
    """How much the open epoch's output wants it to end."""

    demand: Demand


GateReport = SealDone | RulesDone | RulesFailed | DemandGrew


class VmGate(Protocol):
    """The frames of one VM at the switch. Fenced when it is made.

    Every method may raise :class:`KageError` or OSError: the gate is lost then, and a new one is made when a host
    registers. Seals, releases and mode changes are done in the order in which they were asked for.
    """

    def fileno(self) -> int:
        """For select: readable when :meth:`take` may have something."""

    def take(self) -> GateReport | None:
        """What has been done or has happened, if anything. Does not wait."""

    def fence(self) -> None:
        """No frame of the VM is taken any more, from any port, when this returns."""

    def set_owner(self, port: str, node: str) -> None:
        """Take the VM's frames from this port, and no other; empty: from where this node is.

        :raise ConfigError: there is no such port; the VM is fenced.
        """

    def discard(self) -> None:
        """Forget what is held and not released."""

    def hold(self) -> None:
        """Hold when this returns; what was sealed and not released has joined the open epoch."""

    def pass_output(self) -> None:
        """Let out what is held, and what comes behind it, in order. Does not wait until it has left."""

    def close_output(self) -> None:
        """The owner's frames are dropped when this returns; what is sealed stays."""

    def seal(self, epoch: Epoch) -> None:
        """Give all of the open epoch to this one; :class:`SealDone` reports it."""

    def release(self, epoch: Epoch) -> None:
        """Let the sealed epochs up to this one leave."""

    def install(self, version: bytes) -> None:
        """Begin to put a rule version into force; :class:`RulesDone` or :class:`RulesFailed` reports it."""

    def flow(self, information: FlowTold) -> None:
        """A flow is about to begin, or has ended. A class that there is not, or one flow too many: nothing happens."""

    def totals(self) -> OutputTotals:
        """What was held, released and dropped since it exists."""

    def forget(self) -> None:
        """The VM is one like any other: what is held is dropped, its frames are forwarded, and this gate is closed."""

    def leave(self) -> None:
        """Forward the owner's frames, and nobody else's, without this gate, which closes itself when nothing is held
        any more. After :meth:`pass_output`; a gate for this VM can be made again from then on.
        """

    def close(self) -> None:
        """End it; the VM stays registered with the kernel, and silent unless it was passing. May be called again."""


class Plane(Protocol):
    """Makes gates."""

    def open_vm(self, vm: str, macs: tuple[str, ...]) -> VmGate:
        """A gate for this VM, fenced.

        :raise ConfigError: one of the addresses is another VM's.
        """
