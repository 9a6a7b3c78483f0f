"""A relay that delays what crosses a bridge, for kernels without netem: run it in the bridge's network namespace.

A program at each port's ingress drops all frames, but a packet socket there sees them before that (packet(7)). The
relay hands each to the bridge again when its time has come, with its virtio header: a superframe or a checksum that is
still to be made stays what it is (PACKET_VNET_HDR). In order, for the delay is the same for all. It dies with whoever
started it, and installs no programs itself.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

_SOL_PACKET = 263
_PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 15, 23
_SO_RCVBUFFORCE = 33
_ETH_P_ALL = 3
_BUFFER_BYTES = 32 << 20
_FRAME_BYTES_MAX = 1 << 17
READY = "relays"


def _packet_socket(device: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    found.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    found.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    found.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    found.setblocking(False)
    found.bind((device, _ETH_P_ALL))
    return found


def relay(bridge: str, ports: list[str], delay_s: float) -> None:
    """Until the process is ended.

    :raise OSError: a device is not there.
    """
    outlet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # deaf: of no protocol
    outlet.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    outlet.bind((bridge, 0))
    inlets = [_packet_socket(port) for port in ports]
    waiting: deque[tuple[float, bytes]] = deque()
    print(READY, flush=True)
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(inlets, [], [], left_s)
        due_t = time.monotonic() + delay_s
        for inlet in readable:
            with suppress(BlockingIOError):
                while True:
                    waiting.append((due_t, inlet.recv(_FRAME_BYTES_MAX)))
        while waiting and waiting[0][0] <= time.monotonic():
            with suppress(OSError):  # no room, or too large by now: lost, as on any network
                outlet.send(waiting.popleft()[1])


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[3:], float(sys.argv[2]))
