"""The gate's decisions: which held frames may leave, and what is dropped.

The safety argument (I1): a frame that arrives while holding belongs to the open epoch. ``SealEpoch(n)`` gives all of
the open epoch to n; ``Release`` is only ever the answer to ``EpochCommitted(n)`` and covers exactly the epochs up to n,
oldest first. ``Forward`` exists only in PASSING, which the primary asks for when nothing can take over.

Frames are counted, not kept: the buffer they are in is one queue, oldest first::

    | may leave (``leaving``) | sealed epochs, ascending | open epoch |   pending = all of it

Accounting: held = released + dropped + discarded + pending, for every data value. Beyond the byte bound the newest
frame is dropped (tail drop), as a full transmit queue would. Frames come in batches, so that a step costs little
per frame. Does not know when frames are written: the process reports it (``FramesWritten``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from kagemusha.errors import ProtocolError
from kagemusha.model.ids import Epoch
from kagemusha.protocol.machine import Table, on, step


class State(enum.Enum):
    """What happens to a frame that arrives."""

    HOLDING = "holding"  # it waits for the commit of its epoch
    PASSING = "passing"  # it leaves as soon as those before it have left


class Demand(enum.IntEnum):
    """How much the open epoch's output wants the epoch to end."""

    NONE = 0  # there is none
    WAITING = 1  # some waits for the commit
    FILLING = 2  # so much that the bound is near


BOTH = (State.HOLDING, State.PASSING)
# Two epochs may be in flight and one be leaving, each with this share of the bound, besides the open one.
FILLING_SHARE = 4


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FramesArrived:
    """Frames were read from the hold tap, of these sizes in bytes, oldest first."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QueueOverflowed:
    """The kernel dropped this many frames before they could be read."""

    frames: int


@dataclass(frozen=True, slots=True)
class SealEpoch:
    """The guest stands and all of its output was read: the open epoch is this one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class EpochCommitted:
    """The standby has acknowledged all checkpoints up to this one."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class FramesWritten:
    """Of the frames that may leave, the oldest were written back; the kernel refused ``refused`` of them.

    :ivar frames: those that left; ``size``: bytes of all of them, the refused ones too.
    """

    frames: int
    refused: int
    size: int


@dataclass(frozen=True, slots=True)
class DiscardRequested:
    """Another instance of the guest goes on from the last commit: what was not committed was never said."""


@dataclass(frozen=True, slots=True)
class PassRequested:
    """Nothing can take over: let out what is held, and what comes."""


@dataclass(frozen=True, slots=True)
class HoldRequested:
    """Hold from now on. What was sealed before waits for the first commit after it."""


Event = (
    FramesArrived
    | QueueOverflowed
    | SealEpoch
    | EpochCommitted
    | FramesWritten
    | DiscardRequested
    | PassRequested
    | HoldRequested
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget these frames of the batch that arrived (positions in it, ascending)."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget this many frames at the queue's end."""

    frames: int


@dataclass(frozen=True, slots=True)
class ReportSealed:
    """Tell what this epoch holds."""

    epoch: Epoch
    frames: int
    size: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Release:
    """This many more frames of the queue may be written: their epochs are committed."""

    frames: int


@dataclass(frozen=True, slots=True)
class Forward:
    """This many more frames of the queue may be written: nothing is held at present."""

    frames: int


@dataclass(frozen=True, slots=True)
class ReportDemand:
    """Tell that the open epoch's output wants it to end, more than was told before."""

    demand: Demand


@dataclass(frozen=True, slots=True)
class ReportLeft:
    """Tell that nothing that waited for the commit of epochs up to this one is in the queue any more."""

    epoch: Epoch


Effect = Drop | Discard | ReportSealed | Release | Forward | ReportDemand | ReportLeft


@dataclass(frozen=True, slots=True)
class SealedEpoch:
    """What an epoch has in the queue."""

    epoch: Epoch
    frames: int
    size: int


@dataclass(frozen=True, slots=True)
class HoldBuffer:
    """All the gate knows. Sizes in bytes, with the vnet header.

    :ivar bound: no frame is kept beyond this many pending bytes.
    :ivar leaving: frames that may be written, and have not been yet.
    :ivar committed: the last committed epoch, until all of its frames have been written.
    :ivar sealed: epochs that wait for their commit, ascending.
    :ivar last: the last sealed epoch since holding began, or None.
    :ivar demand: what was told of the open epoch.
    """

    bound: int
    state: State = State.HOLDING
    leaving: int = 0
    committed: Epoch | None = None
    sealed: tuple[SealedEpoch, ...] = ()
    last: Epoch | None = None
    open_frames: int = 0
    open_size: int = 0
    open_dropped: int = 0
    demand: Demand = Demand.NONE
    pending_size: int = 0
    held: int = 0
    released: int = 0
    dropped: int = 0
    discarded: int = 0

    @property
    def pending(self) -> int:
        """Frames in the queue."""
        return self.leaving + sum(epoch.frames for epoch in self.sealed) + self.open_frames


Result = tuple[HoldBuffer, tuple[Effect, ...]]


def initial(bound: int) -> HoldBuffer:
    """A gate that holds, with nothing in it."""
    return HoldBuffer(bound)


def advance(data: HoldBuffer, event: Event) -> Result:
    """Take one event.

    :raise ProtocolError: it has no place in this state, or an epoch is out of order; nothing has changed.
    """
    return step(TABLE, data, event)


# --- transitions ------------------------------------------------------------------------------------------------------


