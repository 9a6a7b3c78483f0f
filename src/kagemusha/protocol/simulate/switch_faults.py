"""What can go wrong with a switch and with the connections to it, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kagemusha.protocol.simulate.arbiter import ARBITER
from kagemusha.protocol.simulate.node import Node
from kagemusha.protocol.simulate.switch_agent import RESTART_S, SwitchAgent

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.world import World

Strike = Callable[["World", Node, int], None]


def _at_switch(act: Callable[[SwitchAgent, World, int], object]) -> Strike:
    """Where there is none nothing happens."""

    def fault(world: World, node: Node, number: int) -> None:
        if world.switch is not None:
            act(world.switch, world, number)

    return fault


def _die(switch: SwitchAgent, world: World, number: int) -> None:
    switch.die()
    world.agenda.later(RESTART_S + number % 7 * 0.1, world.network.ether, switch.start)


def _die_amid(switch: SwitchAgent, world: World, number: int) -> None:
    switch.dies_after = number % 6


def _freeze(switch: SwitchAgent, world: World, number: int) -> None:
    """Mostly for long enough that a guest does not wait for its seal, not for so long that connections are given up."""
    if switch.up:
        switch.process.frozen = True
        thaw_s = 0.03 + number % 100 * 0.001 if number % 3 else 0.5
        world.agenda.later(thaw_s, world.network.ether, world.agenda.thaw, switch.process)


def _break_control(world: World, node: Node, number: int) -> None:
    for line in world.network.lines:
        if line.b.node == ARBITER and line.a.node == node.index:
            line.break_off()


def _cut_control(world: World, node: Node, number: int) -> None:
    """One way, or both."""
    pairs = ((node.index, ARBITER), (ARBITER, node.index))
    world.network.cut |= set(pairs[number % 3 : number % 3 + 1] or pairs)


def _fill(switch: SwitchAgent, world: World, number: int) -> None:
    switch.full = number % 2 == 0


SWITCH_FAULTS: dict[str, Strike] = {
    "switch dies": _at_switch(_die),
    "switch dies amid effects": _at_switch(_die_amid),
    "switch freezes": _at_switch(_freeze),
    "gate of switch dies": _at_switch(lambda switch, *_: switch.lose_gate()),
    "disk of switch full": _at_switch(_fill),
    "break control": _break_control,
    "cut control": _cut_control,
}
