"""``kage switch`` as a process, with real frames: holding, claims, rules, flows, replay, and its own death."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from tests.harness.commands import wait
from tests.harness.gate import PLAIN
from tests.harness.rule_values import version
from tests.harness.switch import HOSTS, STRANGER, VM1, VM2, made
from tests.harness.switch_clients import pumped, set_mode, totals_of
from tests.harness.switch_command import ADDRESS, VM, WAIT_S, SwitchCommand, switch_command

from kagemusha.errors import FencedError
from kagemusha.failover.switch_arbiter import SwitchArbiter
from kagemusha.gate.rulebase.codec import encode
from kagemusha.kernel.bridge import BridgeLinks
from kagemusha.model.config import TlsTable
from kagemusha.model.flows import FlowAddress, FlowInformation, Payload, TimedFlow, Transport
from kagemusha.model.ids import Epoch, Term
from kagemusha.model.rules import Rule
from kagemusha.protocol.switch_words import Mode
from kagemusha.switching.client import SwitchClient

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
ONE, TWO = Epoch(1), Epoch(2)
ODD = Rule("odd", "ether[21] & 1 == 1", "media")


@pytest.fixture
def command(tmp_path: Path) -> Iterator[SwitchCommand]:
    with switch_command(tmp_path) as running:
        yield running


def registered(client: SwitchClient) -> SwitchClient:
    client.wait_registered(WAIT_S)
    return client


def connections(client: SwitchClient) -> int:
    """How many it has had."""
    client.pump()
    return client.client_statistics().connections


def sealed(client: SwitchClient, epoch: Epoch) -> int:
    client.seal(epoch)
    done = client.wait_sealed(epoch, WAIT_S)
    assert done.session, "the switch has confirmed it"
    return done.frames


def test_frames_leave_with_their_commit_and_strangers_pass(command: SwitchCommand) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    here.send("ha", VM1, 1, 2, 3)
    assert sealed(host, ONE) == 3
    here.send("ha", VM1, 4)
    here.send("ha", STRANGER, 90)
    assert here.numbers("ca", 1) == [90]
    host.release(ONE)
    assert here.numbers("ca", 3) == [1, 2, 3]
    totals = totals_of(host)
    assert (totals.held_frames, totals.released_frames, totals.pending_frames) == (4, 3, 1)


def test_a_claim_ends_the_former_owner_at_once(command: SwitchCommand) -> None:
    here, old = command.here, registered(command.host("a", VM1))
    here.send("ha", VM1, 1, 2)
    arbiter = SwitchArbiter(ADDRESS, TlsTable(insecure=True), node="b", timeout_s=WAIT_S)
    assert arbiter.claim(VM, Term(2), "b/guest").holder == "b/guest"
    here.send("ha", VM1, 3)
    new = registered(command.host("b", VM1, term=2))
    set_mode(new, Mode.ALONE)
    here.send("hb", VM1, 10)
    assert here.numbers("ca", 1) == [10], "nothing of the former owner, held or sent later"
    pumped(old, lambda: old.superseded == 2)
    late = command.host("a", VM1)
    with pytest.raises(FencedError):
        late.wait_registered(WAIT_S)
    assert arbiter.claim(VM, Term(2), "a/guest").holder == "b/guest", "a term is given once"
    arbiter.close()


def test_rules_and_flows_decide_at_the_switch(command: SwitchCommand) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    host.set_rules(encode(version(ODD)))
    host.wait_rules(WAIT_S)
    here.send("ha", VM1, 1, 2, 3)
    assert here.numbers("ca", 2) == [1, 3]
    media = bytes(
        Ether(src=VM1.hex(":"), dst="02:00:c0:ff:ee:01")
        / IP(src="10.0.0.2", dst="10.0.0.9")
        / UDP(sport=30000, dport=40000)
        / b"media"
    )
    address = FlowAddress(Transport.UDP, ip_address("10.0.0.2"), 30000, ip_address("10.0.0.9"), 40000)
    found = FlowInformation("sip", "sip-1-0", address, Payload.ANY, "media", 60.0, "a call")

    def known(flow: FlowInformation, number: int) -> dict[str, TimedFlow]:
        return {flow.name: TimedFlow(flow, number, time.monotonic() + 60)}

    def passes() -> bool:
        here.packets("ca")
        here.send_packet("ha", PLAIN + media)
        return any(media in packet for packet in here.packets("ca"))

    assert not passes()
    over_tcp = replace(found, address=replace(address, transport=Transport.TCP))
    host.set_flows(known(over_tcp, 1))
    host.set_flows(known(found, 2))
    wait(passes, "the flow is let go")
    host.set_flows({})
    wait(lambda: not passes(), "the flow is held again")


def test_a_flow_comes_behind_the_host_s_rules_and_a_rule_lapses_without_its_host(command: SwitchCommand) -> None:
    """Of flows to one port: the host's own rule wins. Then the host is gone, and what it lets go for a while ends."""
    here, host = command.here, registered(command.host("a", VM1))
    short = Rule("short", "ether[21] == 8", "media", 1.0)
    made_of = version(Rule("mine", "udp dst port 40001", "held"), short)
    host.set_rules(encode(made_of))
    host.wait_rules(WAIT_S)
    flows = {}
    for port in (40000, 40001):
        address = FlowAddress(Transport.UDP, ip_address("10.0.0.2"), 30000, ip_address("10.0.0.9"), port)
        name = f"sip-{port}-0"
        flow = FlowInformation("sip", name, address, Payload.ANY, "media", 60.0, "a call")
        flows[name] = TimedFlow(flow, 1, time.monotonic() + 60)
    host.set_flows(flows)

    def passing(port: int) -> bool:
        media = bytes(
            Ether(src=VM1.hex(":"), dst="02:00:c0:ff:ee:01")
            / IP(src="10.0.0.2", dst="10.0.0.9")
            / UDP(sport=30000, dport=port)
            / b"media"
        )
        here.packets("ca")
        here.send_packet("ha", PLAIN + media)
        return any(media in packet for packet in here.packets("ca"))

    wait(lambda: passing(40000), "the flow is let go")
    assert not passing(40001)
    host.close()

    def held() -> bool:
        here.frames("ca")
        here.send("ha", VM1, 8)
        return here.frames("ca", VM1) == []

    wait(held, "the rule has lapsed")
    assert passing(40000), "and the flow has not"


