"""Whatever process of the switch dies, held frames do not leak; a successor takes over what is there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from tests.harness.conditions import wait_until
from tests.harness.gate import WAIT_S
from tests.harness.switch import CLIENTS, STRANGER, VM1, VM2, VM3, Switch, switch

from kagemusha.errors import BugError, ConfigError, TransientError
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.switched.plane import SwitchPlane
from kagemusha.gate.switched.registry import Inbound, SwitchedCounts
from kagemusha.model.ids import Epoch
from kagemusha.model.rules import Action, PacketClass, Rule, RuleSet

pytestmark = pytest.mark.root
ONE, TWO = Epoch(1), Epoch(2)
ODD = RuleSet(
    (PacketClass("held", Action.HOLD), PacketClass("sent", Action.TRANSMIT)),
    (Rule("odd", "ether[21] & 1 == 1", "sent"),),
    "held",
)


@pytest.fixture
def here() -> Iterator[Switch]:
    with switch() as made_switch:
        yield made_switch


class Agent:
    """A process that guards the switch, with VM1 held behind ha, VM2 passing behind ha and VM3 held behind hb."""

    def __init__(self, here: Switch) -> None:
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                here.open()
                here.add_vm("one", VM1, "ha").install(ODD)
                here.add_vm("two", VM2, "ha", GateMode.PASS)
                vm = here.add_vm("three", VM3, "hb")
                vm.open_replay()
                vm.set_inbound(Inbound.DIVERT)
                os.write(told, b"!")
                signal.pause()
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(ready, 1) == b"!"
        os.close(ready)
        self._here = here
        self._killed = False

    def kill(self) -> None:
        if not self._killed:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._killed = True

    def taps_gone(self) -> bool:
        return not any(name.startswith("kg") for name in self._here.device_names())


@pytest.fixture
def agent(here: Switch) -> Iterator[Agent]:
    made = Agent(here)
    yield made
    made.kill()


def test_a_killed_agent_leaks_nothing_and_plain_forwarding_goes_on(here: Switch, agent: Agent) -> None:
    here.send("ha", VM1, 1, 2)
    here.send("hb", VM3, 301)
    assert here.numbers("ca") == [1]
    agent.kill()
    for number in range(10, 2000, 10):  # while its gate processes are dying, too
        here.send("ha", VM1, number)
        here.send("hb", VM3, 3000 + number)
    wait_until(agent.taps_gone, "the taps of the killed processes go")
    here.send("ha", VM1, 20)
    here.send("ha", VM2, 21)
    here.send("hb", VM3, 322)
    here.send("hb", STRANGER, 23)
    assert here.numbers("ca") == [21, 23]
    assert 21 in here.numbers("cb")


def test_a_successor_adopts_silence_and_protects_again(here: Switch, agent: Agent) -> None:
    agent.kill()
    plane = here.open()
    assert plane.adopted
    left = plane.left_over()
    assert {mac: each.mode for mac, each in left.items()} == {
        VM1: GateMode.CLOSED,
        VM2: GateMode.PASS,
        VM3: GateMode.CLOSED,
    }
    assert {each.inbound for each in left.values()} == {Inbound.OFF}
    here.send("ha", VM1, 1)
    here.send("ha", VM2, 2)
    here.send("hb", VM2, 3)
    assert here.numbers("ca") == [2]
    here.send("ca", STRANGER, 4, to=VM3)
    assert here.numbers("hb", 2)[-1] == 4
    vm = here.add_vm("one", VM1, None, GateMode.CLOSED)
    here.send("ha", VM1, 5)
    vm.set_owner("ha")
    here.send("ha", VM1, 7)
    vm.set_mode(GateMode.HOLD)
    here.send("ha", VM1, 9)
    vm.gate.seal(ONE)
    assert vm.gate.wait_sealed(ONE, WAIT_S).frames == 1, "without rules all are held"
    assert here.frames("ca") == []
    vm.gate.release(ONE)
    assert here.numbers("ca", 1) == [9]
    assert vm.counts() == SwitchedCounts(fenced=1, spoofed=0, closed=1, orphaned=0)
    assert set(plane.left_over()) == {VM2, VM3}
    plane.forget(VM3)
    here.send("hb", VM3, 11)
    assert here.numbers("ca") == [11]


def test_adoption_under_load_leaks_nothing(here: Switch, agent: Agent) -> None:
    """The VM's host does not stop sending what has to be held, from the kill until a host has registered again."""
    child = os.fork()
    if child == 0:
        while True:
            here.send("ha", VM1, 2, 4, 6)
    try:
        agent.kill()
        for _ in range(5):
            plane = here.open()
            vm = here.add_vm("one", VM1, "ha")
            before = vm.given
            wait_until(lambda vm=vm, before=before: vm.given > before, "frames are held")  # type: ignore[misc]
            plane.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert here.frames("ca") == []


