"""The standby's end against a real ship process, with a meddler between them: whole or not at all."""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.harness.conditions import wait_until
from tests.harness.links import ignore
from tests.harness.meddler import Meddling, meddler
from tests.harness.primary_side import PrimarySide, hello_for, primary_side
from tests.harness.standby_side import StandbySide, standby_side, wait_readable
from tests.harness.waiting_process import WaitingProcess, waiting_process
from tests.harness.wire import TERM, checkpoint, pages_of, run_table, wire_bytes, write_pages

from kagemusha.commit.applier import Applier, CommittedCheckpoint
from kagemusha.commit.memory import StandbyMemory
from kagemusha.commit.receiver import OutputTold, ReceivingSession
from kagemusha.errors import GuestError, PeerError, TransientError, WireError
from kagemusha.kernel.staging import KEPT_BYTES, RECENT_CHECKPOINTS, SLOTS, StagingSlot
from kagemusha.model.ids import Epoch, Term
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, RUN_ZERO, Bytes
from kagemusha.ship.orders import Say, SendCheckpoint, SendSync, SendSyncEnd
from kagemusha.transport.link import Link, connect
from kagemusha.wire.block import BlockCodec
from kagemusha.wire.frame import Frame
from kagemusha.wire.handshake import HandOver, Hello
from kagemusha.wire.messages import (
    Ack,
    CheckpointBegin,
    Heartbeat,
    OutputLeft,
    StandDownConfirmed,
    SyncBegin,
    decode,
    encode,
)
from kagemusha.wire.output import HeldOutput
from kagemusha.wire.sync import OutgoingSync
from kagemusha.wire.tally import StreamTotals

pytestmark = pytest.mark.root
IMAGE_PAGES = 1536
PARTS = (run_table((3, 500, RUN_DATA), (600, 100, RUN_ZERO), (1024, 16, RUN_DATA)), run_table((100, 40, RUN_DATA)))
FIRST_FRAME_OF_CHECKPOINT = 4  # after Hello, SyncBegin, one chunk, SyncEnd


