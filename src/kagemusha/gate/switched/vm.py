"""One protected VM at the switch: behind which port it is, and what happens to its frames.

Invariant (I2): from the moment at which :meth:`VmPort.fence` or :meth:`VmPort.set_owner` returns, no frame of this VM
that comes in on the former owner's port goes on. Invariant (I1): what the former owner sent and was not released is
discarded before the next owner's frames are let in, so an epoch that nobody will commit cannot be released with one of
the next owner.

Does not know hosts, terms or commits: whoever uses this does (I1, I2 are about what it is told).
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from kagemusha.errors import BugError, ConfigError, KageError, TransientError
from kagemusha.gate.classification import Classification
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.process import spawn_gate
from kagemusha.gate.rules.classifier import Ending
from kagemusha.gate.rules.counters import CounterReading
from kagemusha.gate.switched.registry import (
    Inbound,
    Registration,
    SwitchedCounts,
    VmStatistics,
    counts_of,
)
from kagemusha.gate.switched.taps import HoldTap, ReplayTap
from kagemusha.kernel import netns
from kagemusha.kernel.bpf_slot import ProgramSlot
from kagemusha.model.rules import RuleSet, VmAddresses

if TYPE_CHECKING:
    from kagemusha.gate.switched.plane import SwitchPlane

_DRAIN_TIMEOUT_S = 2.0
_DRAIN_PATIENCE_S = 0.1
_DRAIN_LOOK_S = 0.000_2
REPLAY_QUEUE_FRAMES = 4096
ANSWER_S = 1.0
"""A gate process that needs longer is frozen, and other VMs are waiting for whoever asks it."""


class VmPort:
    """A protected VM. Made by :meth:`SwitchPlane.add_vm`.

    :ivar name: of the VM.
    :ivar macs: its addresses, of six bytes each; their frames are held in one queue.
    :ivar gate: its gate process: seal, release, pass_all, hold, discard, statistics.
    :ivar replay: its replay tap, or None.
    """

    def __init__(
        self,
        plane: SwitchPlane,
        name: str,
        macs: tuple[bytes, ...],
        registration: Registration,
        addresses: VmAddresses,
        hold_bytes: int,
    ) -> None:
        self.name = name
        self.macs = macs
        self.replay: ReplayTap | None = None
        self._plane = plane
        self._registry = plane.around.registry
        self._registration = registration
        self._closed = False
        self._hold = HoldTap(plane.around, min(macs))
        self._drained = False
        with ExitStack() as undo:
            undo.callback(self._hold.close)
            self.gate = spawn_gate(self._hold, hold_bytes=hold_bytes, stands_at_seal=False, answer_s=ANSWER_S)
            undo.callback(self.gate.kill)
            self._classification = Classification(self, addresses)
            undo.callback(self._classification.close)
            self._row = self._registry.cells.row(registration.index)
            undo.callback(self._row.release)
            self._row.clear()
            self._registry.slots.put(self._hold.by_rules, registration.index)
            self._register()
            undo.pop_all()

    # --- what it is now -----------------------------------------------------------------------------------------------

    @property
    def registration(self) -> Registration:
        """Owner, mode and inbound mode."""
        return self._registration

    @property
    def owner(self) -> str | None:
        """The port behind which the VM is."""
        return self._plane.port_name(self._registration.owner)

    @property
    def mode(self) -> GateMode:
        """What happens to the owner's frames."""
        return self._registration.mode

    @property
    def slot(self) -> ProgramSlot:
        """Of the program that says which frames are held."""
        return self._hold.slot

    @property
    def given(self) -> int:
        """Frames that were given to the hold tap since it exists."""
        return self._hold.count.given

    def ending(self) -> Ending:
        """What becomes of a frame that the rules have judged."""
        return self._hold.ending()

    def counts(self) -> SwitchedCounts:
        """Frames with the VM's address that were dropped at the ports."""
        return counts_of(self._row)

    def statistics(self) -> VmStatistics:
        """What can be told without asking the gate process."""
        return VmStatistics(
            owner=self.owner,
            mode=self.mode,
            inbound=self._registration.inbound,
            held_given=self.given,
            inbound_given=self.replay.given if self.replay is not None else 0,
            dropped=self.counts(),
        )

    def rule_counts(self) -> CounterReading:
        """Frames and bytes each rule has matched."""
        return self._classification.counts()

    # --- rules --------------------------------------------------------------------------------------------------------

    def install(self, rule_set: RuleSet) -> None:
        """Put a rule set into force.

        :raise ConfigError, UnsupportedError: as ``Classification.install``; nothing has changed.
        """
        self._classification.install(rule_set)

    @property
    def rules_descriptors(self) -> frozenset[int]:
        """What a forked process needs to :meth:`install`, and may keep: all else it has to close, or frames would
        still be judged when the switch's agent is dead.
        """
        return frozenset({self._hold.slot.fd, self._hold.count.fd, self._classification.descriptor})

    # --- owner --------------------------------------------------------------------------------------------------------

    def fence(self) -> None:
        """The VM has no owner: from now on nothing of it is taken, from any port.

        If frames towards the VM were copied (COPY), they are diverted (DIVERT) from now on, for its next owner: with
        one change, so that a takeover waits once.
        """
        inbound = self._registration.inbound
        if inbound is Inbound.COPY and self.replay is not None:
            self.replay.divert_all()
            inbound = Inbound.DIVERT
        self._change(owner=0, inbound=inbound)
        self._registry.settle()

    def set_owner(self, port: str | None) -> int:
        """The VM is behind this port from now on; the mode stays. Nothing to do if it is so already.

        Of the former owner nothing gets in any more when this returns, and what was not released of its frames is
        discarded; frames to the VM go to the new port. None: it is fenced, and frames to it go where they went.

        If frames towards the VM were copied (COPY), they are diverted (DIVERT) from before the change on, as
        :meth:`fence` says: the keeper is to replay then, and OFF to be set when it has.

        :return: frames discarded.
        :raise ConfigError: it is not one of the switch's ports towards hosts.
        :raise TransientError: the gate process does not answer; the VM is fenced.
        """
        owner = 0 if port is None else self._plane.host_port(port)
        former = self._registration.owner
        if owner == former:
            return 0
        if former:
            self.fence()  # else it is already
        discarded = 0
        with suppress(BugError):  # a gate process that is gone holds nothing
            discarded = self.gate.discard()
        if owner:
            self._put_entries(owner)
            self._change(owner=owner)
        return discarded

    # --- mode ---------------------------------------------------------------------------------------------------------

    def set_mode(self, mode: GateMode) -> None:
        """Change what happens to the owner's frames; holds for every frame from the return on.

        HOLD: the gate process must be holding already. PASS after HOLD: it must be passing; frames go on through it, in
        order, until there is a gap. CLOSED: what is being released stays, too.

        :raise TransientError: frames are held and none leaves; they and those behind them still go that way, in order,
            and the mode is as before.
        :raise BugError: the gate process is gone while frames are to be let out in order.
        """
        index = self._registration.index
        if mode is GateMode.PASS and self._registration.mode is GateMode.HOLD:
            if not self._drain():
                return
        elif mode is GateMode.HOLD:
            self._registry.slots.put(self._hold.by_rules, index)
        self._change(mode=mode)
        if self._registration.owner:  # else no program lets anything through that could have seen another mode
            self._registry.settle()

    def begin_passing(self) -> None:
        """Let out what is held, and behind it what comes, in order, and then without the gate process. Returns at once.

        :meth:`passing` is to be asked from time to time until it says so.
        """
        if self._registration.mode is not GateMode.PASS:
            self._registry.slots.put(self._hold.drain, self._registration.index)
            self._change(mode=GateMode.HOLD)  # before the first frame leaves: CLOSED lets none out
            self._drained = False
        self.gate.begin_pass()

    def passing(self) -> bool:
        """Whether frames pass now: after :meth:`begin_passing`, once there is a gap and nothing is held.

        Waits, some 10 ms, only when that seems to be so.
        """
        count = self._hold.count
        if self._registration.mode is GateMode.PASS:
            return True
        if count.returned < count.given:
            return False
        if not self._drained:  # programs may still be about to hold a frame
            self._registry.settle()
            self._drained = True
            return self.passing()
        self._change(mode=GateMode.PASS)
        return True

    def _drain(self) -> bool:
        """Let frames queue up behind held ones until there are none; False: it is well under way, and left so."""
        count = self._hold.count
        self._registry.slots.put(self._hold.drain, self._registration.index)
        self._registry.settle()
        began, before = time.monotonic(), count.returned
        while count.returned < count.given:
            waited_s = time.monotonic() - began
            if waited_s > _DRAIN_PATIENCE_S and count.returned > before:
                return False
            if waited_s > _DRAIN_PATIENCE_S and self._nothing_is_held(count.given):
                break
            if waited_s > _DRAIN_TIMEOUT_S:
                raise TransientError(
                    f"{count.given - count.returned} frames are still held",
                    operation=f"open the gate of {self.name}",
                    hint="the gate process has to pass before the mode is changed",
                )
            time.sleep(_DRAIN_LOOK_S)
        return True

    def _nothing_is_held(self, given: int) -> bool:
        """Whether those that are missing never came into the tap (the kernel had no memory)."""
        self._registry.settle()
        first = self.gate.statistics()
        second = self.gate.statistics()
        return first == second and not second.pending_frames and self._hold.count.given == given

    def _change(self, **what: int | GateMode) -> None:
        self._registration = replace(self._registration, **what)  # type: ignore[arg-type]  # by name
        self._register()

    def _register(self) -> None:
        for mac in self.macs:
            self._registry.put(mac, self._registration)

    def _put_entries(self, owner: int) -> None:
        for mac in self.macs:
            self._plane.around.links.put_entry(owner, mac)

    # --- inbound ------------------------------------------------------------------------------------------------------

    def open_replay(self, *, queue_frames: int = REPLAY_QUEUE_FRAMES) -> ReplayTap:
        """Make the tap into which frames towards the VM can be put; the caller, or what it forks, owns its descriptor.

        :param queue_frames: that wait there at most until they are read; more are not kept.
        :raise KageError: there is one.
        """
        if self.replay is not None:
            raise KageError(f"{self.name} has a replay tap already", operation="keep inbound frames")
        with netns.entered(self._plane.around.namespace_fd):
            self.replay = ReplayTap(self._plane.around, min(self.macs), self._row, queue_frames=queue_frames)
        self._change(replay=self.replay.ifindex, inbound=Inbound.OFF)
        return self.replay

    def set_inbound(self, mode: Inbound) -> None:
        """Change what happens to frames towards the VM; holds for every frame from the return on.

        :raise ConfigError: there is no replay tap.
        """
        if mode is not Inbound.OFF and self.replay is None:
            raise ConfigError(f"{self.name} has no replay tap", operation="keep inbound frames")
        if mode is Inbound.DIVERT and self.replay is not None and self._registration.inbound is not mode:
            self.replay.divert_all()
        self._change(inbound=mode)
        self._registry.settle()

    def close_replay(self) -> None:
        """Frames towards the VM go their way. The process that owns the tap has to end for the tap to go."""
        if self.replay is None:
            return
        self.set_inbound(Inbound.OFF)
        self.replay.drop_fd()
        self.replay = None

    # --- end ----------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """The VM is one of the many again: its frames are forwarded like any. What is held is lost."""
        for mac in self.macs:
            self._plane.forget(mac)
        with suppress(FileNotFoundError):
            self._registry.slots.clear(self._registration.index)
        self._end()
        self._plane.forget_vm(self.name)

    def close(self) -> None:
        """End our processes; the VM stays registered: silent, unless it was passing. May be called again."""
        if self._closed:
            return
        mode = self.mode if self.mode is GateMode.PASS else GateMode.CLOSED
        self._change(mode=mode, inbound=Inbound.OFF, replay=0)
        self._end()

    def _end(self) -> None:
        self._closed = True
        self.gate.kill()
        if self.replay is not None:
            self.replay.drop_fd()
            self.replay = None
        self._classification.close()
        self._hold.close()
        self._row.release()
