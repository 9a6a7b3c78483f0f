"""Whole checkpoints and synchronisations: complete only when all of it is there, in order, unaltered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tests.harness.wire import (
    EPOCH,
    IMAGE,
    TERM,
    Buffers,
    checkpoint,
    pages_of,
    receive_stream,
    run_table,
    wire_bytes,
    write_pages,
)

from kagemusha.errors import BugError, WireError
from kagemusha.model.config import Compression
from kagemusha.model.ids import Epoch, Term
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, RUN_ZERO, Bytes
from kagemusha.wire.block import BlockCodec
from kagemusha.wire.checkpoint import AssemblyState, CheckpointAssembler
from kagemusha.wire.frame import Frame, FrameHeader, FrameType, make_frame
from kagemusha.wire.messages import CheckpointBegin, CheckpointEnd, Heartbeat, SyncEnd, encode
from kagemusha.wire.sync import OutgoingSync, SyncAssembler

PARTS = (
    run_table((3, 2, RUN_DATA), (9, 300, RUN_DATA), (1024, 1, RUN_DATA)),
    run_table((4, 1, RUN_DATA), (599, 1, RUN_ZERO)),
)
DATA = np.random.default_rng(5).integers(0, 4, 304 * PAGE_BYTES, dtype=np.uint8)
DATA[10 * PAGE_BYTES : 20 * PAGE_BYTES] = 0
DEVICE = bytes(range(256)) * 5000


def sample(*, epoch: Epoch = EPOCH, compression: Compression = "none") -> list[Frame]:
    return list(checkpoint(PARTS, DATA, DEVICE, epoch=epoch, compression=compression).frames())


def received_of(frame: Frame) -> tuple[FrameHeader, memoryview]:
    header = FrameHeader(frame.kind, frame.term, frame.epoch, 0, frame.length, frame.payload_digest)
    return header, memoryview(b"".join(frame.parts))


def assembled(frames: Sequence[Frame], *, buffers: Buffers | None = None) -> CheckpointAssembler:
    assembler = CheckpointAssembler(EPOCH, buffers or Buffers(), term=TERM, image=IMAGE, codec=BlockCodec())
    for frame in frames:
        assembler.add(*received_of(frame))
    return assembler


def feed(assembler: CheckpointAssembler, frames: Sequence[Frame]) -> None:
    for frame in frames:
        assert not assembler.add(*received_of(frame))


def never_complete(frames: Sequence[Frame], match: str | None = None) -> None:
    """Nothing of these frames is ever complete; what is wrong is found at the end at the latest."""
    assembler = assembled([])
    with pytest.raises(WireError, match=match):
        feed(assembler, frames)
    assert not assembler.complete
    assert assembler.state is AssemblyState.DISCARDED
    with pytest.raises(BugError):
        assembler.add(*received_of(frames[0]))


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_round_trip(compression: Compression) -> None:
    outgoing = checkpoint(PARTS, DATA, DEVICE, compression=compression)
    frames = list(outgoing.frames())
    buffers = Buffers()
    assembler = assembled(frames, buffers=buffers)
    assert assembler.complete
    sent, got = outgoing.statistics(), assembler.statistics()
    assert sent == got
    assert got.wire_bytes == len(wire_bytes(frames))
    assert (got.data_bytes, got.zero_bytes) == (294 * PAGE_BYTES, 11 * PAGE_BYTES)
    assert buffers.device[: got.device_bytes].tobytes() == DEVICE
    expected = np.zeros(IMAGE.pages * PAGE_BYTES, np.uint8)
    write_pages(expected, np.concatenate(PARTS), DATA)
    memory = np.zeros(IMAGE.pages * PAGE_BYTES, np.uint8)
    write_pages(memory, buffers.runs[: got.runs], buffers.data[: got.data_bytes])
    assert (memory == expected).all()


def test_golden_stream() -> None:
    """The digest as the format's document defines it, computed by hand."""
    frames = list(checkpoint([run_table((5, 1, RUN_DATA))], pages_of(0xAB), b"\x51EVM").frames())
    assert [frame.kind.name for frame in frames] == [
        "CHECKPOINT_BEGIN",
        "PAGE_CHUNK",
        "DEVICE_STATE",
        "CHECKPOINT_END",
    ]
    payloads = [b"".join(frame.parts) for frame in frames]
    begin = "0100000000000000 0010000000000000 0400000000000000" + 3 * "0000000000000000"
    assert payloads[0] == bytes.fromhex(begin)
    assert payloads[2].hex() == "000000000000000004000000040000005145564d"
    records = bytes.fromhex(
        "2000 0000 03000000 0700000000000000 30000000 8f358b169a485162"
        "2100 0000 03000000 0700000000000000 20100000 32054b2a835b2c72"
        "2200 0000 03000000 0700000000000000 14000000 a18e15ef52b3ac4a"
    )
    counts = "010000000100000001000000000000000010000000000000"
    assert payloads[3].hex() == counts + xxhash.xxh3_128_hexdigest(records)
    assert payloads[3].hex() == counts + "3153a086fdd6672025f518effd2a8580"


