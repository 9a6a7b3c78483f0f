"""The lease in the datapath: frames stop when it ends, whatever way they go and whoever is dead or frozen."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.harness.conditions import wait_until
from tests.harness.gate import WAIT_S, Lab, Listener, frame, lab, tcp_superframe

from kagemusha.gate.classification import Classification
from kagemusha.gate.devices import UPLINK
from kagemusha.gate.namespace import GateMode
from kagemusha.kernel import netns
from kagemusha.kernel.bpf import TC_ACT_SHOT
from kagemusha.kernel.bpf_lease import FOREVER_NS, TC_ACT_OK, Lease, boottime_ns, lease_program
from kagemusha.kernel.bpf_program import ProgramRun
from kagemusha.model.ids import Epoch
from kagemusha.model.rules import Action, PacketClass, Rule, RuleSet, VmAddresses

pytestmark = pytest.mark.root
ONE, TWO = Epoch(1), Epoch(2)
LEASE_NS = 150_000_000
LONG_NS = 3600 * 10**9
RENEWED_NS = 2 * 10**9
CLASSES = (PacketClass("held", Action.HOLD), PacketClass("sent", Action.TRANSMIT))
TRANSMIT = RuleSet(CLASSES, (Rule("all", "greater 1", "sent"),), "held")


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        yield made


@contextmanager
def transmitting(host: Lab) -> Iterator[Lease]:
    """A gate that holds, with rules that let everything go at once."""
    network, _ = host.build()
    classification = Classification(network, VmAddresses())
    try:
        classification.install(TRANSMIT)
        network.set_mode(GateMode.HOLD)
        yield network.lease
    finally:
        classification.close()


def lapse(lease: Lease) -> None:
    """Wait until a finite lease is over."""
    until_ns = lease.until_ns
    assert 0 < until_ns < FOREVER_NS
    wait_until(lambda: boottime_ns() >= until_ns, "the lease is over")


def send_past(host: Lab, lease: Lease, *numbers: int) -> None:
    """The guest sends, each frame is counted as too late, and none arrives."""
    before = lease.dropped
    host.send(*numbers)
    wait_until(lambda: lease.dropped == before + len(numbers), "all were dropped")
    assert host.numbers() == []


# --- the value ----------------------------------------------------------------------------------------------------


def test_the_words_of_a_lease() -> None:
    """Two writers: neither undoes what the other says."""
    lease = Lease()
    assert lease.until_ns == 0
    lease.extend(50)
    assert lease.until_ns == 0, "a renewal does not begin one"
    lease.begin(100)
    lease.extend(90)
    assert lease.until_ns == 100
    lease.extend(200)
    lease.extend(150)
    assert lease.until_ns == 200, "a late answer takes nothing back"
    lease.forever()
    lease.extend(300)
    assert lease.until_ns == FOREVER_NS
    lease.end()
    lease.extend(400)
    assert lease.until_ns == 0
    lease.begin(350)
    assert lease.until_ns == 400
    lease.extend(FOREVER_NS)
    assert lease.until_ns < FOREVER_NS, "a renewal is never for ever"
    lease.close()


def test_a_forked_process_extends_it_without_a_call() -> None:
    lease = Lease()
    lease.begin(1)
    pid = os.fork()
    if pid == 0:
        os.close(lease.fd)  # the mapping is enough
        lease.extend(12345)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert lease.until_ns == 12345
    lease.close()


def test_a_reader_never_sees_half_of_a_renewal() -> None:
    """Values whose halves differ, written as fast as it goes by another process."""
    low, high = 0x0000_0001_0000_0001, 0x7FFF_FFF0_7FFF_FFF0
    lease = Lease()
    lease.begin(1)
    pid = os.fork()
    if pid == 0:
        step = 0x0000_0007_0000_0007
        value = low
        while value < high:
            lease.extend(value)
            value += step
        os._exit(0)
    try:
        seen, last = 0, 1
        while seen < 20_000:
            value = lease.until_ns
            assert value >= last
            assert value == 1 or value >> 32 == value & 0xFFFF_FFFF, hex(value)
            last, seen = value, seen + 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lease.close()


@pytest.mark.parametrize(
    ("prepare", "verdict"),
    [
        (lambda lease: None, TC_ACT_SHOT),
        (lambda lease: lease.begin(boottime_ns() + LONG_NS), TC_ACT_OK),
        (lambda lease: lease.begin(boottime_ns()), TC_ACT_SHOT),
        (lambda lease: (lease.begin(1), lease.extend(boottime_ns() + LONG_NS)), TC_ACT_OK),
        (lambda lease: (lease.begin(1), lease.extend(boottime_ns())), TC_ACT_SHOT),
        (lambda lease: lease.forever(), TC_ACT_OK),
        (lambda lease: (lease.forever(), lease.end()), TC_ACT_SHOT),
        (lambda lease: (lease.extend(boottime_ns() + LONG_NS), lease.end()), TC_ACT_SHOT),
        (lambda lease: (lease.extend(FOREVER_NS), lease.end()), TC_ACT_SHOT),
        (lambda lease: lease.begin(FOREVER_NS), TC_ACT_OK),
    ],
)
def test_the_program_reads_what_was_written(prepare: Callable[[Lease], object], verdict: int) -> None:
    lease = Lease()
    program = lease_program(lease)
    prepare(lease)
    assert ProgramRun(program).verdict(frame(1)) == verdict
    assert lease.dropped == (verdict == TC_ACT_SHOT)
    os.close(program)
    lease.close()


# --- every way out ------------------------------------------------------------------------------------------------


def test_a_network_begins_without_a_lease(host: Lab) -> None:
    """What a killed predecessor had does not count: its successor's gate holds, and lets nothing go by itself."""
    with transmitting(host) as lease:
        assert host.network is not None
        host.network.set_mode(GateMode.CLOSED)
        assert lease.until_ns == 0
        host.network.set_mode(GateMode.HOLD)
        lease.extend(boottime_ns() + LONG_NS)
        send_past(host, lease, 1, 2)
        lease.begin(boottime_ns() + LONG_NS)
        host.send(3)
        assert host.numbers(1) == [3]