def test_rules_that_cannot_be_had_leave_those_before(command: SwitchCommand) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    host.set_rules(encode(version(ODD)))
    host.wait_rules(WAIT_S)
    host.set_rules(encode(version(Rule("bad", "no such words", "media"))))
    wait(lambda: bool(connections(host) and "bad" in host.last_refusal), "it is refused")
    here.send("ha", VM1, 4, 5)
    assert here.numbers("ca", 1) == [5]


@pytest.mark.parametrize("how", ["kill", "end"])
def test_an_agent_that_ends_leaks_nothing_and_its_successor_goes_on(command: SwitchCommand, how: str) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    other = registered(command.host("b", VM2, vm="vm2"))
    set_mode(other, Mode.ALONE)
    here.send("hb", VM2, 70)
    assert here.numbers("ca", 1) == [70]
    here.send("ha", VM1, 1, 2)
    sealed(host, ONE)
    getattr(command, how)()
    here.send("ha", VM1, 3)
    here.send("hb", VM2, 71)
    assert here.numbers("ca", 1) == [71], "who runs alone is heard on; who is held is not"
    command.start()
    assert command.served()[-1].adopted
    wait(lambda: connections(host) == 2, "the host is back")
    registered(host)
    here.send("ha", VM1, 4)
    host.release(ONE)
    assert sealed(host, TWO) == 1
    host.release(TWO)
    assert here.numbers("ca", 1, mac=VM1) == [4]
    stale = command.host("b", VM1)
    with pytest.raises(FencedError):
        stale.wait_registered(WAIT_S)