def test_empty_checkpoint_of_device_state_alone() -> None:
    for parts in ((), (run_table(),)):
        assembler = assembled(list(checkpoint(parts, pages_of(), b"x").frames()))
        assert assembler.complete
        assert assembler.statistics().page_chunks == 0


def test_state_by_state() -> None:
    frames = sample()
    assembler = assembled([])
    states = [assembler.state]
    for frame in frames:
        assert assembler.add(*received_of(frame)) is assembler.complete
        states.append(assembler.state)
    assert states == [AssemblyState.EMPTY, *[AssemblyState.OPEN] * (len(frames) - 1), AssemblyState.COMPLETE]
    with pytest.raises(BugError):
        assembler.add(*received_of(frames[-1]))
    assert assembler.complete


@pytest.mark.parametrize("upto", range(6))
def test_abandon_at_every_frame(upto: int) -> None:
    frames = sample()
    assert len(frames) == 6 + 1
    assembler = assembled(frames[:upto])
    assert assembler.abandon() is (upto > 0)
    assert assembler.state is AssemblyState.DISCARDED
    with pytest.raises(BugError):
        assembler.add(*received_of(frames[0]))
    assert assembler.abandon() is False


def test_a_complete_one_is_not_thrown_away() -> None:
    assembler = assembled(sample())
    assert assembler.abandon() is False
    assert assembler.complete


FRAMES = sample()


@pytest.mark.parametrize("missing", range(len(FRAMES) - 1))
def test_a_missing_frame(missing: int) -> None:
    never_complete(FRAMES[:missing] + FRAMES[missing + 1 :])


@pytest.mark.parametrize("repeated", range(len(FRAMES) - 1))
def test_a_repeated_frame(repeated: int) -> None:
    never_complete([*FRAMES[: repeated + 1], *FRAMES[repeated:]])


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(len(FRAMES)), 2)))
def test_exchanged_frames(one: int, other: int) -> None:
    frames = list(FRAMES)
    frames[one], frames[other] = frames[other], frames[one]
    never_complete(frames)


def test_exchanged_page_chunks_are_found_by_the_digest_alone() -> None:
    frames = list(FRAMES)
    frames[1], frames[2] = frames[2], frames[1]
    never_complete(frames, "digest mismatch")


def test_a_chunk_of_another_checkpoint() -> None:
    never_complete([FRAMES[0], sample(epoch=Epoch(8))[1], *FRAMES[2:]], "epoch 8 where term 3, epoch 7")
    other = checkpoint(PARTS, DATA, DEVICE, term=Term(2))
    never_complete([FRAMES[0], list(other.frames())[1], *FRAMES[2:]], "term 2, epoch 7")
    never_complete(sample(epoch=Epoch(8)), "epoch 8")