def test_a_closed_plane_leaves_its_vms_silent(here: Switch) -> None:
    here.open()
    here.add_vm("one", VM1, "ha")
    here.add_vm("two", VM2, "ha", GateMode.PASS)
    assert here.plane is not None
    here.plane.close()
    here.send("ha", VM1, 1)
    here.send("ha", VM2, 2)
    assert here.numbers("ca") == [2]


def test_a_successor_with_other_ports_frees_the_rest(here: Switch, agent: Agent) -> None:
    agent.kill()
    plane = here.open(hosts=("hb",), clients=CLIENTS)
    assert plane.adopted
    assert here.links.ingress_program(here.links.get("ha").index) is None
    with pytest.raises(ConfigError):
        plane.add_vm("one", VM1, owner="ha")


def test_a_killed_gate_process_leaks_nothing_and_can_be_replaced(here: Switch) -> None:
    here.open()
    vm = here.add_vm("one", VM1, "ha")
    vm.install(ODD)
    other = here.add_vm("two", VM2, "ha")
    here.send("ha", VM1, 2, 3)
    here.send("ha", VM2, 102)
    vm.gate.seal(ONE)
    vm.gate.wait_sealed(ONE, WAIT_S)
    taps = {name for name in here.device_names() if name.startswith("kgh")}
    os.kill(vm.gate.process.pid, signal.SIGKILL)
    wait_until(lambda: len(taps & here.device_names()) == 1, "the tap of the killed process goes")
    here.send("ha", VM1, 4, 5)
    assert here.numbers("ca") == [3, 5]
    with pytest.raises(BugError, match="signal 9"):
        vm.gate.release(ONE)
    assert here.plane is not None
    vm.close()
    here.plane.forget_vm("one")
    here.send("ha", VM1, 6, 7)
    assert here.numbers("ca") == [], "silent until somebody says what is to be done"
    vm = here.add_vm("one", VM1, "ha")
    vm.install(ODD)
    here.send("ha", VM1, 8, 9)
    assert here.numbers("ca") == [9]
    vm.gate.seal(TWO)
    assert vm.gate.wait_sealed(TWO, WAIT_S).frames == 1
    vm.gate.release(TWO)
    assert here.numbers("ca", 1) == [8]
    assert vm.rule_counts().rules["odd"].frames == 1
    other.gate.seal(ONE)
    assert other.gate.wait_sealed(ONE, WAIT_S).frames == 1, "the other VM was not concerned"


def test_the_owner_can_change_while_the_gate_process_is_dead(here: Switch) -> None:
    here.open()
    vm = here.add_vm("one", VM1, "ha")
    here.send("ha", VM1, 1)
    os.kill(vm.gate.process.pid, signal.SIGKILL)
    wait_until(lambda: not any(name.startswith("kgh") for name in here.device_names()), "the tap goes")
    assert vm.set_owner("hb") == 0
    here.send("ha", VM1, 2)
    here.send("hb", VM1, 3)
    assert here.frames("ca") == []
    assert vm.counts().fenced == 1


def test_a_frozen_gate_process_leaks_nothing_and_goes_on(here: Switch) -> None:
    here.open()
    vm = here.add_vm("one", VM1, "ha")
    os.kill(vm.gate.process.pid, signal.SIGSTOP)
    here.send("ha", VM1, 1, 2)
    vm.gate.seal(ONE)
    with pytest.raises(TransientError):
        vm.gate.wait_sealed(ONE, 0.05)
    assert here.frames("ca") == []
    os.kill(vm.gate.process.pid, signal.SIGCONT)
    assert vm.gate.wait_sealed(ONE, WAIT_S).frames == 2
    vm.gate.release(ONE)
    assert here.numbers("ca", 2) == [1, 2]


def test_programs_of_another_version_are_not_adopted(here: Switch) -> None:
    plane = here.open()
    links = here.links
    index = links.get("ha").index
    links.set_ingress_program(index, plane._wards[True], name="kage-switch 0 1 2 3")
    plane.close()
    here.plane = None
    with pytest.raises(Exception, match="version 0"):
        SwitchPlane.open("br0", host_ports=("ha",))
