"""A host's decisions about its VM at the switch: when the guest may go on, and what may be told to be committed.

The safety argument (I1). A guest that stands for epoch n goes on when the switch has said ``Sealed(n)``: then the
epoch is *confirmed*, and no frame of a later one can be in it. It also goes on when no such answer comes in time
(``SealOverdue``), for no fault of ours may leave it standing (I4). Then n is not confirmed, and the switch may seal it
late, with frames of epoch n+1 in it. Nothing leaks all the same, for nobody ever tells the switch in that session that
n is committed: the connection is dropped and the session is over for this host; ``GoOn`` hands out the session's number
only with a confirmed epoch, and with it alone the standby can tell its commit; ``SendRelease`` is only the answer to a
commit of a confirmed epoch of the current session. The next session's number is another, its first epoch is after n,
and what the switch had sealed joins it: frames of n leave with a later commit, so later, never earlier.

While there is no session the guest goes on with its epochs, and the switch holds what it sends. The mode that was
wanted last is asked for again in each new session, unless it is what a session begins with.

A host that is told of a newer term is SUPERSEDED, for good: the guest has to fall silent.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from kagemusha.errors import ProtocolError
from kagemusha.model.ids import NO_EPOCH, Epoch, Term
from kagemusha.protocol.machine import Table, on, step
from kagemusha.protocol.switch_words import NO_SESSION, Mode


class State(enum.Enum):
    """Where a host is with its switch."""

    CUT = "cut"  # there is no connection
    REGISTERING = "registering"  # the switch has been asked
    REGISTERED = "registered"  # the switch takes the guest's frames from here
    SEALING = "sealing"  # ... and the guest stands until the switch answers
    SUPERSEDED = "superseded"  # another holds a newer term


LIVE = (State.REGISTERING, State.REGISTERED, State.SEALING)
ABLE = (State.CUT, State.REGISTERING, State.REGISTERED)
ALL = tuple(State)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The switch is there. ``session``: a fresh number, chosen at random."""

    session: int


@dataclass(frozen=True, slots=True)
class TermChanged:
    """The guest runs in this term from now on. ``session``: a fresh number, for where there is a connection."""

    term: Term
    session: int


@dataclass(frozen=True, slots=True)
class RegisteredTold:
    """The switch has registered the VM."""

    session: int


@dataclass(frozen=True, slots=True)
class SupersededTold:
    """The switch says that another has this term or a newer one."""

    term: Term


@dataclass(frozen=True, slots=True)
class SealWanted:
    """The guest stands after this epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SealedTold:
    """The switch has sealed this epoch."""

    session: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SealOverdue:
    """The guest has stood for long enough."""


@dataclass(frozen=True, slots=True)
class CommitLearned:
    """The standby has acknowledged all checkpoints up to this one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ModeWanted:
    """This is to be done with the guest's frames."""

    mode: Mode


@dataclass(frozen=True, slots=True)
class ModeTold:
    """The switch does so."""

    session: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """There is no connection any more."""