def test_one_whom_the_owner_followed_is_not_heard_after_the_end_of_protection(command: SwitchCommand) -> None:
    here, old = command.here, registered(command.host("a", VM1))
    new = registered(command.host("b", VM1, term=2))
    pumped(old, lambda: old.superseded == 2)
    set_mode(new, Mode.ALONE)
    new.unregister()
    here.send("ha", VM1, 1)
    here.send("hb", VM1, 10)
    assert here.numbers("ca", 1) == [10]
    wait(lambda: not command.gate_pids(), "the gate is not needed any more")
    new.close()
    command.kill()
    command.start()
    here.send("ha", VM1, 2)
    here.send("hb", VM1, 11)
    assert here.numbers("ca", 1) == [11], "as before, with no host that registers"
    again = registered(command.host("b", VM1, term=2))
    here.send("hb", VM1, 12)
    assert sealed(again, ONE) == 1


def test_a_seal_that_was_not_waited_for_does_not_stand_for_a_later_one(command: SwitchCommand) -> None:
    """The host was given up while the gate process stood still, and has registered anew."""
    here, first = command.here, registered(command.host("a", VM1))
    here.send("ha", VM1, 1)
    for pid in command.gate_pids():
        os.kill(pid, signal.SIGSTOP)
    first.seal(ONE)
    second = command.host("a", VM1, first_epoch=2)
    wait(lambda: connections(second) == 1, "it has asked to register")
    for pid in command.gate_pids():
        os.kill(pid, signal.SIGCONT)
    registered(second)
    here.send("ha", VM1, 2)
    assert sealed(second, TWO) == 2
    second.release(TWO)
    assert here.numbers("ca", 2) == [1, 2]


def test_a_seal_is_told_though_the_gate_answers_another_question_behind_it(command: SwitchCommand) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    here.send("ha", VM1, 1)
    assert sealed(host, ONE) == 1
    (pid,) = command.gate_pids()
    os.kill(pid, signal.SIGSTOP)
    host.seal(TWO)
    host.ask_totals()
    wait(command.waits_for_a_gate, "the switch waits for the totals")
    os.kill(pid, signal.SIGCONT)
    assert host.wait_sealed(TWO, 5.0).session, "the switch has confirmed it"


def test_what_was_sent_to_the_dead_host_is_given_to_the_next(command: SwitchCommand) -> None:
    here, host = command.here, registered(command.host("a", VM1))
    sealed(host, ONE)
    host.release(ONE)
    for number in (1, 2, 3):
        here.send_packet("ca", PLAIN + made(STRANGER, number, to=VM1))
    assert here.numbers("ha", 3, mac=STRANGER) == [1, 2, 3]
    host.close()
    new = registered(command.host("b", VM1, term=2))
    here.send_packet("ca", PLAIN + made(STRANGER, 4, to=VM1))
    got = here.numbers("hb", 4, mac=STRANGER)
    assert got == [1, 2, 3, 4]
    assert new.superseded is None


def test_status_says_whose_frames_are_taken_and_what_waits(command: SwitchCommand) -> None:
    command.here.send("ha", VM1, 1)
    registered(command.host("a", VM1))
    command.here.send("ha", VM1, 2, 3)
    found: dict[str, Any] = {}

    def has_read_them() -> bool:
        found.update(json.loads(command.kage("--status", "--json")))
        return bool(found["vms"][0]["totals"]["pending_frames"] == 2)

    wait(has_read_them, "its gate process has what came")
    (vm,) = found["vms"]
    assert (vm["vm"], vm["term"], vm["owner"]) == (VM, 1, "a/guest")
    assert vm["state"] in ("holding", "cut"), "nobody has pumped the host's end meanwhile"
    assert vm["totals"]["held_frames"] == 2
    assert found["counts"]["vms"] == 1
    shown = command.kage("--status")
    assert vm["state"] in shown or "cut" in shown
    assert "a/guest" in shown