def pages(count: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(1, 256, count * PAGE_BYTES, dtype=np.uint8)


DATA = pages(556, 7)
DEVICE = random.Random(7).randbytes((1 << 20) + 5)
CHECKPOINT_FRAMES = list(checkpoint(PARTS, DATA, DEVICE, epoch=Epoch(1)).frames())
LAST_FRAME = FIRST_FRAME_OF_CHECKPOINT + len(CHECKPOINT_FRAMES) - 1


@pytest.fixture
def child() -> Iterator[WaitingProcess]:
    with waiting_process(700, 16) as started:
        started.touch(0, 650, 0x77)
        yield started


@pytest.fixture
def standby(child: WaitingProcess) -> Iterator[StandbySide]:
    with standby_side(child.pid, child.image) as side:
        yield side


def protect(primary: PrimarySide, standby: StandbySide) -> None:
    """Hello, a synchronisation of one chunk, one checkpoint; then a last word."""
    primary.order(primary.call())
    standby.welcome()
    primary.fill(0, 1, (run_table((0, 2, RUN_DATA)),), pages_of(1, 2), b"")
    primary.order(SendSync(0, 1, 2 * PAGE_BYTES, skip_zero=False))
    primary.order(SendSyncEnd())
    primary.order(SendCheckpoint(primary.fill(1, 1, PARTS, DATA, DEVICE)))
    primary.order(Say(HandOver(reason="the end")))


def drop(frame: int) -> Meddling:
    return lambda number, data: [] if number == frame else [data]


def repeat(frame: int) -> Meddling:
    return lambda number, data: [data, data] if number == frame else [data]


def swap(frame: int) -> Meddling:
    held: list[bytes] = []

    def meddle(number: int, data: bytes) -> Sequence[bytes]:
        if number == frame:
            held.append(data)
            return []
        return [data, *held] if number == frame + 1 else [data]

    return meddle


def flip(frame: int, seed: int) -> Meddling:
    def meddle(number: int, data: bytes) -> Sequence[bytes]:
        if number != frame:
            return [data]
        bit = random.Random(seed).randrange(len(data) * 8)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        return [bytes(damaged)]

    return meddle


def cut(frame: int, seed: int) -> Meddling:
    """Everything up to somewhere inside the frame, then the connection ends."""
    state = {"over": False}

    def meddle(number: int, data: bytes) -> Sequence[bytes] | None:
        if state["over"]:
            return None
        if number == frame:
            state["over"] = True
            return [data[: random.Random(seed).randrange(len(data))]]
        return [data]

    return meddle


def middle_frames() -> list[int]:
    return list(range(FIRST_FRAME_OF_CHECKPOINT, LAST_FRAME + 1))


MEDDLINGS = [
    *(pytest.param(drop(frame), id=f"drop-{frame}") for frame in middle_frames()),
    *(pytest.param(repeat(frame), id=f"repeat-{frame}") for frame in middle_frames()[:-1]),
    *(pytest.param(swap(frame), id=f"swap-{frame}") for frame in middle_frames()),
    *(pytest.param(flip(frame, seed), id=f"flip-{frame}-{seed}") for frame in middle_frames() for seed in (1, 2)),
    *(pytest.param(cut(frame, seed), id=f"cut-{frame}-{seed}") for frame in middle_frames() for seed in (1, 2)),
]


@pytest.mark.parametrize("meddling", MEDDLINGS)
def test_a_checkpoint_that_is_not_whole_is_never_reported(
    standby: StandbySide, child: WaitingProcess, meddling: Meddling
) -> None:
    with (
        meddler(standby.address, meddling) as between,
        primary_side(between.address, child.image, heartbeat_s=60) as primary,  # frames are counted
    ):
        expected = child.contents()
        write_pages(expected, run_table((0, 2, RUN_DATA)), pages_of(1, 2))
        protect(primary, standby)
        with pytest.raises((PeerError, TransientError)):
            unexpected(standby)
        assert standby.session is not None
        assert standby.session.synchronised
        standby.session.abandon()
    assert np.array_equal(child.contents(), expected)


def unexpected(standby: StandbySide) -> None:
    """Receive until the session breaks; anything that it reports is a finding."""
    received = standby.receive()
    pytest.fail(f"reported: {received}")


def test_a_stream_nobody_meddled_with_makes_the_memory_equal(standby: StandbySide, child: WaitingProcess) -> None:
    standby.memory.clear()
    with (
        meddler(standby.address, lambda _, data: [data]) as between,
        primary_side(between.address, child.image) as primary,
    ):
        protect(primary, standby)
        whole = standby.checkpoint()
        expected = np.zeros(IMAGE_PAGES * PAGE_BYTES, np.uint8)
        write_pages(expected, run_table((0, 2, RUN_DATA)), pages_of(1, 2))
        assert np.array_equal(child.contents(), expected), "synchronised, and nothing of the checkpoint yet"
        applied = standby.apply(whole)
        write_pages(expected, np.concatenate(PARTS), DATA)
        assert np.array_equal(child.contents(), expected)
        assert (applied.device_state, applied.error, applied.checkpoint.epoch) == (DEVICE, None, 1)
        assert standby.said().message == HandOver(reason="the end")


@pytest.mark.parametrize("frame", [1, 2, 3])
def test_a_synchronisation_that_is_not_whole_never_counts(
    standby: StandbySide, child: WaitingProcess, frame: int
) -> None:
    with meddler(standby.address, drop(frame)) as between, primary_side(between.address, child.image) as primary:
        protect(primary, standby)
        with pytest.raises(PeerError):
            standby.synchronise()
        assert standby.session is not None
        assert not standby.session.synchronised
        standby.session.abandon()


class BarePrimary:
    """A primary whose every frame the test makes."""

    def __init__(self, standby: StandbySide, hello: Hello) -> None:
        self.link: Link = connect(standby.address, None, inbox=ignore)
        self.link.send(encode(hello, term=TERM))
        standby.welcome()
        sync = OutgoingSync(term=TERM, codec=BlockCodec("none"))
        self.send(sync.begin(standby.image.pages), sync.end())
        standby.synchronise()

    def send(self, *frames: Frame) -> None:
        for frame in frames:
            self.link.send(frame)


@pytest.fixture
def bare(standby: StandbySide) -> Iterator[BarePrimary]:
    primary = BarePrimary(standby, hello_for(standby.image))
    yield primary
    primary.link.close()


def one_page(epoch: int, *, term: Term = TERM) -> list[Frame]:
    """A checkpoint of one page, full of its epoch's number."""
    return list(
        checkpoint((run_table((9, 1, RUN_DATA)),), pages_of(epoch), b"d", epoch=Epoch(epoch), term=term).frames()
    )


def test_without_a_free_slot_nothing_is_read(standby: StandbySide, bare: BarePrimary) -> None:
    """Two checkpoints lie there unapplied: the third stays on the link, and its sender feels it."""
    session = standby.session
    assert session is not None
    bare.send(*one_page(1), *one_page(2), *one_page(3))
    first, second = standby.checkpoint(), standby.checkpoint()
    assert {first.slot, second.slot} == {0, 1}
    assert not session.can_read
    wait_readable(session.link)
    before = session.link.received_bytes
    assert list(session.receive()) == []
    assert session.link.received_bytes == before
    session.free(first.slot)
    third = standby.checkpoint()
    assert (third.epoch, third.slot) == (3, first.slot)


def test_a_checkpoint_is_kept_while_the_next_one_comes(
    standby: StandbySide, bare: BarePrimary, child: WaitingProcess
) -> None:
    """The second goes into the other slot: what the first one's slot holds is still the first."""
    bare.send(*one_page(1), *one_page(2))
    first, second = standby.checkpoint(), standby.checkpoint()
    for whole in (first, second):
        standby.apply(whole)
        assert (child.contents()[9 * PAGE_BYTES : 10 * PAGE_BYTES] == whole.epoch).all()


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(one_page(1, term=Term(TERM + 1)), id="another term"),
        pytest.param([encode(HandOver(reason="old"), term=Term(TERM + 1))], id="last word of another term"),
        pytest.param(one_page(1)[1:], id="no begin"),
        pytest.param([*one_page(1)[:-1], *one_page(2)], id="begin inside a checkpoint"),
        pytest.param([one_page(1)[0], one_page(2)[1]], id="chunk of another epoch"),
        pytest.param([encode(Ack(Epoch(1)), term=TERM)], id="acknowledgement from the primary"),
        pytest.param([encode(SyncBegin(IMAGE_PAGES), term=TERM)], id="second synchronisation"),
        pytest.param(
            [encode(CheckpointBegin(Epoch(1), 1, 1 << 40, 0, 0, 0, 0), term=TERM)], id="more than there is room for"
        ),
        pytest.param([encode(StandDownConfirmed(), term=TERM)], id="a message of the standby"),
    ],
)
def test_frames_that_are_sound_but_out_of_place(
    standby: StandbySide, bare: BarePrimary, child: WaitingProcess, frames: list[Frame]
) -> None:
    before = child.contents()
    bare.send(*frames)
    with pytest.raises(WireError):
        unexpected(standby)
    assert np.array_equal(child.contents(), before)


