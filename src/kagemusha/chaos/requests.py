"""Whether a request that waited through a takeover was answered by what had reached the standby, or was sent again.

Frames that go to a dead primary are lost, and clients send them again after 200 ms or more. What had reached the
standby before, in a checkpoint or for its inbound replay, needs no retransmission of the client. Which of the two it
was the answer itself says: with TCP timestamps (RFC 7323, section 4.3) it echoes the time at which that segment was
sent which brought the request, and one that comes again later is not echoed. So what is looked at is one request and
the first segment that acknowledges it, as they came by the switch. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from kagemusha.chaos.recorder import Frame

_IP, _TCP = b"\x08\x00", 6
_END, _NOTHING, _TIMESTAMPS = 0, 1, 8
_HALF = 1 << 31


@dataclass(frozen=True, slots=True)
class Segment:
    """The TCP in a frame.

    :ivar sent, echoed: the timestamps option, in the clocks of the two ends; None: there is none.
    """

    ports: tuple[int, int]
    sequence: int
    acknowledged: int
    payload: bytes
    sent: int | None
    echoed: int | None


def segment_of(content: bytes) -> Segment | None:
    """None: it is no whole TCP segment over IPv4 without a tag."""
    if content[12:14] != _IP or content[23] != _TCP or int.from_bytes(content[20:22]) & 0x3FFF:
        return None
    at, end = 14 + 4 * (content[14] & 15), 14 + int.from_bytes(content[16:18])
    source, target, sequence, acknowledged, offset = struct.unpack_from("!HHIIB", content, at)
    begin = at + 4 * (offset >> 4)
    sent, echoed = _timestamps(content[at + 20 : begin])
    return Segment((source, target), sequence, acknowledged, content[begin:end], sent, echoed)


def _timestamps(options: bytes) -> tuple[int | None, int | None]:
    while len(options) >= 2 and options[0] != _END:
        if options[0] == _NOTHING:
            options = options[1:]
            continue
        if options[0] == _TIMESTAMPS and len(options) >= 10:
            sent, echoed = struct.unpack_from("!II", options, 2)
            return sent, echoed
        options = options[max(2, options[1]) :]
    return None, None


def reached_standby(request: bytes, asked: Iterable[Frame], answers: Iterable[Frame]) -> bool | None:
    """Whether the first frame of a request brought its answer about; False: one that was sent again.

    :param request: the whole of it, in one segment; no other of the record is equal.
    :param asked: what the client has sent.
    :param answers: what was sent to it, by whichever host.
    :return: None if that cannot be told.
    """
    first = next(
        (
            (frame.t_ns, segment)
            for frame in asked
            if (segment := segment_of(frame.content)) and segment.payload == request
        ),
        None,
    )
    if first is None:
        return None
    asked_ns, question = first
    for frame in sorted(answers, key=lambda frame: frame.t_ns):
        answer = segment_of(frame.content)
        if (
            frame.t_ns > asked_ns
            and answer is not None
            and answer.ports == question.ports[::-1]
            and _covers(answer, question)
        ):
            return None if None in (question.sent, answer.echoed) else answer.echoed == question.sent
    return None


def _covers(answer: Segment, question: Segment) -> bool:
    return (answer.acknowledged - question.sequence - len(question.payload)) % (2 * _HALF) < _HALF
