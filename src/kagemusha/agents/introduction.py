"""Whether the primary that calls fits to the standby here: the same VM, on a machine of the same kind."""

from __future__ import annotations

import re
from contextlib import suppress

from kagemusha.commit.acceptor import Caller
from kagemusha.errors import PeerError, TransientError
from kagemusha.guest.machine import Machine
from kagemusha.model.ids import Term
from kagemusha.model.memory import same_layout
from kagemusha.wire.handshake import Hello, RefusalCode, Refused
from kagemusha.wire.messages import encode

Misfit = tuple[RefusalCode, str]


def misfit_of_name(hello: Hello, vm: str) -> Misfit | None:
    """Why it cannot even be talked to; None: it can."""
    if hello.common_version() is None:
        return RefusalCode.VERSION, "no common version of the wire format"
    if hello.vm_name != vm:
        return RefusalCode.VM_NAME, f"this standby is for VM {vm!r}, not {hello.vm_name!r}"
    return None


def misfit_of_machine(hello: Hello, machine: Machine) -> Misfit | None:
    """Why its guest could not go on here; None: it could."""
    if hello.machine_type != machine.type:
        return RefusalCode.MACHINE, f"machine type is {hello.machine_type} there and {machine.type} here"
    if _version(hello.qemu_version) > _version(machine.qemu_version):
        return RefusalCode.MACHINE, f"QEMU is {hello.qemu_version} there and older here: {machine.qemu_version}"
    difference = same_layout(hello.image(), machine.image)
    return None if difference is None else (RefusalCode.LAYOUT, difference)


def send_away(caller: Caller, code: RefusalCode, reason: str, term: Term) -> None:
    """Tell a primary why it is refused, and hang up."""
    with suppress(PeerError, TransientError):  # it did not wait for the answer, and will ask again
        caller.link.send(encode(Refused(code=code, reason=reason, term=term), term=term))
    caller.link.close()


def _version(text: str) -> tuple[int, ...]:
    """The number at the beginning of QEMU's version."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split(" ", 1)[0])[:3])
