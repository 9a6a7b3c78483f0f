"""Real namespaces, programs and processes: what is held stays, what leaves is complete, in order and unchanged."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from tests.harness.gate import LONG_QUEUE, PLAIN, WAIT_S, Lab, Listener, device_names, frame, lab, tcp_superframe

from kagemusha.errors import BugError, TransientError
from kagemusha.gate import devices
from kagemusha.gate.messages import GateStatistics, Sealed
from kagemusha.gate.namespace import GateMode
from kagemusha.model.ids import Epoch

pytestmark = pytest.mark.root
ONE, TWO, THREE = Epoch(1), Epoch(2), Epoch(3)


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        yield made


def wait_dead(pidfd: int) -> None:
    assert select.select([pidfd], (), (), WAIT_S)[0]


def wait_stopped(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "T":
                return
    raise AssertionError("the gate process does not stop")


def test_frames_leave_only_with_their_commit(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(1, 2, 3)
    gate.seal(ONE)
    assert gate.wait_sealed(ONE, WAIT_S) == Sealed(ONE, 3, 330, 0)
    host.send(4, 5)
    gate.seal(TWO)
    assert gate.wait_sealed(TWO, WAIT_S) == Sealed(TWO, 2, 220, 0)
    host.send(6)
    gate.statistics()
    assert host.numbers() == []
    gate.release(ONE)
    assert host.numbers(3) == [1, 2, 3]
    gate.release(TWO)
    assert host.numbers(2) == [4, 5]
    assert gate.statistics() == GateStatistics(6, 5, 0, 0, 1, 110)
    assert host.numbers() == []


def test_one_release_covers_all_epochs_before(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    for epoch in (ONE, TWO, THREE):
        host.send(*range(epoch * 100, epoch * 100 + 50))
        gate.seal(epoch)
        gate.wait_sealed(epoch, WAIT_S)
    gate.release(TWO)
    assert host.numbers(100) == [*range(100, 150), *range(200, 250)]
    assert gate.statistics().pending_frames == 50


@pytest.mark.parametrize("size", [60, 1514])
def test_bytes_are_identical(host: Lab, size: int) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(*range(200), size=size)
    gate.seal(ONE)
    gate.wait_sealed(ONE, WAIT_S)
    gate.release(ONE)
    assert host.client.wait_for(200) == [frame(number, size) for number in range(200)]


@pytest.mark.parametrize("mode", [GateMode.PASS, GateMode.HOLD])
def test_superframes_are_held_and_leave_whole(host: Lab, mode: GateMode) -> None:
    network, gate = host.build()
    network.set_mode(mode)
    packets = [tcp_superframe(size) for size in (3000, 20_000, 60_000)]
    client = Listener("client", protocol=0x0800, vnet=True)
    for packet in packets:
        os.write(network.tap_fd, packet)
    if mode is GateMode.HOLD:
        gate.seal(ONE)
        assert gate.wait_sealed(ONE, WAIT_S).frames == 3
        assert client.arrived() == []
        gate.release(ONE)
    arrived = client.wait_for(3)
    client.close()
    assert [packet[:2] + packet[4:6] for packet in arrived] == [packet[:2] + packet[4:6] for packet in packets]
    assert [packet[10:] for packet in arrived] == [packet[10:] for packet in packets]


def test_incoming_frames_pass_while_holding(host: Lab) -> None:
    network, _ = host.build()
    network.set_mode(GateMode.HOLD)
    host.send_in(frame(7))
    assert os.read(network.tap_fd, 2000)[10:] == frame(7)


def test_closed_is_closed_both_ways(host: Lab) -> None:
    network, gate = host.build()
    for mode in (GateMode.PASS, GateMode.HOLD, GateMode.CLOSED):
        network.set_mode(mode)
    host.send(1)
    host.send_in(frame(2))
    assert host.numbers() == []
    with pytest.raises(BlockingIOError):
        os.read(network.tap_fd, 2000)
    assert gate.statistics().held_frames == 0


def test_tail_drop_is_counted(host: Lab) -> None:
    network, gate = host.build(hold_bytes=1100)
    network.set_mode(GateMode.HOLD)
    host.send(*range(25))
    gate.seal(ONE)
    assert gate.wait_sealed(ONE, WAIT_S) == Sealed(ONE, 10, 1100, 15)
    gate.release(ONE)
    assert host.numbers(10) == list(range(10))
    assert gate.statistics() == GateStatistics(25, 10, 15, 0, 0, 0)


def test_a_full_kernel_queue_is_counted(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    os.kill(gate.process.pid, signal.SIGSTOP)
    wait_stopped(gate.process.pid)
    sent = devices.HOLD_QUEUE_FRAMES + 500
    data = PLAIN + frame(1)
    for _ in range(sent):
        os.write(network.tap_fd, data)
    os.kill(gate.process.pid, signal.SIGCONT)
    gate.seal(ONE)
    sealed = gate.wait_sealed(ONE, WAIT_S)
    statistics = gate.statistics()
    assert statistics.held_frames == sent
    assert statistics.dropped_frames == 500
    assert sealed.frames == statistics.pending_frames == devices.HOLD_QUEUE_FRAMES


def test_killed_gate_process_leaks_nothing(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(*range(20))
    gate.seal(ONE)
    gate.wait_sealed(ONE, WAIT_S)
    os.kill(gate.process.pid, signal.SIGKILL)
    wait_dead(gate.process.pidfd)
    assert "hold0" not in device_names(network.name)
    host.send(*range(20, 40))
    assert host.numbers() == []
    with pytest.raises(BugError, match="signal 9"):
        gate.release(ONE)
    with pytest.raises(BugError, match="signal 9"):
        gate.wait_sealed(TWO, WAIT_S)
    network.set_mode(GateMode.PASS)
    host.send(99)
    assert host.numbers(1) == [99]


def test_frozen_gate_process_leaks_nothing_and_goes_on(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(1)
    gate.seal(ONE)
    gate.wait_sealed(ONE, WAIT_S)
    os.kill(gate.process.pid, signal.SIGSTOP)
    wait_stopped(gate.process.pid)
    host.send(2, 3)
    gate.seal(TWO)
    with pytest.raises(TransientError):
        gate.wait_sealed(TWO, 0.05)
    assert host.numbers() == []
    os.kill(gate.process.pid, signal.SIGCONT)
    assert gate.wait_sealed(TWO, WAIT_S).frames == 2
    gate.release(TWO)
    assert host.numbers(3) == [1, 2, 3]


def test_a_broken_order_of_epochs_ends_the_process(host: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(1)
    gate.release(THREE)
    with pytest.raises(BugError, match="exit code 1"):
        gate.statistics()
    assert "no such epoch" in capfd.readouterr().err
    assert host.numbers() == []


def test_a_new_session_covers_what_was_held(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(1)
    gate.seal(ONE)
    host.send(2)
    gate.hold()
    host.send(3)
    gate.seal(TWO)
    gate.wait_sealed(ONE, WAIT_S)
    assert gate.wait_sealed(TWO, WAIT_S).frames == 3
    assert host.numbers() == []
    gate.release(TWO)
    assert host.numbers(3) == [1, 2, 3]


def test_changes_under_load_lose_double_and_reorder_nothing(host: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that never stops sending, through ten changes between holding and passing."""
    monkeypatch.setattr(devices, "HOLD_QUEUE_FRAMES", LONG_QUEUE)
    network, gate = host.build()
    stop = threading.Event()
    sent = 0

    def guest() -> None:
        nonlocal sent
        while not stop.is_set():
            host.send(sent)
            sent += 1
            time.sleep(0.000_05)

    network.set_mode(GateMode.PASS)
    sender = threading.Thread(target=guest)
    sender.start()
    arrived: list[int] = []
    try:
        epoch = 0
        for _ in range(5):
            gate.hold()
            network.set_mode(GateMode.HOLD)
            for _ in range(3):
                epoch += 1
                before = sent
                while sent < before + 100:
                    time.sleep(0.001)
                gate.seal(Epoch(epoch))
                gate.wait_sealed(Epoch(epoch), WAIT_S)
                if epoch % 3:
                    gate.release(Epoch(epoch))
            gate.pass_all()
            network.set_mode(GateMode.PASS)
            before = sent
            while sent < before + 100:
                time.sleep(0.001)
            arrived += host.numbers()
    finally:
        stop.set()
        sender.join()
    arrived += host.numbers(sent - len(arrived))
    assert arrived == list(range(sent))
    statistics = gate.statistics()
    assert statistics.pending_frames == 0
    assert statistics.held_frames == statistics.released_frames == network.count.given


