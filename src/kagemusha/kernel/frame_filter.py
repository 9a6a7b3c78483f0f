"""A packet socket that sees frames of a device in both directions, as far as a filter lets them through.

Facts (packet(7), net/core/filter.c, net/packet/af_packet.c): the filter is classic BPF and runs where the frame
passes, in the context of whoever sends it; what it does not take costs nothing more. It sees the frame without the tag
that the buffer carries aside; PACKET_AUXDATA tells that there is one. What comes in is seen before any program at the
device's ingress, what leaves (PACKET_OUTGOING) behind its egress. SO_ATTACH_FILTER replaces a filter; what is queued
stays.

Neither makes sense of frames nor says which filter is right.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from kagemusha.kernel.raw_socket import (
    AUXDATA,
    PACKET_AUXDATA,
    RETURN,
    SOL_PACKET,
    STATUS_VLAN_VALID,
    Instruction,
    attach_filter,
    open_at,
)

_ROOM_BYTES = 1 << 17  # more than the largest superframe
_ANCILLARY_BYTES = socket.CMSG_SPACE(AUXDATA.size)
NOTHING: tuple[Instruction, ...] = ((RETURN, 0, 0, 0),)


@dataclass(frozen=True, slots=True)
class FilteredFrame:
    """A frame that the filter took.

    :param leaves: it leaves through the device; else it came in.
    :param tagged: it has a VLAN tag, which is not in ``data``.
    :param data: from the destination address on; good until the next call of ``receive``.
    """

    leaves: bool
    tagged: bool
    data: memoryview


class FilteredSocket:
    """Frames of a device of the calling thread's network namespace.

    The socket stays in that namespace, and may be used by a process forked later.

    :param queue_bytes: of kernel memory that frames may take up until they are read.
    :raise OSError: ENODEV: there is no such device; ENETDOWN: it is down; EPERM; EINVAL: the filter is none.
    """

    def __init__(self, device: str, program: Sequence[Instruction], *, queue_bytes: int) -> None:
        self._buffer = memoryview(bytearray(_ROOM_BYTES))
        self._room = [self._buffer]
        self._socket = open_at(
            device, queue_bytes=queue_bytes, options=((SOL_PACKET, PACKET_AUXDATA),), program=program
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For poll: readable when there is a frame, or an error to be told."""
        return self._socket.fileno()

    def take_only(self, program: Sequence[Instruction]) -> None:
        """From now on take only what this filter takes.

        :raise OSError: EINVAL: it is none.
        """
        attach_filter(self._socket, program)

    def receive(self) -> FilteredFrame | None:
        """The next frame; None if there is none.

        :raise OSError: ENETDOWN: the device is gone, or down.
        """
        try:
            size, ancillary, _, address = self._socket.recvmsg_into(self._room, _ANCILLARY_BYTES)
        except BlockingIOError:
            return None
        tagged = any(
            level == SOL_PACKET and kind == PACKET_AUXDATA and AUXDATA.unpack(data)[0] & STATUS_VLAN_VALID
            for level, kind, data in ancillary
        )
        return FilteredFrame(address[2] == socket.PACKET_OUTGOING, tagged, self._buffer[:size])

    def close(self) -> None:
        """End it; what is queued is forgotten."""
        self._socket.close()