def test_transmitted_frames_stop_by_themselves(host: Lab) -> None:
    """No process does anything: the test sets the end and waits for it. Renewed, frames leave again."""
    with transmitting(host) as lease:
        lease.begin(boottime_ns() + LONG_NS)
        host.send(1, 2)
        assert host.numbers(2) == [1, 2]
        lease.begin(boottime_ns() + LEASE_NS)
        lapse(lease)
        send_past(host, lease, 3, 4, 5)
        lease.extend(boottime_ns() + LONG_NS)
        host.send(6)
        assert host.numbers(1) == [6]
        assert lease.dropped == 3


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_renews_no_more_silences_the_guest(host: Lab, how: signal.Signals) -> None:
    """Frozen, it goes on where it was: the guest is heard again. Killed, it is silent for good."""
    with transmitting(host) as lease:
        pid = os.fork()
        if pid == 0:
            while True:
                lease.extend(boottime_ns() + RENEWED_NS)
                time.sleep(RENEWED_NS / 100e9)
        try:
            lease.begin(1)
            wait_until(lambda: lease.until_ns > 1, "it renews")
            host.send(1)
            assert host.numbers(1) == [1]
            os.kill(pid, how)
            wait_until(lambda: is_in_state(pid, "TZ"), "the signal has arrived")
            lapse(lease)
            send_past(host, lease, 2, 3)
            if how is signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
                wait_until(lambda: lease.until_ns > boottime_ns(), "it renews again")
                host.send(4)
                assert host.numbers(1) == [4]
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def is_in_state(pid: int, states: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in states


def test_released_frames_stop_too_and_are_accounted_for(host: Lab) -> None:
    """Held frames go in past the lease, for it may be renewed before their commit; out they come only within one."""
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    lease = network.lease
    lease.begin(boottime_ns())
    host.send(1, 2, 3)
    gate.seal(ONE)
    assert gate.wait_sealed(ONE, WAIT_S).frames == 3
    assert lease.dropped == 0
    gate.release(ONE)
    wait_until(lambda: lease.dropped == 3, "the released frames are dropped")
    assert host.numbers() == []
    host.send(4, 5)
    gate.seal(TWO)
    assert gate.wait_sealed(TWO, WAIT_S).frames == 2
    lease.extend(boottime_ns() + LONG_NS)
    gate.release(TWO)
    assert host.numbers(2) == [4, 5]
    totals = gate.statistics()
    assert (totals.held_frames, totals.released_frames, totals.pending_frames) == (5, 5, 0)
    assert network.count.given == 5


def test_passing_frames_stop_too(host: Lab) -> None:
    network, _ = host.build()
    network.set_mode(GateMode.PASS)
    assert network.lease.until_ns == FOREVER_NS
    network.lease.begin(boottime_ns())
    send_past(host, network.lease, 1, 2)


def test_draining_past_the_lease_ends_and_loses_the_frames(host: Lab) -> None:
    """The drain program waits for the frames ahead, not for where they went. Its end is a lease for ever."""
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    network.lease.begin(boottime_ns())
    host.send(1, 2, 3)
    gate.pass_all()
    assert network.lease.dropped == 3
    network.set_mode(GateMode.PASS)
    assert (network.count.given, network.count.returned) == (3, 3)
    host.send(4)
    assert host.numbers(1) == [4]


def test_a_frame_of_any_other_program_is_asked_too(host: Lab) -> None:
    """A socket on the uplink itself: whatever is sent through it comes by the one place, in every mode."""
    network, _ = host.build()
    with netns.entered(network.namespace_fd):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.bind((UPLINK, 0))
    with sender:
        modes = (GateMode.CLOSED, GateMode.PASS, GateMode.HOLD)
        for number, mode in enumerate(modes):
            network.set_mode(mode)
            network.lease.begin(boottime_ns())
            with pytest.raises(OSError, match="No buffer space"):  # a sender on the device itself is told
                sender.send(frame(number))
        assert network.lease.dropped == len(modes)
        assert host.numbers() == []
        network.lease.extend(boottime_ns() + LONG_NS)
        sender.send(frame(9))
        assert host.numbers(1) == [9]


def test_superframes_are_one_frame_to_the_lease(host: Lab) -> None:
    """Before they are segmented: whole within it, dropped as one past it."""
    with transmitting(host) as lease:
        assert host.network is not None
        client = Listener("client", protocol=0x0800, vnet=True)
        lease.begin(boottime_ns() + LONG_NS)
        packet = tcp_superframe(20_000)
        os.write(host.network.tap_fd, packet)
        assert [each[10:] for each in client.wait_for(1)] == [packet[10:]]
        lease.begin(boottime_ns())
        os.write(host.network.tap_fd, packet)
        assert lease.dropped == 1
        assert client.arrived() == []
        client.close()


def test_frames_for_the_guest_come_in_past_the_lease(host: Lab) -> None:
    """Silent is not deaf: the standby's session, and the guest's own timers, see no difference."""
    network, _ = host.build()
    network.set_mode(GateMode.HOLD)
    network.lease.begin(boottime_ns())
    host.send_in(frame(7))
    assert os.read(network.tap_fd, 2000)[10:] == frame(7)
    assert network.lease.dropped == 0
