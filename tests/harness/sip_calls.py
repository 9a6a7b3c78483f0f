"""SIP messages as phones and servers write them, and the packets that carry them, seen at a VM's tap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from kagemusha.gate.flows.packet import SYN, Direction, Packet
from kagemusha.model.flows import Transport

VM, PEER = "192.0.2.10", "198.51.100.7"
VM6, PEER6 = "2001:db8::10", "2001:db8:1::7"
FROM, TO = Direction.FROM_VM, Direction.TO_VM


def sdp(host: str, *media: str, session: bool = True, port: int = 0) -> str:
    """A description with these m= sections (``m=`` left out), or one stream of audio at ``port``."""
    family = "IP6" if ":" in host else "IP4"
    lines = ["v=0", f"o=- 1 1 IN {family} {host}", "s=-"]
    lines += [f"c=IN {family} {host}"] if session else []
    lines += ["t=0 0"]
    for each in media or (f"audio {port} RTP/AVP 0",):
        lines += [f"m={each}"]
    return "\r\n".join((*lines, ""))


@dataclass
class Call:
    """A call between a caller and a callee, one of which is the VM."""

    caller: Direction
    call_id: str = "a84b4c76e66710@pc33.example.com"
    vm: str = VM
    peer: str = PEER
    to_tag: str = "314159"
    transport: Transport = Transport.UDP
    time_s: float = 0.0
    sequences: dict[Direction, int] = field(default_factory=lambda: {FROM: 1000, TO: 5000})

    def request(
        self, method: str, number: int, body: str = "", *, by: Direction | None = None, more: Iterable[str] = (),
        established: bool = False, target: str = "sip:bob@biloxi.example.com",
    ) -> bytes:  # fmt: skip
        side = by or self.caller
        own, other = "From: <sip:alice@a>;tag=1928301774", "To: <sip:bob@b>"
        if side is not self.caller:
            own, other = f"From: <sip:bob@b>;tag={self.to_tag}", "To: <sip:alice@a>;tag=1928301774"
        elif established:
            other += f";tag={self.to_tag}"
        return self._message(f"{method} {target} SIP/2.0", own, other, f"{number} {method}", body, more)

    def response(
        self, status: int, method: str, number: int, body: str = "", *, to: Direction | None = None,
        more: Iterable[str] = (),
    ) -> bytes:  # fmt: skip
        """The answer to a request of ``to`` (the caller, by default)."""
        ends = "From: <sip:alice@a>;tag=1928301774", f"To: <sip:bob@b>;tag={self.to_tag}"
        if (to or self.caller) is not self.caller:
            ends = f"From: <sip:bob@b>;tag={self.to_tag}", "To: <sip:alice@a>;tag=1928301774"
        return self._message(f"SIP/2.0 {status} Whatever", *ends, f"{number} {method}", body, more)

    def _message(self, start: str, own: str, other: str, cseq: str, body: str, more: Iterable[str]) -> bytes:
        lines = [start, "Via: SIP/2.0/UDP pc33.example.com;branch=z9hG4bK776asdhds", own, other]
        lines += [f"Call-ID: {self.call_id}", f"CSeq: {cseq}", "Max-Forwards: 70", *more]
        lines += ["Content-Type: application/sdp"] if body else []
        return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", body)).encode()

    def packet(self, side: Direction, data: bytes, *, syn: bool = False) -> Packet:
        """The packet with which a side sends bytes."""
        vm, peer = (ip_address(self.vm), 5060), (ip_address(self.peer), 5060)
        source, target = (vm, peer) if side is FROM else (peer, vm)
        packet = Packet(side, self.time_s, self.transport, source[0], source[1], target[0], target[1], data)
        if self.transport is Transport.TCP:
            packet = replace(packet, sequence=self.sequences[side] & 0xFFFF_FFFF, flags=SYN if syn else 0x10)
            self.sequences[side] += 1 if syn else len(data)
        return packet


def rtp(sequence: int, timestamp: int, *, ssrc: int = 0xDEADBEEF, kind: int = 0, size: int = 160) -> bytes:
    """A packet of RTP (RFC 3550 section 5.1)."""
    head = bytes((0x80, kind)) + (sequence & 0xFFFF).to_bytes(2) + (timestamp & 0xFFFF_FFFF).to_bytes(4)
    return head + ssrc.to_bytes(4) + bytes(size)


def frame(source: str, source_port: int, target: str, target_port: int, payload: bytes, *, tcp: bool = False) -> bytes:
    """An Ethernet frame."""
    network = IPv6(src=source, dst=target) if ":" in source else IP(src=source, dst=target)
    transport = TCP(sport=source_port, dport=target_port) if tcp else UDP(sport=source_port, dport=target_port)
    return bytes(Ether(src="52:54:00:6b:61:01", dst="02:00:00:00:00:01") / network / transport / Raw(payload))
