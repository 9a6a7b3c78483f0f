"""A real gate with rules: what a rule lets go leaves at once, the rest waits, also while the rules are exchanged."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.harness.gate import PLAIN, WAIT_S, Lab, frame, lab, number_of

from kagemusha.errors import ConfigError
from kagemusha.gate.classification import Classification
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.rules.counters import RuleCount
from kagemusha.model.ids import Epoch
from kagemusha.model.rules import Action, PacketClass, Rule, RuleSet, VmAddresses

pytestmark = pytest.mark.root
ONE = Epoch(1)
ODD = "ether[21] & 1 == 1"  # the last byte of the number a test frame carries
CLASSES = (PacketClass("held", Action.HOLD), PacketClass("sent", Action.TRANSMIT))


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        yield made


@contextmanager
def classified(host: Lab, *rules: Rule) -> Iterator[Classification]:
    """A gate that holds, by these rules; what no rule matches is held."""
    network, _ = host.build()
    classification = Classification(network, VmAddresses())
    try:
        classification.install(rule_set(*rules))
        network.set_mode(GateMode.HOLD)
        yield classification
    finally:
        classification.close()


def rule_set(*rules: Rule) -> RuleSet:
    return RuleSet(CLASSES, rules, "held")


def test_what_a_rule_transmits_leaves_at_once_and_the_rest_with_its_commit(host: Lab) -> None:
    with classified(host, Rule("odd", ODD, "sent")) as classification:
        host.send(*range(1, 9))
        assert host.numbers(4) == [1, 3, 5, 7]
        assert host.gate is not None
        host.gate.seal(ONE)
        assert host.gate.wait_sealed(ONE, WAIT_S).frames == 4
        assert host.numbers() == []
        host.gate.release(ONE)
        assert host.numbers(4) == [2, 4, 6, 8]
        counts = classification.counts()
        assert counts.rules == {"odd": RuleCount(4, 400)}
        assert counts.default == RuleCount(4, 400)


def test_the_first_rule_that_matches_decides(host: Lab) -> None:
    with classified(host, Rule("seven", "ether[21] == 7", "held"), Rule("odd", ODD, "sent")):
        host.send(*range(1, 9))
        assert host.numbers(3) == [1, 3, 5]


def test_without_rules_everything_is_held(host: Lab) -> None:
    network, gate = host.build()
    network.set_mode(GateMode.HOLD)
    host.send(1, 2, 3)
    gate.seal(ONE)
    assert gate.wait_sealed(ONE, WAIT_S).frames == 3
    assert host.numbers() == []


def test_an_emptied_slot_holds(host: Lab) -> None:
    with classified(host, Rule("odd", ODD, "sent")):
        assert host.network is not None
        host.network.slot.clear()
        host.send(1, 3)
        assert host.numbers() == []


def test_a_set_that_is_refused_changes_nothing(host: Lab) -> None:
    with classified(host, Rule("odd", ODD, "sent")) as classification:
        host.send(1)
        with pytest.raises(ConfigError):
            classification.install(rule_set(Rule("odd", "no such primitive", "sent")))
        host.send(2, 3)
        assert host.numbers(2) == [1, 3]
        assert classification.counts().rules == {"odd": RuleCount(2, 200)}


def test_a_rule_that_stays_goes_on_counting(host: Lab) -> None:
    with classified(host, Rule("odd", ODD, "sent")) as classification:
        host.send(1, 2)
        classification.install(rule_set(Rule("two", "ether[21] == 2", "sent"), Rule("odd", ODD, "sent")))
        host.send(2, 3)
        assert host.numbers(3) == [1, 2, 3]
        assert classification.counts().rules == {"odd": RuleCount(2, 200), "two": RuleCount(1, 100)}


def test_exchanging_the_rules_under_load_loses_and_misdirects_nothing(host: Lab) -> None:
    """The sets differ in everything but in what they say of the test's frames."""
    exchanges, frames = 200, 40_000
    one = (Rule("odd", ODD, "sent"),)
    other = (Rule("tcp", "tcp port 5060", "sent"), Rule("even", "ether[21] & 1 == 0", "held"), Rule("all", ODD, "sent"))
    with classified(host, *one) as classification:
        assert host.network is not None
        assert host.gate is not None
        tap = host.network.tap_fd
        enough = threading.Event()

        def send() -> None:
            number = 0
            while number < frames or not enough.is_set():
                number += 1
                os.write(tap, PLAIN + frame(number, 60))
            sent.append(number)

        sent: list[int] = []
        sender = threading.Thread(target=send)
        sender.start()
        try:
            for turn in range(exchanges):
                classification.install(rule_set(*(other if turn % 2 else one)))
        finally:
            enough.set()
            sender.join()
        (last,) = sent
        arrived = [number_of(data) for data in host.client.wait_for((last + 1) // 2)]
        assert arrived == list(range(1, last + 1, 2))
        host.gate.seal(ONE)
        host.gate.wait_sealed(ONE, WAIT_S)
        assert host.gate.statistics().held_frames == last // 2, "with those that had no room"
        assert host.network.count.given == last // 2


def test_holding_ends_in_order_with_rules_in_force(host: Lab) -> None:
    with classified(host, Rule("odd", ODD, "sent")):
        assert host.network is not None
        assert host.gate is not None
        host.send(2, 4, 5)
        host.gate.pass_all()
        host.network.set_mode(GateMode.PASS)
        host.send(6, 7)
        assert host.numbers(5) == [5, 2, 4, 6, 7]
