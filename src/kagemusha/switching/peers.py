"""One host's connection, as the switch has it.

Invariant: what waits to be sent to a peer is bounded, and a peer that is silent for ``SILENCE_S`` or takes nothing is
dropped; it can stop nobody else. Does not decide anything.
"""

from __future__ import annotations

import time
from typing import Final

from kagemusha.errors import PeerError, TransientError, WireError
from kagemusha.model.ids import NO_TERM, Term
from kagemusha.transport.control import HEARTBEAT_S, SILENCE_S
from kagemusha.transport.link import Link
from kagemusha.wire.messages import Heartbeat
from kagemusha.wire.switch import SwitchHello, SwitchMessage, decode_switch, encode_switch

HELLO_S: Final = 3.0
WAITING_BYTES_MAX: Final = 256 << 10
"""Answers are small: a host that leaves so much unread has stopped reading."""


class Peer:
    """A connection.

    :ivar node: what it calls itself; empty: it has not introduced itself yet.
    :ivar watched_for: what epoll was asked for.
    """

    def __init__(self, link: Link, address: str) -> None:
        self._link = link
        self._counter = self._heard_counter = 0
        self._opened_t = self._beat_t = time.monotonic()
        self.address = address
        self.node = ""
        self.watched_for = 0

    def fileno(self) -> int:
        """For epoll; -1: closed."""
        return self._link.fileno()

    def __str__(self) -> str:
        return f"{self.node or 'a stranger'} ({self.address})"

    @property
    def has_more_to_send(self) -> bool:
        """The kernel did not take all."""
        return self._link.waiting_bytes > 0

    def receive(self) -> tuple[SwitchMessage, Term] | None:
        """The next message and its frame's term; heartbeats stay here.

        :raise WireError, PeerError, TransientError: the connection cannot be used any more.
        """
        self._link.flush()
        while (received := self._link.receive()) is not None:
            header, payload = received
            if not self.node and header.kind is not SwitchHello.kind:
                raise WireError(f"{header.kind.name}: not expected here", operation="wait for an introduction")
            message = decode_switch(header, payload)
            if not isinstance(message, Heartbeat):
                return message, header.term
            if message.counter <= self._heard_counter:
                raise WireError("the counter of a heartbeat does not grow", operation="hear a heartbeat")
            self._heard_counter = message.counter
        return None

    def tell(self, message: SwitchMessage, term: Term) -> None:
        """Send, or keep until the peer takes it.

        :raise TransientError, PeerError: the connection broke, or the peer takes nothing.
        """
        self._link.offer(encode_switch(message, term=term))
        if self._link.waiting_bytes > WAITING_BYTES_MAX:
            raise TransientError("the host takes no answers any more", operation="answer")

    def look(self, now: float) -> None:
        """Send a heartbeat if it is time, and see whether the peer still lives.

        :raise TransientError: it does not; or it did not introduce itself.
        """
        if not self.node:
            if now - self._opened_t > HELLO_S:
                raise TransientError("it did not introduce itself", operation="wait for an introduction")
            return
        if now - self._link.heard_t > SILENCE_S:
            raise TransientError("it is silent", operation="listen")
        if now - self._beat_t >= HEARTBEAT_S:
            self._beat_t = now
            self._counter += 1
            self.tell(Heartbeat(self._counter, self._heard_counter), NO_TERM)

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


BROKEN: Final = (PeerError, TransientError)
"""What ends a connection; :class:`WireError` is one of the first."""