def test_a_chunk_with_other_contents_of_the_same_shape() -> None:
    other = DATA.copy()
    other[0] ^= 1
    altered = list(checkpoint(PARTS, other, DEVICE).frames())
    never_complete([FRAMES[0], altered[1], *FRAMES[2:]], "digest mismatch")
    device = b"\xff" + DEVICE[1:]
    altered = list(checkpoint(PARTS, DATA, device).frames())
    never_complete([*FRAMES[:4], altered[4], *FRAMES[5:]], "digest mismatch")


def test_a_checkpoint_without_a_begin() -> None:
    for frame in FRAMES[1:]:
        never_complete([frame], "before the begin")


def test_two_begins() -> None:
    never_complete([FRAMES[0], FRAMES[0]], "CHECKPOINT_BEGIN inside a checkpoint")


@pytest.mark.parametrize(
    ("page_chunks", "page_bytes", "device_bytes", "rules_bytes", "complaint"),
    [
        (4, 305 * PAGE_BYTES, len(DEVICE), 0, "the begin says"),
        (2, 305 * PAGE_BYTES, len(DEVICE), 0, "more pages than announced"),
        (3, 306 * PAGE_BYTES, len(DEVICE), 0, "the begin says"),
        (3, 304 * PAGE_BYTES, len(DEVICE), 0, "more pages than announced"),
        (3, 100 * PAGE_BYTES, len(DEVICE), 0, "do not fit"),
        (3, 305 * PAGE_BYTES, len(DEVICE) + 1, 0, "the begin says"),
        (3, 305 * PAGE_BYTES, len(DEVICE), 1, "the begin says"),
        (3, 305 * PAGE_BYTES, len(DEVICE) - 1, 0, "do not fit"),
        (3, 1 << 63, len(DEVICE), 0, "bytes of pages announced, there is room for"),
        (3, 305 * PAGE_BYTES, 1 << 40, 0, "bytes of device state and rules announced, there is room for"),
        (3, 305 * PAGE_BYTES, len(DEVICE), 1 << 40, "bytes of device state and rules announced, there is room for"),
        (3, 305 * PAGE_BYTES, 0, len(DEVICE) + 1, "the begin says"),
    ],
)
def test_a_begin_that_lies(
    page_chunks: int, page_bytes: int, device_bytes: int, rules_bytes: int, complaint: str
) -> None:
    """Its digest is right: the counts are checked for themselves."""
    begin = encode(CheckpointBegin(EPOCH, page_chunks, page_bytes, device_bytes, rules_bytes, 0, 0), term=TERM)
    never_complete(redigested([begin, *FRAMES[1:]]), complaint)


@given(device=st.binary(max_size=300), rules=st.binary(max_size=300))
def test_a_rule_set_follows_the_device_state(device: bytes, rules: bytes) -> None:
    outgoing = checkpoint(
        [], np.empty(0, np.uint8), device, rules=rules, inbound_seen=len(device) << 55, switch_session=len(device) << 54
    )
    received = receive_stream(wire_bytes(outgoing.frames()))
    assert received.committed()
    assert received.assembler is not None
    totals = received.assembler.statistics()
    assert (totals.device_bytes, totals.rules_bytes) == (len(device), len(rules))
    assert outgoing.statistics() == totals
    assert received.assembler.inbound_seen == len(device) << 55
    assert received.assembler.switch_session == len(device) << 54
    assert received.buffers.device[: len(device) + len(rules)].tobytes() == device + rules


def redigested(frames: list[Frame]) -> list[Frame]:
    """The same frames, with an end whose digest fits them and whose counts are those of the sample."""
    state = xxhash.xxh3_128()
    for frame in frames[:-1]:
        state.update(
            b"".join(
                value.to_bytes(size, "little")
                for value, size in (
                    (frame.kind, 2),
                    (0, 2),
                    (frame.term, 4),
                    (frame.epoch, 8),
                    (frame.length, 4),
                    (frame.payload_digest, 8),
                )
            )
        )
    end = CheckpointEnd.parse(*received_of(FRAMES[-1]))
    return [*frames[:-1], encode(with_digest(end, state.digest()), term=TERM)]