def test_a_keeper_that_dies_is_replaced(command: SwitchCommand) -> None:
    """What it kept is lost; a takeover soon after is as any."""
    registered(command.host("a", VM1))
    os.kill(command.part("kage-keeper"), signal.SIGKILL)
    terms = count(2)

    def is_replayed() -> bool:
        """What was sent while one host had the VM is given to the next."""
        send_to_vm(command, 1)
        term = next(terms)
        registered(command.host("ab"[term % 2 == 0], VM1, term=term))
        return command.here.numbers(HOSTS[term % 2 == 0], mac=STRANGER) == [1]

    wait(is_replayed, "there is another")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_keeper_that_fails_at_a_takeover_does_not_cut_the_vm_off(command: SwitchCommand, number: int) -> None:
    host = registered(command.host("a", VM1))
    keeper = command.part("kage-keeper")
    os.kill(keeper, signal.SIGSTOP)
    host.close()
    registered(command.host("b", VM1, term=2))
    os.kill(keeper, number)

    def heard() -> bool:
        send_to_vm(command, 1)
        return bool(command.here.numbers("hb", mac=STRANGER))

    wait(heard, "the next host hears what is sent to its VM")


def test_a_gate_that_stood_still_seals_again(command: SwitchCommand) -> None:
    """Its answer of then is nobody's any more; those of now are not taken for it."""
    here, host = command.here, command.host("a", VM1, seal_s=1.0)
    registered(host)
    sealed(host, ONE)
    gate = command.part("kage-gate")
    os.kill(gate, signal.SIGSTOP)
    here.send("ha", VM1, 1)
    host.seal(TWO)
    assert not host.wait_sealed(TWO, WAIT_S).session
    wait(lambda: connections(host) == 2, "it has connected anew")
    os.kill(gate, signal.SIGCONT)
    registered(host)
    for number in (3, 4, 5):
        sealed(host, Epoch(number))
    host.release(Epoch(5))
    assert here.numbers("ca", 1, mac=VM1) == [1]


def test_a_gate_that_is_frozen_for_good_is_replaced(command: SwitchCommand) -> None:
    here, host = command.here, command.host("a", VM1, seal_s=1.0)
    registered(host)
    other = registered(command.host("b", VM2, vm="vm2"))
    gate = command.part("kage-gate")
    os.kill(gate, signal.SIGSTOP)
    host.seal(ONE)
    assert not host.wait_sealed(ONE, WAIT_S).session
    wait(lambda: gate_is_another(command, gate, host), "there is another gate")
    registered(host)
    here.send("ha", VM1, 1)
    assert sealed(host, TWO) == 1
    sealed(other, ONE)


def gate_is_another(command: SwitchCommand, gate: int, host: SwitchClient) -> bool:
    host.pump()
    return host.registered and command.part("kage-gate") != gate


def send_to_vm(command: SwitchCommand, number: int) -> None:
    command.here.send_packet("ca", PLAIN + made(STRANGER, number, to=VM1))


def test_junk_ends_its_connection_and_is_told_once(command: SwitchCommand) -> None:
    host = registered(command.host("a", VM1))
    for _ in range(3):
        with socket.create_connection((ADDRESS.host, ADDRESS.port)) as foreign:
            foreign.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
            with suppress(ConnectionResetError):
                assert foreign.recv(4096) == b""
    wait(lambda: len(command.refused()) == 1, "it is told")
    assert sealed(host, ONE) == 0


def test_it_can_leave_the_bridge_as_it_was(tmp_path: Path) -> None:
    with switch_command(tmp_path, "--remove-at-end") as command:
        registered(command.host("a", VM1))
        assert command.end() == 0
        command.here.send("ha", VM1, 5)
        assert command.here.numbers("ca", 1) == [5]
        with BridgeLinks() as links:
            assert not [link.name for link in links.all() if link.name.startswith("kg")]
