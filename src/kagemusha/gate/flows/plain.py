"""DNS and TCP connections: flows that are told by ports and flags alone.

DNS over UDP is datagrams that stand by themselves (RFC 1035): what the VM asks a server, and what it answers a client.
TCP connections are named from their first SYN to a FIN or RST. Both are information; a class only if the table names
one, and never one that sends TCP ahead of its commit (``guard``).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from kagemusha.gate.flows.packet import FIN, RST, SYN, Direction, Packet
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowAddress, FlowEnd, FlowEvent, FlowInformation, Payload, Transport

DNS_PORT = 53
DNS_TTL_S = 60.0
TCP_TTL_S = 3600.0
MAX_KNOWN = 1024
_DNS_BYTES = 12


class _Known:
    """Flows that were told, oldest first; when one more is too many the oldest is forgotten, and lapses."""

    def __init__(self, protocol: str, class_name: str | None, ttl_s: float) -> None:
        self._protocol, self._class, self._ttl_s = protocol, class_name, ttl_s
        self._told: OrderedDict[FlowAddress, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told)

    def tell(self, address: FlowAddress, why: str, now_s: float) -> list[FlowEvent]:
        said_s = self._told.get(address)
        if said_s is not None and now_s < said_s + self._ttl_s / 4:
            return []
        self._told[address] = now_s
        self._told.move_to_end(address)
        events: list[FlowEvent] = []
        if len(self._told) > MAX_KNOWN:
            oldest, _ = self._told.popitem(last=False)
            events.append(FlowEnd(self._name(oldest), "there are too many"))
        name = self._name(address)
        return [
            *events,
            FlowInformation(self._protocol, name, address, Payload.ANY, self._class, self._ttl_s, why),
        ]

    def end(self, address: FlowAddress, why: str) -> list[FlowEvent]:
        return [] if self._told.pop(address, None) is None else [FlowEnd(self._name(address), why)]

    def expire(self, now_s: float) -> list[FlowEvent]:
        over = [address for address, said_s in self._told.items() if said_s + self._ttl_s <= now_s]
        return [event for address in over for event in self.end(address, "no more of it was seen")]

    def _name(self, address: FlowAddress) -> str:
        return f"{self._protocol}-" + hashlib.blake2b(str(address).encode(), digest_size=12).hexdigest()


class _PlainDetector:
    """What the two have in common. ``read``: the flow of a packet, if it says something about one."""

    protocol: str

    def __init__(self, class_name: str | None, ttl_s: float, read: Callable[[_Known, Packet], list[FlowEvent]]) -> None:
        self._known, self._read = _Known(self.protocol, class_name, ttl_s), read

    @property
    def size(self) -> int:
        """Flows that are kept in mind."""
        return len(self._known)

    def feed(self, packet: Packet) -> Sequence[FlowEvent]:
        """Look at a packet."""
        return self._read(self._known, packet) if packet.source_port and packet.target_port else ()

    def used(self, names: Collection[str], now_s: float) -> Sequence[FlowEvent]:
        """Nothing: what is seen is said."""
        return ()

    def expire(self, now_s: float) -> Sequence[FlowEvent]:
        """Flows that have not been seen for long."""
        return self._known.expire(now_s)

    def resume(self, flows: Sequence[FlowInformation], now_s: float) -> None:
        """Nothing: they are said again when they are seen, under the same names."""


class DnsDetector(_PlainDetector):
    """Queries and answers of the VM over UDP."""

    protocol = "dns"

    def __init__(self, table: FlowsTable) -> None:
        super().__init__(table.dns_class, DNS_TTL_S, _read_dns)


class TcpDetector(_PlainDetector):
    """TCP connections of the VM, by their SYN, FIN and RST."""

    protocol = "tcp"

    def __init__(self, table: FlowsTable) -> None:
        super().__init__(table.tcp_class, TCP_TTL_S, _read_tcp)


def _read_dns(known: _Known, packet: Packet) -> list[FlowEvent]:
    data = packet.payload
    if packet.transport is not Transport.UDP or packet.direction is not Direction.FROM_VM or len(data) < _DNS_BYTES:
        return []
    answers = bool(data[2] & 0x80)
    if answers and packet.source_port == DNS_PORT:
        address = FlowAddress(Transport.UDP, packet.source, DNS_PORT, packet.target, None)
        return known.tell(address, f"DNS answers to {packet.target}", packet.time_s)
    if not answers and packet.target_port == DNS_PORT:
        address = FlowAddress(Transport.UDP, packet.source, None, packet.target, DNS_PORT)
        return known.tell(address, f"DNS queries to {packet.target}", packet.time_s)
    return []


def _read_tcp(known: _Known, packet: Packet) -> list[FlowEvent]:
    if packet.transport is not Transport.TCP or not packet.flags & (SYN | FIN | RST):
        return []
    ends = (packet.source, packet.source_port), (packet.target, packet.target_port)
    own, peer = ends if packet.direction is Direction.FROM_VM else ends[::-1]
    address = FlowAddress(Transport.TCP, own[0], own[1], peer[0], peer[1])
    if packet.flags & (FIN | RST):
        return known.end(address, "closed" if packet.flags & FIN else "reset")
    return known.tell(address, f"TCP connection with {peer[0]} port {peer[1]}", packet.time_s)