def test_without_a_gate_process_frames_wait_in_the_queue_and_leave_in_order(host: Lab) -> None:
    """As at a takeover: the guest runs before it may be heard."""
    network = host.build_network()
    network.lease.end()
    network.set_mode(GateMode.HOLD)
    host.send(*range(1, 60))
    assert host.numbers() == []
    network.set_mode(GateMode.PASS)
    host.send(60)
    assert host.numbers(60) == list(range(1, 61))
    gate = host.spawn_gate()
    gate.hold()
    network.set_mode(GateMode.HOLD)
    host.send(61)
    gate.pass_all()
    network.set_mode(GateMode.PASS)  # nothing was sealed between: what the process never saw must not be waited for
    host.send(62)
    assert host.numbers(2) == [61, 62]


def test_what_waits_when_the_gate_process_starts_is_not_taken_for_returned(host: Lab) -> None:
    """Or the gate would be opened for those behind it before it has left."""
    network = host.build_network()
    network.set_mode(GateMode.HOLD)
    host.send(1, 2)
    network.set_mode(GateMode.PASS)
    network.set_mode(GateMode.HOLD)
    host.send(3, 4)
    gate = host.spawn_gate()
    gate.pass_all()
    assert host.numbers(4) == [1, 2, 3, 4]
    assert network.count.returned == network.count.given == 4
