"""Guards taken away, one at a time, to see that the simulation would notice.

The machines are not touched: a weakened world steps with a table in which some entries are replaced, or does one thing
of its own in the wrong order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kagemusha.protocol import primary as p
from kagemusha.protocol import standby as s
from kagemusha.protocol import switch, switch_host
from kagemusha.protocol.simulate.scenario import Form


@dataclass(frozen=True)
class Weakness:
    """What is wrong with a world of this form; by default nothing."""

    primary_table: Mapping[Any, Any] = field(default_factory=lambda: p.TABLE)
    standby_table: Mapping[Any, Any] = field(default_factory=lambda: s.TABLE)
    ack_early: bool = False
    release_at_seal: bool = False
    send_uncommitted: bool = False
    no_wait: bool = False
    renew_at_receipt: bool = False
    wall_clock: bool = False
    doubt_forgotten: bool = False
    switch_table: Mapping[Any, Any] = field(default_factory=lambda: switch.TABLE)
    host_table: Mapping[Any, Any] = field(default_factory=lambda: switch_host.TABLE)
    keeps_held: bool = False
    releases_open: bool = False
    holds_unasked: bool = False
    form: Form = "host"


def _claims_are_won(data: p.Data, event: p.ClaimLost) -> p.Result:
    """Whoever has it, an answer is an answer."""
    return p.TABLE[p.State.HOLDING, p.ClaimWon](data, p.ClaimWon(event.term))


def _as_link_lost(data: p.Data, event: p.Superseded) -> p.Result:
    return p.TABLE[data.state, p.LinkLost](data, p.LinkLost("a newer term"))


def _any_term_is_welcome(data: s.Data, event: s.PrimaryConnected) -> s.Result:
    return s.TABLE[data.state, s.PrimaryConnected](data, replace(event, term=max(event.term, data.term)))


def _obey_any_primary(data: p.Data, event: p.ClaimWon) -> p.Result:
    obeyed = replace(data, claiming=True, tried=event.term)
    after, effects = p.TABLE[p.State.HOLDING, p.ClaimWon](obeyed, event)
    return replace(after, term=max(data.term, after.term), tried=max(data.tried, after.tried)), tuple(
        effect for effect in effects if not isinstance(effect, p.RecordTerm)
    )


def _obey_any_standby(data: s.Data, event: s.ClaimWon) -> s.Result:
    return s.TABLE[s.State.CLAIMING, s.ClaimWon](data, s.ClaimWon(data.tried))


def _accept_while_claiming(data: s.Data, event: s.PrimaryConnected) -> s.Result:
    return s.TABLE[s.State.PROTECTING, s.PrimaryConnected](data, event)


IGNORE_TERM = Weakness(
    primary_table={
        **p.TABLE,
        (p.State.HOLDING, p.ClaimLost): _claims_are_won,
        **{(state, p.Superseded): _as_link_lost for state in (p.State.ALONE, p.State.HOLDING)},
    },
    standby_table={**s.TABLE, **{(state, s.PrimaryConnected): _any_term_is_welcome for state in s.BEFORE}},
)
OBEY_OLD = Weakness(
    primary_table={**p.TABLE, (p.State.HOLDING, p.ClaimWon): _obey_any_primary},
    standby_table={**s.TABLE, (s.State.CLAIMING, s.ClaimWon): _obey_any_standby},
)
ACCEPT = Weakness(
    standby_table={**s.TABLE, (s.State.CLAIMING, s.PrimaryConnected): _accept_while_claiming},
)

WEAKNESSES: dict[str, Weakness] = {
    "ack-before-complete": Weakness(ack_early=True),
    "release-at-seal": Weakness(release_at_seal=True),
    "send-uncommitted": Weakness(send_uncommitted=True),
    "takeover-without-waiting": Weakness(no_wait=True),
    "ignore-term": IGNORE_TERM,
    "renew-at-receipt": Weakness(renew_at_receipt=True),
    "obey-old-claims": OBEY_OLD,
    "accept-while-claiming": ACCEPT,
    "wall-clock-lease": Weakness(wall_clock=True),
    "doubt-forgotten": Weakness(doubt_forgotten=True),
}
"""By the name of the guard that is missing."""

SOUND = Weakness()
