"""The arbiter that is the switch behind which the VMs are.

It does more than the others: a term that it gives away ends whoever had the one before, at once, for it takes that
host's frames no more. So a winner needs to wait for no lease. It is one machine: while it is away nobody goes on alone,
but nobody is heard then either.

Claims go in the name of the claimant's node, which has to introduce itself with it; the connection is made when it is
needed, kept, and made again when it breaks or the switch has given it up for its silence.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from kagemusha.errors import ConfigError, PeerError, TransientError
from kagemusha.failover.arbiter import Claimed, checked
from kagemusha.model.config import Address, TlsTable
from kagemusha.model.ids import NO_TERM, Term
from kagemusha.transport import tls
from kagemusha.transport.control import open_control, wait_message
from kagemusha.transport.link import Link
from kagemusha.wire.messages import Heartbeat
from kagemusha.wire.switch import (
    AskNewest,
    Claim,
    ClaimAnswer,
    Newest,
    SwitchMessage,
    SwitchRefusal,
    SwitchRefused,
    encode_switch,
)

_OPERATION = "ask the switch"


class SwitchArbiter:
    """Asks the switch's agent at this address."""

    def __init__(self, address: Address, table: TlsTable, *, node: str, timeout_s: float) -> None:
        """Nothing is connected yet. ``node``: in whose name questions are asked that are no claims.

        :raise ConfigError: a file of ``[tls]`` cannot be used.
        """
        self._address, self._context = address, tls.context(table, "client")
        self._node, self._timeout_s = node, timeout_s
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._introduced_as = ""

    def claim(self, vm: str, term: Term, claimant: str) -> Claimed:
        """As :class:`Arbiter` says."""
        node = checked(claimant).partition("/")[0]
        answer = self._ask(Claim(vm=vm, term=term, claimant=claimant), term, node)
        if not isinstance(answer, ClaimAnswer) or (answer.vm, answer.term) != (vm, term):
            raise TransientError(f"{answer.kind.name} is no answer to a claim", operation=_OPERATION)
        return Claimed(term, answer.holder)

    def newest(self, vm: str) -> Claimed | None:
        """As :class:`Arbiter` says."""
        answer = self._ask(AskNewest(vm=vm), NO_TERM, self._introduced_as or self._node)
        if not isinstance(answer, Newest) or answer.vm != vm:
            raise TransientError(f"{answer.kind.name} is no answer to a question", operation=_OPERATION)
        return None if answer.holder is None else Claimed(Term(answer.term), answer.holder)

    def close(self) -> None:
        """Close the connection. May be called again."""
        with self._lock:
            self._forget()

    def _ask(self, question: SwitchMessage, term: Term, node: str) -> SwitchMessage:
        """The answer; over a new connection if the one that was kept turns out to be dead."""
        with self._lock:
            if self._link is not None and node == self._introduced_as:
                with suppress(TransientError, PeerError):
                    return self._ask_over(self._link, question, term)
            self._forget()
            try:
                self._link = open_control(self._address, self._context, node=node, timeout_s=self._timeout_s)
                self._introduced_as = node
                return self._ask_over(self._link, question, term)
            except PeerError as error:
                self._forget()
                raise TransientError(error.message, operation=_OPERATION, hint=error.hint) from error
            except TransientError:
                self._forget()
                raise

    def _ask_over(self, link: Link, question: SwitchMessage, term: Term) -> SwitchMessage:
        deadline = time.monotonic() + self._timeout_s
        link.offer(encode_switch(question, term=term))
        while True:
            answer = wait_message(link, deadline, f"{_OPERATION} {self._address}")
            if isinstance(answer, Heartbeat):
                continue
            if isinstance(answer, SwitchRefused):
                if answer.code is SwitchRefusal.FORGED:
                    raise ConfigError(f"refused: {answer.reason}", operation=_OPERATION)
                raise TransientError(f"refused: {answer.reason}", operation=_OPERATION)
            return answer

    def _forget(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
