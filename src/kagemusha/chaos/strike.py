"""Faults applied to a cluster, and undone."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from kagemusha.chaos.cluster import HOSTS, Cluster
from kagemusha.chaos.fault_points import PointFault, Side, Trigger
from kagemusha.chaos.faults import AnyFault, ChaosFault
from kagemusha.demo.processes import signal_together
from kagemusha.demo.topology import SWITCH
from kagemusha.model.faults import FaultAction, FaultOrder

FREEZE_S = (0.1, 3.0)
CUT_S = (0.5, 3.0)
DELAY_S = (0.01, 0.25)
LOST_SHARE = 0.2
CYCLE_LIMIT_S, TRIGGERED_LIMIT_S = 10.0, 30.0
POLL_S = 0.002
FIRST_S = 0.1
"""How long the first of two faults is there before the second."""

CUTS: dict[AnyFault, tuple[tuple[str, str], ...]] = {
    ChaosFault.CUT_BETWEEN: (("primary", "standby"), ("standby", "primary")),
    ChaosFault.CUT_TO_STANDBY: (("primary", "standby"),),
    ChaosFault.CUT_TO_PRIMARY: (("standby", "primary"),),
    ChaosFault.CUT_PRIMARY_OFF: (("primary", "standby"), ("primary", "third"), ("primary", "arbiter")),
    ChaosFault.CUT_STANDBY_OFF: (("standby", "primary"), ("standby", "third"), ("standby", "arbiter")),
    ChaosFault.CUT_PRIMARY_FROM_ARBITER: (("primary", "arbiter"),),
    ChaosFault.CUT_ARBITER_FROM_PRIMARY: (("arbiter", "primary"),),
    ChaosFault.CUT_BETWEEN_PRIMARY_AND_ARBITER: (("primary", "arbiter"), ("arbiter", "primary")),
    ChaosFault.CUT_STANDBY_FROM_ARBITER: (("standby", "arbiter"),),
    ChaosFault.CUT_ARBITER_FROM_STANDBY: (("arbiter", "standby"),),
    ChaosFault.CUT_BETWEEN_STANDBY_AND_ARBITER: (("standby", "arbiter"), ("arbiter", "standby")),
}
"""Who is not heard by whom any more."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was applied.

    :ivar reached: there was something to apply it to.
    :ivar heal_t: when it is to be undone, CLOCK_MONOTONIC seconds; ``heal``: how.
    """

    fault: AnyFault
    t: float
    reached: bool
    heal_t: float
    heal: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Roles:
    """Which host is what when a fault strikes."""

    primary: str
    standby: str
    third: str


def strike(cluster: Cluster, fault: AnyFault, active: str, standby: str, chance: random.Random) -> Struck:
    """Apply a fault now."""
    (third,) = (host for host in HOSTS if host not in (active, standby))
    roles = Roles(active, standby, third)
    if isinstance(fault, PointFault):
        return _strike_point(cluster, fault, roles, chance)
    verb, place, *_ = fault.value.replace(",", "").split(" ")
    if fault in CUTS or verb in ("loss", "delay"):
        return _strike_network(cluster, fault, roles, chance)
    if verb == "fill":
        return _strike_disk(cluster, fault, roles, chance)
    if place == "switch":
        return _strike_switch(cluster, fault, chance)
    if place == "arbiter":
        return _strike_arbiter(cluster, fault, active, chance)
    return _strike_process(cluster, fault, active if place == "primary" else standby, chance)


def _nothing() -> None:
    """What is dead stays dead."""


def _strike_process(cluster: Cluster, fault: ChaosFault, host: str, chance: random.Random) -> Struck:
    now = time.monotonic()
    verb, _, part = fault.value.split(" ")
    if verb == "kill":
        return Struck(fault, now, cluster.strike(host, part, signal.SIGKILL), now, _nothing)
    thaw = cluster.thaw_of(host)
    reached = cluster.strike(host, part, signal.SIGSTOP)
    return Struck(fault, now, reached, now + chance.uniform(*FREEZE_S), thaw)


def _strike_switch(cluster: Cluster, fault: ChaosFault, chance: random.Random) -> Struck:
    """One of the agent's processes; the agent replaces one that is dead."""
    now = time.monotonic()
    verb, _, part = fault.value.split(" ")
    number = signal.SIGKILL if verb == "kill" else signal.SIGSTOP
    reached = bool(signal_together(cluster.arbiter.part(part), number).names)
    return Struck(fault, now, reached, now + chance.uniform(*FREEZE_S), cluster.arbiter.revive)


