"""All nodes, the network and the arbiter; one run of a scenario, judged after every step.

After the last fault everything that can be repaired is: paths heal, what is frozen thaws, what is down starts again.
Then no pause may last, and exactly one guest has to run, unless operators have ended it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kagemusha.model.lease import PRIMARY_PATIENCE, STANDBY_PATIENCE, LeasePromise
from kagemusha.protocol import primary as p
from kagemusha.protocol.simulate import faults
from kagemusha.protocol.simulate.agenda import Agenda
from kagemusha.protocol.simulate.arbiter import Arbiter
from kagemusha.protocol.simulate.clock import Clock
from kagemusha.protocol.simulate.guest import Gate, Guest
from kagemusha.protocol.simulate.judge import Judge, Violation
from kagemusha.protocol.simulate.node import RESTART_S, Node
from kagemusha.protocol.simulate.primary_role import PrimaryRole
from kagemusha.protocol.simulate.scenario import Scenario
from kagemusha.protocol.simulate.standby_role import StandbyRole
from kagemusha.protocol.simulate.switch_agent import SwitchAgent
from kagemusha.protocol.simulate.weaken import SOUND, Weakness
from kagemusha.protocol.simulate.wire import Network

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.chance import Chance

LEASE_MS = 300
DRIFT_PERMILLE = 10
SETTLE_STEPS = 6000
LOOK_STEPS = 60
Coverage = dict[tuple[Any, type], int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended that broke nothing."""

    steps: int
    frames: int
    takeovers: int
    serving: bool
    reason: str


