"""Which requests had reached the standby: told by the timestamp that the answer echoes."""

from __future__ import annotations

import struct

import pytest

from kagemusha.chaos.recorder import Frame
from kagemusha.chaos.requests import reached_standby, segment_of

CLIENT, SERVER = 40_000, 6379
REQUEST = b"*3 SET key:7 value"
NOTHING, TIMESTAMPS, SACK = b"\x01", b"\x08\x0a", b"\x05\x0a"


def segment(
    ports: tuple[int, int], sequence: int, acknowledged: int, payload: bytes = b"", *, times: tuple[int, int] | None
) -> bytes:
    options = b"" if times is None else NOTHING * 2 + SACK + bytes(8) + TIMESTAMPS + struct.pack("!II", *times)
    options += bytes(-len(options) % 4)
    tcp = struct.pack("!HHIIBBHHH", *ports, sequence, acknowledged, (20 + len(options)) // 4 << 4, 0x18, 0, 0, 0)
    packet = tcp + options + payload
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(packet), 0, 0x4000, 64, 6, 0) + bytes((10, 0, 0, 1, 10, 0, 0, 2))
    return bytes(12) + b"\x08\x00" + ip + packet + bytes(max(0, 46 - len(packet) - 20))  # padded as by a driver


def asked(t_ns: int, sent: int, *, sequence: int = 1000, timed: bool = True) -> Frame:
    times = (sent, 1) if timed else None
    return Frame(t_ns, segment((CLIENT, SERVER), sequence, 50, REQUEST, times=times))


def answer(t_ns: int, echoed: int, *, acknowledged: int = 1000 + len(REQUEST), port: int = CLIENT) -> Frame:
    return Frame(t_ns, segment((SERVER, port), 50, acknowledged, b"+OK", times=(9, echoed)))


def test_a_segment_is_read_to_its_end_and_no_further() -> None:
    found = segment_of(segment((1, 2), 3, 4, b"x", times=(5, 6)))
    assert found is not None
    assert (found.ports, found.sequence, found.acknowledged, found.payload) == ((1, 2), 3, 4, b"x")
    assert (found.sent, found.echoed) == (5, 6)
    assert segment_of(bytes(60)) is None


@pytest.mark.parametrize(("echoed", "reached"), [(100, True), (320, False)])
def test_the_answer_echoes_the_segment_that_brought_the_request(echoed: int, reached: bool) -> None:
    """A copy that was sent again may be there and not be needed."""
    questions = [asked(1, 100), asked(220, 320), asked(440, 540)]
    assert reached_standby(REQUEST, questions, [answer(450, echoed), answer(460, 540)]) is reached


def test_only_what_acknowledges_all_of_it_is_its_answer() -> None:
    others = [answer(2, 77, acknowledged=1000), answer(3, 77, acknowledged=999 + len(REQUEST)), answer(4, 77, port=1)]
    assert reached_standby(REQUEST, [asked(1, 100)], [answer(9, 100), *others]) is True
    assert reached_standby(REQUEST, [asked(1, 100)], others) is None


def test_numbers_wrap_around() -> None:
    question = asked(1, 100, sequence=(1 << 32) - 3)
    assert reached_standby(REQUEST, [question], [answer(2, 100, acknowledged=len(REQUEST) - 3)]) is True


def test_what_cannot_be_told() -> None:
    assert reached_standby(REQUEST, [], [answer(2, 100)]) is None
    assert reached_standby(REQUEST, [asked(1, 0, timed=False)], [answer(2, 0)]) is None
