"""A host whose switch holds: frames go on at once, with the VM's own address alone; the rules only count here."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from tests.harness.gate import GUEST_MAC, PLAIN, WAIT_S, Lab, frame, lab, number_of

from kagemusha.gate.classification import Classification
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.rules.counters import RuleCount
from kagemusha.kernel.tap import FRAME_BYTES_MAX
from kagemusha.model.config import NetworkTable
from kagemusha.model.rules import Action, PacketClass, Rule, RuleSet, VmAddresses

pytestmark = pytest.mark.root
CLASSES = (PacketClass("held", Action.HOLD), PacketClass("sent", Action.TRANSMIT))
ODD = Rule("odd", "ether[21] & 1 == 1", "sent")


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        made.build_network(NetworkTable(bridge="br0", mac=GUEST_MAC.hex(":")), switched=True)
        yield made


def spoofed(number: int, place: int) -> bytes:
    """A frame whose source address differs in one octet."""
    data = bytearray(frame(number))
    data[6 + place] ^= 2
    return bytes(data)


@pytest.mark.parametrize("mode", [GateMode.HOLD, GateMode.PASS])
def test_frames_go_on_at_once_but_no_foreign_ones(host: Lab, mode: GateMode) -> None:
    assert host.network is not None
    host.network.set_mode(mode)
    host.send(1, 2)
    for place in range(6):
        os.write(host.network.tap_fd, PLAIN + spoofed(3, place))
    with pytest.raises(OSError, match="Invalid"):
        os.write(host.network.tap_fd, PLAIN + frame(3)[:10])
    host.send(4)
    assert host.numbers(3) == [1, 2, 4]


def test_a_closed_gate_lets_nothing_out(host: Lab) -> None:
    assert host.network is not None
    host.network.set_mode(GateMode.CLOSED)
    host.send(1)
    host.network.set_mode(GateMode.HOLD)
    host.send(2)
    assert host.numbers(1) == [2]


def test_rules_count_and_decide_nothing(host: Lab) -> None:
    assert host.network is not None
    classification = Classification(host.network, VmAddresses())
    try:
        host.network.set_mode(GateMode.HOLD)
        classification.install(RuleSet(CLASSES, (ODD,), "held"))
        host.send(1, 2, 3)
        os.write(host.network.tap_fd, PLAIN + spoofed(5, 5))
        host.send(4)
        assert host.numbers(4) == [1, 2, 3, 4]
        counts = classification.counts()
        assert counts.rules == {"odd": RuleCount(2, 200)}
        assert counts.default == RuleCount(2, 200), "a foreign frame is not the VM's"
    finally:
        classification.close()


@pytest.mark.parametrize("mode", [GateMode.HOLD, GateMode.PASS])
def test_what_a_guest_sends_before_it_may_be_heard_waits_and_leaves_in_order(host: Lab, mode: GateMode) -> None:
    """And nothing of it before; what it is sent comes in."""
    network = host.network
    assert network is not None
    network.set_mode(GateMode.WAIT)
    host.send(1, 2)
    os.write(network.tap_fd, PLAIN + spoofed(3, 5))
    host.send(4)
    assert network.count.given == 3, "all that is its own"
    assert host.numbers() == []
    host.send_in(frame(7))
    assert select.select([network.tap_fd], [], [], WAIT_S)[0], "what it is sent comes in"
    assert number_of(os.read(network.tap_fd, FRAME_BYTES_MAX)[len(PLAIN) :]) == 7
    network.set_mode(mode)
    host.send(5)
    assert host.numbers(4) == [1, 2, 4, 5]
    assert network.count.returned == network.count.given


def test_what_waited_is_dropped_with_the_gate(host: Lab) -> None:
    assert host.network is not None
    host.network.set_mode(GateMode.WAIT)
    host.send(1)
    host.network.set_mode(GateMode.CLOSED)
    host.send(2)
    assert host.numbers() == []
