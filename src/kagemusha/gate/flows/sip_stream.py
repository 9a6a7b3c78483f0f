"""SIP over TCP: segments to messages (RFC 3261 section 18.3), for a reader in the middle that may have missed some.

Invariant: memory is bounded: so many connections, so many bytes of each. A reader that lost its place (a gap that does
not close, a message that is none, a connection that was there before) goes on at the next segment that begins with a
start line. What it misses is signalling that nobody acts on: held media, or a rule that lapses.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kagemusha.gate.flows.packet import FIN, RST, SYN, Packet
from kagemusha.gate.flows.sdp import MalformedError
from kagemusha.gate.flows.sip_message import BEGINNING, MAX_MESSAGE_BYTES, body_size, header_size
from kagemusha.model.flows import Host

MAX_STREAMS = 256
MAX_WAITING_SEGMENTS = 32
MAX_WAITING_BYTES = 65_536
_SEQUENCES = 1 << 32
_Key = tuple[Host, int, Host, int]


@dataclass(slots=True)
class _Stream:
    """:ivar next: the sequence number of the byte behind ``data``; None: the place is not known."""

    next: int | None = None
    data: bytes = b""
    waiting: dict[int, bytes] = field(default_factory=dict)

    def lose(self) -> None:
        self.next, self.data = None, b""
        self.waiting.clear()


class SipStreams:
    """All connections of a VM's signalling over TCP, each direction by itself."""

    def __init__(self) -> None:
        self._streams: OrderedDict[_Key, _Stream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    def buffered_bytes(self) -> int:
        """What is kept of all of them."""
        return sum(len(each.data) + sum(len(part) for part in each.waiting.values()) for each in self._streams.values())

    def feed(self, packet: Packet) -> list[bytes]:
        """The messages that a segment completes, headers and body."""
        key = (packet.source, packet.source_port, packet.target, packet.target_port)
        if packet.flags & RST:
            self._streams.pop(key, None)
            self._streams.pop((packet.target, packet.target_port, packet.source, packet.source_port), None)
            return []
        if packet.flags & SYN:
            self._streams[key] = _Stream((packet.sequence + 1) % _SEQUENCES)
        stream = self._streams.setdefault(key, _Stream())
        self._streams.move_to_end(key)
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        if packet.cut:
            stream.lose()
            return []
        messages = _read(stream, packet.sequence, packet.payload) if packet.payload else []
        if packet.flags & FIN:
            del self._streams[key]
        return messages


def _read(stream: _Stream, sequence: int, payload: bytes) -> list[bytes]:
    if stream.next is None or _ahead(sequence, stream.next) > MAX_WAITING_BYTES:
        stream.lose()
        if not BEGINNING.match(payload):
            return []
        stream.next = sequence
    if _ahead(sequence, stream.next) > 0:
        stream.waiting.setdefault(sequence, payload)
        if (
            len(stream.waiting) <= MAX_WAITING_SEGMENTS
            and sum(len(part) for part in stream.waiting.values()) <= MAX_WAITING_BYTES
        ):
            return []
        stream.lose()
        return _read(stream, sequence, payload)
    _append(stream, sequence, payload)
    while stream.waiting:
        near = min(stream.waiting, key=lambda at: _ahead(at, stream.next or 0))
        if _ahead(near, stream.next) > 0:
            break
        _append(stream, near, stream.waiting.pop(near))
    try:
        return _messages(stream)
    except MalformedError:
        stream.lose()
        return []


def _ahead(sequence: int, place: int) -> int:
    """How far a sequence number is ahead of a place; negative: behind it."""
    return (sequence - place + (_SEQUENCES >> 1)) % _SEQUENCES - (_SEQUENCES >> 1)


def _append(stream: _Stream, sequence: int, payload: bytes) -> None:
    """What of a segment at or behind the place is new."""
    assert stream.next is not None
    known = -_ahead(sequence, stream.next)
    if known < len(payload):
        stream.data += payload[known:]
        stream.next = (sequence + len(payload)) % _SEQUENCES


def _messages(stream: _Stream) -> list[bytes]:
    """Cut whole messages off.

    :raise MalformedError: what is there is no message.
    """
    messages: list[bytes] = []
    while True:
        stream.data = stream.data.lstrip(b"\r\n")  # keep-alives between messages (RFC 5626)
        size = header_size(stream.data)
        if not size:
            return messages
        whole = size + body_size(stream.data[:size])
        if whole > MAX_MESSAGE_BYTES:
            raise MalformedError("a message that is too long", operation="read SIP")
        if len(stream.data) < whole:
            return messages
        messages.append(stream.data[:whole])
        stream.data = stream.data[whole:]
