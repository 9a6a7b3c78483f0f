"""RTP without visible signalling, told by what it looks like (RFC 3550): statistics, so a belief that has to be earned.

A source is believed after so many datagrams in a row with version 2, one SSRC and payload type, sequence numbers that
ascend by one (three at most: some may be missed) and time stamps that do not jump. Its flow is narrowed to the SSRC. It
looks at what the VM sends only. A port of the VM that signalling speaks of is the signalling's: it says when media end.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from kagemusha.gate.flows.packet import Direction, Packet
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowAddress, FlowEnd, FlowEvent, FlowInformation, Host, Payload, Transport

MAX_CANDIDATES = 4096
MAX_SIGNALLED = 8192
MAX_GAP = 3
MAX_TIMESTAMP_STEP = 3 * 180_000  # two seconds of a 90 kHz clock for each packet that may be missing
_RTP_BYTES = 12
_RTCP_TYPES = range(64, 96)  # RFC 5761: what would be RTCP's packet types, without the marker's bit
_Key = tuple[FlowAddress, int]


@dataclass(slots=True)
class _Source:
    payload_type: int
    sequence: int
    timestamp: int
    count: int
    seen_s: float
    said_s: float | None = None


class RtpDetector:
    """Watches the datagrams that a VM sends, all or some moments of them."""

    protocol = "rtp"

    def __init__(self, table: FlowsTable) -> None:
        self._table = table
        self._sources: OrderedDict[_Key, _Source] = OrderedDict()
        self._signalled: OrderedDict[tuple[Host, int], None] = OrderedDict()

    @property
    def size(self) -> int:
        """Sources that are kept in mind."""
        return len(self._sources)

    def feed(self, packet: Packet) -> Sequence[FlowEvent]:
        """Look at a packet; anything but RTP of the VM is passed over."""
        data = packet.payload
        if packet.direction is not Direction.FROM_VM or packet.transport is not Transport.UDP:
            return ()
        if len(data) < _RTP_BYTES or data[0] >> 6 != 2 or data[1] & 0x7F in _RTCP_TYPES:
            return ()
        if (packet.source, packet.source_port) in self._signalled or not (packet.source_port and packet.target_port):
            return ()
        address = FlowAddress(Transport.UDP, packet.source, packet.source_port, packet.target, packet.target_port)
        key = (address, int.from_bytes(data[8:12]))
        source = self._follow(key, data, packet.time_s)
        if source.count < self._table.rtp_packets:
            return ()
        if source.said_s is not None and packet.time_s < source.said_s + self._table.rtp_ttl_s / 4:
            return ()
        source.said_s = packet.time_s
        why = f"RTP of source {key[1]:08x}, payload type {source.payload_type}, by its looks"
        media = self._table.media_class
        return [
            FlowInformation("rtp", _name(key), address, Payload.RTP, media, self._table.rtp_ttl_s, why, ssrc=key[1])
        ]

    def _follow(self, key: _Key, data: bytes, now_s: float) -> _Source:
        kind, sequence, timestamp = data[1] & 0x7F, int.from_bytes(data[2:4]), int.from_bytes(data[4:8])
        source = self._sources.get(key)
        if source is None:
            source = self._sources[key] = _Source(kind, sequence, timestamp, 0, now_s)
            if len(self._sources) > MAX_CANDIDATES:
                self._sources.popitem(last=False)
        step = (sequence - source.sequence) & 0xFFFF
        elapsed = (timestamp - source.timestamp) & 0xFFFF_FFFF
        plausible = 1 <= step <= MAX_GAP and elapsed <= MAX_TIMESTAMP_STEP and kind == source.payload_type
        if source.said_s is None:
            source.count = source.count + 1 if plausible else 1
        source.payload_type, source.sequence, source.timestamp, source.seen_s = kind, sequence, timestamp, now_s
        self._sources.move_to_end(key)
        return source

    def signalled(self, flows: Iterable[FlowAddress]) -> Sequence[FlowEvent]:
        """The signalling speaks of these flows: from now on it alone does."""
        ports = {(flow.source, flow.source_port) for flow in flows if flow.source_port is not None}
        for host, port in ports:
            self._signalled[host, port or 0] = None
            self._signalled.move_to_end((host, port or 0))
            if len(self._signalled) > MAX_SIGNALLED:
                self._signalled.popitem(last=False)
        if not ports:
            return ()
        gone = [key for key in self._sources if (key[0].source, key[0].source_port) in ports]
        return [event for key in gone for event in self._drop(key, "a call has been signalled for it")]

    def used(self, names: Collection[str], now_s: float) -> Sequence[FlowEvent]:
        """A source goes on for as long as it is seen, not for as long as it is sent."""
        return ()

    def expire(self, now_s: float) -> Sequence[FlowEvent]:
        """Sources that have not been seen for long."""
        over = []
        for key, source in self._sources.items():  # in the order in which they were seen
            if source.seen_s + self._table.rtp_ttl_s > now_s:
                break
            over.append(key)
        return [event for key in over for event in self._drop(key, "no more of it was seen")]

    def resume(self, flows: Sequence[FlowInformation], now_s: float) -> None:
        """Nothing: a source that goes on is believed again before its rule lapses, and has the same name."""

    def _drop(self, key: _Key, why: str) -> list[FlowEvent]:
        source = self._sources.pop(key)
        return [] if source.said_s is None else [FlowEnd(_name(key), why)]


def _name(key: _Key) -> str:
    return "rtp-" + hashlib.blake2b(f"{key[0]} {key[1]}".encode(), digest_size=12).hexdigest()
