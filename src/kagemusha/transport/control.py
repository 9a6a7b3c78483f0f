"""A control connection between a host and its switch: how it begins on the host's side, and when it counts as dead.

Does not know what is said on it afterwards.
"""

from __future__ import annotations

import select
import ssl
import time
from typing import Final

from kagemusha import __version__
from kagemusha.errors import ConfigError, PeerError, TransientError
from kagemusha.model.config import Address
from kagemusha.model.ids import NO_TERM
from kagemusha.transport.link import Link, connect
from kagemusha.wire.switch import SwitchHello, SwitchMessage, SwitchRefused, SwitchWelcome, decode_switch, encode_switch

HEARTBEAT_S: Final = 0.5
SILENCE_S: Final = 3.0
"""Both sides send a heartbeat after so long, and give the connection up when nothing has come for so long."""


def open_control(address: Address, context: ssl.SSLContext | None, *, node: str, timeout_s: float) -> Link:
    """Connect to a switch and introduce ourselves; waits.

    :raise TransientError: it cannot be reached now, or does not answer in time.
    :raise PeerError: TLS does not come about, or it is no switch.
    :raise ConfigError: it refuses us.
    """
    operation = f"connect to the switch {address}"
    deadline = time.monotonic() + timeout_s
    link = connect(address, context, inbox=_nothing_is_expected)
    try:
        link.offer(encode_switch(SwitchHello(product_version=__version__, node=node), term=NO_TERM))
        answer = wait_message(link, deadline, operation)
        if isinstance(answer, SwitchRefused):
            raise ConfigError(f"refused: {answer.reason}", operation=operation)
        if not isinstance(answer, SwitchWelcome):
            raise PeerError(f"{answer.kind.name} instead of a welcome", operation=operation)
        return link
    except BaseException:
        link.close()
        raise


def wait_message(link: Link, deadline: float, operation: str) -> SwitchMessage:
    """The next message, by CLOCK_MONOTONIC seconds at the latest.

    :raise TransientError: none in time, or the connection broke.
    :raise PeerError: what came is no message, or the peer closed the connection.
    """
    while True:
        sent = link.flush()
        if (received := link.receive()) is not None:
            return decode_switch(*received)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TransientError("the switch does not answer in time", operation=operation)
        poll = select.poll()
        poll.register(link.fileno(), select.POLLIN | (0 if sent else select.POLLOUT))
        poll.poll(left_s * 1000)


def _nothing_is_expected(*_: object) -> None:
    raise AssertionError("Link.offer never reads")
