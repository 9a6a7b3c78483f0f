"""Copies of held frames: their bytes, and damage of every kind."""

from __future__ import annotations

import random
import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.harness.wire import TERM

from kagemusha.errors import BugError, WireError
from kagemusha.model.ids import Epoch
from kagemusha.wire.frame import HELD_OUTPUT_BYTES, FrameHeader, FrameType
from kagemusha.wire.inbound import PACKET_BYTES_MAX, PACKET_BYTES_MIN
from kagemusha.wire.messages import Message, decode, encode
from kagemusha.wire.output import HEAD_BYTES, HeldOutput, room_bytes

EPOCH = Epoch(7)


def decoded(payload: bytes) -> Message:
    digest = xxhash.xxh3_64_intdigest(payload)
    return decode(FrameHeader(FrameType.HELD_OUTPUT, TERM, EPOCH, 0, len(payload), digest), payload)


@settings(deadline=None)
@given(st.lists(st.integers(PACKET_BYTES_MIN, 200), min_size=1, max_size=20))
def test_round_trip(lengths: list[int]) -> None:
    output = HeldOutput(EPOCH, tuple(random.Random(length).randbytes(length) for length in lengths))
    payload = output.payload()
    assert decoded(payload) == output
    assert len(payload) == HEAD_BYTES + sum(map(room_bytes, output.frames))
    assert encode(output, term=TERM).epoch == EPOCH


def test_what_room_bytes_says_fits_fits() -> None:
    frame = bytes(HELD_OUTPUT_BYTES - HEAD_BYTES - room_bytes(b""))
    assert encode(HeldOutput(EPOCH, (frame,)), term=TERM).length == HELD_OUTPUT_BYTES
    with pytest.raises(BugError):
        encode(HeldOutput(EPOCH, (frame + b"x",)), term=TERM)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([], 0),
        ([PACKET_BYTES_MIN - 1], PACKET_BYTES_MIN - 1),
        ([PACKET_BYTES_MAX + 1], PACKET_BYTES_MAX + 1),
        ([24, 24], 47),
        ([24, 24], 49),
        ([0xFFFF_FFFF, 25], 24),
    ],
)
def test_lengths_that_do_not_fit(lengths: list[int], size: int) -> None:
    table = b"".join(struct.pack("<I", length) for length in lengths)
    with pytest.raises(WireError, match="HELD_OUTPUT"):
        decoded(struct.pack("<II", len(lengths), 0) + table + bytes(size))


@pytest.mark.parametrize("payload", [b"", bytes(7), bytes(8), struct.pack("<III", 1, 1, 24) + bytes(24)])
def test_a_damaged_head(payload: bytes) -> None:
    with pytest.raises(WireError, match="HELD_OUTPUT"):
        decoded(payload)


@given(st.binary(max_size=80))
def test_anything_at_all(payload: bytes) -> None:
    try:
        message = decoded(payload)
    except WireError:
        return
    assert isinstance(message, HeldOutput)
    assert message.payload() == payload


@pytest.mark.parametrize("frames", [(), (bytes(PACKET_BYTES_MIN - 1),), (bytes(PACKET_BYTES_MAX + 1),)])
def test_what_the_reader_would_refuse_is_not_made(frames: tuple[bytes, ...]) -> None:
    with pytest.raises(BugError):
        HeldOutput(EPOCH, frames).payload()