Event = (
    Connected
    | TermChanged
    | RegisteredTold
    | SupersededTold
    | SealWanted
    | SealedTold
    | SealOverdue
    | CommitLearned
    | ModeWanted
    | ModeTold
    | ConnectionLost
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendRegister:
    """Ask the switch to take the guest's frames from here."""

    session: int
    term: Term
    first_epoch: Epoch


@dataclass(frozen=True, slots=True)
class SendSeal:
    """Ask the switch to seal."""

    session: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Tell the switch that this confirmed epoch is committed."""

    session: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SendMode:
    """Ask the switch to treat frames so."""

    session: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class GoOn:
    """The guest may run. ``session``: goes with the checkpoint to the standby; 0: the epoch is not confirmed."""

    epoch: Epoch
    session: int


@dataclass(frozen=True, slots=True)
class ModeInForce:
    """What was wanted last is done."""

    mode: Mode


@dataclass(frozen=True, slots=True)
class DropConnection:
    """Close it, and connect anew. Whatever it still brings means nothing."""


@dataclass(frozen=True, slots=True)
class ReportSuperseded:
    """The guest has to fall silent."""

    term: Term


Effect = SendRegister | SendSeal | SendRelease | SendMode | GoOn | ModeInForce | DropConnection | ReportSuperseded


@dataclass(frozen=True, slots=True)
class Data:
    """All a host knows of its VM at the switch.

    :ivar next: the epoch that the guest is in.
    :ivar first: of the current session; ``confirmed``: the last that was sealed in it; 0: none.
    :ivar mode: wanted last.
    :ivar unanswered: how many times a mode was asked for in this session and is not told yet.
    """

    state: State
    term: Term
    next: Epoch
    mode: Mode = Mode.HOLDING
    session: int = NO_SESSION
    first: Epoch = NO_EPOCH
    confirmed: Epoch = NO_EPOCH
    unanswered: int = 0


Result = tuple[Data, tuple[Effect, ...]]


def initial(term: Term, first_epoch: Epoch) -> Data:
    """Not connected yet; frames are to be held."""
    return Data(State.CUT, term, first_epoch)


def advance(data: Data, event: Event) -> Result:
    """Take one event.

    :raise ProtocolError: it has no place in this state, or an epoch is out of order; nothing has changed.
    """
    return step(TABLE, data, event)


# --- transitions ------------------------------------------------------------------------------------------------------


def _register(data: Data, event: Connected | TermChanged) -> Result:
    asked = replace(
        data, state=State.REGISTERING, session=event.session, first=data.next, confirmed=NO_EPOCH, unanswered=0
    )
    return asked, (SendRegister(event.session, data.term, data.next),)


def _term_changed(data: Data, event: TermChanged) -> Result:
    """A registration says the term; what was confirmed in the one before joins the next epoch."""
    newer = replace(data, term=event.term)
    return (newer, ()) if data.state is State.CUT else _register(newer, event)


def _registered(data: Data, event: RegisteredTold) -> Result:
    if event.session != data.session:
        return data, ()
    registered = replace(data, state=State.REGISTERED)
    if data.mode is Mode.HOLDING:
        return registered, (ModeInForce(Mode.HOLDING),)
    return replace(registered, unanswered=1), (SendMode(data.session, data.mode),)


def _seal(data: Data, event: SealWanted) -> Result:
    """Without a session there is nobody to wait for."""
    if event.epoch < data.next:
        raise ProtocolError(f"the guest is in epoch {data.next}", operation="seal", epoch=event.epoch)
    after = replace(data, next=Epoch(event.epoch + 1))
    if data.state is not State.REGISTERED or data.mode is not Mode.HOLDING or data.unanswered:
        return after, (GoOn(event.epoch, NO_SESSION),)
    return replace(after, state=State.SEALING), (SendSeal(data.session, event.epoch),)


def _sealed(data: Data, event: SealedTold) -> Result:
    if event.session != data.session or event.epoch != data.next - 1:
        return data, ()
    return replace(data, state=State.REGISTERED, confirmed=event.epoch), (GoOn(event.epoch, event.session),)


def _overdue(data: Data, _: SealOverdue) -> Result:
    cut, go_on = _lost(data)
    return cut, (DropConnection(), *go_on)


def _lost(data: Data, _: ConnectionLost | None = None) -> Result:
    standing = data.state is State.SEALING
    cut = replace(data, state=State.CUT, session=NO_SESSION, first=NO_EPOCH, confirmed=NO_EPOCH, unanswered=0)
    return cut, (GoOn(Epoch(data.next - 1), NO_SESSION),) if standing else ()


def _commit(data: Data, event: CommitLearned) -> Result:
    """Only what was confirmed in this session is released; the rest has joined an epoch that is still to come."""
    if not data.first <= event.epoch <= data.confirmed:
        return data, ()
    return data, (SendRelease(data.session, event.epoch),)


def _want(data: Data, event: ModeWanted) -> Result:
    wanted = replace(data, mode=event.mode)
    if data.state is not State.REGISTERED:
        return wanted, ()
    return replace(wanted, unanswered=data.unanswered + 1), (SendMode(data.session, event.mode),)


def _want_instead(data: Data, event: ModeWanted) -> Result:
    """The capture has failed, and nobody waits for its seal any more. The guest may be running: n is not confirmed, and
    what the switch seals under its number is voided by the change of the mode.
    """
    after, effects = _want(replace(data, state=State.REGISTERED), event)
    return after, (*effects, GoOn(Epoch(data.next - 1), NO_SESSION))


def _mode_told(data: Data, event: ModeTold) -> Result:
    """What is told answers the oldest request; only the last one counts."""
    if event.session != data.session or not data.unanswered:
        return data, ()
    left = replace(data, unanswered=data.unanswered - 1)
    return left, (ModeInForce(data.mode),) if not left.unanswered else ()


def _superseded(data: Data, event: SupersededTold) -> Result:
    cut, go_on = _lost(data)
    return replace(cut, state=State.SUPERSEDED), (DropConnection(), *go_on, ReportSuperseded(event.term))


def _go_on(data: Data, event: SealWanted) -> Result:
    return replace(data, next=max(data.next, Epoch(event.epoch + 1))), (GoOn(event.epoch, NO_SESSION),)


def _ignore(data: Data, _: Event) -> Result:
    """Of a connection or session that is over, or of no use any more."""
    return data, ()


TABLE: Table[Data, Effect] = {
    **on((State.CUT,), Connected, _register),
    **on(ABLE, TermChanged, _term_changed),
    **on((State.REGISTERING,), RegisteredTold, _registered),
    **on((State.CUT, State.REGISTERED, State.SEALING), RegisteredTold, _ignore),
    **on(ABLE, SealWanted, _seal),
    **on((State.SEALING,), SealedTold, _sealed),
    **on((State.CUT, State.REGISTERING, State.REGISTERED), SealedTold, _ignore),
    **on((State.SEALING,), SealOverdue, _overdue),
    **on((*ABLE, State.SEALING), CommitLearned, _commit),
    **on(ABLE, ModeWanted, _want),
    **on((State.SEALING,), ModeWanted, _want_instead),
    **on((State.REGISTERED, State.SEALING), ModeTold, _mode_told),
    **on((State.CUT, State.REGISTERING), ModeTold, _ignore),
    **on(LIVE, ConnectionLost, _lost),
    **on((*LIVE, State.CUT), SupersededTold, _superseded),
    **on((State.SUPERSEDED,), SealWanted, _go_on),
    **{
        (State.SUPERSEDED, event): _ignore
        for event in (
            Connected,
            TermChanged,
            RegisteredTold,
            SupersededTold,
            SealedTold,
            CommitLearned,
            ModeWanted,
            ModeTold,
            ConnectionLost,
        )
    },
}
