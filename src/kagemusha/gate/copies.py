"""What of a sealed epoch is copied for the standby: ``docs/design.md``, "Output that had not left".

Bounded in bytes and in frames looked at: a long queue is a stream, which goes on by itself once a part of it is
acknowledged. Large frames do not keep out small ones behind them, since those are answers that somebody waits for.
"""

from __future__ import annotations

from collections import deque

from kagemusha.kernel.output_channel import OutputChannel
from kagemusha.model.ids import Epoch
from kagemusha.wire.frame import HELD_OUTPUT_BYTES
from kagemusha.wire.output import HEAD_BYTES, HeldOutput, room_bytes

LOOK_FRAMES = 256


def copy_sealed(channel: OutputChannel, epoch: Epoch, queue: deque[bytes], frames: int) -> None:
    """An epoch's frames are the last so many of the queue, and wait for its commit."""
    begin, room = len(queue) - frames, HELD_OUTPUT_BYTES - HEAD_BYTES
    copied = []
    for place in range(begin, begin + min(frames, LOOK_FRAMES)):
        frame = queue[place]
        if room_bytes(frame) <= room:
            room -= room_bytes(frame)
            copied.append(frame)
    if copied:
        channel.put_copy(epoch, HeldOutput(epoch, tuple(copied)).payload())
