"""A primary's ship process: its line to a standby, the heartbeats on it, and the lease that their answers give."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kagemusha.protocol.lease import Renewals
from kagemusha.protocol.simulate.guest import Frame
from kagemusha.protocol.simulate.judge import Snapshot
from kagemusha.protocol.simulate.wire import BROKEN, End, Line, Message

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.node import Node

WELCOME_S = 0.3
HEARD_LATE_S = 0.8
BEAT_S = 0.06
STALL_S = 0.15
CHECKPOINT_S = 0.02


class Ship:
    """``report``: gets, in the worker, the number of the attempt and what came on its line."""

    def __init__(self, node: Node, report: Callable[[int, Message], None]) -> None:
        self._node, self._world = node, node.world
        self._report = report
        self._session = False
        self._renewals = Renewals(node.world.promise)
        self._heard_t = 0.0
        self.line: Line | None = None

    def connect(self, peer: Node, attempt: int, hello: Message) -> None:
        """Call a standby; ``hello`` without the line. It may be heard late."""
        world = self._world
        mine = End(self._node.index, self._node.ship, lambda message: self._receive(line, attempt, message))
        line = self.line = Line(world.network, mine, End(peer.index, world.network.ether, peer.called))
        self._session = False
        self._renewals = Renewals(world.promise)
        self._heard_t = world.agenda.now
        if world.chance.random() < 0.05:
            line.slow(line.b, HEARD_LATE_S * world.chance.random())
        line.send(line.b, ("hello", line, *hello))
        world.agenda.later(WELCOME_S, self._node.ship, self._watch, line, attempt)

    def say(self, message: Message) -> None:
        """Without a line it is not said."""
        if self.line is not None:
            self.line.send(self.line.b, message)

    def send_checkpoint(self, snapshot: Snapshot, held_here: list[Frame]) -> None:
        """It takes its time on the link, and what is said later waits behind it."""
        self.say(("begin", snapshot, held_here))
        if self.line is not None:
            self.line.slow(self.line.b, CHECKPOINT_S * self._world.chance.random() ** 2)
        self.say(("checkpoint", snapshot))

    def hang_up(self, *, silently: bool = False) -> None:
        """``silently``: with all of the host."""
        if self.line is not None:
            line, self.line = self.line, None
            (line.vanish if silently else line.close)(line.a)

    def _receive(self, line: Line, attempt: int, message: Message) -> None:
        """What came on the line, or its end."""
        if self.line is not line:
            return
        self._heard_t = self._world.agenda.now
        kind = message[0]
        if kind == "echo":
            self._echoed(message[1])
            return
        if kind == "welcome":
            self._session = True
            self._heartbeat(line)
        elif kind in ("broken", "refused", "superseded"):
            self.hang_up()
        self._tell(attempt, message)

    def _tell(self, attempt: int, message: Message) -> None:
        self._world.agenda.later(0.0, self._node.worker, self._report, attempt, message)

    def _echoed(self, number: int) -> None:
        until_ns = self._renewals.answered(number)
        if self._world.weakness.renew_at_receipt:
            until_ns = self._node.read_clock() + self._world.promise.lease_ns
        if until_ns is not None:
            self._node.gate.lease(until_ns)

    def _heartbeat(self, line: Line) -> None:
        """Numbered; none while the worker stands still."""
        if self.line is not line or not line.whole:
            return
        now = self._world.agenda.now
        if not self._node.worker.frozen or now - self._node.frozen_t < STALL_S:
            line.send(line.b, ("beat", self._renewals.send(self._node.read_clock())))
        self._world.agenda.later(BEAT_S, self._node.ship, self._heartbeat, line)

    def _watch(self, line: Line, attempt: int) -> None:
        """Silence of the standby ends a session, or an attempt."""
        if self.line is not line:
            return
        limit = self._world.silence_s if self._session else WELCOME_S * 0.9
        silent = self._world.agenda.now - self._heard_t
        if silent < limit:
            self._world.agenda.later(limit - silent + 0.001, self._node.ship, self._watch, line, attempt)
        else:
            self.hang_up()
            self._tell(attempt, BROKEN)