class World:
    """One run. ``coverage`` counts how often each (state, event) was taken."""

    def __init__(
        self, scenario: Scenario, chance: Chance, *, weakness: Weakness = SOUND, coverage: Coverage | None = None
    ) -> None:
        self.scenario = scenario
        self.chance = chance
        self.weakness = weakness
        self.coverage: Coverage = {} if coverage is None else coverage
        self.arbitrated = scenario.policy in ("claim", "switch")
        self.policy: Any = "claim" if self.arbitrated else scenario.policy
        self.promise = LeasePromise(LEASE_MS, DRIFT_PERMILLE)
        self.drift = DRIFT_PERMILLE / 1000
        self.wait_ns = self.promise.wait_ns // (5 if weakness.no_wait else 1)
        # How soon a silent primary is taken for dead must not matter to anything but who serves.
        self.patience_ns = int(self.wait_ns * chance.choice((STANDBY_PATIENCE, 0.2, 1.0)))
        self.silence_s = chance.choice((0.6, 0.6, LEASE_MS / 1000 * PRIMARY_PATIENCE))
        self.agenda = Agenda()
        self.judge = Judge(relaxed=scenario.policy == "alone")
        self.network = Network(self.agenda, chance)
        self.switch = SwitchAgent(self) if scenario.policy == "switch" else None
        self.arbiter = self.switch or Arbiter(self.network)
        self.handed_over = False
        self.instances = self._names = self._sessions = 0
        self.nodes = [
            Node(self, index, Clock(1 + self.drift * (2 * chance.random() - 1), 1000 * chance.random()))
            for index in range(scenario.nodes)
        ]
        for node in self.nodes:
            if isinstance(node.gate, Gate):
                node.gate.wall_lease = weakness.wall_clock
            self.agenda.later(0.001 * node.index, self.network.ether, node.boot)

    # --- what the parts ask -------------------------------------------------------------------------------------

    def next_instance(self) -> int:
        """The number of a guest that comes to life now."""
        self.instances += 1
        return self.instances

    def next_name(self) -> str:
        """For a QEMU that starts now."""
        self._names += 1
        return f"QEMU {self._names}"

    def next_session(self) -> int:
        """A number for a registration at the switch; chosen at random, in truth."""
        self._sessions += 1
        return self._sessions

    def standbys_of(self, node: Node) -> list[Node]:
        """Where a primary looks for standbys."""
        if not self.arbitrated and node.index:
            return []
        return [other for other in self.nodes if other is not node]

    def gave_up(self, guest: Guest, reason: str) -> None:
        """A standby let go of a checkpoint by its own decision."""
        self.judge.given_up[guest.number] = reason

    def kill(self, node: Node, why: str) -> None:
        """A primary ends its guest."""
        guest = node.gate.guest
        if guest is None:
            return
        copies = []
        for other in self.nodes:
            role = other.role
            if isinstance(role, StandbyRole) and role.holds is not None:
                copies.append(role.holds.guest)
            elif other is not node and other.gate.guest is not None:
                copies.append(guest)
        if why != "CaptureFailed" and guest.number == self.instances:  # else a newer one was there and has died
            self.judge.killed(guest, why, copies)
        node.guest_dies()

    def restart(self, node: Node, delay_s: float = 0.0) -> None:
        """A supervisor starts its worker again."""
        self.agenda.later(RESTART_S + delay_s, self.network.ether, node.attach)

    def heal(self) -> None:
        """Every path works."""
        self.network.cut.clear()
        self.network.heal()

    # --- a run --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """From the start to the end.

        :raise Violation: an invariant was broken.
        """
        agenda, judge = self.agenda, self.judge
        todo = list(reversed(self.scenario.faults))
        for _ in range(self.scenario.steps):
            if not agenda.step():
                break
            judge.look()
            while todo and todo[-1].step <= agenda.steps:
                fault = todo.pop()
                if agenda.trace is not None:
                    agenda.trace(f"--- {fault}")
                faults.strike(self, fault)
                judge.look()
        return self._settle()

    def _settle(self) -> Outcome:
        """Everything is repaired, and nothing more goes wrong."""
        self.heal()
        self.arbiter.slow_s = 0.0
        if self.switch is not None:
            self.switch.repair()
        for node in self.nodes:
            node.dies_after = node.freezes_after = -1
            node.thaw()
            if not node.up and not node.stays_down:
                self.restart(node)
        for number in range(SETTLE_STEPS):
            if not self.agenda.step():
                break
            self.judge.look()
            if number % LOOK_STEPS == LOOK_STEPS - 1 and not self._unrest():
                break
        reason = self._unrest()
        return Outcome(
            self.agenda.steps, self.judge.frames_left, self.judge.takeovers, self._serving() == 1, self._verdict(reason)
        )

    def _serving(self) -> int:
        return sum(node.gate.reaches() for node in self.nodes)

    def _unrest(self) -> str:
        """What is not as it should be in the end."""
        for node in self.nodes:
            guest = node.gate.guest
            if self.switch is not None and self._held_for_nobody(node):
                return f"I4: {guest} is held, and nobody protects it"
            if guest is not None and not guest.running and not self._left_silent(node):
                return f"I4: {guest} stands on {node}"
        protected = any(role.data.covered or role.unprotectable for role in self.primaries)
        alone = all(node.stays_down or node.gate.guest is not None for node in self.nodes)
        if self._serving() == 1 and (protected or alone):
            return ""
        return f"I4: {self._serving()} guests are heard; " + ", ".join(str(node.role) for node in self.nodes)

    def _held_for_nobody(self, node: Node) -> bool:
        role = node.role
        alone = isinstance(role, PrimaryRole) and role.data.state is p.State.ALONE
        return alone and self.switch is not None and not self.switch.ports.passes

    def _left_silent(self, node: Node) -> bool:
        """Without an arbiter a worker that was killed leaves its guest to the standby, as it was, and nobody else may
        end that doubt.
        """
        return not self.arbitrated and isinstance(node.role, PrimaryRole) and node.role.in_doubt

    def _verdict(self, reason: str) -> str:
        """A hand-over whose receiver dies before it hears of it leaves nobody who may claim: an operator has to.

        So does an operator who has switched off the node that was just given the term.
        """
        excused = self.handed_over or any(node.stays_down for node in self.nodes)
        stopped = excused and all(node.gate.guest is None for node in self.nodes)
        if reason and ((self.arbitrated and not stopped) or "stands" in reason):
            raise Violation(f"it does not come to rest: {reason}")
        return reason

    @property
    def primaries(self) -> list[PrimaryRole]:
        """All nodes that are primaries now."""
        return [node.role for node in self.nodes if isinstance(node.role, PrimaryRole)]
