"""A frame as detectors read it: addresses, ports, payload, direction, and when it was seen.

Pure. Invariant: any bytes are a packet or None, and nothing is read behind their end. Fragments, tagged frames, IPv6
with extension headers and tunnels are None: whatever a detector does not see is held as ever.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from kagemusha.model.flows import Host, Transport

_IPV4, _IPV6 = 0x0800, 0x86DD
_TRANSPORTS = {6: Transport.TCP, 17: Transport.UDP}
_ETHERNET_BYTES, _UDP_BYTES, _TCP_BYTES = 14, 8, 20
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


class Direction(enum.Enum):
    """Which way a frame goes."""

    FROM_VM = "from the VM"
    TO_VM = "to the VM"

    @property
    def other(self) -> Direction:
        """The way back."""
        return Direction.TO_VM if self is Direction.FROM_VM else Direction.FROM_VM


@dataclass(frozen=True, slots=True)
class Packet:
    """An unfragmented packet of UDP or TCP.

    :param time_s: when it was seen, by whatever clock the detectors' caller uses throughout; ascending.
    :param cut: the frame is shorter than its headers say.
    :param sequence: of TCP, else 0.
    :param flags: of TCP, else 0.
    """

    direction: Direction
    time_s: float
    transport: Transport
    source: Host
    source_port: int
    target: Host
    target_port: int
    payload: bytes
    cut: bool = False
    sequence: int = 0
    flags: int = 0


def parse(frame: bytes | memoryview, direction: Direction, time_s: float) -> Packet | None:
    """The packet in an Ethernet frame; None if it is of no kind that detectors read."""
    data = memoryview(frame)
    if len(data) < _ETHERNET_BYTES:
        return None
    ethertype, packet = data[12] << 8 | data[13], data[_ETHERNET_BYTES:]
    source: Host
    target: Host
    if ethertype == _IPV4 and len(packet) >= 20 and packet[0] >> 4 == 4:
        header, total = 4 * (packet[0] & 0x0F), packet[2] << 8 | packet[3]
        if header < 20 or total < header or packet[6] & 0x3F or packet[7]:  # a fragment
            return None
        protocol = packet[9]
        source, target = IPv4Address(bytes(packet[12:16])), IPv4Address(bytes(packet[16:20]))
    elif ethertype == _IPV6 and len(packet) >= 40 and packet[0] >> 4 == 6:
        header, total = 40, 40 + (packet[4] << 8 | packet[5])
        protocol = packet[6]
        source, target = IPv6Address(bytes(packet[8:24])), IPv6Address(bytes(packet[24:40]))
    else:
        return None
    transport = _TRANSPORTS.get(protocol)
    cut, segment = len(packet) < total, packet[header:total]
    if transport is None or len(segment) < (_UDP_BYTES if transport is Transport.UDP else _TCP_BYTES):
        return None
    ports = segment[0] << 8 | segment[1], segment[2] << 8 | segment[3]
    if transport is Transport.UDP:
        length = segment[4] << 8 | segment[5]
        if length < _UDP_BYTES or (length > len(segment) and not cut):
            return None
        content = bytes(segment[_UDP_BYTES:length])
        return Packet(direction, time_s, transport, source, ports[0], target, ports[1], content, cut)
    offset = 4 * (segment[12] >> 4)
    if not _TCP_BYTES <= offset <= len(segment):
        return None
    sequence = int.from_bytes(segment[4:8])
    content, flags = bytes(segment[offset:]), segment[13]
    return Packet(direction, time_s, transport, source, ports[0], target, ports[1], content, cut, sequence, flags)
