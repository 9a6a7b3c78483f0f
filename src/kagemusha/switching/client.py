"""The worker's hold on its guest's gate at the switch: what ``gate.process.GateClient`` is for one of this host.

``protocol.switch_host`` decides; this does what it says over a :class:`Channel`. A guest never stays paused because of
the switch: :meth:`SwitchClient.wait_sealed` always comes back, with an epoch that is not confirmed if need be. Then
its output leaves with a later epoch (see there why nothing leaks).

The epoch loop has to call :meth:`~SwitchClient.pump` often (``fileno``, and every ``HEARTBEAT_S``), or the switch takes
this host for dead and holds what its guest sends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import xxhash

from kagemusha.errors import ConfigError, FencedError, TransientError
from kagemusha.model.flows import TimedFlow
from kagemusha.model.ids import Epoch, Term
from kagemusha.protocol import switch_host as host
from kagemusha.protocol.gate import Demand
from kagemusha.protocol.output import OutputTotals
from kagemusha.protocol.switch_words import Mode
from kagemusha.switching.channel import Channel, Closed, Opened
from kagemusha.wire.switch import (
    RULES_BYTES_MAX,
    FlowTold,
    RegisterVm,
    RuleSetVersion,
    SwitchMessage,
    SwitchRefusal,
    SwitchRefused,
)
from kagemusha.wire.switch_structs import (
    AskTotals,
    Demanded,
    ModeSet,
    Release,
    RulesInForce,
    Seal,
    Sealed,
    SetMode,
    Totals,
    UnregisterVm,
    VmRegistered,
)

SEAL_S: Final = 0.05
"""How long a guest stands for the switch's answer at most; then the connection counts as lost."""
ANSWER_S: Final = 5.0
TROUBLE_S: Final = 1.0
"""So long there may be no registration before people are told of it."""
_REGISTERED: Final = (host.State.REGISTERED, host.State.SEALING)


@dataclass(frozen=True, slots=True)
class Registration:
    """What the switch has to know. ``port``: of the switch, where this host is; empty: the switch knows."""

    vm: str
    macs: tuple[str, ...]
    port: str
    holder: str


@dataclass(frozen=True, slots=True)
class SealedAtSwitch:
    """What an epoch's output is, as ``gate.messages.Sealed`` has it.

    :ivar session: goes with the checkpoint to the standby, which may tell the switch of its commit; 0: the switch did
        not confirm the epoch in time, its output leaves with a later one, and nobody may tell of it.
    """

    epoch: Epoch
    frames: int
    bytes: int
    dropped_frames: int
    session: int


@dataclass(frozen=True, slots=True)
class SwitchClientStatistics:
    """``unconfirmed``: epochs whose guest went on without the switch. ``refused``: what the switch said no to."""

    connections: int
    sealed: int
    unconfirmed: int
    refused: int
    state: str


