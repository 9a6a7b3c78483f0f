"""Which frames towards a guest are media that may come too late."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kagemusha.inbound.media import ENDS_MAX, MediaEnds, end_key
from kagemusha.kernel.tap import VNET_HEADER_BYTES

VNET = bytes(VNET_HEADER_BYTES)
RTP = b"\x80\x00" + bytes(range(10)) + b"voice"
GUEST = {4: "192.0.2.10", 6: "2001:db8::10"}
FAR = {4: "192.0.2.1", 6: "2001:db8::1"}


def frame(payload: bytes = RTP, *, family: int = 4, port: int = 20_000, protocol: int = 17, fragment: int = 0) -> bytes:
    """A datagram to the guest, as the replay tap gives it."""
    udp = struct.pack("!HHHH", 30_000, port, 8 + len(payload), 0) + payload
    ends = ip_address(FAR[family]).packed + ip_address(GUEST[family]).packed
    if family == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, fragment, 64, protocol, 0) + ends
    else:
        head = struct.pack("!IHBB", 6 << 28, len(udp), protocol, 64) + ends
    return VNET + bytes(12) + (b"\x08\x00" if family == 4 else b"\x86\xdd") + head + udp


def ends(family: int = 4) -> MediaEnds:
    known = MediaEnds()
    known.note(end_key(GUEST[family], 20_000), 100.0)
    return known


@pytest.mark.parametrize("family", [4, 6])
def test_rtp_to_an_end_that_was_told_of_is_media_as_long_as_it_was_told(family: int) -> None:
    known = ends(family)
    assert known.are_reached_by(frame(family=family), 99.0)
    assert not known.are_reached_by(frame(family=family), 100.0)
    known.note(end_key(GUEST[family], 20_000), 50.0)
    assert known.are_reached_by(frame(family=family), 99.0), "another call at the same end lasts longer"
    assert not MediaEnds().are_reached_by(frame(family=family), 0.0)


@pytest.mark.parametrize(
    "other",
    [
        frame(port=20_002),
        frame(protocol=6),
        frame(fragment=0x2000),
        frame(fragment=0x0001),
        frame(b"\x80\xc8" + RTP[2:]),  # a sender report: RTCP
        frame(b"\x16\xfe" + RTP[2:]),  # DTLS
        frame(b"\x00\x01" + RTP[2:]),  # STUN
        frame(RTP[:11]),
        frame(family=6),
        frame()[:-6],
        VNET,
    ],
    ids=lambda other: other[VNET_HEADER_BYTES + 12 :].hex()[:12],
)
def test_what_is_in_doubt_is_the_guests(other: bytes) -> None:
    assert not ends().are_reached_by(other, 0.0)


@given(st.binary(max_size=120))
@example(frame()[:55])
def test_any_bytes(data: bytes) -> None:
    ends().are_reached_by(data, 0.0)


def test_of_too_many_ends_the_first_is_forgotten() -> None:
    known = ends()
    for port in range(1, ENDS_MAX + 1):
        known.note(end_key("192.0.2.11", port), 100.0)
    assert not known.are_reached_by(frame(), 0.0)