def _strike_point(cluster: Cluster, fault: PointFault, roles: Roles, chance: random.Random) -> Struck:
    """Arm the point, see to it that somebody comes by, and wait for that. What is not reached is not armed any more."""
    now = time.monotonic()
    alive: Callable[[], bool]
    if fault.side is Side.SWITCH:
        end, heal, alive = SWITCH, cluster.arbiter.revive, lambda: cluster.arbiter.alive
    else:
        end = {Side.PRIMARY: roles.primary, Side.STANDBY: roles.standby, Side.THIRD: roles.third}[fault.side]
        node = cluster.nodes[end]
        heal, alive = cluster.thaw_of(end), lambda: node.alive
    if not alive():
        return Struck(fault, now, False, now, _nothing)
    board = cluster.boards[end]
    before = board.struck
    board.arm(FaultOrder(fault.fault, fault.action, chance.randint(1, fault.times)))
    match fault.trigger:
        case Trigger.PRIMARY_DIES:
            cluster.strike(roles.primary, "host", signal.SIGKILL)
        case Trigger.STANDBY_DIES:
            cluster.strike(roles.standby, "host", signal.SIGKILL)
        case Trigger.SWITCHOVER:
            cluster.ask_switchover(roles.primary)
    lone = fault.trigger is Trigger.NOTHING
    deadline = now + (CYCLE_LIMIT_S if lone else TRIGGERED_LIMIT_S)
    while board.struck == before and time.monotonic() < deadline and alive():
        if lone and cluster.pair != (roles.primary, roles.standby):
            break  # a machine that stood still has ended the protection; another fault now would be a second one
        time.sleep(POLL_S)
    board.disarm()
    lasts = fault.action is FaultAction.FREEZE or fault.side is Side.SWITCH
    heal_t = time.monotonic() + (chance.uniform(*FREEZE_S) if lasts else 0.0)
    return Struck(fault, now, board.struck > before, heal_t, heal)


def _strike_disk(cluster: Cluster, fault: ChaosFault, roles: Roles, chance: random.Random) -> Struck:
    now = time.monotonic()
    host, other = roles.primary, roles.standby
    if fault.value.startswith("fill standby"):
        host, other = other, host
    cluster.fill_disk(host)
    if fault.doubled:
        time.sleep(FIRST_S)
        cluster.strike(other, "host", signal.SIGKILL)
    return Struck(fault, now, True, now + chance.uniform(*CUT_S), lambda: cluster.free_disk(host))


def _strike_arbiter(cluster: Cluster, fault: ChaosFault, active: str, chance: random.Random) -> Struck:
    now = time.monotonic()
    arbiter = cluster.arbiter
    heal: Callable[[], None]
    match fault:
        case ChaosFault.KILL_ARBITER | ChaosFault.KILL_ARBITER_LOSE_PRIMARY:
            arbiter.kill()
            heal = arbiter.start
        case ChaosFault.FREEZE_ARBITER:
            arbiter.signal(signal.SIGSTOP)

            def heal() -> None:
                arbiter.signal(signal.SIGCONT)
        case _:
            heal = arbiter.slow_down()
    if fault.doubled:
        cluster.strike(active, "host", signal.SIGKILL)
    return Struck(fault, now, True, now + chance.uniform(*CUT_S), heal)


def _strike_network(cluster: Cluster, fault: ChaosFault, roles: Roles, chance: random.Random) -> Struck:
    now = time.monotonic()
    ends = {"primary": roles.primary, "standby": roles.standby, "third": roles.third}
    ends["arbiter"] = cluster.form.arbiter_end
    for sender, receiver in CUTS.get(fault, ()):
        cluster.network.cut(ends[sender], (ends[receiver],))
    if fault is ChaosFault.LOSS:
        cluster.network.lose(LOST_SHARE)
    if fault in (ChaosFault.DELAY, ChaosFault.DELAY_LOSE_PRIMARY):
        cluster.network.delay(chance.uniform(*DELAY_S))
        if fault.doubled:
            time.sleep(FIRST_S)
            cluster.strike(roles.primary, "host", signal.SIGKILL)
    return Struck(fault, now, True, now + chance.uniform(*CUT_S), cluster.network.heal)