def with_digest(end: CheckpointEnd, digest: bytes) -> CheckpointEnd:
    return CheckpointEnd(end.epoch, end.page_chunks, end.device_chunks, end.runs, end.data_bytes, digest)


def test_redigested_sample_is_the_sample() -> None:
    assert [received_of(f) for f in redigested(list(FRAMES))] == [received_of(f) for f in FRAMES]


@pytest.mark.parametrize("field", ["page_chunks", "device_chunks", "runs", "data_bytes"])
def test_an_end_that_lies(field: str) -> None:
    end = CheckpointEnd.parse(*received_of(FRAMES[-1]))
    values = {name: getattr(end, name) for name in ("page_chunks", "device_chunks", "runs", "data_bytes")}
    values[field] += 1
    lie = CheckpointEnd(EPOCH, **values, digest=end.digest)
    never_complete([*FRAMES[:-1], encode(lie, term=TERM)], "missing or too many")


def test_an_end_with_another_digest() -> None:
    end = CheckpointEnd.parse(*received_of(FRAMES[-1]))
    lie = with_digest(end, bytes([end.digest[0] ^ 1]) + end.digest[1:])
    never_complete([*FRAMES[:-1], encode(lie, term=TERM)], "digest mismatch")


@pytest.mark.parametrize("offset", [0, 1, (1 << 20) - 1, (1 << 20) + 1, 0xFFFFFFFF])
def test_device_state_at_another_offset(offset: int) -> None:
    parts = BlockCodec("none").compress(np.frombuffer(DEVICE, np.uint8)[1 << 20 :], extra=offset)
    frame = make_frame(FrameType.DEVICE_STATE, term=TERM, epoch=EPOCH, parts=parts)
    never_complete([*FRAMES[:5], frame], "expected at 1048576")


def test_an_empty_piece_of_device_state() -> None:
    parts = BlockCodec("none").compress(np.empty(0, np.uint8))
    frame = make_frame(FrameType.DEVICE_STATE, term=TERM, epoch=EPOCH, parts=parts)
    never_complete([FRAMES[0], frame], "0 bytes of device state at 0")


def test_more_runs_than_there_is_room_for() -> None:
    buffers = Buffers(runs=np.zeros(4, run_table().dtype))
    with pytest.raises(WireError, match="more than 4 page runs"):
        assembled(FRAMES, buffers=buffers)


def test_errors_name_the_epoch() -> None:
    with pytest.raises(WireError) as caught:
        assembled([FRAMES[1]])
    assert caught.value.epoch == EPOCH


def test_heartbeats_between_the_chunks_change_nothing() -> None:
    beat = encode(Heartbeat(1, 0), term=TERM)
    frames = [frame for pair in zip(FRAMES, [beat] * len(FRAMES), strict=True) for frame in pair]
    received = receive_stream(wire_bytes(frames))
    assert received.committed()
    assert len(received.messages) == len(FRAMES)


def test_frames_are_made_once() -> None:
    outgoing = checkpoint(PARTS, DATA, DEVICE)
    list(outgoing.frames())
    with pytest.raises(BugError):
        next(outgoing.frames())


def test_parts_that_name_other_sizes_are_our_own_bug() -> None:
    with pytest.raises(BugError):
        checkpoint(PARTS, DATA[:-PAGE_BYTES], DEVICE)


