"""What tests ask of a host's end at the switch, waited for."""

from __future__ import annotations

from collections.abc import Callable

from tests.harness.conditions import wait_until

from kagemusha.protocol.output import OutputTotals
from kagemusha.protocol.switch_words import Mode
from kagemusha.switching.client import SwitchClient


def pumped(client: SwitchClient, condition: Callable[[], bool]) -> None:
    def holds() -> bool:
        client.pump()
        return condition()

    wait_until(holds, "what the switch was asked for")


def totals_of(client: SwitchClient) -> OutputTotals:
    """The switch's totals now."""
    before = client.totals
    client.ask_totals()
    pumped(client, lambda: client.totals is not before)
    after = client.totals
    assert after is not None
    return after


def set_mode(client: SwitchClient, mode: Mode) -> None:
    """Until the switch does so."""
    client.want(mode)
    client.wait_mode()
