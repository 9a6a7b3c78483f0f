"""What the roles of a node have in common: a machine, its table, and the effects that are performed one by one.

Between two effects the process may be killed, or frozen: then the rest comes when it thaws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kagemusha.errors import ProtocolError
from kagemusha.protocol.machine import Table, step
from kagemusha.protocol.simulate.arbiter import Holder
from kagemusha.protocol.simulate.judge import Violation

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.node import Node


class Role(ABC):
    """A machine at work on a node."""

    def __init__(self, node: Node, data: Any, table: Table[Any, Any]) -> None:
        self.node = node
        self.world = node.world
        self.data = data
        self.over = False
        self._table = table
        self._perform: dict[type, Callable[[Any], None]] = {}
        self._events: deque[Any] = deque()
        self._rest: tuple[Any, ...] | None = None
        self._goes_on: Callable[[], None] | None = None

    def tell(self, event: Any) -> None:
        """Give the machine an event.

        :raise Violation: it has no place for it: the worker would die of it.
        """
        if self.over:
            return
        if self._goes_on is not None:
            self._events.append(event)
            return
        before = self.data
        key = (before.state, type(event))
        coverage = self.world.coverage
        coverage[key] = coverage.get(key, 0) + 1
        try:
            self.data, effects = step(self._table, before, event)
        except ProtocolError as error:
            raise Violation(f"{self}: {error}") from error
        self.perform(effects)

    def tell_if_it_fits(self, event: Any) -> None:
        """For an event that the worker asks the machine about first."""
        if not self.over and (self.data.state, type(event)) in self._table:
            try:
                step(self._table, self.data, event)
            except ProtocolError:
                return
            self.tell(event)

    def perform(self, effects: Iterable[Any]) -> None:
        """Do what was asked for, in order, as long as the worker lives and runs."""
        node = self.node
        worker, life = node.worker, node.worker.life
        rest = list(effects)
        while rest:
            if node.dies_after >= 0 or node.freezes_after >= 0:
                node.count_effect()
                if worker.life != life:
                    return
            if worker.frozen:
                worker.backlog.insert(0, (self.perform, (tuple(rest),)))
                return
            if self._goes_on is not None:
                self._rest = tuple(rest)
                return
            effect = rest.pop(0)
            self._perform[type(effect)](effect)
        if self._goes_on is not None:
            self._rest = ()
        elif not self.over:
            self.settled()

    # --- to wait in the middle of an effect ---

    def wait(self, goes_on: Callable[[], None]) -> None:
        """The worker waits for something: what else happens is taken afterwards, and ``goes_on`` ends the effect."""
        self._goes_on = goes_on

    def end_wait(self, *events: Any) -> None:
        """It is there, or will not come. ``events``: what it has come to."""
        goes_on, self._goes_on = self._goes_on, None
        if goes_on is None or self.over:
            return
        goes_on()
        rest, self._rest = self._rest or (), None
        self._events.extendleft(reversed(events))
        self.perform(rest)
        while self._events and self._goes_on is None and not self.over:
            self.tell_if_it_fits(self._events.popleft())

    @abstractmethod
    def settled(self) -> None:
        """All effects of an event are performed: what does the new state want?"""

    @abstractmethod
    def answered(self, term: int, won: bool, holder: Holder) -> None:
        """The arbiter's answer."""

    def __repr__(self) -> str:
        return f"node {self.node.index} {self.data.state.name} term {self.data.term}/{self.data.tried}"
