"""The standby's copies of frames that its primary held: what a takeover has to send that nobody else will.

The restored guest has sent what it sent in committed epochs; if the primary died before that left, clients would wait
for a retransmission of the guest (TCP, 200 ms at least) or for ever (UDP).

The safety argument (I1): what was told of epoch n the guest had sent before it stood for checkpoint n, so it may leave
once n, or a later epoch of the same session, is committed; :meth:`KeptOutput.take` hands out nothing else. That some of
it may have left already is no harm: TCP drops a repeated segment, and IP allows a datagram to come twice (RFC 791).
``left`` keeps that to the last moments.

Bounded: the newest ``EPOCHS`` epochs, each as large as one message. Pure.
"""

from __future__ import annotations

from collections import deque

from kagemusha.model.ids import Epoch
from kagemusha.wire.output import HeldOutput

EPOCHS = 4  # two in flight, one that leaves, the open one's


class KeptOutput:
    """Of one session."""

    def __init__(self) -> None:
        self._kept: deque[HeldOutput] = deque(maxlen=EPOCHS)

    def add(self, output: HeldOutput) -> None:
        """Frames that wait for the commit of an epoch; the oldest epoch makes room."""
        self._kept.append(output)

    def left(self, epoch: Epoch) -> None:
        """What waited for the commit of epochs up to this one has left."""
        self._kept = deque((output for output in self._kept if output.epoch > epoch), EPOCHS)

    def clear(self) -> None:
        """Another session begins."""
        self._kept.clear()

    def take(self, committed: Epoch) -> list[bytes]:
        """The frames of epochs up to the last committed one, in order; then all are forgotten."""
        frames = [frame for output in self._kept if output.epoch <= committed for frame in output.frames]
        self._kept.clear()
        return frames
