"""Copies of frames that the primary's gate holds, for the standby that may have to send them.

They travel in the session, each epoch's in one message, as a rule ahead of the end of its checkpoint. A table of
lengths and the frames behind it, each with its virtio-net header of 10 bytes in front::

    | count u32 | 0 u32 | count x length u32 | frames |

Invariant: a message that was parsed has lengths that fill it exactly. What may be sent when is not decided here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np

from kagemusha.errors import BugError, WireError
from kagemusha.model.ids import Epoch
from kagemusha.wire.frame import FrameHeader, FrameType
from kagemusha.wire.inbound import PACKET_BYTES_MAX, PACKET_BYTES_MIN

_HEAD: Final = struct.Struct("<II")
_LENGTH_BYTES: Final = 4
HEAD_BYTES: Final = _HEAD.size


def room_bytes(frame: bytes) -> int:
    """What a frame takes of ``HELD_OUTPUT_BYTES``, beyond ``HEAD_BYTES``."""
    return _LENGTH_BYTES + len(frame)


@dataclass(frozen=True, slots=True)
class HeldOutput:
    """Primary → standby: frames that the guest sent in ``epoch`` and that wait for its commit; at least one.

    They need not be all, but they are in order.
    """

    kind: ClassVar[FrameType] = FrameType.HELD_OUTPUT
    epoch: Epoch
    frames: tuple[bytes, ...]

    def payload(self) -> bytes:
        """The bytes of the payload.

        :raise BugError: the reader would not take it.
        """
        lengths = np.array([len(frame) for frame in self.frames], "<u4")
        if problem := _problem(lengths.tolist(), int(lengths.sum(dtype=np.int64))):
            raise BugError(problem, operation="encode held output", epoch=self.epoch)
        return b"".join((_HEAD.pack(len(lengths), 0), lengths.tobytes(), *self.frames))

    @classmethod
    def parse(cls, header: FrameHeader, payload: memoryview) -> Self:
        """The message in ``payload``, copied.

        :raise WireError: it is none.
        """
        count, reserved = _HEAD.unpack_from(payload) if len(payload) >= _HEAD.size else (0, 0)
        at = _HEAD.size + count * _LENGTH_BYTES
        if reserved or not count or at > len(payload):
            problem: str | None = f"{count} frames in {len(payload)} bytes, reserved {reserved}"
        else:
            lengths = np.frombuffer(payload[_HEAD.size : at], "<u4").tolist()
            problem = _problem(lengths, len(payload) - at)
        if problem is not None:
            raise WireError(f"{header.kind.name}: {problem}", operation="read held output", epoch=header.epoch)
        frames = []
        for length in lengths:
            frames.append(bytes(payload[at : at + length]))
            at += length
        return cls(header.epoch, tuple(frames))


def _problem(lengths: Sequence[int], data_bytes: int) -> str | None:
    """What is wrong with frames of these lengths in so many bytes."""
    if not lengths:
        return "no frames"
    if min(lengths) < PACKET_BYTES_MIN or max(lengths) > PACKET_BYTES_MAX:
        return f"frames of {min(lengths)} to {max(lengths)} bytes"
    if sum(lengths) != data_bytes:
        return f"{data_bytes} bytes of frames that are {sum(lengths)}"
    return None
