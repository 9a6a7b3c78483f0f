"""The arbiter, first come first served for each term, and who asks it over a network that loses, doubles and delays.

A request may be applied although its answer is lost, and much later than it was sent; asking again gives the same
answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kagemusha.protocol.simulate.agenda import Process
from kagemusha.protocol.simulate.wire import Network

ARBITER = -1
ASK_AGAIN_S = 0.06

Holder = tuple[int, str]
"""Which node, and which instance on it."""


class Unanswered(Exception):  # nothing is wrong: it is asked again
    """Nothing is said to this question."""


class Arbiter:
    """Terms and their holders. ``slow_s``: what requests take longer, each up to."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.process = Process("arbiter")
        self.holders: dict[int, Holder] = {}
        self.slow_s = 0.0

    @property
    def newest(self) -> tuple[int, Holder] | None:
        """The newest term that was given, and to whom."""
        if not self.holders:
            return None
        term = max(self.holders)
        return term, self.holders[term]

    def ask(self, node: int, client: Process, request: Callable[[], Any], answer: Callable[[Any], None]) -> None:
        """Send a request: it may be lost, doubled or late, and so may its answer."""
        chance = self._network.chance
        for _ in range(2 if chance.random() < 0.1 else 1):
            if (node, ARBITER) in self._network.cut:
                return
            delay = self._network.delay_s() + chance.random() * self.slow_s
            self._network.agenda.later(delay, self.process, self._apply, node, client, client.life, request, answer)

    def _apply(
        self, node: int, client: Process, life: int, request: Callable[[], Any], answer: Callable[[Any], None]
    ) -> None:
        try:
            result = request()
        except Unanswered:
            return
        chance = self._network.chance
        if (ARBITER, node) in self._network.cut or chance.random() < 0.05 or client.life != life:
            return
        delay = self._network.delay_s() + chance.random() * self.slow_s
        self._network.agenda.later(delay, client, answer, result)

    def asked_newest(self) -> tuple[int, Holder] | None:
        """The newest term that was given. :raise Unanswered: it is not said."""
        return self.newest

    def claim(self, term: int, holder: Holder) -> tuple[int, Holder]:
        """Who has this term: it is the first that asked."""
        return term, self.holders.setdefault(term, holder)


class Claimant:
    """Asks for one role of a node until it is answered. ``told``: gets (term, holder) of every answer."""

    def __init__(
        self, arbiter: Arbiter, network: Network, node: int, worker: Process, identity: str, told: Callable[..., None]
    ) -> None:
        self._arbiter = arbiter
        self._network = network
        self._worker = worker
        self._node = node
        self._told = told
        self.identity = (node, identity)
        self._wanted: int | None = None
        self._notes: list[int] = []
        self._asking = False
        self.open = True

    def claim(self, term: int) -> None:
        """Ask for it, again and again."""
        self._wanted = term
        self._go_on()

    def drop(self) -> None:
        """Ask no more."""
        self._wanted = None

    def note(self, term: int) -> None:
        """Tell who holds it, until it is known to be there."""
        self._notes.append(term)
        self._go_on()

    def _go_on(self) -> None:
        if not self._asking:
            self._asking = True
            self._network.agenda.later(0.0, self._worker, self._ask)

    def _ask(self) -> None:
        self._asking = False
        if not self.open or (self._wanted is None and not self._notes):
            return
        for term in self._notes[:1] + ([] if self._wanted is None else [self._wanted]):
            claim = partial(self._arbiter.claim, term, self.identity)
            self._arbiter.ask(self._node, self._worker, claim, self._answer)
        self._asking = True
        self._network.agenda.later(ASK_AGAIN_S, self._worker, self._ask)

    def _answer(self, result: tuple[int, Holder]) -> None:
        term, holder = result
        if term in self._notes:
            self._notes.remove(term)
            return
        if self._wanted == term:
            self._wanted = None
        if self.open:
            # Also an answer that is not wanted any more: it may have been on its way to the worker already.
            self._told(term, holder == self.identity, holder)
