"""A node: what is durable on it, its processes, its guest and gate, and which role it has.

A node that starts asks the arbiter who was given the newest term; ``protocol/election.py`` says whether it may claim
one. If so it waits longer than any standby's takeover takes, claims, and boots the VM afresh if it wins. Else it is a
standby, which asks again now and then as long as it waits: a claim of its node may have been applied late.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kagemusha.model.ids import FIRST_EPOCH, FIRST_TERM, Epoch, Term
from kagemusha.protocol import primary as p
from kagemusha.protocol import standby as s
from kagemusha.protocol.election import KnownTerms, NewestClaim, term_to_claim
from kagemusha.protocol.simulate.agenda import Process
from kagemusha.protocol.simulate.arbiter import Holder
from kagemusha.protocol.simulate.clock import Clock
from kagemusha.protocol.simulate.guest import Gate, Guest, Mode
from kagemusha.protocol.simulate.judge import Violation
from kagemusha.protocol.simulate.primary_role import PrimaryRole
from kagemusha.protocol.simulate.standby_role import StandbyRole
from kagemusha.protocol.simulate.uplink import Uplink
from kagemusha.protocol.simulate.wire import Message

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.world import World

ASK_GAP_S = 0.05
GRACE_S = 0.6
FRAME_S = 0.02
RESTART_S = 0.1


class Node:
    """One host. ``held``, ``tried``, ``agreed``, ``own``, ``doubt``: what is durable."""

    def __init__(self, world: World, index: int, clock: Clock) -> None:
        self.world = world
        self.index = index
        self.clock = clock
        self.worker = Process(f"worker {index}")
        self.ship = Process(f"ship {index}")
        self.qemu = Process(f"QEMU {index}")
        self.gate: Gate | Uplink = Gate(world.agenda, clock, world.judge)
        if world.switch is not None:
            self.gate = Uplink(world, index, world.switch.ports)
        self.held = self.tried = self.agreed = 0
        self.own = self.doubt = False
        self.role: PrimaryRole | StandbyRole | None = None
        self.up = False
        self.stays_down = False
        self.frozen_t = self.thawed_t = 0.0
        self.dies_after = self.freezes_after = -1
        self._chain = 0
        self._waits = False
        self._boots = 0

    def __repr__(self) -> str:
        return f"node {self.index}"

    def must(self, condition: bool, what: str) -> None:
        """A rule that the agent relies on.

        :raise Violation: it is broken.
        """
        if not condition:
            raise Violation(f"{self}: {what}")

    # --- durable ------------------------------------------------------------------------------------------------

    def record(self, term: int, *, own: bool) -> None:
        """A guest runs in this term. ``own``: here."""
        self.world.judge.recorded(self.index, self.held, term)
        self.held, self.own = term, own
        self.doubt &= own
        self.tried = max(self.tried, term)

    def record_tried(self, term: int) -> None:
        """This term is being claimed."""
        self.tried = max(self.tried, term)

    def record_agreed(self, term: int) -> None:
        """This term was agreed on with a primary."""
        self.tried = max(self.tried, term)
        self.agreed = max(self.agreed, term)

    # --- life ---------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """The worker starts; there is no guest."""
        if self.up or self.stays_down:
            return
        self.up = self.gate.up = True
        self._boots += 1
        self._waits = False
        if not self.world.arbitrated:
            other = self.index or (self.held and not self.own)
            self._as_standby() if other else self._as_primary(in_doubt=self.doubt)
            return
        self._ask()

    def attach(self) -> None:
        """The worker starts; a predecessor was killed and its guest runs."""
        guest = self.gate.guest
        if guest is None:
            self.boot()
        elif not self.up:
            self.up = True
            self.gate.worker_back()
            self._take_primary(guest, FIRST_EPOCH, in_doubt=True)

    def die(self, *, host: bool, guest: bool) -> None:
        """The worker is killed. ``host``: with all of the node, and without a word; ``guest``: with its guest."""
        if not self.up:
            return
        self.up = False
        self.dies_after = self.freezes_after = -1
        for process in (self.worker, self.ship):
            process.die()
        if self.role is not None:
            self.role.cut_off(silently=host)
            self.role = None
        if guest or host or self.gate.guest is None or not self.gate.guest.adopted:
            self.guest_dies()
        self.gate.worker_died()

    def guest_dies(self) -> None:
        """QEMU is gone."""
        if self.gate.guest is not None:
            self.gate.guest.running = False
        self.gate.guest = None
        self.qemu.die()

    def freeze(self, *processes: Process) -> None:
        """SIGSTOP."""
        self.frozen_t = self.world.agenda.now
        for process in processes:
            process.frozen = True

    def thaw(self) -> None:
        """SIGCONT to everything; a suspended host wakes."""
        self.gate.up = self.up or self.gate.guest is not None
        if self.worker.frozen:
            self.thawed_t = self.world.agenda.now
        for process in (self.qemu, self.ship, self.worker):
            if process.frozen:
                self.world.agenda.thaw(process)

    def count_effect(self) -> None:
        """A fault that is to strike between two effects."""
        if self.dies_after >= 0:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.die(host=True, guest=True)
                self.world.restart(self)
        elif self.freezes_after >= 0:
            self.freezes_after -= 1
            if self.freezes_after < 0:
                self.freeze(self.worker)

    # --- roles --------------------------------------------------------------------------------------------------

    def called(self, hello: Message) -> None:
        """A primary connects, if somebody listens here."""
        if hello[0] != "hello":
            return  # it hung up before it was heard
        line = hello[1]
        role = self.role
        if isinstance(role, StandbyRole) and not role.over:
            self.world.agenda.later(0.0, self.worker, role.called, hello)
        elif self.up:
            line.close(line.b)

    def _as_standby(self) -> None:
        self.gate.reset()
        self.role = StandbyRole(self)

    def _as_primary(self, booted_as: str | None = None, *, in_doubt: bool = False) -> None:
        if not self.held:
            self.record(1, own=True)
        guest = Guest(self.world.next_instance(), self.index, booted_as or self.world.next_name(), adopted=True)
        self.gate.reset()
        self.gate.guest = guest
        if not in_doubt:
            self.gate.mode = Mode.PASS
        self.start_frames()
        self._take_primary(guest, FIRST_EPOCH, in_doubt=in_doubt)

    def _take_primary(self, guest: Guest, first_epoch: Epoch, *, in_doubt: bool = False) -> None:
        role = PrimaryRole(self, guest, in_doubt=in_doubt, first_epoch=first_epoch)
        self.role = role
        role.begin()

    def standby_ended(self, state: s.State) -> None:
        """Its machine is at an end, or its guest runs."""
        role = self.role
        assert isinstance(role, StandbyRole)
        if state is s.State.ACTIVE:
            assert role.guest is not None
            self._take_primary(role.guest, Epoch(role.data.committed + 1))
        elif state is s.State.SPENT:
            self._as_standby()
        else:
            self._end_process()

    def primary_ended(self, state: p.State) -> None:
        """Fenced or handed over: a standby from now on. Else the process ends, and a supervisor starts it again."""
        if state in (p.State.FENCED, p.State.HANDED_OVER):
            self.guest_dies()
            if self.world.arbitrated or self.index:
                self._as_standby()
                return
        self._end_process()

    def _end_process(self) -> None:
        self.up = False
        self.worker.die()
        self.ship.die()
        self.role = None
        self.guest_dies()
        self.gate.close()
        self.world.restart(self)

    # --- the start rule -----------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self.role is None and not self._waits:
            self.world.arbiter.ask(self.index, self.worker, self.world.arbiter.asked_newest, self._told)
            self.world.agenda.later(ASK_GAP_S, self.worker, self._ask)

    def _told(self, newest: tuple[int, Holder] | None) -> None:
        if self.role is not None or self._waits:
            return
        term = self.may_claim(newest)
        if term is None:
            self._as_standby()
            return
        self._waits = True
        grace = 0.0 if term == FIRST_TERM else self.clock.true_s(self.world.promise.wait_ns) + GRACE_S
        self.world.agenda.later(grace, self.worker, self._claim, term)

    def may_claim(self, newest: tuple[int, Holder] | None) -> Term | None:
        """What the election says."""
        given = None if newest is None else NewestClaim(Term(newest[0]), ours=newest[1][0] == self.index)
        known = KnownTerms(Term(self.held), self.own, Term(self.agreed))
        return term_to_claim(given, known, first=self.index == 0)

    def start_again(self) -> None:
        """A standby that waits in vain finds that it is the one who may claim."""
        self._end_process()

    def _claim(self, term: int) -> None:
        self._waits = True
        self.record_tried(term)
        self._claim_on(term, (self.index, f"boot {self._boots}"))

    def _claim_on(self, term: int, holder: Holder) -> None:
        if self.role is None:
            arbiter = self.world.arbiter
            claim = partial(arbiter.claim, term, holder)
            arbiter.ask(self.index, self.worker, claim, lambda got: self._won(got, holder))
            self.world.agenda.later(ASK_GAP_S, self.worker, self._claim_on, term, holder)

    def _won(self, got: tuple[int, Holder], holder: Holder) -> None:
        if self.role is not None:
            return
        if got[1] == holder:
            self.record(got[0], own=True)
            self._as_primary(booted_as=holder[1])
        elif got[1][0] == self.index:  # to a predecessor of ours, whose request was late
            self.start_again()
        else:
            self._as_standby()

    def read_clock(self) -> int:
        """For the lease."""
        now = self.world.agenda.now
        return self.clock.wall(now) if self.world.weakness.wall_clock else self.clock.read(now)

    # --- the guest ----------------------------------------------------------------------------------------------

    def run_guest(self) -> None:
        """It goes on."""
        guest = self.gate.guest
        if guest is not None and not guest.running:
            guest.running = True
            self.start_frames()

    def start_frames(self) -> None:
        """It sends from now on, while it runs."""
        self._chain += 1
        self.world.agenda.later(0.0, self.qemu, self._send, self._chain)

    def _send(self, chain: int) -> None:
        guest = self.gate.guest
        if chain != self._chain or guest is None or not guest.running:
            return
        guest.progress += 1
        chance = self.world.chance
        self.gate.take(guest, guest.progress, transmit=chance.random() < 0.2)
        self.world.agenda.later(FRAME_S * (0.1 + chance.random()), self.qemu, self._send, chain)
