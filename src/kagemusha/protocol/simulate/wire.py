"""The network between the nodes: paths that can be cut one way or both, and lines on them that behave like TCP.

A line is one TCP connection. What arrives on it does so once and in order; while the path is cut it waits. A line that
breaks loses a tail of what is under way, and each end learns of it in its own time, or never. TCP rules out more than
that: nothing of a line is heard twice, or before what was said earlier on it, or on another line; so none of this is
here.

Between lines nothing is ordered. One that was given up delivers what was under way behind the first words of its
successor, its end included: a caller whose first word was late is heard after the one that called later (``slow``),
and has gone when it is answered. Two nodes have one line, for checkpoints, heartbeats and their answers, and one after
the other; copies of frames to the guest have a connection of their own, and no say in anything that is judged here. A
host has several lines to its switch: its worker's, and its standby's until it has become a worker, for commits. Claims
are asked for apart from all of them, and may be lost, doubled, or applied long after they were given up (``arbiter``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kagemusha.protocol.simulate.agenda import Agenda, Process

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.chance import Chance

Message = tuple[Any, ...]
Receiver = Callable[[Message], None]
BROKEN: Message = ("broken",)
QUICK_S = 0.0004
SPREAD_S = 0.0016


class End:
    """One end of a line: the way to it, and who hears there."""

    __slots__ = ("lasts_until", "latest", "node", "open", "parked", "process", "receiver")

    def __init__(self, node: int, process: Process | None, receiver: Receiver | None) -> None:
        self.node = node
        self.process = process
        self.receiver = receiver
        self.open = True
        self.latest = 0.0
        self.lasts_until = float("inf")
        self.parked: deque[Message] = deque()


class Network:
    """All paths. ``cut``: pairs (from, to) that nothing gets over; the arbiter is node -1."""

    def __init__(self, agenda: Agenda, chance: Chance) -> None:
        self.agenda = agenda
        self.chance = chance
        self.ether = Process("network")
        self.cut: set[tuple[int, int]] = set()
        self.lines: list[Line] = []

    def delay_s(self) -> float:
        """How long one message takes; now and then much longer."""
        roll = self.chance.random()
        return QUICK_S + SPREAD_S * roll if roll < 0.97 else QUICK_S + (roll - 0.97) * 2

    def heal(self) -> None:
        """Paths may have healed: what waited for it arrives."""
        self.lines = [line for line in self.lines if line.a.open or line.b.open]
        for line in self.lines:
            line.unpark(line.a, line.b)
            line.unpark(line.b, line.a)

    def isolate(self, node: int, others: list[int]) -> None:
        """Cut both ways between a node and others."""
        for other in others:
            self.cut |= {(node, other), (other, node)}


class Line:
    """One connection. ``a``: the primary's end."""

    __slots__ = ("_network", "a", "b", "whole")

    def __init__(self, network: Network, a: End, b: End) -> None:
        self._network = network
        self.a = a
        self.b = b
        self.whole = True
        network.lines.append(self)

    def send(self, to: End, message: Message) -> None:
        """Put a message on its way to one end."""
        if not self.whole:
            return
        agenda = self._network.agenda
        to.latest = max(to.latest, agenda.now + self._network.delay_s())
        agenda.later(to.latest - agenda.now, self._network.ether, self._arrive, to, message)

    def _arrive(self, to: End, message: Message) -> None:
        if self._network.agenda.now > to.lasts_until or not to.open:
            return
        other = self.b if to is self.a else self.a
        if to.parked or (self._network.cut and (other.node, to.node) in self._network.cut):
            to.parked.append(message)
            return
        self._hand(to, message)

    def _hand(self, to: End, message: Message) -> None:
        if to.process is not None and to.receiver is not None:
            self._network.agenda.later(0.0, to.process, to.receiver, message)

    def unpark(self, source: End, to: End) -> None:
        """What waited for the path."""
        if to.parked and (source.node, to.node) not in self._network.cut:
            for message in to.parked:
                if to.open and self._network.agenda.now <= to.lasts_until:
                    self._hand(to, message)
            to.parked.clear()

    def slow(self, to: End, delay_s: float) -> None:
        """Whoever is at this end takes his time to look at it: nothing is heard there before."""
        to.latest = max(to.latest, self._network.agenda.now + delay_s)

    def close(self, mine: End) -> None:
        """One end hangs up: the other hears of it after all that is under way."""
        if mine.open:
            mine.open = False
            mine.parked.clear()
            self.send(self.b if mine is self.a else self.a, BROKEN)

    def vanish(self, mine: End) -> None:
        """One end is gone without a word."""
        mine.open = False
        mine.parked.clear()

    def break_off(self) -> None:
        """It breaks: a tail of what is under way is lost, and both ends hear of it some time."""
        if not self.whole:
            return
        self.whole = False
        agenda, chance = self._network.agenda, self._network.chance
        for end in (self.a, self.b):
            keep = chance.random() * 0.002
            end.lasts_until = agenda.now + keep
            agenda.later(keep + chance.random() * 0.05, self._network.ether, self._tell_broken, end)

    def _tell_broken(self, end: End) -> None:
        if end.open:
            self._hand(end, BROKEN)
