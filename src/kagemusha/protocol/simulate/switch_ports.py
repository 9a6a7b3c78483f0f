"""The switch's ports as the kernel and the gate process have them: whose frames are taken, and which of them wait.

They work while the switch's agent stands still, and pass on while it is dead what they were passing. What the agent
asks of the gate process is done in order, and some time later; what it waits for is done when all of that is. A
protected VM's frames are taken from the owner's port only; those of any other VM are forwarded from wherever they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kagemusha.protocol import gate
from kagemusha.protocol.simulate.agenda import Process
from kagemusha.protocol.simulate.guest import Frame, Guest, Mode

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.world import World

BOUND = 64
WORK_S = 0.001
DRAINED_S = 0.004
NOBODY = -1
Report = Callable[[int, int, int], None]


class Ports:
    """For the one VM. ``mode``: what becomes of the owner's frames. ``report``: is told of each seal that is done."""

    def __init__(self, world: World, report: Report) -> None:
        self._world = world
        self._report = report
        self._gate = Process("gate process of the switch")
        self.protected = False
        self.owner = NOBODY
        self.mode = Mode.CLOSED
        self.lose()

    def lose(self) -> None:
        """The gate process is gone, and what it held."""
        self._gate.die()
        self._buffer = gate.initial(BOUND)
        self._frames: deque[Frame] = deque()
        self._orders: deque[gate.Event] = deque()
        self.draining = False

    # --- frames -------------------------------------------------------------------------------------------------

    def takes(self, node: int) -> bool:
        """Whether a frame from there may get anywhere."""
        return not self.protected or (self.owner == node and self.mode is not Mode.CLOSED)

    @property
    def passes(self) -> bool:
        """Whether what the owner sends leaves without a commit."""
        return self.mode is Mode.PASS or self._buffer.state is gate.State.PASSING

    def arrive(self, node: int, guest: Guest, progress: int, transmit: bool) -> None:
        """A frame comes from a host. ``transmit``: the rules do not hold it."""
        if not self.takes(node):
            return
        if not self.protected or self.mode is Mode.PASS or (transmit and not self.draining):
            self._world.judge.frame_left(guest, progress, held=False, transmit=transmit)
            return
        self._frames.append((guest, progress))
        self._step(gate.FramesArrived((1,)))

    # --- what the agent asks of the kernel ------------------------------------------------------------------------

    def fence(self) -> None:
        """Nothing of the VM is taken any more."""
        self.owner = NOBODY

    def protect(self) -> None:
        """A gate is made for the VM; it has no owner."""
        if not self.protected:
            self.adopt()

    def adopt(self) -> None:
        """The same for one that was protected before, perhaps by an agent that died."""
        self.lose()
        self.protected = True
        self.owner, self.mode = NOBODY, Mode.CLOSED

    def forget(self) -> None:
        """It is a VM like any other."""
        self.lose()
        self.protected = False
        self.fence()

    def agent_died(self) -> None:
        """What would be held is dropped; what passes goes on."""
        self.lose()
        if self.mode is not Mode.PASS:
            self.mode = Mode.CLOSED

    # --- what it asks of the gate process -------------------------------------------------------------------------

    def hold(self) -> None:
        """It holds when this returns."""
        self._at_once(gate.HoldRequested())
        self.draining = False
        self.mode = Mode.HOLD

    def pass_all(self) -> None:
        """What is held leaves, and what comes behind it."""
        if self.mode is not Mode.PASS:
            self.mode, self.draining = Mode.HOLD, True
        self._order(gate.PassRequested())

    def look(self) -> None:
        """There may be a gap by now: frames go their way without the gate process."""
        if self.draining and self._buffer.state is gate.State.PASSING and not self._frames:
            self.draining = False
            self.mode = Mode.PASS

    def close(self) -> None:
        """What is sealed stays."""
        self.draining = False
        self.mode = Mode.CLOSED

    def discard(self) -> None:
        """What is not released is forgotten when this returns."""
        self._at_once(gate.DiscardRequested())

    def seal(self, epoch: int) -> None:
        """Reported when it is done."""
        self._order(gate.SealEpoch(epoch))  # type: ignore[arg-type]

    def release(self, epoch: int) -> None:
        """The sealed epochs up to this one leave."""
        self._order(gate.EpochCommitted(epoch))  # type: ignore[arg-type]

    def release_all(self) -> None:
        """What no sound switch does: all that is held leaves, of whatever epoch."""
        for guest, progress in self._frames:
            self._world.judge.frame_left(guest, progress, held=True, transmit=False)
        self._at_once(gate.DiscardRequested())

    def _order(self, event: gate.Event) -> None:
        self._orders.append(event)
        self._world.agenda.later(WORK_S * self._world.chance.random(), self._gate, self._work)

    def _at_once(self, event: gate.Event) -> None:
        while self._orders:
            self._work()
        self._step(event)

    def _work(self) -> None:
        if self._orders:
            self._step(self._orders.popleft())

    def _step(self, event: gate.Event) -> None:
        self._buffer, effects = gate.advance(self._buffer, event)
        for effect in effects:
            match effect:
                case gate.Release(frames) | gate.Forward(frames):
                    self._let_out(frames, held=isinstance(effect, gate.Release))
                case gate.Discard(frames):
                    for _ in range(frames):
                        self._frames.pop()
                case gate.Drop():
                    self._frames.pop()
                case gate.ReportSealed(_, frames, size, dropped):
                    self._report(frames, size, dropped)

    def _let_out(self, frames: int, *, held: bool) -> None:
        """A closed port lets nothing out."""
        for _ in range(frames):
            guest, progress = self._frames.popleft()
            if self.mode is not Mode.CLOSED:
                self._world.judge.frame_left(guest, progress, held=held, transmit=False)
        self._buffer, _ = gate.advance(self._buffer, gate.FramesWritten(frames, 0, frames))