def test_heartbeats_may_lie_between_the_frames_of_a_checkpoint(standby: StandbySide, bare: BarePrimary) -> None:
    for frame in one_page(1):
        bare.send(encode(Heartbeat(1, 0), term=TERM), frame)
    assert standby.checkpoint().epoch == 1


def test_held_output_may_lie_between_the_frames_of_a_checkpoint(standby: StandbySide, bare: BarePrimary) -> None:
    output = HeldOutput(Epoch(2), (bytes(30),))
    for frame in one_page(1):
        bare.send(encode(output, term=TERM), frame)
    bare.send(encode(OutputLeft(Epoch(2)), term=TERM))
    for _ in one_page(1):
        assert standby.receive() == OutputTold(output)
    assert standby.checkpoint().epoch == 1
    assert standby.receive() == OutputTold(OutputLeft(Epoch(2)))


def test_abandoning_tells_whether_a_part_was_thrown_away(standby: StandbySide, bare: BarePrimary) -> None:
    session = standby.session
    assert session is not None
    bare.send(*one_page(1), *one_page(2)[:-1])
    standby.checkpoint()
    wait_until(lambda: [*session.receive()] == [] and session.link.receive() is None, "the rest is read")
    assert session.abandon()
    assert not session.abandon(), "only once"


def test_a_damaged_part_was_thrown_away_too(standby: StandbySide, bare: BarePrimary) -> None:
    session = standby.session
    assert session is not None
    bare.send(*one_page(1)[:-1], one_page(2)[-1])
    with pytest.raises(WireError):
        unexpected(standby)
    assert session.abandon()


