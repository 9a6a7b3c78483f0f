"""A host's connection to the switch that comes back by itself: messages out, messages in, heartbeats, reconnection.

Does not know what is said; whoever uses it is told of every connection that begins and ends, in order. Used by one
thread; :meth:`Channel.take` never waits unless it is given a time.
"""

from __future__ import annotations

import select
import ssl
import time
from dataclasses import dataclass
from typing import Final

from kagemusha.errors import PeerError, TransientError
from kagemusha.model.config import Address
from kagemusha.model.ids import NO_TERM, Term
from kagemusha.switching.connector import Connector
from kagemusha.transport.control import HEARTBEAT_S, SILENCE_S
from kagemusha.transport.link import Link
from kagemusha.wire.messages import Heartbeat
from kagemusha.wire.switch import SwitchMessage, decode_switch, encode_switch

WAITING_BYTES_MAX: Final = 4 << 20
"""Of what was said and not taken: a rule set, and much that is small."""


@dataclass(frozen=True, slots=True)
class Opened:
    """There is a connection."""


@dataclass(frozen=True, slots=True)
class Closed:
    """There is none any more; another is being made."""

    reason: str


Heard = Opened | Closed | SwitchMessage


class Channel:
    """To one switch.

    :ivar connected: there is a connection, and its :class:`Opened` was taken.
    :ivar reason: why the last one ended, or the last try failed.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None, *, node: str) -> None:
        self._connector = Connector(address, context, node=node)
        self._link: Link | None = None
        self._ended: str | None = None
        self._counter = self._heard_counter = 0
        self._beat_t = 0.0
        self._waits_to_send = False
        self._reason = "not connected yet"
        self._ready = select.epoll()
        self._ready.register(self._connector.fileno(), select.EPOLLIN)
        self._connector.want()

    def fileno(self) -> int:
        """For select: readable when :meth:`take` has something. Stays the same over reconnections."""
        return self._ready.fileno()

    @property
    def connected(self) -> bool:
        """There is a connection."""
        return self._link is not None

    @property
    def reason(self) -> str:
        """Why there is none."""
        return self._connector.last_error or self._reason

    def say(self, message: SwitchMessage, term: Term) -> None:
        """Send, or keep until the switch takes it. Without a connection it is not said; :class:`Closed` tells."""
        if self._link is None:
            return
        try:
            self._link.offer(encode_switch(message, term=term))
            if self._link.waiting_bytes > WAITING_BYTES_MAX:
                raise TransientError("the switch takes nothing any more", operation="say")
        except (PeerError, TransientError) as error:
            self.drop(str(error))

    def take(self, timeout_s: float = 0.0) -> Heard | None:
        """The next that was heard; waits for it so long at most."""
        deadline = time.monotonic() + timeout_s
        while True:
            heard = self._next()
            if heard is not None:
                return heard
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            self._ready.poll(min(left_s, HEARTBEAT_S))

    def drop(self, reason: str) -> None:
        """Close the connection and make another. :class:`Closed` tells, also if we did it ourselves."""
        if self._link is not None:
            self._ready.unregister(self._link.fileno())
            self._link.close()
            self._link = None
            self._ended = self._reason = reason
            self._connector.want()

    def close(self) -> None:
        """End it. May be called again."""
        if self._ready.closed:
            return
        if self._link is not None:
            self._link.close()
            self._link = None
        self._ready.close()
        self._connector.close()

    def _next(self) -> Heard | None:
        if self._ended is not None:
            reason, self._ended = self._ended, None
            return Closed(reason)
        if self._link is None:
            return self._opened()
        try:
            heard = self._receive(self._link)
        except (PeerError, TransientError) as error:
            self.drop(str(error))
            return self._next()
        return heard

    def _opened(self) -> Opened | None:
        link = self._connector.take()
        if link is None:
            return None
        self._link = link
        self._counter = self._heard_counter = 0
        self._waits_to_send = False
        link.heard_t = self._beat_t = time.monotonic()  # it may have waited here for long
        self._ready.register(link.fileno(), select.EPOLLIN)
        return Opened()

    def _receive(self, link: Link) -> SwitchMessage | None:
        if link.waiting_bytes or self._waits_to_send:
            self._waits_to_send = not link.flush()
            self._ready.modify(link.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._waits_to_send else 0))
        while (received := link.receive()) is not None:
            message = decode_switch(*received)
            if not isinstance(message, Heartbeat):
                return message
            self._heard_counter = message.counter
        now = time.monotonic()
        if now - link.heard_t > SILENCE_S:
            raise TransientError("the switch is silent", operation="listen")
        if now - self._beat_t >= HEARTBEAT_S:
            self._beat_t = now
            self._counter += 1
            link.offer(encode_switch(Heartbeat(self._counter, self._heard_counter), term=NO_TERM))
        return None
