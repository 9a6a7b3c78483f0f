"""The few small eBPF programs of the gate, assembled by hand; the one with rules is made in ``gate.rules``.

All are of type SCHED_CLS, meant for tc clsact ingress in direct-action mode, so their return value is the verdict.
They touch neither packet data nor helpers other than ``bpf_redirect``; a redirect to a device that is gone drops.

The hold programs share a one-element array map of two 64-bit cells (:class:`HoldCount`)::

    cell 0  given      frames handed to the hold tap; the programs, also the one with rules, add atomically
    cell 1  returned   of those, frames that are done with (written back or dropped); the gate process stores

``drain_program`` compares the two: as long as any frame is behind in the hold tap (returned < given), new frames queue
up behind it; once none is, frames go out directly. That is how holding ends without a frame overtaking another.

Does not attach anything (see ``netlink``). Source: bpf(2), Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import mmap
import os
import struct

from kagemusha.kernel.bpf_maps import create_map
from kagemusha.kernel.bpf_program import load_program
from kagemusha.kernel.bpf_slot import ProgramSlot

BPF_MAP_TYPE_ARRAY = 2
BPF_F_MMAPABLE = 1 << 10
BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE = 1, 2
TC_ACT_OK, TC_ACT_SHOT = 0, 2
HELPER_RANDOM_U32, HELPER_TAIL_CALL, HELPER_REDIRECT = 7, 12, 23

_MOV32_IMM, _MOV64_IMM, _LOAD_IMM64, _LOAD64, _JUMP_LESS_EQUAL = 0xB4, 0xB7, 0x18, 0x79, 0xBD
_AND32_IMM, _JUMP_LESS_IMM = 0x54, 0xA5
_MOV64, _LD_ABS_W, _LD_ABS_H, _JUMP32_NOT_EQUAL, _JUMP_NOT_EQUAL_IMM = 0xBF, 0x20, 0x28, 0x5E, 0x55
_SOURCE_AT = 6  # of an Ethernet frame
_ATOMIC_ADD64, _CALL, _EXIT = 0xDB, 0x85, 0x95


def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """One instruction, 8 bytes."""
    return struct.pack("<BBhi", code, dst | src << 4, offset, immediate)


def _redirect(ifindex: int) -> bytes:
    return (
        instruction(_MOV32_IMM, 1, immediate=ifindex)
        + instruction(_MOV32_IMM, 2)
        + instruction(_CALL, immediate=HELPER_REDIRECT)
        + instruction(_EXIT)
    )


def _cells(map_fd: int) -> bytes:
    return instruction(_LOAD_IMM64, 1, BPF_PSEUDO_MAP_VALUE, immediate=map_fd) + instruction(0)


def _count_one() -> bytes:
    return instruction(_MOV64_IMM, 2, immediate=1) + instruction(_ATOMIC_ADD64, 1, 2)


def drop_program() -> int:
    """Load a program that drops every frame; its descriptor.

    :raise OSError: EPERM without CAP_BPF and CAP_NET_ADMIN.
    """
    return load_program(instruction(_MOV32_IMM, 0, immediate=TC_ACT_SHOT) + instruction(_EXIT), "kage_drop")


def lossy_program(share: float) -> int:
    """Load a program that drops this share of frames at random and lets the others go on; its descriptor.

    :raise OSError: as :func:`drop_program`.
    """
    shot = instruction(_MOV32_IMM, 0, immediate=TC_ACT_SHOT) + instruction(_EXIT)
    code = (
        instruction(_CALL, immediate=HELPER_RANDOM_U32)
        + instruction(_AND32_IMM, 0, immediate=0xFFFF)
        + instruction(_JUMP_LESS_IMM, 0, offset=2, immediate=int(share * 0x10000))
        + instruction(_MOV32_IMM, 0, immediate=TC_ACT_OK)
        + instruction(_EXIT)
        + shot
    )
    return load_program(code, "kage_lossy")


def redirect_program(ifindex: int) -> int:
    """Load a program that sends every frame out of another device; its descriptor.

    :raise OSError: EPERM without CAP_BPF and CAP_NET_ADMIN.
    """
    return load_program(_redirect(ifindex), "kage_redirect")


def own_frames_program(mac: bytes, ifindex: int, slot: ProgramSlot) -> int:
    """Load a program that sends frames with this source address out of another device, and drops all others.

    :param mac: six bytes.
    :param slot: its program, if there is one, does that instead for the VM's own: it may count them.
    :raise OSError: as :func:`drop_program`.
    """
    shot = instruction(_MOV32_IMM, 0, immediate=TC_ACT_SHOT) + instruction(_EXIT)
    last = (
        instruction(_MOV64, 1, 6)
        + instruction(_LOAD_IMM64, 2, BPF_PSEUDO_MAP_FD, immediate=slot.fd)
        + instruction(0)
        + instruction(_MOV32_IMM, 3)
        + instruction(_CALL, immediate=HELPER_TAIL_CALL)  # comes back only if it failed
        + _redirect(ifindex)
    )
    front, back = struct.unpack("!IH", mac)
    skipped = len(last) // 8
    code = (
        instruction(_MOV64, 6, 1)  # where LD_ABS looks for the packet; a frame that is too short ends with 0, so drops
        + instruction(_LD_ABS_W, immediate=_SOURCE_AT)
        + instruction(_MOV32_IMM, 7, immediate=_signed(front))
        + instruction(_JUMP32_NOT_EQUAL, 0, 7, offset=2 + skipped)
        + instruction(_LD_ABS_H, immediate=_SOURCE_AT + 4)
        + instruction(_JUMP_NOT_EQUAL_IMM, 0, offset=skipped, immediate=back)
        + last
        + shot
    )
    return load_program(code, "kage_own")


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def slot_program(slot: ProgramSlot, count: HoldCount, hold_ifindex: int) -> int:
    """Load a program that leaves the decision to the slot's; its descriptor.

    While the slot is empty, every frame is counted and sent to the hold tap.
    """
    code = (
        instruction(_LOAD_IMM64, 2, BPF_PSEUDO_MAP_FD, immediate=slot.fd)
        + instruction(0)
        + instruction(_MOV32_IMM, 3)
        + instruction(_CALL, immediate=HELPER_TAIL_CALL)  # comes back only if it failed
        + _cells(count.fd)
        + _count_one()
        + _redirect(hold_ifindex)
    )
    return load_program(code, "kage_slot")


def drain_program(count: HoldCount, hold_ifindex: int, direct_ifindex: int) -> int:
    """Load a program that sends frames directly when no earlier one is in the hold tap, else after them."""
    through_hold = _count_one() + _redirect(hold_ifindex)
    code = (
        _cells(count.fd)
        + instruction(_LOAD64, 2, 1, 0)
        + instruction(_LOAD64, 3, 1, 8)
        + instruction(_JUMP_LESS_EQUAL, 2, 3, len(through_hold) // 8)
        + through_hold
        + _redirect(direct_ifindex)
    )
    return load_program(code, "kage_drain")


class HoldCount:
    """The two counters, mapped into this process and whatever it forks."""

    def __init__(self) -> None:
        self.fd = create_map(BPF_MAP_TYPE_ARRAY, value_bytes=16, entries=1, flags=BPF_F_MMAPABLE, name=b"kage_count")
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._cells = memoryview(self._memory).cast("Q")

    @property
    def given(self) -> int:
        """Frames handed to the hold tap since it exists."""
        return self._cells[0]

    @property
    def returned(self) -> int:
        """Of those, how many the gate process is done with."""
        return self._cells[1]

    @returned.setter
    def returned(self, frames: int) -> None:
        self._cells[1] = frames  # one aligned 8-byte store

    def close(self) -> None:
        """Give the mapping and the descriptor back; loaded programs keep the map alive."""
        self._cells.release()
        self._memory.close()
        os.close(self.fd)
