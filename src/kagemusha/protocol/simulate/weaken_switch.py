"""Guards of the switch form taken away, as ``weaken.py`` does with those of the host form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kagemusha.model.ids import Epoch
from kagemusha.protocol import switch
from kagemusha.protocol import switch_host as host
from kagemusha.protocol import switch_words as words
from kagemusha.protocol.simulate.weaken import Weakness


def _claim_without_fence(data: words.Data, event: words.ClaimAsked) -> switch.Result:
    """Whoever registers with the term ends the owner; until then it goes on."""
    after, effects = switch.TABLE[data.state, words.ClaimAsked](data, event)
    if after.owner == data.owner:
        return after, effects
    spoken = tuple(effect for effect in effects if isinstance(effect, words.RecordClaim | words.AnswerClaim))
    return replace(data, newest=after.newest, holder=after.holder), spoken


def _register_anyone(data: words.Data, event: words.RegisterAsked) -> switch.Result:
    """The term is not looked at."""
    welcome = replace(event, term=max(event.term, data.newest))
    return switch.TABLE[data.state, words.RegisterAsked](replace(data, holder=event.holder), welcome)


def _forget_anyone(data: words.Data, event: words.UnregisterAsked) -> switch.Result:
    return switch.TABLE[data.state, words.UnregisterAsked](data, replace(event, sole=True))


def _as_confirmed(data: host.Data, event: host.SealOverdue) -> host.Result:
    """The guest goes on, and its standby may tell the commit."""
    return host.TABLE[data.state, host.SealedTold](data, host.SealedTold(data.session, Epoch(data.next - 1)))


def _switch_with(event: type, transition: Any) -> Mapping[Any, Any]:
    return {**switch.TABLE, **{key: transition for key in switch.TABLE if key[1] is event}}


SWITCH_WEAKNESSES: dict[str, Weakness] = {
    "answer-before-fencing": Weakness(form="switch", switch_table=_switch_with(words.ClaimAsked, _claim_without_fence)),
    "register-without-newer-term": Weakness(
        form="switch", switch_table=_switch_with(words.RegisterAsked, _register_anyone)
    ),
    "forget-who-was-followed": Weakness(
        form="switch", switch_table=_switch_with(words.UnregisterAsked, _forget_anyone)
    ),
    "keep-held-of-former-owner": Weakness(form="switch", keeps_held=True),
    "release-what-is-not-sealed": Weakness(form="switch", releases_open=True),
    "commit-what-is-not-confirmed": Weakness(
        form="switch", host_table={**host.TABLE, (host.State.SEALING, host.SealOverdue): _as_confirmed}
    ),
    "protect-before-it-holds": Weakness(form="switch", holds_unasked=True),
}
"""By the name of the guard that is missing."""
