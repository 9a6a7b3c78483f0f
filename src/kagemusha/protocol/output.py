"""What the epoch loop asks of whatever holds its guest's output: a gate process of the host, or the switch.

Values and an interface; no decisions (``gate.py`` and ``switch_host.py`` have them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kagemusha.model.ids import Epoch
from kagemusha.protocol.gate import Demand


class SealedOutput(Protocol):
    """What an epoch's output is: frames and bytes held, and frames dropped because the bound was reached.

    :ivar session: at a switch, in which it may be told of the epoch's commit; 0: nobody is to be told.
    """

    @property
    def epoch(self) -> Epoch: ...  # noqa: D102

    @property
    def frames(self) -> int: ...  # noqa: D102

    @property
    def bytes(self) -> int: ...  # noqa: D102

    @property
    def dropped_frames(self) -> int: ...  # noqa: D102

    @property
    def session(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class OutputTotals:
    """held = released + dropped + discarded + pending, in frames, since what holds them exists."""

    held_frames: int
    released_frames: int
    dropped_frames: int
    discarded_frames: int
    pending_frames: int
    pending_bytes: int


class OutputGate(Protocol):
    """Where a guest's output is held until its epoch is committed. Used by one thread.

    :ivar demand: how much the open epoch's output wants it to end, as far as was heard.
    """

    @property
    def demand(self) -> Demand: ...  # noqa: D102

    def fileno(self) -> int:
        """For select: readable when :meth:`pump` has something to take in."""

    def pump(self) -> None:
        """Take in what was said without being asked. Does not wait."""

    def seal(self, epoch: Epoch) -> None:
        """The guest stands: what it has sent is this epoch's. Returns at once."""

    def wait_sealed(self, epoch: Epoch, timeout_s: float) -> SealedOutput:
        """The answer. :raise TransientError: none in time."""

    def release(self, epoch: Epoch) -> None:
        """The standby has acknowledged this epoch and all before. Returns at once."""

    def close(self) -> None:
        """Give it up. May be called again."""