def _arrive(data: HoldBuffer, event: FramesArrived) -> tuple[HoldBuffer, int, int, tuple[int, ...]]:
    """Take in what fits: data with the counts, frames and bytes kept, positions dropped."""
    room = data.bound - data.pending_size
    size = sum(event.sizes)
    dropped: list[int] = []
    if size > room:
        size = 0
        for position, frame_size in enumerate(event.sizes):
            if size + frame_size <= room:
                size += frame_size
            else:
                dropped.append(position)
    counted = replace(
        data,
        held=data.held + len(event.sizes),
        dropped=data.dropped + len(dropped),
        pending_size=data.pending_size + size,
    )
    return counted, len(event.sizes) - len(dropped), size, tuple(dropped)


def _hold_frames(data: HoldBuffer, event: FramesArrived) -> Result:
    counted, frames, size, dropped = _arrive(data, event)
    held = replace(
        counted,
        open_frames=data.open_frames + frames,
        open_size=data.open_size + size,
        open_dropped=data.open_dropped + len(dropped),
    )
    told, demand = _tell_demand(held)
    return told, ((Drop(dropped),) if dropped else ()) + demand


def _tell_demand(data: HoldBuffer) -> Result:
    demand = Demand.WAITING if data.open_frames else Demand.NONE
    if data.open_size * FILLING_SHARE >= data.bound or data.open_dropped:
        demand = Demand.FILLING
    return (replace(data, demand=demand), (ReportDemand(demand),)) if demand > data.demand else (data, ())


def _forward_frames(data: HoldBuffer, event: FramesArrived) -> Result:
    counted, frames, _, dropped = _arrive(data, event)
    effects: tuple[Effect, ...] = (Drop(dropped),) if dropped else ()
    return replace(counted, leaving=data.leaving + frames), (*effects, Forward(frames))


def _overflowed(data: HoldBuffer, event: QueueOverflowed) -> Result:
    lost = event.frames
    held = replace(data, held=data.held + lost, dropped=data.dropped + lost)
    return (
        _tell_demand(replace(held, open_dropped=data.open_dropped + lost))
        if data.state is State.HOLDING
        else (held, ())
    )


def _seal(data: HoldBuffer, event: SealEpoch) -> Result:
    if data.last is not None and event.epoch <= data.last:
        raise ProtocolError(f"epoch {data.last} was sealed already", operation="seal", epoch=event.epoch)
    sealed = SealedEpoch(event.epoch, data.open_frames, data.open_size)
    after = replace(_nothing_open(data), sealed=(*data.sealed, sealed), last=event.epoch)
    return after, (ReportSealed(event.epoch, sealed.frames, sealed.size, data.open_dropped),)


def _commit(data: HoldBuffer, event: EpochCommitted) -> Result:
    """Epochs up to the committed one leave; it must be one that was sealed and waits."""
    if all(sealed.epoch != event.epoch for sealed in data.sealed):
        raise ProtocolError("no such epoch waits for its commit", operation="release", epoch=event.epoch)
    frames = sum(sealed.frames for sealed in data.sealed if sealed.epoch <= event.epoch)
    waiting = tuple(sealed for sealed in data.sealed if sealed.epoch > event.epoch)
    committed = replace(data, sealed=waiting, leaving=data.leaving + frames, committed=event.epoch)
    told, left = _tell_left(committed)
    return told, (Release(frames), *left)


def _tell_left(data: HoldBuffer) -> Result:
    if data.committed is None or data.leaving:
        return data, ()
    return replace(data, committed=None), (ReportLeft(data.committed),)


def _written(data: HoldBuffer, event: FramesWritten) -> Result:
    gone = event.frames + event.refused
    if gone > data.leaving or event.size > data.pending_size:
        raise ProtocolError(f"{gone} frames left, {data.leaving} were allowed to", operation="account")
    after = replace(
        data,
        leaving=data.leaving - gone,
        pending_size=data.pending_size - event.size,
        released=data.released + event.frames,
        discarded=data.discarded + event.refused,
    )
    return _tell_left(after)


def _pass(data: HoldBuffer, _: PassRequested) -> Result:
    frames = data.pending - data.leaving
    passing = replace(data, state=State.PASSING, leaving=data.pending, committed=None, sealed=(), last=None)
    return _nothing_open(passing), (Forward(frames),)


def _discard(data: HoldBuffer, _: DiscardRequested) -> Result:
    """A new session, with nothing in it but what is leaving already."""
    frames = data.pending - data.leaving
    size = sum(epoch.size for epoch in data.sealed) + data.open_size
    after = replace(
        data, sealed=(), last=None, pending_size=data.pending_size - size, discarded=data.discarded + frames
    )
    return _nothing_open(after), (Discard(frames),) if frames else ()


def _nothing_open(data: HoldBuffer) -> HoldBuffer:
    return replace(data, open_frames=0, open_size=0, open_dropped=0, demand=Demand.NONE)


def _hold(data: HoldBuffer, _: HoldRequested) -> Result:
    """A new session: whatever no one committed joins the open epoch, so that its first commit covers it."""
    frames = sum(epoch.frames for epoch in data.sealed)
    size = sum(epoch.size for epoch in data.sealed)
    holding = replace(data, state=State.HOLDING, sealed=(), last=None)
    return _tell_demand(replace(holding, open_frames=data.open_frames + frames, open_size=data.open_size + size))


TABLE: Table[HoldBuffer, Effect] = {
    (State.HOLDING, FramesArrived): _hold_frames,
    (State.PASSING, FramesArrived): _forward_frames,
    (State.HOLDING, SealEpoch): _seal,
    (State.HOLDING, EpochCommitted): _commit,
    **on(BOTH, QueueOverflowed, _overflowed),
    **on(BOTH, FramesWritten, _written),
    **on(BOTH, DiscardRequested, _discard),
    **on(BOTH, PassRequested, _pass),
    **on(BOTH, HoldRequested, _hold),
}
