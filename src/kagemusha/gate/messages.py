"""What the worker and its gate process tell each other, one fixed-size datagram each (SOCK_SEQPACKET).

::

    0       kind (u8)
    8..64   seven numbers (u64): see each message

Both ends are of one process image (fork), so there is no version and no byte order but the machine's.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import astuple, dataclass

from kagemusha.errors import WireError
from kagemusha.model.ids import Epoch

_LAYOUT = struct.Struct("=B7x7Q")
MESSAGE_BYTES = _LAYOUT.size


class Command(enum.IntEnum):
    """Worker to gate process."""

    SEAL = 1  # epoch; answered by SEALED
    RELEASE = 2  # epoch; not answered
    PASS = 3  # answered by PASSED when nothing is left
    HOLD = 4  # answered by HOLDS
    COUNT = 5  # answered by COUNTED
    DISCARD = 6  # answered by DISCARDED


class Reply(enum.IntEnum):
    """Gate process to worker."""

    SEALED = 17  # epoch, frames, bytes, dropped frames
    PASSED = 18
    HOLDS = 19
    COUNTED = 20  # the fields of GateStatistics
    DISCARDED = 22  # frames
    DEMAND = 21  # how much the open epoch's output wants it to end; sent when it grows, not asked for


@dataclass(frozen=True, slots=True)
class Sealed:
    """What an epoch's output is: frames and bytes held, and frames dropped because the bound was reached."""

    epoch: Epoch
    frames: int
    bytes: int
    dropped_frames: int

    @property
    def session(self) -> int:
        """Of no switch."""
        return 0


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """Totals since the gate process began: held = released + dropped + discarded + pending, in frames.

    dropped: no room (byte bound or kernel queue); discarded: the kernel refused to take them back, or another instance
    of the guest went on from a commit before them.
    """

    held_frames: int
    released_frames: int
    dropped_frames: int
    discarded_frames: int
    pending_frames: int
    pending_bytes: int


def encode(kind: Command | Reply, *numbers: int) -> bytes:
    """A message; numbers that are left out are zero."""
    return _LAYOUT.pack(kind, *numbers, *(0,) * (7 - len(numbers)))


def encode_statistics(statistics: GateStatistics) -> bytes:
    """A COUNTED message."""
    return encode(Reply.COUNTED, *astuple(statistics))


def decode(message: bytes) -> tuple[Command | Reply, tuple[int, ...]]:
    """Kind and the seven numbers.

    :raise WireError: not one of the messages.
    """
    if len(message) != MESSAGE_BYTES:
        raise WireError(f"{len(message)} bytes are no gate message", operation="gate control")
    kind, *numbers = _LAYOUT.unpack(message)
    try:
        known = Command(kind) if kind < Reply.SEALED else Reply(kind)
    except ValueError as error:
        raise WireError(f"{kind} is no gate message", operation="gate control") from error
    return known, tuple(numbers)
