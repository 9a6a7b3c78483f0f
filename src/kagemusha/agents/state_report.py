"""A worker's state as it is told: to the event log when it changes, and to whoever asks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from kagemusha.agents.eventlog import EventLog
from kagemusha.model.events import StateChanged
from kagemusha.model.ids import FIRST_TERM, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The answer to ``kage status``.

    :ivar since: when the state was entered, ISO 8601, UTC; ``seconds``: how long ago that was.
    :ivar peer: the standby's address, or the primary's; None without a session.
    :ivar committed: the last checkpoint that a standby holds, or that this standby holds; 0: none.
    """

    vm: str
    node: str
    role: str
    state: str
    since: str
    seconds: float
    reason: str
    term: int
    peer: str | None
    committed: int


class StateReport:
    """Of one VM on one node, through all its roles.

    :ivar role: that was told last.
    """

    def __init__(self, log: EventLog, vm: str, node: str) -> None:
        self._log = log
        self._vm = vm
        self._node = node
        self.role = self._state = self._reason = ""
        self._term = FIRST_TERM
        self._entered_t = time.monotonic()
        self._since = datetime.now(UTC)

    def tell(self, role: str, state: str, term: Term, reason: str) -> None:
        """Log a new state, or a new reason in the old one; nothing if both are as before."""
        if (role, state) != (self.role, self._state):
            self._entered_t, self._since = time.monotonic(), datetime.now(UTC)
        elif reason == self._reason:
            self._term = term
            return
        self.role, self._state, self._term, self._reason = role, state, term, reason
        self._log.write(StateChanged(t=time.monotonic(), role=role, state=state, term=term, reason=reason))

    def status(self, *, peer: str | None, committed: int) -> Status:
        """All of it, now."""
        return Status(
            vm=self._vm,
            node=self._node,
            role=self.role,
            state=self._state,
            since=self._since.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._entered_t, 3),
            reason=self._reason,
            term=self._term,
            peer=peer,
            committed=committed,
        )
