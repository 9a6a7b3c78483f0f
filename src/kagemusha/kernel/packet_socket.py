"""A packet socket that sees what comes in on one device, as whole Ethernet frames, before any program at its ingress.

Facts (packet(7), net/core/dev.c, net/packet/af_packet.c):

- ``__netif_receive_skb_core`` gives a frame to packet sockets first and to the device's ingress programs then, so a
  socket sees frames that a program redirects or drops, and sees them as they came.
- A VLAN tag of the frame (the outer one) has been taken out by then; PACKET_AUXDATA tells it, and ``receive`` puts it
  back, with the ethertype it had.
- Frames that leave through the device are seen as well, unless PACKET_IGNORE_OUTGOING is set.
- Whoever sent the frame pays for the socket: its filter, and a clone of the buffer's head if the filter takes it. No
  content is copied until it is read. A queue that is full costs the sender nothing but the filter.
- The filter may ask for a random number (SKF_AD_RANDOM), so frames can be sampled before they cost anything.

Does not make sense of frames, and sends none.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Self

from kagemusha.kernel.raw_socket import (
    AD_RANDOM,
    AUXDATA,
    JUMP_GE,
    LOAD_WORD,
    PACKET_AUXDATA,
    PACKET_IGNORE_OUTGOING,
    PACKET_STATISTICS,
    RETURN,
    SOL_PACKET,
    STATISTICS,
    STATUS_VLAN_TPID_VALID,
    STATUS_VLAN_VALID,
    VLAN_ETHERTYPE,
    WHOLE,
    attach_filter,
    open_at,
)

_TAG = struct.Struct("!2H")
_TAG_BYTES = 4
_ADDRESSES_BYTES = 12  # destination and source; a tag follows them
_ROOM_BYTES = 1 << 17  # more than the largest superframe
_ANCILLARY_BYTES = socket.CMSG_SPACE(AUXDATA.size)
MAX_ONE_IN = 1 << 31


@dataclass(frozen=True, slots=True)
class PacketSocketStatistics:
    """Totals of a packet socket.

    :param queued: frames that its filter took and its queue had room for.
    :param missed: frames that its filter took and its queue had no room for.
    """

    queued: int
    missed: int


class PacketSocket:
    """The frames that come in on a device of the calling thread's network namespace.

    The socket stays in that namespace, whatever the thread does later.

    :param device: its name; it has to be up.
    :param queue_bytes: of kernel memory that frames may take up until they are read.
    :raise OSError: ENODEV: there is no such device; ENETDOWN: it is down; EPERM.
    """

    def __init__(self, device: str, *, queue_bytes: int) -> None:
        # a tag that has to be put back is written in front of the frame: nothing but the addresses is moved
        self._buffer = bytearray(_TAG_BYTES + _ROOM_BYTES)
        self._view = memoryview(self._buffer)
        self._room = [self._view[_TAG_BYTES:]]
        self._queued = self._missed = 0
        options = (SOL_PACKET, PACKET_IGNORE_OUTGOING), (SOL_PACKET, PACKET_AUXDATA)
        self._socket = open_at(device, queue_bytes=queue_bytes, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self) -> memoryview | None:
        """The next frame, tags included; None if there is none. The view is good until the next call.

        :raise OSError: ENETDOWN: the device is gone, or down.
        """
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into(self._room, _ANCILLARY_BYTES)
        except BlockingIOError:
            return None
        for level, kind, data in ancillary:
            if level == SOL_PACKET and kind == PACKET_AUXDATA:
                status, _, _, _, _, tag, ethertype = AUXDATA.unpack(data)
                if status & STATUS_VLAN_VALID:
                    known = status & STATUS_VLAN_TPID_VALID
                    return self._tagged(size, ethertype if known else VLAN_ETHERTYPE, tag)
        return self._view[_TAG_BYTES : _TAG_BYTES + size]

    def _tagged(self, size: int, ethertype: int, tag: int) -> memoryview:
        buffer = self._buffer
        buffer[:_ADDRESSES_BYTES] = buffer[_TAG_BYTES : _TAG_BYTES + _ADDRESSES_BYTES]
        _TAG.pack_into(buffer, _ADDRESSES_BYTES, ethertype, tag)
        return self._view[: _TAG_BYTES + size]

    def take_one_in(self, count: int) -> None:
        """From now on take one in so many frames, at random; 1: all. What is queued stays.

        :param count: at most 2^31.
        """
        if not 1 <= count <= MAX_ONE_IN:
            raise ValueError(f"one in {count}")
        sampling = [(LOAD_WORD, 0, 0, AD_RANDOM), (JUMP_GE, 1, 0, (1 << 32) // count)] if count > 1 else []
        attach_filter(self._socket, [*sampling, (RETURN, 0, 0, WHOLE), (RETURN, 0, 0, 0)])

    def statistics(self) -> PacketSocketStatistics:
        """Totals so far."""
        data = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size)  # and starts at 0 again
        taken, missed = STATISTICS.unpack(data)
        self._queued += taken - missed
        self._missed += missed
        return PacketSocketStatistics(self._queued, self._missed)

    def close(self) -> None:
        """End it; what is queued is forgotten."""
        self._socket.close()