def test_a_session_between_checkpoints_throws_nothing_away(standby: StandbySide, bare: BarePrimary) -> None:
    session = standby.session
    assert session is not None
    bare.send(*one_page(1))
    standby.checkpoint()
    assert not session.abandon()


def test_every_byte_is_a_sign_of_life_not_only_whole_frames(standby: StandbySide) -> None:
    """A megabyte on a slow link may take longer than the lease."""
    with socket.create_connection((standby.address.host, standby.address.port)) as primary:
        primary.sendall(wire_bytes([encode(hello_for(standby.image), term=TERM)]))
        session = standby.welcome()
        frame = wire_bytes([encode(SyncBegin(IMAGE_PAGES), term=TERM)], first_sequence=1)
        for byte in frame:
            before = session.last_heard
            primary.sendall(bytes([byte]))
            wait_readable(session.link)
            assert list(session.receive()) == []
            assert session.last_heard > before


def test_the_standby_beats_often_enough_whatever_the_lease(standby: StandbySide, bare: BarePrimary) -> None:
    session = standby.session
    assert session is not None
    wait_until(lambda: beats(session, bare), "a heartbeat")


def beats(session: ReceivingSession, bare: BarePrimary) -> bool:
    session.beat(100.0)
    received = bare.link.receive()
    return received is not None and isinstance(decode(*received), Heartbeat)


def test_memory_of_an_abandoned_checkpoint_is_given_back() -> None:
    """A part of a large checkpoint must not stay allocated for as long as the standby lives."""
    image_pages = 4 * KEPT_BYTES // PAGE_BYTES
    with waiting_process(image_pages) as child, standby_side(child.pid, child.image) as standby:
        bare = BarePrimary(standby, hello_for(standby.image))
        large = list(checkpoint((run_table((0, image_pages, RUN_DATA)),), pages(image_pages, 1), b"").frames())
        bare.send(encode(Heartbeat(1, 0), term=TERM))
        session = standby.session
        assert session is not None
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(bare.send, *large[:-1])
            while not sending.done() or select.select([session.link], [], [], 0)[0]:
                assert list(session.receive()) == []
        wide = resident_bytes(standby.slots)
        session.abandon()
        for _ in range(RECENT_CHECKPOINTS + 1):
            for slot in standby.slots:
                slot.trim(0)
        assert resident_bytes(standby.slots) <= wide - 2 * KEPT_BYTES
        bare.link.close()


def resident_bytes(slots: tuple[StagingSlot, ...]) -> int:
    """Memory that exists behind the slots, from the kernel's list of our mappings."""
    names = {"kage-staging"}
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counting = any(name in line for name in names)
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    assert len(slots) == 2
    return total


def test_a_dead_process_behind_the_synchronisation_is_an_error_of_the_guest(
    standby: StandbySide, child: WaitingProcess
) -> None:
    with primary_side(standby.address, child.image) as primary:
        child.end()
        protect(primary, standby)
        with pytest.raises(GuestError, match="cannot be written"):
            unexpected(standby)


def test_a_dead_process_behind_a_checkpoint_is_reported_by_the_applier(
    standby: StandbySide, bare: BarePrimary, child: WaitingProcess
) -> None:
    bare.send(*one_page(1))
    whole = standby.checkpoint()
    child.end()
    assert isinstance(standby.apply(whole).error, OSError)


def test_closing_the_applier_finishes_what_was_acknowledged() -> None:
    """I3: a takeover waits for it, and then the memory is the last checkpoint."""
    count = 16_000
    with waiting_process(count) as child:
        slots = tuple(StagingSlot(count) for _ in range(SLOTS))
        applier = Applier(StandbyMemory(child.pid, child.image), slots)
        contents = pages(count, 8)
        for epoch, slot in enumerate(slots, 1):
            slot.runs[:1] = run_table((0, count, RUN_DATA))
            slot.data[: len(contents)] = contents if epoch == SLOTS else 1
            applier.apply(
                CommittedCheckpoint(Epoch(epoch), epoch - 1, StreamTotals(1, 0, 1, len(contents), 0, 0, 0, 0))
            )
        applier.close()
        assert np.array_equal(child.contents()[: len(contents)], contents)
