"""What a switch is told of a rule version: no macros, flows by themselves, and nothing of who made it."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import ip_address

import pytest
from tests.harness.rule_values import FLOW, NOW_US, ROOT, SIPD, rule, rule_set

from kagemusha.errors import ConfigError
from kagemusha.gate.rulebase.authors import US
from kagemusha.gate.rulebase.codec import decode, encode
from kagemusha.gate.rulebase.expansion import expanded
from kagemusha.gate.rulebase.version import Origin, RuleVersion
from kagemusha.gate.rules.matcher import bind
from kagemusha.model.flows import FlowAddress, FlowInformation, Payload, Transport
from kagemusha.model.rules import Rule, VmAddresses

ADDRESSES = VmAddresses.parse(("52:54:00:6b:61:01",), ("192.0.2.10", "192.0.2.11"))
CALL = FlowInformation(
    "sip",
    "sip-1-0",
    FlowAddress(Transport.UDP, ip_address("192.0.2.10"), 4000, ip_address("198.51.100.7"), 5000),
    Payload.RTP,
    "media",
    60.0,
    "a call",
)


def of(*pairs: tuple[Rule, Origin], number: int = 3) -> RuleVersion:
    rules, origins = zip(*pairs, strict=True)
    return RuleVersion(number, rule_set(*rules), origins, ROOT, NOW_US, "for a test", 1)


def lapsing(author: Origin, seconds: float) -> Origin:
    return replace(author, lapses_us=int((time.time() + seconds) * US))


HOST, GUEST, DETECTOR = Origin(ROOT), Origin(SIPD), Origin(FLOW)
OWN = Rule("own", "src host $vm_ip and udp", "media")
SIX = Rule("six", "src host $vm_ip6", "media")
TOLD = Rule("flow.sip-1-0", CALL.expression, "media", CALL.ttl_s, CALL.why)


def test_macros_are_replaced_and_it_decides_the_same() -> None:
    version = of((OWN, HOST), (rule("other"), HOST))
    plain = expanded(version, ADDRESSES)
    assert [each.name for each in plain.version.rule_set.rules] == ["own", "other"]
    assert "$" not in plain.version.text
    ours, theirs = bind(version.rule_set, ADDRESSES), bind(plain.version.rule_set, VmAddresses())
    assert [each.instructions for each in ours.programs if each] == [
        each.instructions for each in theirs.programs if each
    ]
    assert decode(encode(plain.version)) == plain.version


def test_a_rule_of_an_address_that_the_vm_has_not_is_left_out() -> None:
    plain = expanded(of((SIX, HOST), (rule("other"), HOST)), ADDRESSES)
    assert [each.name for each in plain.version.rule_set.rules] == ["other"]


def test_flows_go_by_themselves_and_everything_else_does_not() -> None:
    strange = Rule("flow.odd", "udp port 7", "media", 60.0)
    pairs = (
        (rule("host"), HOST),
        (TOLD, lapsing(DETECTOR, 40)),
        (strange, lapsing(DETECTOR, 40)),
        (rule("guest.a"), GUEST),
    )
    plain = expanded(of(*pairs), ADDRESSES)
    assert [each.name for each in plain.version.rule_set.rules] == ["host", "flow.odd", "guest.a"]
    assert plain.flows["sip-1-0"].flow == CALL
    assert time.monotonic() < plain.flows["sip-1-0"].until_t <= time.monotonic() + 40


def test_the_same_rules_are_the_same_bytes_whoever_made_them() -> None:
    pairs = (rule("host"), HOST), (TOLD, lapsing(DETECTOR, 40))
    one, other = expanded(of(*pairs), ADDRESSES), expanded(replace(of(*pairs, number=9), author=SIPD), ADDRESSES)
    assert encode(one.version) == encode(other.version)
    assert one.flows == other.flows
    assert expanded(of(pairs[0], (TOLD, lapsing(DETECTOR, 50))), ADDRESSES).flows != one.flows, "it was made anew"


def test_a_rule_that_is_too_long_then_is_refused() -> None:
    many = VmAddresses.parse((), [f"192.0.2.{number}" for number in range(1, 65)])
    with pytest.raises(ConfigError, match="characters"):
        expanded(of((Rule("own", "src host $vm_ip or dst host $vm_ip", "media"), HOST)), many)
