"""The protected VMs as the programs know them: one record by MAC address, one row of counters, one slot.

Record (little-endian 32-bit numbers)::

    0   owner     ifindex of the port behind which the VM is; 0: none, all of its frames are fenced
    4   mode      0 CLOSED, 1 PASS, 2 HOLD (:data:`MODES`)
    8   index     of its row of counters, and of its slot
    12  inbound   0 OFF, 1 COPY, 2 DIVERT (:class:`Inbound`): frames towards the VM
    16  replay    ifindex of the tap that these are put into

Invariant: a record is exchanged as a whole, so a program never sees an owner with another one's mode. ``settle`` waits
until no program acts on an old record any more; what such a program did with its frame is done then, too.

The maps outlive their process together with the programs at the ports; ``numbers`` finds them again. The slots do not:
the kernel empties them (``kernel.bpf_slot``), and a VM in HOLD whose slot is empty is silent.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from typing import Self

from kagemusha.errors import ConfigError
from kagemusha.gate.namespace import GateMode
from kagemusha.kernel.bpf_slot import ProgramSlot
from kagemusha.kernel.bpf_table import CellRow, CellTable, RecordTable, map_by_id, map_id, wait_programs

VMS_MAX = 256
KEY_BYTES = 8  # six of the address, two zeros
_RECORD = struct.Struct("<5I12x")
RECORD_BYTES = _RECORD.size
OWNER_AT, MODE_AT, INDEX_AT, INBOUND_AT, REPLAY_AT = 0, 4, 8, 12, 16

MODES = {GateMode.CLOSED: 0, GateMode.PASS: 1, GateMode.HOLD: 2}
_MODE_OF = {number: mode for mode, number in MODES.items()}

FENCED, SPOOFED, CLOSED, ORPHANED, GIVEN, RETURNED, CELLS = 0, 1, 2, 3, 4, 5, 8


class Inbound(enum.IntEnum):
    """What happens to frames towards the VM."""

    OFF = 0  # they go their way
    COPY = 1  # they go their way, and a copy into the replay tap
    DIVERT = 2  # they go into the replay tap instead, for as long as a frame in there has not been sent on


@dataclass(frozen=True, slots=True)
class Registration:
    """A VM's record. Ports and taps by ifindex, 0: none."""

    owner: int
    mode: GateMode
    index: int
    inbound: Inbound = Inbound.OFF
    replay: int = 0


@dataclass(frozen=True, slots=True)
class SwitchedCounts:
    """Frames with a VM's address that were dropped at the ports, since the VM was added.

    :param fenced: from a host's port that does not own the VM: an older term, or an impostor there.
    :param spoofed: from a client's port.
    :param closed: from the owner while the gate was closed.
    :param orphaned: from the owner, to be held, when no process of the switch was alive to say how.
    """

    fenced: int
    spoofed: int
    closed: int
    orphaned: int


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """A protected VM at the switch.

    :param owner: the port behind which it is, or None.
    :param held_given: frames given to its present hold tap.
    :param inbound_given: frames put into its present replay tap.
    """

    owner: str | None
    mode: GateMode
    inbound: Inbound
    held_given: int
    inbound_given: int
    dropped: SwitchedCounts


class Registry:
    """The maps. Made new, or those that a predecessor's programs refer to.

    :param numbers: of a predecessor's maps.
    :raise OSError: ENOENT: they are not there any more.
    """

    def __init__(self, numbers: tuple[int, int, int] | None = None) -> None:
        fds: list[int | None] = [None, None, None]
        try:
            for place, number in enumerate(numbers or ()):
                fds[place] = map_by_id(number)
        except OSError:
            for fd in fds:
                if fd is not None:
                    os.close(fd)
            raise
        self.records = RecordTable(key_bytes=KEY_BYTES, record_bytes=RECORD_BYTES, records_max=VMS_MAX, fd=fds[0])
        self.cells = CellTable(rows=VMS_MAX, cells=CELLS, fd=fds[1])
        self.slots = ProgramSlot(VMS_MAX, fd=fds[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The maps' numbers, for a successor."""
        return map_id(self.records.fd), map_id(self.cells.fd), map_id(self.slots.fd)

    def read(self) -> dict[bytes, Registration]:
        """All registrations by MAC address (6 bytes)."""
        return {key[:6]: found for key in self.records.all_keys() if (found := self.get(key[:6])) is not None}

    def get(self, mac: bytes) -> Registration | None:
        """The registration of an address, or None."""
        record = self.records.get(_key(mac))
        if record is None:
            return None
        owner, mode, index, inbound, replay = _RECORD.unpack(record)
        return Registration(owner, _MODE_OF[mode], index, Inbound(inbound), replay)

    def put(self, mac: bytes, registration: Registration) -> None:
        """Register an address, or change what is registered; for frames that arrive from now on."""
        each = registration
        self.records.put(_key(mac), _RECORD.pack(each.owner, MODES[each.mode], each.index, each.inbound, each.replay))

    def delete(self, mac: bytes) -> None:
        """Forget an address; its frames are anybody's."""
        self.records.delete(_key(mac))

    def settle(self) -> None:
        """Wait until every change so far holds for all that happens from now on."""
        wait_programs()

    def free_index(self) -> int:
        """An index that no registration has.

        :raise ConfigError: there are too many VMs.
        """
        taken = {each.index for each in self.read().values()}
        for index in range(VMS_MAX):
            if index not in taken:
                return index
        raise ConfigError(f"a switch can protect {VMS_MAX} VMs", operation="add a VM to the switch")

    def close(self) -> None:
        """Give the descriptors back."""
        self.records.close()
        self.cells.close()
        self.slots.close()


def counts_of(row: CellRow) -> SwitchedCounts:
    """The counters of a VM's row."""
    return SwitchedCounts(row[FENCED], row[SPOOFED], row[CLOSED], row[ORPHANED])


def _key(mac: bytes) -> bytes:
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError(f"{mac.hex(':')} is no address of a single device", operation="register a VM")
    return mac + bytes(KEY_BYTES - 6)
