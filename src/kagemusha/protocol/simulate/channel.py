"""A host's connection to the switch that comes back by itself, one line after the other.

A line that was given up still delivers what was under way when it was, perhaps after the first words of the next one;
so the switch hears words of old sessions among those of new ones. Neither side sends heartbeats here: it looks whether
the other could have been heard, and gives the line up when that was not so twice in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kagemusha.protocol.simulate.agenda import Process
from kagemusha.protocol.simulate.arbiter import ARBITER
from kagemusha.protocol.simulate.wire import End, Line, Message

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.world import World

CONNECT_S = 0.02
RETRY_S = 0.08
LOOK_S = 0.2
OPENED: Message = ("opened",)
CLOSED: Message = ("closed",)


class Watch:
    """Of one end: is the other still there?"""

    def __init__(self, world: World, line: Line, mine: End, other: Callable[[], bool], lost: Callable[[], Any]) -> None:
        self._world, self._line, self._mine = world, line, mine
        self._there, self._lost = other, lost
        self._missed = 0
        self.go_on()

    def go_on(self) -> None:
        """Look again in a while."""
        if self._mine.process is not None:
            self._world.agenda.later(LOOK_S, self._mine.process, self._look)

    def _look(self) -> None:
        if not self._mine.open:
            return
        theirs = self._line.b if self._mine is self._line.a else self._line.a
        heard = self._there() and (theirs.node, self._mine.node) not in self._world.network.cut
        self._missed = 0 if heard else self._missed + 1
        if self._missed < 2:
            self.go_on()
        else:
            self._lost()


class Channel:
    """``heard``: gets OPENED, CLOSED, and in between what the switch says; in ``process``."""

    def __init__(self, world: World, node: int, process: Process, heard: Callable[[Message], None]) -> None:
        self._world, self._node, self._process, self._heard = world, node, process, heard
        self._line: Line | None = None
        self._closed = False
        self._want(CONNECT_S)

    def say(self, message: Message) -> None:
        """Without a connection it is not said."""
        if self._line is not None:
            self._line.send(self._line.b, message)

    def drop(self) -> None:
        """Give the connection up, and make another. CLOSED is told."""
        if self._line is not None:
            self._hang_up()
            self._world.agenda.later(0.0, self._process, self._tell, CLOSED)
            self._want(CONNECT_S)

    def close(self, *, silently: bool = False) -> None:
        """For good. ``silently``: with all of the host."""
        self._closed = True
        if self._line is not None:
            self._hang_up(silently=silently)

    def _hang_up(self, *, silently: bool = False) -> None:
        assert self._line is not None
        line, self._line = self._line, None
        (line.vanish if silently else line.close)(line.a)

    def _want(self, about_s: float) -> None:
        delay = about_s * (0.2 + self._world.chance.random())
        self._world.agenda.later(delay, self._process, self._connect)

    def _connect(self) -> None:
        switch, cut = self._world.switch, self._world.network.cut
        if self._closed or self._line is not None or switch is None:
            return
        if not switch.hears or (self._node, ARBITER) in cut or (ARBITER, self._node) in cut:
            self._want(RETRY_S)
            return
        mine = End(self._node, self._process, lambda message: self._receive(line, message))
        theirs = End(ARBITER, switch.process, lambda message: switch.hear(line, message))
        line = self._line = Line(self._world.network, mine, theirs)
        switch.accept(line, self._process)
        Watch(self._world, line, mine, lambda: not switch.process.frozen, lambda: self._lost(line))
        self._tell(OPENED)

    def _receive(self, line: Line, message: Message) -> None:
        if self._line is not line:
            return
        if message[0] == "broken":
            self._lost(line)
        else:
            self._tell(message)

    def _lost(self, line: Line) -> None:
        if self._line is line:
            self._hang_up()
            self._tell(CLOSED)
            self._want(CONNECT_S)

    def _tell(self, message: Message) -> None:
        if not self._closed:
            self._heard(message)
