"""The client's requests that were open when the guest died, or that it sent before the next one was heard.

Pure: it reads the frames that have passed the client's port of the switch, both ways. A request that reached the dead
guest, or nobody, is to be answered by its successor; a client that had to send it again was not served by us but by its
own transport. SIP over UDP and requests of one segment over TCP, one after the other on a connection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from kagemusha.chaos.recorder import Frame
from kagemusha.gate.flows.packet import Direction, Packet, parse
from kagemusha.gate.flows.sdp import MalformedError
from kagemusha.gate.flows.sip_message import parse_sip
from kagemusha.model.flows import Transport

_LOOK_BACK_NS = 5_000_000_000


@dataclass(slots=True)
class _Asked:
    """A request: when it was sent first, when again, and when the first answer came."""

    sent_ns: int
    again_ns: list[int]
    answered_ns: int | None = None


@dataclass(frozen=True, slots=True)
class OpenRequests:
    """Of one transport.

    :ivar in_flight: sent, and not answered, when the guest died.
    :ivar meanwhile: sent after that, and before its successor was heard.
    :ivar answered: of both.
    :ivar repeated: of both, those that the client sent again before the answer.
    """

    in_flight: int = 0
    meanwhile: int = 0
    answered: int = 0
    repeated: int = 0

    def __add__(self, other: OpenRequests) -> OpenRequests:
        return OpenRequests(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def sip_requests(frames: Iterable[Frame], client: bytes, kill_t: float, heard_t: float) -> OpenRequests:
    """Of SIP over UDP. A request is told by its dialog, number and method; any response to it is an answer.

    :param frames: both ways, in order of time.
    :param client: its MAC address, which tells the directions apart.
    """
    asked: dict[Hashable, _Asked] = {}
    for frame, packet in _packets(frames, client, Transport.UDP):
        try:
            message = parse_sip(packet.payload)
        except MalformedError:
            continue
        key = (message.call_id, message.number, message.method)
        if packet.direction is Direction.FROM_VM:
            _answer(asked.get(key), frame.t_ns, is_response=message.status is not None)
        elif message.status is None and message.method != "ACK":
            _ask(asked, key, frame.t_ns)
    return _account(asked.values(), kill_t, heard_t)


def tcp_requests(frames: Iterable[Frame], client: bytes, port: int, kill_t: float, heard_t: float) -> OpenRequests:
    """Of requests to this port, one at a time on a connection. New data on the connection is the answer.

    :param frames: both ways, in order of time.
    """
    asked: dict[Hashable, _Asked] = {}
    newest: dict[Hashable, _Asked] = {}
    told: set[Hashable] = set()
    for frame, packet in _packets(frames, client, Transport.TCP):
        if not packet.payload:
            continue
        if packet.direction is Direction.FROM_VM and packet.source_port == port:
            connection = (packet.source, packet.target_port)
            if (connection, packet.sequence) not in told:
                told.add((connection, packet.sequence))
                _answer(newest.get(connection), frame.t_ns, is_response=True)
        elif packet.direction is Direction.TO_VM and packet.target_port == port:
            connection = (packet.target, packet.source_port)
            newest[connection] = _ask(asked, (connection, packet.sequence), frame.t_ns)
    return _account(asked.values(), kill_t, heard_t)


def _packets(frames: Iterable[Frame], client: bytes, transport: Transport) -> Iterable[tuple[Frame, Packet]]:
    for frame in frames:
        direction = Direction.TO_VM if frame.content[6:12] == client else Direction.FROM_VM
        packet = parse(frame.content, direction, frame.t_ns / 1e9)
        if packet is not None and packet.transport is transport:
            yield frame, packet


def _ask(asked: dict[Hashable, _Asked], key: Hashable, t_ns: int) -> _Asked:
    known = asked.get(key)
    if known is None:
        return asked.setdefault(key, _Asked(t_ns, []))
    if known.answered_ns is None:
        known.again_ns.append(t_ns)
    return known


def _answer(request: _Asked | None, t_ns: int, *, is_response: bool) -> None:
    if request is not None and is_response and request.answered_ns is None:
        request.answered_ns = t_ns


def _account(asked: Iterable[_Asked], kill_t: float, heard_t: float) -> OpenRequests:
    kill_ns, heard_ns = int(kill_t * 1e9), int(heard_t * 1e9)
    concerned = [
        each
        for each in asked
        if kill_ns - _LOOK_BACK_NS < each.sent_ns < heard_ns
        and (each.answered_ns is None or each.answered_ns > kill_ns)
    ]
    in_flight = sum(each.sent_ns <= kill_ns for each in concerned)
    return OpenRequests(
        in_flight=in_flight,
        meanwhile=len(concerned) - in_flight,
        answered=sum(each.answered_ns is not None for each in concerned),
        repeated=sum(bool(each.again_ns) for each in concerned),
    )
