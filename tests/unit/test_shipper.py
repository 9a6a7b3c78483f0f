"""The ship process, forked as the worker forks it, against the standby's real parts."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.harness.conditions import PATIENCE_S, wait_until
from tests.harness.links import contexts, listener_on_free_port, make_certificates, next_frame
from tests.harness.primary_side import PrimarySide, primary_side
from tests.harness.standby_side import StandbySide, standby_side, wait_readable, welcome_for
from tests.harness.waiting_process import WaitingProcess, waiting_process
from tests.harness.wire import TERM, run_table

from kagemusha.commit.receiver import OutputTold
from kagemusha.kernel.bpf_lease import boottime_ns
from kagemusha.model.config import Compression
from kagemusha.model.ids import Epoch, Term
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, Bytes
from kagemusha.ship import shipper
from kagemusha.ship.orders import (
    Acknowledged,
    CloseSession,
    Say,
    SendCheckpoint,
    SendSync,
    SendSyncEnd,
    SessionFailed,
    SessionOpened,
    SessionRefused,
    StandbyWentAway,
    SyncSent,
)
from kagemusha.transport.link import Link, accept
from kagemusha.wire.frame import FrameType
from kagemusha.wire.handshake import Goodbye, HandOver, RefusalCode, StandDown
from kagemusha.wire.messages import Ack, Heartbeat, Message, OutputLeft, StandDownConfirmed, decode, encode
from kagemusha.wire.output import HeldOutput

pytestmark = pytest.mark.root


def pages(count: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(1, 256, count * PAGE_BYTES, dtype=np.uint8)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a moment makes no standby silent or slow."""
    monkeypatch.setattr(shipper, "SILENT_HEARTBEATS", 100_000)
    monkeypatch.setattr(shipper, "FINISH_TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def child() -> Iterator[WaitingProcess]:
    with waiting_process(600, 16) as started:
        yield started


@pytest.fixture
def standby(child: WaitingProcess) -> Iterator[StandbySide]:
    with standby_side(child.pid, child.image) as side:
        yield side


@pytest.fixture
def primary(standby: StandbySide) -> Iterator[PrimarySide]:
    with primary_side(standby.address, standby.image) as side:
        yield side


def open_session(primary: PrimarySide, standby: StandbySide, *, compression: Compression = "none") -> None:
    """As far as an empty synchronisation."""
    primary.order(primary.call(primary.hello(compression=compression)))
    standby.welcome()
    primary.report(SessionOpened)
    primary.order(SendSyncEnd())
    standby.synchronise()


@contextmanager
def bare_standby() -> Iterator[tuple[socket.socket, PrimarySide]]:
    """A listener in the test's hands and a ship process that calls it."""
    listener, address = listener_on_free_port()
    with listener, waiting_process(16) as child, primary_side(address, child.image, heartbeat_s=0.01) as primary:
        yield listener, primary


def answer(listener: socket.socket, *messages: Message) -> Link:
    """Take the call, read the Hello, say something."""
    wait_readable(listener)
    link, _ = accept(listener, None)
    assert next_frame(link)[0].kind is FrameType.HELLO
    for message in messages:
        link.send(encode(message, term=TERM))
    return link


def test_a_session_is_opened(primary: PrimarySide, standby: StandbySide) -> None:
    primary.order(primary.call())
    standby.welcome()
    opened = primary.report(SessionOpened)
    assert (opened.term, opened.peer) == (TERM, str(standby.address))


@pytest.mark.parametrize("code", RefusalCode)
def test_only_a_refusal_for_the_term_says_superseded(
    primary: PrimarySide, standby: StandbySide, code: RefusalCode
) -> None:
    primary.order(primary.call())
    standby.refuse(code, "no", 9)
    assert primary.report(SessionRefused) == SessionRefused(1, "no", Term(9), code is RefusalCode.TERM)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_checkpoint_of_several_parts_arrives_and_is_applied_in_their_order(
    primary: PrimarySide, standby: StandbySide, child: WaitingProcess, compression: Compression
) -> None:
    """The second part names pages of the first again; pages of zeros are found on the way."""
    open_session(primary, standby, compression=compression)
    data = pages(300 + 16 + 20, 1)
    data[10 * PAGE_BYTES : 40 * PAGE_BYTES] = 0
    parts = (run_table((5, 300, RUN_DATA), (1024, 16, RUN_DATA)), run_table((20, 20, RUN_DATA)))
    sealed = primary.fill(0, 1, parts, data, b"device state" * 200_000)
    primary.order(SendCheckpoint(sealed))
    checkpoint = standby.checkpoint()
    assert not primary.reports.poll(0), "nothing was acknowledged yet"
    assert standby.session is not None
    standby.session.acknowledge(checkpoint.epoch)
    acknowledged = primary.report(Acknowledged)
    assert (acknowledged.epoch, acknowledged.zero_bytes) == (1, 30 * PAGE_BYTES)
    assert acknowledged.wire_bytes == checkpoint.totals.wire_bytes
    applied = standby.apply(checkpoint)
    assert (applied.error, applied.device_state) == (None, b"device state" * 200_000)
    expected = np.zeros(child.image.pages * PAGE_BYTES, np.uint8)
    expected[5 * PAGE_BYTES : 305 * PAGE_BYTES] = data[: 300 * PAGE_BYTES]
    expected[1024 * PAGE_BYTES : 1040 * PAGE_BYTES] = data[300 * PAGE_BYTES : 316 * PAGE_BYTES]
    expected[20 * PAGE_BYTES : 40 * PAGE_BYTES] = data[316 * PAGE_BYTES :]
    assert np.array_equal(child.contents(), expected)


def test_an_empty_checkpoint_is_one_too(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    primary.order(SendCheckpoint(primary.fill(1, 1, (), pages(0, 0), b"")))
    assert standby.checkpoint().totals.data_bytes == 0


def test_two_checkpoints_in_flight(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    for slot in (0, 1):
        part = run_table((slot, 1, RUN_DATA))
        primary.order(SendCheckpoint(primary.fill(slot, slot + 1, (part,), pages(1, slot), b"x")))
    first, second = standby.checkpoint(), standby.checkpoint()
    assert (first.epoch, second.epoch) == (1, 2)
    assert standby.session is not None
    for checkpoint in (first, second):
        standby.session.acknowledge(checkpoint.epoch)
        assert primary.report(Acknowledged).epoch == checkpoint.epoch


@pytest.mark.parametrize("acknowledged", [[2], [1, 1], [3], [2, 1]])
def test_an_acknowledgement_that_is_not_due_ends_the_session(
    primary: PrimarySide, standby: StandbySide, acknowledged: list[int]
) -> None:
    open_session(primary, standby)
    for slot in (0, 1):
        primary.order(SendCheckpoint(primary.fill(slot, slot + 1, (), pages(0, 0), b"x")))
    standby.checkpoint()
    standby.checkpoint()
    assert standby.session is not None
    for epoch in acknowledged:
        standby.session.acknowledge(Epoch(epoch))
    if acknowledged == [1, 1]:
        assert primary.report(Acknowledged).epoch == 1
    assert "acknowledgement" in primary.report(SessionFailed).reason


def test_an_acknowledgement_before_the_end_was_sent_ends_the_session() -> None:
    """A checkpoint larger than the socket's buffers, acknowledged when its first frame came."""
    with waiting_process(8000) as child:
        listener, address = listener_on_free_port()
        with listener, primary_side(address, child.image) as primary:
            primary.order(primary.call())
            link = answer(listener, welcome_for(child.image, TERM))
            primary.report(SessionOpened)
            primary.order(SendSyncEnd())
            sealed = primary.fill(0, 1, (run_table((0, 8000, RUN_DATA)),), pages(8000, 2), b"")
            primary.order(SendCheckpoint(sealed))
            while next_frame(link)[0].kind is not FrameType.CHECKPOINT_BEGIN:
                pass
            link.send(encode(Ack(Epoch(1)), term=TERM))
            # Nothing more is read: the process meets the acknowledgement while it waits to send.
            assert "acknowledgement" in primary.report(SessionFailed).reason
            link.close()


def test_synchronisation_pages_are_reported_in_order_when_they_are_sent(
    primary: PrimarySide, standby: StandbySide, child: WaitingProcess
) -> None:
    primary.order(primary.call())
    standby.welcome()
    primary.report(SessionOpened)
    data = [pages(500, 3), pages(16, 4)]
    data[0][: 100 * PAGE_BYTES] = 0
    for slot, part in enumerate((run_table((50, 500, RUN_DATA)), run_table((1024, 16, RUN_DATA)))):
        sealed = primary.fill(slot, 1, (part,), data[slot], b"")
        primary.order(SendSync(slot, len(part), sealed.data_bytes, skip_zero=slot == 0))
    primary.order(SendSyncEnd())
    standby.synchronise()
    sent = [primary.report(SyncSent), primary.report(SyncSent)]
    assert [report.slot for report in sent] == [0, 1]
    assert 400 * PAGE_BYTES < sent[0].wire_bytes < 401 * PAGE_BYTES, "the zero pages were left out"
    expected = np.zeros(child.image.pages * PAGE_BYTES, np.uint8)
    expected[50 * PAGE_BYTES : 550 * PAGE_BYTES] = data[0]
    expected[1024 * PAGE_BYTES : 1040 * PAGE_BYTES] = data[1]
    assert np.array_equal(child.contents(), expected)


def test_later_rounds_send_zero_pages_too(primary: PrimarySide, standby: StandbySide, child: WaitingProcess) -> None:
    """What the guest has zeroed since must not stay as it was."""
    child.touch(0, 7, 0xEE)
    primary.order(primary.call())
    standby.welcome()
    primary.fill(0, 1, (run_table((6, 3, RUN_DATA)),), np.zeros(3 * PAGE_BYTES, np.uint8), b"")
    primary.order(SendSync(0, 1, 3 * PAGE_BYTES, skip_zero=False))
    primary.order(SendSyncEnd())
    standby.synchronise()
    assert not child.contents().any()


def test_heartbeats_follow_the_loops_sign_of_life() -> None:
    """They come while it is fresh, stop while it is stale, and come again. Then the session still works."""
    listener, address = listener_on_free_port()
    with (
        listener,
        waiting_process(16) as child,
        primary_side(address, child.image, heartbeat_s=0.02, stall_s=1e4) as primary,
    ):
        primary.order(primary.call())
        link = answer(listener, welcome_for(child.image, TERM))
        primary.report(SessionOpened)
        for _ in range(5):
            assert heartbeat(link)
        primary.sign_of_life(age_s=1e5)
        while select.select([link], [], [], 0.3)[0]:  # what was on its way; then silence for 15 intervals
            assert heartbeat(link)
            link.send(encode(Heartbeat(1, 1), term=TERM))
        link.send(encode(Heartbeat(1, 1), term=TERM))
        primary.sign_of_life()
        assert heartbeat(link)
        assert not primary.reports.poll(0)
        link.close()


def test_heartbeats_are_answered_at_once_and_extend_the_lease(primary: PrimarySide, standby: StandbySide) -> None:
    """From when each was sent: the lease never reaches further than that allows, whenever the answer came."""
    primary.lease.begin(1)
    primary.order(primary.call(primary.hello(lease_ms=5000)))
    session = standby.welcome()
    primary.report(SessionOpened)
    last_ns = 1
    for _ in range(3):
        while primary.lease.until_ns == last_ns:
            wait_readable(session.link)
            heard_ns = boottime_ns()
            assert list(session.receive()) == []
            answered_s = time.monotonic() + 0.1  # the answer is on its way, or there was no heartbeat
            while primary.lease.until_ns == last_ns and time.monotonic() < answered_s:
                time.sleep(0.001)
        last_ns = primary.lease.until_ns
        assert last_ns <= heard_ns + 5000 * 10**6


def test_a_late_answer_counts_from_the_sending() -> None:
    """Held back for longer than the lease, it gives nothing; a newer one gives what is left."""
    with bare_standby() as (listener, primary):
        primary.lease.begin(1)
        primary.order(primary.call(primary.hello(lease_ms=2000)))
        link = answer(listener, welcome_for(primary.image, TERM))
        primary.report(SessionOpened)
        while (message := next_message(link)).counter < 2:
            pass
        first, first_ns = message.counter, boottime_ns()
        numbers = itertools.count(1)

        def says(echo: int = 0) -> None:
            """The standby lives, and has got the heartbeat of this number."""
            link.send(encode(Heartbeat(next(numbers), echo), term=TERM))

        while boottime_ns() <= first_ns + 2001 * 10**6:  # until what was sent by then is too old
            message = next_message(link)
            says()
        while next_message(link).counter < message.counter + 5:  # ... and was forgotten with a later one
            says()
        says(first)
        while (message := next_message(link)).counter < first + 20:
            says()
        assert primary.lease.until_ns == 1
        sent_before_ns = boottime_ns()
        says(message.counter)
        wait_until(lambda: primary.lease.until_ns > 1, "the newer answer extends the lease")
        assert primary.lease.until_ns <= sent_before_ns + 2000 * 10**6
        link.close()


def test_an_acknowledgement_extends_the_lease_too(primary: PrimarySide, standby: StandbySide) -> None:
    primary.lease.begin(1)
    primary.order(primary.call(primary.hello(lease_ms=60_000)))
    session = standby.welcome()
    primary.report(SessionOpened)
    primary.order(SendSyncEnd())
    primary.order(SendCheckpoint(primary.fill(1, 1, (), pages(0, 0), b"")))
    assert standby.checkpoint().epoch == 1
    heard_ns, before_ns = boottime_ns(), primary.lease.until_ns
    session.acknowledge(Epoch(1))
    primary.report(Acknowledged)
    assert before_ns < primary.lease.until_ns <= heard_ns + 60 * 10**9


def test_an_answer_to_what_was_never_sent_ends_the_session() -> None:
    with bare_standby() as (listener, primary):
        primary.lease.begin(1)
        primary.order(primary.call())
        link = answer(listener, welcome_for(primary.image, TERM))
        primary.report(SessionOpened)
        link.send(encode(Heartbeat(1, 1 << 40), term=TERM))
        assert "was not sent" in primary.report(SessionFailed).reason
        assert primary.lease.until_ns == 1
        link.close()


def test_heartbeats_come_between_the_frames_of_a_checkpoint() -> None:
    """One that takes longer to send than the lease lasts must not end it."""
    with waiting_process(8000) as child:
        listener, address = listener_on_free_port()
        with listener, primary_side(address, child.image, heartbeat_s=0.02) as primary:
            primary.order(primary.call())
            link = answer(listener, welcome_for(child.image, TERM))
            primary.report(SessionOpened)
            primary.order(SendSyncEnd())
            sealed = primary.fill(0, 1, (run_table((0, 8000, RUN_DATA)),), pages(8000, 2), b"")
            primary.order(SendCheckpoint(sealed))
            inside: list[FrameType] = []
            while FrameType.CHECKPOINT_END not in inside:
                kind = next_frame(link)[0].kind
                if kind is FrameType.CHECKPOINT_BEGIN or inside:
                    inside.append(kind)
                    link.send(encode(Heartbeat(len(inside), 0), term=TERM))
                    time.sleep(0.02)  # a slow reader: what does not fit into the buffers takes long
            assert inside.count(FrameType.HEARTBEAT) >= 5
            link.close()


def next_message(link: Link) -> Heartbeat:
    """The next heartbeat."""
    while (received := next_frame(link))[0].kind is not FrameType.HEARTBEAT:
        pass
    message = decode(*received)
    assert isinstance(message, Heartbeat)
    return message


def heartbeat(link: Link) -> bool:
    """Whether the next frame is a heartbeat, leaving out the beginning of the synchronisation."""
    kind = next_frame(link)[0].kind
    return kind is FrameType.HEARTBEAT or (kind is FrameType.SYNC_BEGIN and heartbeat(link))


def test_a_silent_standby_fails_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipper, "SILENT_HEARTBEATS", 40)
    with bare_standby() as (listener, primary):
        primary.order(primary.call())
        link = answer(listener, welcome_for(primary.image, TERM))
        primary.report(SessionOpened)
        assert "silent" in primary.report(SessionFailed).reason
        link.close()


def test_a_frozen_standby_fails_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: its kernel goes on to take bytes, nobody answers."""
    monkeypatch.setattr(shipper, "SILENT_HEARTBEATS", 300)
    with bare_standby() as (listener, primary):
        pid = os.fork()
        if pid == 0:
            link = answer(listener, welcome_for(primary.image, TERM))
            beats = 1
            while True:
                link.send(encode(Heartbeat(beats, 0), term=TERM))
                beats += 1
                select.select([link], [], [], 0.02)
                while link.receive() is not None:
                    pass
        try:
            primary.order(primary.call())
            primary.report(SessionOpened)
            assert not primary.reports.poll(1.0), "a standby that beats is not silent"
            os.kill(pid, signal.SIGSTOP)
            assert "silent" in primary.report(SessionFailed).reason
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_goodbye_of_the_standby_is_reported(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    assert standby.session is not None
    standby.session.send(Goodbye(reason="maintenance"))
    standby.session.abandon()
    assert primary.report(StandbyWentAway) == StandbyWentAway("maintenance", confirmed=False)
    primary.report(SessionFailed)


def test_the_answer_to_a_stand_down_is_reported(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    assert standby.session is not None
    primary.order(Say(StandDown(reason="maintenance")))
    standby.said()
    standby.session.send(StandDownConfirmed())
    assert primary.report(StandbyWentAway) == StandbyWentAway("stood down", confirmed=True)


def test_a_stand_down_that_nobody_asked_for_is_no_promise(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    assert standby.session is not None
    standby.session.send(StandDownConfirmed())
    assert "unexpected STAND_DOWN_CONFIRMED" in primary.report(SessionFailed).reason


@pytest.mark.parametrize("term", [0, int(TERM)])
def test_a_refusal_for_a_term_that_is_not_newer_is_not_believed(
    primary: PrimarySide, standby: StandbySide, term: int
) -> None:
    primary.order(primary.call())
    standby.refuse(RefusalCode.TERM, "no", term)
    assert "not newer" in primary.report(SessionFailed).reason


def test_reports_name_the_attempt_they_belong_to(primary: PrimarySide, standby: StandbySide) -> None:
    primary.order(primary.call(attempt=7))
    standby.welcome()
    assert primary.report(SessionOpened).attempt == 7
    assert standby.session is not None
    standby.session.abandon()
    assert primary.report(SessionFailed).attempt == 7


def test_a_goodbye_is_not_lost_while_a_checkpoint_is_sent() -> None:
    """The standby leaves with half of the checkpoint unread: its promise arrives before the failure."""
    with waiting_process(8000) as child:
        listener, address = listener_on_free_port()
        with listener, primary_side(address, child.image) as primary:
            primary.order(primary.call())
            link = answer(listener, welcome_for(child.image, TERM))
            primary.report(SessionOpened)
            primary.order(SendSyncEnd())
            sealed = primary.fill(0, 1, (run_table((0, 8000, RUN_DATA)),), pages(8000, 2), b"")
            primary.order(SendCheckpoint(sealed))
            while next_frame(link)[0].kind is not FrameType.PAGE_CHUNK:
                pass
            link.send(encode(Goodbye(reason="maintenance"), term=TERM))
            link.close()
            assert primary.report(StandbyWentAway) == StandbyWentAway("maintenance", confirmed=False)
            primary.report(SessionFailed)


@pytest.mark.parametrize("message", [HandOver(reason="QEMU has died"), StandDown(reason="end"), Goodbye(reason="x")])
@pytest.mark.parametrize("how", ["hang up", "close the session"])
def test_closing_orders_arrive_before_the_process_ends(
    primary: PrimarySide, standby: StandbySide, message: StandDown | HandOver | Goodbye, how: str
) -> None:
    """Behind two checkpoints whose acknowledgements the worker does not wait for."""
    open_session(primary, standby)
    part = run_table((0, 600, RUN_DATA))
    for slot in (0, 1):
        sealed = primary.fill(slot, slot + 1, (part,), pages(600, slot), b"x")
        primary.order(SendCheckpoint(sealed))
    primary.order(Say(message))
    if how == "hang up":
        primary.reports.close()
    else:
        primary.order(CloseSession())
    for epoch in (1, 2):
        checkpoint = standby.checkpoint()
        assert checkpoint.epoch == epoch
        assert standby.session is not None
        standby.session.acknowledge(checkpoint.epoch)
        standby.session.beat(0)
        standby.session.free(checkpoint.slot)
    assert standby.said().message == message
    assert standby.session is not None
    standby.session.abandon()
    if how == "hang up":
        assert primary.hang_up() == 0
    else:
        primary.order(primary.call())
        standby.welcome()
        while not isinstance(report := primary.reports.recv(), SessionOpened):
            assert isinstance(report, Acknowledged)


def test_closing_orders_arrive_though_nobody_takes_reports_any_more() -> None:
    """The worker dies while pages wait on a full link: there is something to report before its last order's turn."""
    with waiting_process(8000) as child:
        listener, address = listener_on_free_port()
        with listener, primary_side(address, child.image) as primary:
            primary.order(primary.call())
            link = answer(listener, welcome_for(child.image, TERM))
            primary.report(SessionOpened)
            sealed = primary.fill(0, 1, (run_table((0, 8000, RUN_DATA)),), pages(8000, 2), b"")
            primary.order(SendSync(0, 1, sealed.data_bytes, skip_zero=False))
            primary.order(Say(HandOver(reason="the worker dies")))
            primary.reports.close()
            while (kind := next_frame(link)[0].kind) is not FrameType.HAND_OVER:
                assert kind in (FrameType.SYNC_BEGIN, FrameType.PAGE_CHUNK, FrameType.HEARTBEAT)
            link.close()
            assert primary.hang_up() == 0


def test_the_process_ends_well_when_the_worker_is_gone_with_reports_unread(
    primary: PrimarySide, standby: StandbySide
) -> None:
    primary.order(primary.call())
    standby.welcome()
    wait_until(lambda: primary.reports.poll(0), "the session's report")
    assert standby.session is not None
    for _ in range(50):
        standby.session.send(Goodbye(reason="x"))
    standby.session.abandon()
    assert primary.hang_up() == 0


def test_orders_for_a_dropped_session_are_ignored(primary: PrimarySide, standby: StandbySide) -> None:
    open_session(primary, standby)
    primary.order(CloseSession())
    primary.order(SendSync(0, 0, 0, skip_zero=False))
    primary.order(SendSyncEnd())
    primary.order(SendCheckpoint(primary.fill(0, 1, (), pages(0, 0), b"old")))
    primary.order(Say(Goodbye(reason="nobody hears this")))
    open_session(primary, standby)
    primary.order(SendCheckpoint(primary.fill(1, 2, (), pages(0, 0), b"new")))
    checkpoint = standby.checkpoint()
    assert (checkpoint.epoch, standby.apply(checkpoint).device_state) == (2, b"new")


def test_copies_of_held_output_go_to_the_standby_ahead_of_the_checkpoint(
    primary: PrimarySide, standby: StandbySide
) -> None:
    """Those of before the session are of no use to it."""
    output = HeldOutput(Epoch(2), (bytes(30), bytes(40)))
    primary.copies.put_copy(Epoch(1), HeldOutput(Epoch(1), output.frames).payload())
    open_session(primary, standby)
    primary.copies.put_copy(output.epoch, output.payload())
    primary.copies.put_copy(Epoch(3), HeldOutput(Epoch(3), output.frames).payload())
    primary.order(SendCheckpoint(primary.fill(0, 2, (), pages(0, 0), b"state")))
    assert standby.receive() == OutputTold(output)
    assert standby.receive() == OutputTold(HeldOutput(Epoch(3), output.frames))
    assert standby.checkpoint().epoch == 2
    primary.copies.put_left(Epoch(2))
    assert standby.receive() == OutputTold(OutputLeft(Epoch(2)))


def test_nobody_there() -> None:
    listener, address = listener_on_free_port()
    listener.close()
    with waiting_process(16) as child, primary_side(address, child.image) as primary:
        for _ in range(2):
            primary.order(primary.call())
            assert "refused" in primary.report(SessionFailed).reason


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "foreign stream"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), "foreign stream"),
        (b"", "closed the connection"),
        (b"KAGE\1\0", "truncated"),
    ],
)
def test_something_else_answers(reply: bytes, reason: str) -> None:
    with bare_standby() as (listener, primary):
        primary.order(primary.call())
        wait_readable(listener)
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE_S)
        connection.recv(1 << 16)
        connection.sendall(reply)
        connection.close()
        assert reason in primary.report(SessionFailed).reason


