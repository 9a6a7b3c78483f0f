"""Media towards a guest, which is of no use to it once it is late: which frames are that.

A takeover gives the guest what it was sent since its checkpoint, a tenth of a second and more of each call. It has
answered most of it before, in the life that was taken back; and until it has heard all of it again, nobody hears
anything new of it. So a replay leaves out what is older than a listener would wait for: LATE_S. Only RTP (RFC 3550) to
an end that flow information has told of, and no RTCP; whatever is in doubt is given to the guest.

Pure. Invariant: any bytes are media or not, and nothing is read behind their end.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

import xxhash

from kagemusha.kernel.tap import VNET_HEADER_BYTES

LATE_S: Final = 0.05
"""Between two and three packets of 20 ms."""
ENDS_MAX: Final = 4096

_IPV4, _IPV6, _UDP = b"\x08\x00", b"\x86\xdd", 17
_ETHERTYPE_AT, _PACKET_AT = VNET_HEADER_BYTES + 12, VNET_HEADER_BYTES + 14
_UDP_BYTES, _RTP_BYTES = 8, 12
_RTCP_TYPES = range(192, 224)  # RFC 5761, section 4


def end_key(address: str, port: int) -> int:
    """A number for an address and port of UDP.

    :raise ValueError: it is no address.
    """
    return xxhash.xxh3_64_intdigest(ip_address(address).packed + port.to_bytes(2, "big"))


class MediaEnds:
    """Where a guest hears media."""

    def __init__(self) -> None:
        self._until_t: dict[int, float] = {}

    def note(self, key: int, until_t: float) -> None:
        """RTP to this end is media until then. Of too many the first is forgotten."""
        self._until_t[key] = max(until_t, self._until_t.pop(key, 0.0))
        if len(self._until_t) > ENDS_MAX:
            del self._until_t[next(iter(self._until_t))]

    def are_reached_by(self, frame: bytes, now_t: float) -> bool:
        """Whether a frame, virtio-net header first, is media to one of them."""
        if not self._until_t:
            return False
        kind, head = frame[_ETHERTYPE_AT:_PACKET_AT], frame[_PACKET_AT : _PACKET_AT + 40]
        if kind == _IPV4 and len(head) == 40:
            fragment, protocol, target = (head[6] & 0x3F) | head[7], head[9], head[16:20]
            at = _PACKET_AT + 4 * (head[0] & 0x0F)
        elif kind == _IPV6 and len(head) == 40:
            fragment, protocol, target = 0, head[6], head[24:40]
            at = _PACKET_AT + 40
        else:
            return False
        datagram = frame[at : at + _UDP_BYTES + _RTP_BYTES]
        if fragment or protocol != _UDP or len(datagram) < _UDP_BYTES + _RTP_BYTES:
            return False
        if datagram[_UDP_BYTES] >> 6 != 2 or datagram[_UDP_BYTES + 1] in _RTCP_TYPES:
            return False
        return self._until_t.get(xxhash.xxh3_64_intdigest(target + datagram[2:4]), 0.0) > now_t
