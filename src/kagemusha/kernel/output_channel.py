"""What the gate process tells the ship process, on a way on which nobody ever waits: what finds no room is dropped.

Copies of held frames are put there while the guest stands, so they wake nobody: they are taken when their checkpoint is
sent. That an epoch's frames have left wakes the reader. Two pairs of sockets with message boundaries (unix(7),
SOCK_SEQPACKET), made before the processes are forked. A message is the epoch (u64, the machine's order) and, of a copy,
the payload; both ends are of one process image.
"""

from __future__ import annotations

import socket
import struct

from kagemusha.model.ids import Epoch

_EPOCH = struct.Struct("=Q")
_SO_SNDBUFFORCE = 32
_ROOM_BYTES = 512 << 10


class OutputChannel:
    """Both ends; each process uses one.

    :param copy_bytes: the largest payload of a copy.
    """

    def __init__(self, copy_bytes: int) -> None:
        self._message_bytes = _EPOCH.size + copy_bytes
        self._copies, self._put_copies = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._left, self._put_left = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in self._ends:
            end.setblocking(False)
        self._put_copies.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM_BYTES)

    @property
    def _ends(self) -> tuple[socket.socket, ...]:
        return self._copies, self._put_copies, self._left, self._put_left

    def fileno(self) -> int:
        """For the reader's poll: something has left."""
        return self._left.fileno()

    @property
    def writer_fds(self) -> set[int]:
        """What the writing process needs."""
        return {self._put_copies.fileno(), self._put_left.fileno()}

    @property
    def reader_fds(self) -> set[int]:
        """What the reading process needs."""
        return {self._copies.fileno(), self._left.fileno()}

    def put_copy(self, epoch: Epoch, payload: bytes) -> bool:
        """Copies of an epoch's frames; False: there was no room for them."""
        return _put(self._put_copies, epoch, payload)

    def put_left(self, epoch: Epoch) -> bool:
        """What waited for the commit of epochs up to this one has left; False: nobody is told."""
        return _put(self._put_left, epoch, b"")

    def take_copy(self) -> tuple[Epoch, bytes] | None:
        """The next copy; None: there is none yet."""
        return _take(self._copies, self._message_bytes)

    def take_left(self) -> Epoch | None:
        """The next epoch that has left; None: there is none yet."""
        taken = _take(self._left, _EPOCH.size)
        return None if taken is None else taken[0]

    def close(self) -> None:
        """Give all ends back. May be called again."""
        for end in self._ends:
            end.close()


def _put(end: socket.socket, epoch: Epoch, payload: bytes) -> bool:
    try:
        end.send(_EPOCH.pack(epoch) + payload)
    except (BlockingIOError, BrokenPipeError):
        return False
    return True


def _take(end: socket.socket, room: int) -> tuple[Epoch, bytes] | None:
    try:
        message = end.recv(room)
    except BlockingIOError:
        return None
    return (Epoch(_EPOCH.unpack_from(message)[0]), message[_EPOCH.size :]) if message else None