@pytest.mark.parametrize("messages", [[Heartbeat(1, 0)], [Ack(Epoch(1))]])
def test_an_answer_that_is_none(messages: list[Message]) -> None:
    with bare_standby() as (listener, primary):
        primary.order(primary.call())
        link = answer(listener, *messages)
        assert "answered with" in primary.report(SessionFailed).reason
        link.close()


def test_another_term_ends_the_session() -> None:
    with bare_standby() as (listener, primary):
        primary.order(primary.call())
        link = answer(listener)
        link.send(encode(welcome_for(primary.image, TERM - 1), term=Term(TERM - 1)))
        assert "welcomes term 2" in primary.report(SessionFailed).reason
        link.close()

        primary.order(primary.call())
        link = answer(listener, welcome_for(primary.image, TERM))
        primary.report(SessionOpened)
        link.send(encode(Heartbeat(1, 0), term=Term(TERM + 1)))
        assert "of term 4" in primary.report(SessionFailed).reason
        link.close()


def test_over_tls_and_with_a_certificate_the_standby_refuses(tmp_path: Path) -> None:
    """The second: with TLS 1.3 the primary learns of it only when it waits for the answer."""
    ours = make_certificates(tmp_path / "ours")
    theirs = make_certificates(tmp_path / "theirs").client
    server, _ = contexts(ours)
    stranger = ours.client.model_copy(update={"cert": theirs.cert, "key": theirs.key})
    with waiting_process(600) as child, standby_side(child.pid, child.image, server) as standby:
        with primary_side(standby.address, child.image, table=ours.client) as primary:
            open_session(primary, standby)
            part, data = run_table((0, 600, RUN_DATA)), pages(600, 5)
            primary.order(SendCheckpoint(primary.fill(0, 1, (part,), data, b"state")))
            assert standby.apply(standby.checkpoint()).device_state == b"state"
            assert np.array_equal(child.contents()[: len(data)], data)
        with primary_side(standby.address, child.image, table=stranger) as primary:
            primary.order(primary.call())
            reason = primary.report(SessionFailed).reason
            assert "TLS failed" in reason
            assert "check cert, key and ca" in reason
        assert isinstance(server, ssl.SSLContext)
