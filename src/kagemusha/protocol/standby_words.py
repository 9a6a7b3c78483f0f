"""The words of the standby's machine: its states, what can happen to it, and what it asks for.

Values only; which of them follows from which is in ``standby.py``, which offers all of these names too. Nothing here
knows how an effect is performed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kagemusha.model.ids import NO_EPOCH, Epoch, Term


class State(enum.Enum):
    """Where a standby is."""

    WAITING = "waiting"  # QEMU waits, there is no primary
    SYNCING = "syncing"  # the memory is being filled: nothing to take over with
    PROTECTING = "protecting"  # exactly one committed checkpoint is held
    CLAIMING = "claiming"  # the primary is silent: the arbiter has been asked for the next term
    TAKING_OVER = "taking over"  # decided; what was acknowledged is being applied
    ACTIVATING = "activating"  # the device state is being fed to QEMU
    UNHEARD = "unheard"  # the guest runs here; what it sends waits for the end of the primary's lease
    ACTIVE = "active"  # the guest runs here, and is heard
    STOOD_DOWN = "stood down"  # promised not to take over
    FAILED = "failed"  # the guest cannot be brought to life here
    SPENT = "spent"  # the guest was brought to life ahead of a claim that was lost


class Ahead(enum.Enum):
    """Whether the guest has been brought to life ahead of the answer to the claim."""

    NO = "no"
    LOADING = "loading"  # the device state is being fed to QEMU
    ALIVE = "alive"  # it runs, unheard


TERMINAL = frozenset({State.STOOD_DOWN, State.FAILED, State.SPENT})
BEFORE = (State.WAITING, State.SYNCING, State.PROTECTING)
UNDECIDED = (*BEFORE, State.CLAIMING)
COMING = (State.TAKING_OVER, State.ACTIVATING, State.UNHEARD)
DECIDED = (*COMING, State.ACTIVE)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrimaryConnected:
    """A primary introduced itself and fits.

    ``term``: in which its guest runs; ``tried``: the newest it has ever claimed; ``first_epoch``: the epoch its guest
    is in.
    """

    term: Term
    tried: Term
    first_epoch: Epoch


@dataclass(frozen=True, slots=True)
class CheckpointComplete:
    """All of this checkpoint is here and verified."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class CheckpointApplied:
    """This checkpoint is in QEMU's memory."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The session broke. Decides nothing by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class HeartbeatLost:
    """Nothing was heard of the primary for so long that it is taken for dead. Its lease may still run."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaseOver:
    """The primary that was last heard has no lease any more, by any clock within the drift bound."""


@dataclass(frozen=True, slots=True)
class ClaimWon:
    """The arbiter has given this term to us."""

    term: Term


@dataclass(frozen=True, slots=True)
class ClaimLost:
    """The arbiter has given this term to another."""

    term: Term
    holder: str


@dataclass(frozen=True, slots=True)
class Forced:
    """The operator vouches that no other instance runs or will (``kage promote --force``)."""

    reason: str


@dataclass(frozen=True, slots=True)
class GuestDied:
    """The primary says that its guest certainly runs no more."""

    reason: str


@dataclass(frozen=True, slots=True)
class PrimaryLeft:
    """The primary ends the protection in good order: do not take over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Activated:
    """The guest runs here."""


@dataclass(frozen=True, slots=True)
class Failed:
    """QEMU does not take the state, or is gone, or the memory cannot be written."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The operator wants this standby to end."""

    reason: str


Event = (
    PrimaryConnected
    | CheckpointComplete
    | CheckpointApplied
    | LinkLost
    | HeartbeatLost
    | LeaseOver
    | ClaimWon
    | ClaimLost
    | Forced
    | GuestDied
    | PrimaryLeft
    | Activated
    | Failed
    | StopRequested
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DropSession:
    """Close the link; whatever part of a checkpoint had come is thrown away."""


@dataclass(frozen=True, slots=True)
class PrepareMemory:
    """Wait for what is being applied, then make the memory all zero."""


@dataclass(frozen=True, slots=True)
class AcceptSession:
    """Welcome the primary."""

    term: Term


@dataclass(frozen=True, slots=True)
class RefuseSession:
    """Send the primary away. ``superseded``: because our term is newer."""

    reason: str
    term: Term
    superseded: bool


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell the primary that this checkpoint is committed."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ApplyCheckpoint:
    """Write this checkpoint into QEMU's memory."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class RecordTried:
    """Make durable that this term is being claimed, before it is."""

    term: Term


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask the arbiter for this term until it answers."""

    term: Term


@dataclass(frozen=True, slots=True)
class DropClaim:
    """Ask no more; the answer means nothing."""


@dataclass(frozen=True, slots=True)
class NoteTerm:
    """Tell the arbiter who holds this term, without waiting."""

    term: Term


@dataclass(frozen=True, slots=True)
class RecordTerm:
    """Make this term durable before going on."""

    term: Term


@dataclass(frozen=True, slots=True)
class Activate:
    """Feed QEMU the device state of this checkpoint."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class HoldOutput:
    """Let frames in to the guest; what it sends waits."""


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Let the guest's frames out and in. What it had sent in epochs up to this one, and may not have left at the
    primary's, goes first; then what waits here.
    """

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ConfirmStandDown:
    """Tell the primary that we will not take over."""


@dataclass(frozen=True, slots=True)
class SayGoodbye:
    """Promise the primary not to take over."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopGuest:
    """End the guest that runs here."""


Effect = (
    DropSession
    | PrepareMemory
    | AcceptSession
    | RefuseSession
    | Acknowledge
    | ApplyCheckpoint
    | RecordTried
    | Claim
    | DropClaim
    | NoteTerm
    | RecordTerm
    | Activate
    | HoldOutput
    | OpenGate
    | ConfirmStandDown
    | SayGoodbye
    | StopGuest
)


@dataclass(frozen=True, slots=True)
class Data:
    """All a standby knows.

    :ivar term: the newest in which a guest is known to run.
    :ivar tried: the newest that this host has ever claimed, with or without success.
    :ivar arbitrated: there is an arbiter; without one it is this standby that decides.
    :ivar fencing: where this arbiter gives a term, nothing of the former holder gets through any more.
    :ivar committed: last acknowledged epoch of this session; 0 if none.
    :ivar applied: last applied epoch of this session; 0 if none.
    :ivar session: a primary is connected.
    :ivar ahead: of the claim; where the arbiter fences.
    :ivar silenced: the primary's lease is over or its guest dead: nothing of it leaves any more.
    :ivar reason: why it takes over, stood down or failed.
    """

    state: State
    term: Term
    tried: Term
    arbitrated: bool = False
    fencing: bool = False
    committed: Epoch = NO_EPOCH
    applied: Epoch = NO_EPOCH
    session: bool = False
    ahead: Ahead = Ahead.NO
    silenced: bool = False
    reason: str = ""

    @property
    def next_term(self) -> Term:
        """Which nobody has claimed, as far as is known here."""
        return Term(max(self.term, self.tried) + 1)

    @property
    def status(self) -> str:
        """The state as an operator wants it told."""
        return State.TAKING_OVER.name if self.state in COMING else self.state.name
