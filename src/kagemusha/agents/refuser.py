"""Answers primaries that call a node which runs the VM itself: an old one learns there that it has been superseded.

A process of its own, so that the worker's has no threads when it forks, and foreign handshakes stay away from it. It
dies with the worker. Without it nothing is unsafe; an old primary that has no arbiter would only stay silent longer.
"""

from __future__ import annotations

import select
import socket
import ssl

from kagemusha.agents.introduction import send_away
from kagemusha.commit.acceptor import Acceptor, Caller
from kagemusha.kernel.forked import fork_process
from kagemusha.model.config import Address
from kagemusha.model.ids import Term
from kagemusha.transport import link
from kagemusha.wire.handshake import RefusalCode


class Refuser:
    """The process, from the moment this node runs the VM to the end of that role."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, vm: str, term: Term) -> None:
        """:raise ConfigError: the address cannot be used."""
        listener = link.listen(address)
        self._process = fork_process(
            lambda: _serve(listener, context, vm, term), name="kage-refuser", keep={listener.fileno()}
        )
        listener.close()

    def close(self) -> None:
        """End it."""
        self._process.end()


def _serve(listener: socket.socket, context: ssl.SSLContext | None, vm: str, term: Term) -> None:
    acceptor = Acceptor(listener, context)
    while True:
        select.select([acceptor], [], [])
        while (caller := acceptor.take()) is not None:
            _refuse(caller, vm, term)


def _refuse(caller: Caller, vm: str, term: Term) -> None:
    if caller.hello.vm_name != vm:
        code, reason = RefusalCode.VM_NAME, f"this node runs VM {vm!r}, not {caller.hello.vm_name!r}"
    elif caller.hello.term < term:
        code, reason = RefusalCode.TERM, f"this node runs the VM in term {term}"
    else:
        code, reason = RefusalCode.STATE, f"this node runs the VM itself, in term {term}"
    send_away(caller, code, reason, term)
