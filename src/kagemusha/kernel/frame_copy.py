"""Copies of the frames that leave through a device, and frames sent into one: packet sockets with virtio-net headers.

``CopySocket`` sees what the device's driver is given, one frame for one call of it. Facts (packet(7), net/core/dev.c,
net/packet/af_packet.c):

- ``dev_hard_start_xmit`` gives each buffer to packet sockets and then to the driver: after the device's queue
  discipline, and after segmentation for a driver that cannot do it. So a copy is what the reader of a tap gets, with
  PACKET_VNET_HDR also in its header. Below a queue discipline (pfifo_fast and its like; not noqueue) one CPU at a
  time does this, so the order of the copies is that of the driver's queue.
- A filter of four instructions lets only frames through that leave (SKF_AD_PKTTYPE), so what comes in on the device
  costs that filter and no more. Whoever sends a frame pays for a clone of the buffer's head.
- A full queue drops the newest. With SO_RXQ_OVFL each frame tells how many were dropped before it, so the place of
  each in the order is known although some are missing; nothing is attached while that number is 0.
- PACKET_STATISTICS counts both, and starts at 0 again each time it is read.
- recvmsg fails with EINVAL, and consumes the frame, if its kind of segmentation has no virtio-net header.
- A VLAN tag that the buffer carries aside is told by PACKET_AUXDATA. A tap puts it into the frame and moves
  ``csum_start`` by its size (tun_put_user); so does ``receive_into``.

::

    struct virtio_net_hdr { u8 flags, gso_type; u16 hdr_len, gso_size, csum_start, csum_offset; };

Neither numbers frames nor decides which are sent again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Self

from kagemusha.kernel.raw_socket import (
    AD_PACKET_TYPE,
    AUXDATA,
    JUMP_EQUAL,
    LOAD_WORD,
    PACKET_AUXDATA,
    PACKET_STATISTICS,
    PACKET_VNET_HDR,
    RETURN,
    SO_RXQ_OVFL,
    SOL_PACKET,
    STATISTICS,
    STATUS_VLAN_TPID_VALID,
    STATUS_VLAN_VALID,
    VLAN_ETHERTYPE,
    WHOLE,
    Instruction,
    open_at,
)
from kagemusha.kernel.tap import VNET_HEADER_BYTES

_SIOCGIFTXQLEN, _SIOCSIFTXQLEN = 0x8942, 0x8943
_IFREQ = struct.Struct("=16si20x")
_DROPPED = struct.Struct("=I")
_TAG = struct.Struct("!2H")
_NEEDS_CHECKSUM = 0x01
_CHECKSUM_START = struct.Struct("=H")
_CHECKSUM_START_OFFSET = 6
_TAG_OFFSET = VNET_HEADER_BYTES + 12  # behind destination and source
_ANCILLARY_BYTES = socket.CMSG_SPACE(AUXDATA.size) + socket.CMSG_SPACE(_DROPPED.size)
_ONLY_OUTGOING: tuple[Instruction, ...] = (
    (LOAD_WORD, 0, 0, AD_PACKET_TYPE),
    (JUMP_EQUAL, 0, 1, socket.PACKET_OUTGOING),
    (RETURN, 0, 0, WHOLE),
    (RETURN, 0, 0, 0),
)


class UnfitFrameError(OSError):
    """One frame was consumed that has no virtio-net header."""


class CopySocket:
    """What leaves through a device of the calling thread's namespace, from now on.

    The socket stays in that namespace, and may be used by a process forked later.

    :param queue_bytes: of kernel memory that copies may take up until they are read.
    :raise OSError: ENODEV: there is no such device; ENETDOWN: it is down; EPERM.
    """

    def __init__(self, device: str, *, queue_bytes: int) -> None:
        self._copied = 0
        self._socket = open_at(
            device,
            queue_bytes=queue_bytes,
            options=(
                (socket.SOL_SOCKET, SO_RXQ_OVFL),
                (SOL_PACKET, PACKET_VNET_HDR),
                (SOL_PACKET, PACKET_AUXDATA),
            ),
            program=_ONLY_OUTGOING,
        )

    def fileno(self) -> int:
        """For poll: readable when there is a copy, or an error to be told."""
        return self._socket.fileno()

    def receive_into(self, room: memoryview) -> tuple[int, int] | None:
        """Put the next copy, header first, at the start of ``room``; None if there is none.

        :param room: for the largest frame (``FRAME_BYTES_MAX``) at least.
        :return: bytes of header and frame, and copies that were dropped before it since the socket exists, mod 2^32.
        :raise UnfitFrameError: one frame could not be copied.
        :raise OSError: ENETDOWN: the device is gone, or down.
        """
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into([room], _ANCILLARY_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UnfitFrameError(error.errno, "a frame without a virtio-net header") from error
            raise
        dropped = 0
        for level, kind, data in ancillary:
            if level == SOL_PACKET and kind == PACKET_AUXDATA:
                status, _, _, _, _, tag, ethertype = AUXDATA.unpack(data)
                if status & STATUS_VLAN_VALID:
                    known = status & STATUS_VLAN_TPID_VALID
                    size = _put_tag(room, size, ethertype if known else VLAN_ETHERTYPE, tag)
            elif level == socket.SOL_SOCKET and kind == SO_RXQ_OVFL:
                (dropped,) = _DROPPED.unpack(data)
        return size, dropped

    def copied(self) -> int:
        """Frames that have left since the socket exists, those included that there was no room for.

        Only one process may ask. About a microsecond.
        """
        frames, _ = STATISTICS.unpack(self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))
        self._copied += frames
        return self._copied

    def close(self) -> None:
        """End it; what is queued is forgotten."""
        self._socket.close()


def _put_tag(room: memoryview, size: int, ethertype: int, tag: int) -> int:
    """Write a tag behind the addresses and move on where the checksum starts; the new size."""
    room[_TAG_OFFSET + _TAG.size : size + _TAG.size] = bytes(room[_TAG_OFFSET:size])
    _TAG.pack_into(room, _TAG_OFFSET, ethertype, tag)
    if room[0] & _NEEDS_CHECKSUM:
        (start,) = _CHECKSUM_START.unpack_from(room, _CHECKSUM_START_OFFSET)
        _CHECKSUM_START.pack_into(room, _CHECKSUM_START_OFFSET, start + _TAG.size)
    return size + _TAG.size


class FrameSender:
    """Sends frames with virtio-net headers out of a device of the calling thread's namespace; receives nothing.

    :raise OSError: ENODEV: there is no such device; EPERM.
    """

    def __init__(self, device: str) -> None:
        self._device = device.encode()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self._socket.bind((device, 0))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, packet: bytes | memoryview) -> None:
        """Header and frame. It is in the device's queue, or dropped by it, when this returns.

        :raise OSError: EINVAL: the header is no valid one; EMSGSIZE: longer than the device's MTU; ENOBUFS: the queue
            discipline has no room; ENETDOWN: the device is down.
        """
        self._socket.send(packet)

    @property
    def queue_frames(self) -> int:
        """The device's txqueuelen: of a tap, the frames that wait for its reader at most."""
        answer = fcntl.ioctl(self._socket, _SIOCGIFTXQLEN, _IFREQ.pack(self._device, 0))
        return int(_IFREQ.unpack(answer)[1])

    @queue_frames.setter
    def queue_frames(self, frames: int) -> None:
        fcntl.ioctl(self._socket, _SIOCSIFTXQLEN, _IFREQ.pack(self._device, frames))


class DeviceCounts:
    """A device's counters of frames that left, of the calling thread's namespace at the time this is made.

    Facts: a tap counts a frame in tx_packets when its reader has read it, and in tx_dropped when its queue was full.
    Read from /proc/net/dev, which takes no lock that others could hold; about 8 microseconds with four devices.
    """

    def __init__(self, device: str) -> None:
        self._key = f"{device}:".encode()
        self._fd = os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> tuple[int, int]:
        """(tx_packets, tx_dropped).

        :raise OSError: ENODEV: the device is gone.
        """
        for line in os.pread(self._fd, 65_536, 0).splitlines():
            if line.lstrip().startswith(self._key):
                columns = line.split(b":", 1)[1].split()
                return int(columns[9]), int(columns[11])
        raise OSError(errno.ENODEV, f"{self._key.decode()} no such network device")

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)
