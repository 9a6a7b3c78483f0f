"""The hold buffer: nothing is allowed to leave but by commit or pass, and every frame is accounted for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kagemusha.errors import ProtocolError
from kagemusha.model.ids import Epoch
from kagemusha.protocol import gate
from kagemusha.protocol.gate import (
    Demand,
    Discard,
    DiscardRequested,
    Drop,
    EpochCommitted,
    Forward,
    FramesArrived,
    FramesWritten,
    HoldBuffer,
    HoldRequested,
    PassRequested,
    QueueOverflowed,
    Release,
    ReportDemand,
    ReportLeft,
    ReportSealed,
    SealEpoch,
    State,
)

BOUND = 1000


def run(*events: gate.Event, bound: int = BOUND) -> tuple[HoldBuffer, list[gate.Effect]]:
    """All effects but the demands and what has left, which have tests of their own."""
    data, effects = run_all(*events, bound=bound)
    return data, [effect for effect in effects if not isinstance(effect, ReportDemand | ReportLeft)]


def run_all(*events: gate.Event, bound: int = BOUND) -> tuple[HoldBuffer, list[gate.Effect]]:
    data = gate.initial(bound)
    effects: list[gate.Effect] = []
    for event in events:
        data, new = gate.advance(data, event)
        effects.extend(new)
    return data, effects


def demands(*events: gate.Event) -> list[Demand]:
    return [effect.demand for effect in run_all(*events)[1] if isinstance(effect, ReportDemand)]


def test_the_first_frame_of_an_epoch_asks_for_its_end_once() -> None:
    first, more, seal = FramesArrived((10,)), FramesArrived((10, 10)), SealEpoch(Epoch(1))
    assert demands(seal) == []
    assert demands(first, more, more) == [Demand.WAITING]
    assert demands(first, seal, more) == [Demand.WAITING, Demand.WAITING]


@pytest.mark.parametrize("filling", [FramesArrived((250,)), FramesArrived((10, 991)), QueueOverflowed(1)])
def test_an_epoch_that_fills_a_quarter_of_the_buffer_or_loses_frames_asks_urgently(filling: gate.Event) -> None:
    assert demands(FramesArrived((10,)), filling, FramesArrived((1,))) == [Demand.WAITING, Demand.FILLING]


def test_what_a_lost_session_left_behind_asks_again() -> None:
    before = (FramesArrived((10,)), SealEpoch(Epoch(1)))
    assert demands(*before, HoldRequested()) == [Demand.WAITING, Demand.WAITING]


def test_passing_asks_for_nothing() -> None:
    assert demands(PassRequested(), FramesArrived((10, 900)), QueueOverflowed(3)) == []


def test_commit_releases_exactly_the_epochs_up_to_it() -> None:
    data, effects = run(
        FramesArrived((100, 100)),
        SealEpoch(Epoch(1)),
        FramesArrived((100,)),
        SealEpoch(Epoch(2)),
        FramesArrived((100, 100, 100)),
        SealEpoch(Epoch(3)),
        FramesArrived((50,)),
        EpochCommitted(Epoch(2)),
    )
    assert effects[:-1] == [
        ReportSealed(Epoch(1), 2, 200, 0),
        ReportSealed(Epoch(2), 1, 100, 0),
        ReportSealed(Epoch(3), 3, 300, 0),
    ]
    assert effects[-1] == Release(3)
    assert (data.leaving, data.pending) == (3, 7)


def left(*events: gate.Event) -> list[Epoch]:
    return [effect.epoch for effect in run_all(*events)[1] if isinstance(effect, ReportLeft)]


def test_what_has_left_is_told_when_the_last_frame_is_written() -> None:
    sealed = (FramesArrived((10, 10)), SealEpoch(Epoch(1)), FramesArrived((10,)), SealEpoch(Epoch(2)))
    committed = (*sealed, EpochCommitted(Epoch(1)))
    assert left(*committed, FramesWritten(1, 0, 10)) == []
    assert left(*committed, FramesWritten(2, 0, 20)) == [1]
    assert left(*committed, FramesWritten(1, 1, 20)) == [1], "what the kernel refuses for good is gone, too"
    assert left(*committed, EpochCommitted(Epoch(2)), FramesWritten(2, 0, 20), FramesWritten(1, 0, 10)) == [2]


def test_an_epoch_without_output_has_left_with_its_commit() -> None:
    assert left(SealEpoch(Epoch(1)), EpochCommitted(Epoch(1))) == [1]


def test_what_passes_is_nobody_s_epoch() -> None:
    committed = (FramesArrived((10,)), SealEpoch(Epoch(1)), EpochCommitted(Epoch(1)))
    assert left(*committed, PassRequested(), FramesWritten(1, 0, 10)) == []


def test_tail_drop_at_the_bound() -> None:
    data, effects = run(FramesArrived((600, 300)), FramesArrived((200, 100, 1)), SealEpoch(Epoch(1)))
    assert effects == [Drop((0, 2)), ReportSealed(Epoch(1), 3, 1000, 2)]
    assert (data.held, data.dropped, data.pending_size) == (5, 2, 1000)


def test_written_frames_make_room() -> None:
    data, _ = run(
        FramesArrived((1000,)),
        SealEpoch(Epoch(1)),
        EpochCommitted(Epoch(1)),
        FramesWritten(1, 0, 1000),
        FramesArrived((1000,)),
    )
    assert (data.dropped, data.released, data.pending_size) == (0, 1, 1000)


def test_pass_lets_everything_out_in_order() -> None:
    data, effects = run(
        FramesArrived((1, 1)), SealEpoch(Epoch(4)), FramesArrived((1,)), PassRequested(), FramesArrived((1, 1))
    )
    assert effects[1:] == [Forward(3), Forward(2)]
    assert data.leaving == data.pending == 5


def test_hold_makes_what_was_sealed_wait_for_the_next_commit() -> None:
    """After a lost session nobody acknowledges the old epochs; a commit of the next session covers them."""
    data, effects = run(
        FramesArrived((1, 1)), SealEpoch(Epoch(4)), FramesArrived((1,)), HoldRequested(), SealEpoch(Epoch(5))
    )
    assert effects[-1] == ReportSealed(Epoch(5), 3, 3, 0)
    with pytest.raises(ProtocolError):
        gate.advance(data, EpochCommitted(Epoch(4)))
    assert gate.advance(data, EpochCommitted(Epoch(5)))[1] == (Release(3),)


def test_discarding_spares_what_was_released() -> None:
    data, effects = run(
        FramesArrived((1, 1)),
        SealEpoch(Epoch(4)),
        EpochCommitted(Epoch(4)),
        FramesArrived((1,)),
        SealEpoch(Epoch(5)),
        FramesArrived((1, 1)),
        DiscardRequested(),
        SealEpoch(Epoch(1)),
    )
    assert effects[-2:] == [Discard(3), ReportSealed(Epoch(1), 0, 0, 0)]
    assert (data.leaving, data.discarded, data.pending_size) == (2, 3, 2)
    with pytest.raises(ProtocolError):
        gate.advance(data, EpochCommitted(Epoch(5)))


def test_hold_after_pass_still_lets_out_what_was_passed() -> None:
    data, _ = run(PassRequested(), FramesArrived((1, 1)), HoldRequested(), FramesArrived((1,)))
    assert (data.state, data.leaving, data.open_frames) == (State.HOLDING, 2, 1)


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ((), EpochCommitted(Epoch(1))),
        ((SealEpoch(Epoch(1)), EpochCommitted(Epoch(1))), EpochCommitted(Epoch(1))),
        ((SealEpoch(Epoch(2)),), SealEpoch(Epoch(2))),
        ((SealEpoch(Epoch(2)),), SealEpoch(Epoch(1))),
        ((SealEpoch(Epoch(2)),), EpochCommitted(Epoch(3))),
        ((PassRequested(),), SealEpoch(Epoch(1))),
        ((PassRequested(),), EpochCommitted(Epoch(1))),
        ((FramesArrived((1,)),), FramesWritten(1, 0, 1)),
        ((FramesArrived((1,)), SealEpoch(Epoch(1))), FramesWritten(0, 1, 1)),
    ],
)
def test_what_has_no_place_is_refused(before: tuple[gate.Event, ...], event: gate.Event) -> None:
    data, _ = run(*before)
    with pytest.raises(ProtocolError):
        gate.advance(data, event)


class AgainstAQueue(RuleBasedStateMachine):
    """The buffer beside a plain list of frames, each labelled with the epoch that must be committed first."""

    def __init__(self) -> None:
        super().__init__()
        self.data = gate.initial(300)
        self.queue: list[tuple[int, Epoch | None, bool]] = []  # size, epoch, may leave
        self.epoch = 0
        self.waiting: list[Epoch] = []
        self.told = Demand.NONE
        self.lost = False
        self.departing: Epoch | None = None
        self.left: list[Epoch] = []

    def take(self, event: gate.Event) -> tuple[gate.Effect, ...]:
        self.data, effects = gate.advance(self.data, event)
        for effect in effects:
            if isinstance(effect, ReportDemand):
                assert effect.demand > self.told, "each is told once"
                self.told = effect.demand
            elif isinstance(effect, ReportLeft):
                self.left.append(effect.epoch)
        return tuple(effect for effect in effects if not isinstance(effect, ReportDemand | ReportLeft))

    def allowed(self) -> int:
        return sum(may for _, _, may in self.queue)

    def allow(self, effects: tuple[gate.Effect, ...], kind: type) -> None:
        before = self.allowed()
        counts = [effect.frames for effect in effects if isinstance(effect, (Release, Forward))]
        assert all(isinstance(effect, (kind, Drop)) for effect in effects)
        for position in range(before, before + sum(counts)):
            size, epoch, _ = self.queue[position]
            self.queue[position] = (size, epoch, True)

    @rule(sizes=st.lists(st.integers(1, 120), max_size=6))
    def arrive(self, sizes: list[int]) -> None:
        effects = self.take(FramesArrived(tuple(sizes)))
        dropped = {position for effect in effects if isinstance(effect, Drop) for position in effect.positions}
        self.queue += [(size, None, False) for position, size in enumerate(sizes) if position not in dropped]
        if self.data.state is State.PASSING:
            self.allow(effects, Forward)
        else:
            self.lost |= bool(dropped)
            assert all(isinstance(effect, Drop) for effect in effects)

    @precondition(lambda self: self.data.state is State.HOLDING)
    @rule()
    def seal(self) -> None:
        self.epoch += 1
        epoch = Epoch(self.epoch)
        self.take(SealEpoch(epoch))
        self.told, self.lost = Demand.NONE, False
        self.waiting.append(epoch)
        self.queue = [(size, old if old or may else epoch, may) for size, old, may in self.queue]

    @precondition(lambda self: self.waiting)
    @rule(choice=st.integers(0, 99))
    def commit(self, choice: int) -> None:
        epoch = self.waiting[choice % len(self.waiting)]
        should = sum(1 for _, of, may in self.queue if may or (of is not None and of <= epoch))
        self.allow(self.take(EpochCommitted(epoch)), Release)
        assert self.allowed() == should
        assert all(of is None or of <= epoch for _, of, may in self.queue if may)
        self.waiting = [other for other in self.waiting if other > epoch]
        self.departing = epoch

    @rule(count=st.integers(0, 5), refused=st.integers(0, 1))
    def write(self, count: int, refused: int) -> None:
        gone = min(count, self.allowed())
        refused = min(refused, gone)
        size = sum(size for size, _, _ in self.queue[:gone])
        self.take(FramesWritten(gone - refused, refused, size))
        del self.queue[:gone]

    @rule(frames=st.integers(0, 3))
    def overflow(self, frames: int) -> None:
        self.lost |= bool(frames) and self.data.state is State.HOLDING
        assert self.take(QueueOverflowed(frames)) == ()

    @rule()
    def pass_all(self) -> None:
        self.allow(self.take(PassRequested()), Forward)
        self.departing = None
        self.told, self.lost = Demand.NONE, False
        self.waiting = []
        assert self.allowed() == len(self.queue)

    @rule()
    def hold(self) -> None:
        assert self.take(HoldRequested()) == ()
        self.waiting = []
        self.queue = [(size, None, may) for size, _, may in self.queue]

    @rule()
    def discard(self) -> None:
        kept = [entry for entry in self.queue if entry[2]]
        lost = len(self.queue) - len(kept)
        assert self.take(DiscardRequested()) == ((Discard(lost),) if lost else ())
        self.told, self.lost = Demand.NONE, False
        self.waiting = []
        self.queue = kept

    @invariant()
    def accounts(self) -> None:
        data = self.data
        assert data.held == data.released + data.dropped + data.discarded + data.pending
        assert data.pending == len(self.queue)
        assert data.leaving == self.allowed()
        assert data.pending_size == sum(size for size, _, _ in self.queue) <= data.bound

    @invariant()
    def what_has_left_is_told_once(self) -> None:
        gone = self.departing if not self.allowed() else None
        assert self.left == ([] if gone is None else [gone])
        if gone is not None:
            self.departing = None
            self.left.clear()

    @invariant()
    def the_open_epoch_is_asked_for(self) -> None:
        open_sizes = [size for size, epoch, may in self.queue if epoch is None and not may]
        if self.data.state is State.PASSING or not (open_sizes or self.lost):
            assert self.told == Demand.NONE
        else:
            urgent = self.lost or sum(open_sizes) * 4 >= self.data.bound
            assert self.told == (Demand.FILLING if urgent else Demand.WAITING)


TestAgainstAQueue = AgainstAQueue.TestCase
TestAgainstAQueue.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 400), max_size=30))
def test_tail_drop_never_exceeds_the_bound(sizes: list[int]) -> None:
    data, effects = run(FramesArrived(tuple(sizes)), bound=1000)
    dropped = sum(len(effect.positions) for effect in effects if isinstance(effect, Drop))
    assert data.pending_size <= 1000
    assert data.pending + dropped == len(sizes)
