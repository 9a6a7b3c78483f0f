"""What the packet sockets of this package have in common: opened at one device, with a filter and a queue.

Facts (packet(7), socket(7), net/core/filter.c): a socket of protocol 0 is deaf until it is bound, so nothing comes by
before its options are set. SO_ATTACH_FILTER replaces a filter; what is queued stays. SO_RCVBUFFORCE doubles what it is
given. A device that is down is told by SO_ERROR after the bind.

::

    struct sock_filter { u16 code; u8 jt, jf; u32 k; };     struct sock_fprog { u16 len; struct sock_filter *filter; };
    struct tpacket_auxdata { u32 tp_status, tp_len, tp_snaplen; u16 tp_mac, tp_net, tp_vlan_tci, tp_vlan_tpid; };
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

SOL_PACKET = 263
PACKET_STATISTICS, PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 6, 8, 15, 23
SO_RXQ_OVFL = 40
STATUS_VLAN_VALID, STATUS_VLAN_TPID_VALID = 1 << 4, 1 << 6
VLAN_ETHERTYPE = 0x8100
AUXDATA = struct.Struct("=3I4H")
STATISTICS = struct.Struct("=2I")  # tp_packets, tp_drops: since they were last read
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_ETH_P_ALL = 3
_INSTRUCTION = struct.Struct("=HBBI")

# <linux/filter.h>: load a word, jump if equal, jump if greater or equal, return
LOAD_WORD, JUMP_EQUAL, JUMP_GE, RETURN = 0x20, 0x15, 0x35, 0x06
AD_PACKET_TYPE, AD_RANDOM = 0xFFFF_F000 + 4, 0xFFFF_F000 + 56  # SKF_AD_OFF + SKF_AD_PKTTYPE, SKF_AD_RANDOM
WHOLE = 0x4_0000
Instruction = tuple[int, int, int, int]  # code, jt, jf, k of struct sock_filter


def attach_filter(raw: socket.socket, program: Sequence[Instruction]) -> None:
    """From now on the socket takes only what this filter takes.

    :raise OSError: EINVAL: it is none.
    """
    if len(program) > MAX_INSTRUCTIONS:
        raise OSError(22, f"a filter of {len(program)} instructions")
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*step) for step in program))
    option = struct.pack("@HP", len(program), ctypes.addressof(code))  # the kernel copies both before it returns
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


def open_at(
    device: str, *, queue_bytes: int, options: Sequence[tuple[int, int]], program: Sequence[Instruction] = ()
) -> socket.socket:
    """A packet socket at a device of the calling thread's network namespace, non-blocking.

    :param device: its name; it has to be up.
    :param queue_bytes: of kernel memory that frames may take up until they are read.
    :param options: levels and names of further options that are to be on.
    :param program: a filter; empty: it takes everything.
    :raise OSError: ENODEV: there is no such device; ENETDOWN: it is down; EPERM; EINVAL: the filter is none.
    """
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        if program:
            attach_filter(raw, program)
        raw.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, queue_bytes // 2)
        for level, name in options:
            raw.setsockopt(level, name, 1)
        raw.bind((device, _ETH_P_ALL))
        if error := raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, f"device {device}")
    except OSError:
        raw.close()
        raise
    return raw