@given(st.lists(st.integers(0, 255), max_size=40), st.binary(max_size=50), st.integers(1, 5))
def test_any_checkpoint_comes_through(fills: list[int], device: bytes, cut: int) -> None:
    """In two parts, the second naming pages of the first again."""
    first = run_table(*((2 * n, 1, RUN_DATA) for n in range(len(fills[:-cut]))))
    second = run_table(*((2 * n, 1, RUN_DATA) for n in range(len(fills[-cut:]))))
    data = pages_of(*fills)
    buffers = Buffers()
    assembler = assembled(list(checkpoint((first, second), data, device).frames()), buffers=buffers)
    got = assembler.statistics()
    assert assembler.complete
    expected, memory = (np.full(IMAGE.pages * PAGE_BYTES, 0xEE, np.uint8) for _ in range(2))
    write_pages(expected, np.concatenate((first, second)), data)
    write_pages(memory, buffers.runs[: got.runs], buffers.data[: got.data_bytes])
    assert (memory == expected).all()


def sync_frames() -> tuple[OutgoingSync, list[Frame]]:
    sync = OutgoingSync(term=TERM, codec=BlockCodec())
    frames = [sync.begin(IMAGE.pages)]
    for runs in PARTS:
        size = int(runs["count"][runs["kind"] == RUN_DATA].sum()) * PAGE_BYTES
        frames += sync.pages(runs, DATA[:size])
    return sync, [*frames, sync.end()]


def test_synchronisation() -> None:
    sync, frames = sync_frames()
    memory = np.full(IMAGE.pages * PAGE_BYTES, 0xEE, np.uint8)
    received = receive_stream(wire_bytes(frames), memory=memory)
    assert received.sync is not None
    assert received.sync.complete
    assert received.sync.statistics() == sync.statistics()
    expected = np.full(IMAGE.pages * PAGE_BYTES, 0xEE, np.uint8)
    write_pages(expected, PARTS[0], DATA[: 303 * PAGE_BYTES])
    write_pages(expected, PARTS[1], DATA[:PAGE_BYTES])
    assert (received.memory == expected).all()


def feed_sync(assembler: SyncAssembler, frames: list[Frame], scratch: Bytes) -> None:
    for frame in frames:
        assembler.add(*received_of(frame), scratch)


def drop(frames: list[Frame]) -> list[Frame]:
    return [*frames[:2], *frames[3:]]


def repeat(frames: list[Frame]) -> list[Frame]:
    return [*frames[:2], *frames[1:]]


def exchange(frames: list[Frame]) -> list[Frame]:
    return [frames[0], frames[2], frames[1], *frames[3:]]


def no_begin(frames: list[Frame]) -> list[Frame]:
    return frames[1:]


def second_begin(frames: list[Frame]) -> list[Frame]:
    return [frames[0], *frames]


def foreign(frames: list[Frame]) -> list[Frame]:
    return [frames[0], FRAMES[1], *frames[2:]]


def other_end(frames: list[Frame]) -> list[Frame]:
    end = SyncEnd.parse(*received_of(frames[-1]))
    return [*frames[:-1], encode(SyncEnd(end.page_chunks, end.runs, end.data_bytes, bytes(16)), term=TERM)]


@pytest.mark.parametrize("damage", [drop, repeat, exchange, no_begin, second_begin, foreign, other_end])
def test_damaged_synchronisation(damage: Callable[[list[Frame]], list[Frame]]) -> None:
    assembler = SyncAssembler(term=TERM, image=IMAGE, codec=BlockCodec())
    scratch = np.empty(1 << 20, np.uint8)
    with pytest.raises(WireError):
        feed_sync(assembler, damage(sync_frames()[1]), scratch)
    assert assembler.state is AssemblyState.DISCARDED
    with pytest.raises(BugError):
        assembler.add(*received_of(sync_frames()[1][0]), scratch)


def test_synchronisation_of_another_image() -> None:
    assembler = SyncAssembler(term=TERM, image=IMAGE, codec=BlockCodec())
    frame = OutgoingSync(term=TERM, codec=BlockCodec()).begin(IMAGE.pages + 1)
    with pytest.raises(WireError, match="image has"):
        assembler.add(*received_of(frame), np.empty(0, np.uint8))