class SwitchClient:
    """One guest's gate at the switch. It holds from the first moment: nothing leaves before a registration.

    :ivar demand: how much the open epoch's output wants it to end, as far as was heard.
    :ivar superseded: the newer term that the switch has told of; the guest has to fall silent. None: none.
    :ivar holding: the switch has confirmed that it holds, and nothing else was wanted since. It stays so when the
        connection is lost: a switch that is left goes on holding, and one that was restarted begins with it.
    :ivar totals: the last that was told, see :meth:`ask_totals`; None: none in this registration.
    """

    def __init__(
        self, channel: Channel, registration: Registration, term: Term, *, first_epoch: Epoch, seal_s: float = SEAL_S
    ) -> None:
        """Register, as soon as there is a connection.

        :param channel: of the node that ``registration.holder`` names; it is the client's from now on.
        :param seal_s: how long the guest stands for an answer of the switch at most.
        """
        self._registration = registration
        self._channel = channel
        self._data = host.initial(term, first_epoch)
        self._seal_s = seal_s
        self._seal_deadline_t = 0.0
        self._away_t = time.monotonic()
        self._done: dict[Epoch, SealedAtSwitch] = {}
        self._counts: dict[Epoch, Sealed] = {}
        self._mode_in_force: Mode | None = None
        self.holding = False
        self.totals: OutputTotals | None = None
        self._rules: bytes | None = None
        self._flows: dict[str, TimedFlow] = {}
        self._flows_due = False
        self._connections = self._sealed = self._unconfirmed = self._refused = 0
        self.rules_in_force: int | None = None
        self.last_refusal = self._refused_rules = ""
        self.demand = Demand.NONE
        self.superseded: Term | None = None
        if channel.connected:
            self._connections += 1
            self._step(host.Connected(_fresh_session()))

    # --- what the epoch loop asks -------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when :meth:`pump` has something to take in."""
        return self._channel.fileno()

    def pump(self) -> None:
        """Take in what has come, keep the connection alive, connect anew. Does not wait."""
        while self._take(0.0):
            pass

    def seal(self, epoch: Epoch) -> None:
        """The guest stands: what it has sent is this epoch's. Returns at once."""
        self._seal_deadline_t = time.monotonic() + self._seal_s
        self._step(host.SealWanted(epoch))

    def wait_sealed(self, epoch: Epoch, timeout_s: float) -> SealedAtSwitch:
        """The answer to :meth:`seal`, or that there is none; never raises for want of one.

        :param timeout_s: the smaller of this and ``seal_s`` counts.
        """
        deadline = min(self._seal_deadline_t, time.monotonic() + timeout_s)
        while epoch not in self._done and self._take(0.0):
            pass  # what came in time counts, however late it is looked at
        while epoch not in self._done:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._step(host.SealOverdue())
            else:
                self._take(left_s)
        return self._done.pop(epoch)

    def release(self, epoch: Epoch) -> None:
        """The standby has acknowledged this epoch and all before. Returns at once."""
        self._step(host.CommitLearned(epoch))

    def want(self, mode: Mode) -> None:
        """This is to be done with the guest's frames, in this registration and those to come. Returns at once.

        ALONE: let out what is held, and whatever comes. HOLDING: what is held already waits for the next commit.
        """
        if mode is not self._data.mode:
            self.holding, self._mode_in_force = False, None
            self._step(host.ModeWanted(mode))

    def wait_mode(self, timeout_s: float = ANSWER_S) -> None:
        """Until the switch does what was wanted last.

        :raise TransientError: it does not answer in time.
        :raise FencedError: another holds a newer term.
        """
        self._wait(lambda: self.registered, f"set the mode {self._data.mode.name}", timeout_s)

    def ask_totals(self) -> None:
        """Ask for the switch's totals; ``totals`` has them later. Returns at once."""
        if self._data.state in _REGISTERED:
            self._channel.say(AskTotals(self._data.session), self._data.term)

    def close(self) -> None:
        """Give it up: the switch goes on holding. May be called again."""
        self._channel.close()

    # --- what else the switch is told ---------------------------------------------------------------------------------

    def set_term(self, term: Term) -> None:
        """The guest runs in this term from now on."""
        self._step(host.TermChanged(term, _fresh_session()))

    def set_rules(self, version: bytes) -> None:
        """This rule version decides, in this registration and those to come. Returns at once.

        ``rules_in_force`` is the XXH3-64 digest of what does.

        :raise ConfigError: it is too large for the switch.
        """
        if not 0 < len(version) <= RULES_BYTES_MAX:
            raise ConfigError(f"a rule version of {len(version)} bytes", operation="send rules to the switch")
        if version == self._rules:
            return
        self._rules = version
        if self._data.state in _REGISTERED:
            self._channel.say(RuleSetVersion(self._data.session, version), self._data.term)

    def wait_rules(self, timeout_s: float = ANSWER_S) -> None:
        """Until the version that was set last is in force. :raise TransientError: not in time, or it is refused."""
        wanted = xxhash.xxh3_64_intdigest(self._rules or b"")
        self._wait(lambda: self.rules_in_force == wanted, "send rules to the switch", timeout_s)

    def set_flows(self, flows: Mapping[str, TimedFlow]) -> None:
        """These flows of the VM's are known, in this registration and those to come, and no others; by their names.

        What is new, or was made anew, is told, and what has ended. Returns at once.
        """
        before, self._flows = self._flows, dict(flows)
        if self._data.state in _REGISTERED:
            self._tell_flows(before)

    def _tell_flows(self, before: Mapping[str, TimedFlow]) -> None:
        now, session = time.monotonic(), self._data.session
        for name, each in before.items():
            if name not in self._flows:
                self._channel.say(FlowTold.of(each.flow, session=session, lifetime_s=0.0, ended=True), self._data.term)
        for name, each in self._flows.items():
            if before.get(name) != each and each.until_t > now:
                told = FlowTold.of(each.flow, session=session, lifetime_s=each.until_t - now)
                self._channel.say(told, self._data.term)

    def unregister(self) -> None:
        """The guest is one like any other; what is held is dropped. Returns at once, :meth:`close` follows."""
        self._channel.say(UnregisterVm(self._session("unregister")), self._data.term)

    def wait_registered(self, timeout_s: float = ANSWER_S) -> None:
        """Until the switch takes the guest's frames from here, treated as was wanted last.

        :raise TransientError: not in time.
        :raise FencedError: another holds a newer term.
        """
        self._wait(lambda: self.registered, "register", timeout_s)

    @property
    def registered(self) -> bool:
        """The switch takes the guest's frames from here, treated as was wanted last, as far as was heard."""
        return self._data.state in _REGISTERED and self._mode_in_force is self._data.mode

    @property
    def trouble(self) -> str:
        """What does not work at the moment, for people; empty: all does."""
        if self._data.state not in _REGISTERED:
            late = time.monotonic() > self._away_t + TROUBLE_S
            return f"the switch: {self._channel.reason or 'not registered yet'}" if late else ""
        return f"the switch refuses: {self._refused_rules}" if self._refused_rules else ""

    def client_statistics(self) -> SwitchClientStatistics:
        """What this side has seen."""
        counts = (self._connections, self._sealed, self._unconfirmed, self._refused)
        return SwitchClientStatistics(*counts, self._data.state.value)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _session(self, operation: str) -> int:
        if self._data.state not in _REGISTERED:
            raise TransientError(f"not registered: {self._channel.reason}", operation=operation)
        return self._data.session

    def _wait(self, condition: Callable[[], bool], operation: str, timeout_s: float = ANSWER_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.superseded is not None:
                raise FencedError(f"another holds term {self.superseded}", operation=operation)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                reason = self.last_refusal or self._channel.reason
                raise TransientError(f"the switch does not answer in time ({reason})", operation=operation)
            self._take(left_s)

    def _take(self, timeout_s: float) -> bool:
        """Take in one thing; False: there was none in time."""
        heard = self._channel.take(timeout_s)
        match heard:
            case None:
                return False
            case Opened():
                self._connections += 1
                self._step(host.Connected(_fresh_session()))
            case Closed():
                self._away_t = time.monotonic()
                if self._data.state in host.LIVE:
                    self._step(host.ConnectionLost())
            case _:
                self._hear(heard)
        return True

    def _hear(self, message: SwitchMessage) -> None:
        match message:
            case VmRegistered(session):
                self._step(host.RegisteredTold(session))
                if self._flows_due and self._data.state in _REGISTERED:
                    self._flows_due = False
                    self._tell_flows({})
            case Sealed(epoch, session):
                self._counts[epoch] = message
                self._step(host.SealedTold(session, epoch))
                self._counts.clear()
            case ModeSet(session, mode):
                self._step(host.ModeTold(session, Mode(mode)))
            case Demanded(session, demand) if session == self._data.session:
                self.demand = Demand(demand)
            case RulesInForce(session, digest) if session == self._data.session:
                self.rules_in_force = digest
                self._refused_rules = ""
            case Totals(session) if session == self._data.session:
                numbers = (message.held_frames, message.released_frames, message.dropped_frames)
                more = (message.discarded_frames, message.pending_frames, message.pending_bytes)
                self.totals = OutputTotals(*numbers, *more)
            case SwitchRefused():
                self._refused_told(message)
            case _:
                pass  # of a session that is over

    def _refused_told(self, message: SwitchRefused) -> None:
        """Of the current session: another has the term, or the switch begins anew with us, or asks for patience."""
        self._refused += 1
        self.last_refusal = message.reason
        if message.session != self._data.session:
            return
        if message.code is SwitchRefusal.RULES:
            self._refused_rules = message.reason
        if message.code is SwitchRefusal.TERM and message.term >= self._data.term:
            self._step(host.SupersededTold(Term(message.term)))
        elif message.code is not SwitchRefusal.RULES and self._data.state in host.LIVE:
            self._channel.drop(message.reason)

    def _step(self, event: host.Event) -> None:
        self._data, effects = host.advance(self._data, event)
        for effect in effects:
            self._do(effect)

    def _do(self, effect: host.Effect) -> None:
        term, of = self._data.term, self._registration
        match effect:
            case host.SendRegister(session, term, epoch):
                self.demand, self._mode_in_force, self.rules_in_force = Demand.NONE, None, None
                self.totals = None
                asked = RegisterVm(
                    vm=of.vm,
                    macs=of.macs,
                    port=of.port,
                    term=term,
                    holder=of.holder,
                    session=session,
                    first_epoch=epoch,
                )
                self._channel.say(asked, term)
                if self._rules is not None:
                    self._channel.say(RuleSetVersion(session, self._rules), term)
                self._flows_due = True
            case host.SendSeal(session, epoch):
                self._channel.say(Seal(epoch, session), term)
            case host.SendRelease(session, epoch):
                self._channel.say(Release(epoch, session), term)
            case host.SendMode(session, mode):
                self._channel.say(SetMode(session, mode), term)
            case host.GoOn(epoch, session):
                self._go_on(epoch, session)
            case host.ModeInForce(mode):
                self._mode_in_force = mode
                self.holding = mode is Mode.HOLDING
            case host.DropConnection():
                self._channel.drop("given up")
            case host.ReportSuperseded(newer):
                self.superseded = newer

    def _go_on(self, epoch: Epoch, session: int) -> None:
        self.demand = Demand.NONE
        counts = self._counts.get(epoch)
        if counts is None:
            self._unconfirmed += 1
            self._done[epoch] = SealedAtSwitch(epoch, 0, 0, 0, 0)
        else:
            self._sealed += 1
            self._done[epoch] = SealedAtSwitch(epoch, counts.frames, counts.bytes, counts.dropped_frames, session)


def _fresh_session() -> int:
    return secrets.randbits(64) or 1
