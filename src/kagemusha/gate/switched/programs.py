"""The switch's programs: which way a frame goes that comes in on a port.

::

    port ingress, place 1: WARD    source address registered? ─no──────────────────────────────────► next place
                                     │ from another port than the owner's: count, drop
                                     │ CLOSED: count, drop          PASS ─────────────────────────► next place
                                     └ HOLD: jump into the VM's slot (empty: count, drop)
                                          ├ BY RULES: classifier ─ transmit ──────────────────────► next place
                                          │                     └ hold: given += 1, mark, to the VM's hold tap
                                          └ DRAIN: none in the hold tap ──────────────────────────► next place
                                                   else: given += 1, mark, to the hold tap
    port ingress, place 2: REPLAY  destination registered? ─no or OFF────────────────────────────► the bridge
                                     │ COPY: given += 1, a copy to the VM's replay tap ──────────► the bridge
                                     └ DIVERT: given > returned: given += 1, to the replay tap; else ► the bridge

    port egress: BACK              from a VM whose owner is this port? drop: what was flooded does not come back

    tap ingress, place 1: OUTLET (hold tap)  registered and not CLOSED? ─► place 2: REPLAY ──────► the bridge
    tap egress:           INLET  (both taps) marked? ─ no: drop

Invariants (I1, I2): a frame with a registered source address gets into the bridge from its owner's port alone, and,
while its VM is in HOLD, only if a rule lets it go or through the hold tap. Whatever is missing, a slot, a tap or a
counter, the frame is dropped. Nothing but what these programs redirect gets into a tap: the bridge's own messages, and
frames that it would send there, have not the tap's mark.

A place's program that lets a frame go on returns TC_ACT_UNSPEC, which asks the next place; the last one's leads into
the bridge. The frame is not changed, but for its mark when it is held. Attaches nothing (see ``plane``).
"""

from __future__ import annotations

from collections.abc import Callable

from kagemusha.gate.namespace import GateMode
from kagemusha.gate.rules import ebpf
from kagemusha.gate.rules.classifier import CONTEXT, TRANSMIT, WORD, Ending
from kagemusha.gate.rules.ebpf import FP, R0, R1, R2, R3, R4, R6, R7, R8, Assembler
from kagemusha.gate.switched.registry import (
    CLOSED,
    FENCED,
    GIVEN,
    INBOUND_AT,
    INDEX_AT,
    KEY_BYTES,
    MODE_AT,
    MODES,
    ORPHANED,
    OWNER_AT,
    REPLAY_AT,
    RETURNED,
    SPOOFED,
    Inbound,
    Registry,
)
from kagemusha.kernel.bpf_program import load_program

TC_ACT_UNSPEC, TC_ACT_SHOT = -1, 2
_MARK, _IFINDEX = 8, 40  # offsets in struct __sk_buff
_DESTINATION, _SOURCE, _ADDRESS_BYTES = 0, 6, 6
_HELPER_MAP_LOOKUP, _HELPER_TAIL_CALL, _HELPER_CLONE_REDIRECT = 1, 12, 13
_HELPER_REDIRECT, _HELPER_LOAD_BYTES = 23, 26
_KEY_AT, _INDEX_KEY_AT = -KEY_BYTES, -KEY_BYTES - 8
_RECORD, _ROW, _SAVED = R7, R8, ebpf.R9  # kept over calls of helpers
_CELL_BYTES = 8


def _load(name: str, append: Callable[[Assembler], None]) -> int:
    assembler = Assembler()
    append(assembler)
    return load_program(assembler.assemble().instructions, name)


def _verdict(a: Assembler, verdict: int) -> None:
    a.alu(ebpf.MOV, R0, verdict)
    a.exit()


def _look_up(a: Assembler, registry: Registry, address_at: int, missing: int) -> None:
    """_RECORD = the record of the frame's address; goes on at ``missing`` if there is none."""
    a.store_immediate(8, FP, _KEY_AT, 0)
    a.alu64_register(ebpf.MOV, R1, CONTEXT)
    a.alu(ebpf.MOV, R2, address_at)
    a.alu64_register(ebpf.MOV, R3, FP)
    a.alu64(ebpf.ADD, R3, _KEY_AT)
    a.alu(ebpf.MOV, R4, _ADDRESS_BYTES)
    a.call_helper(_HELPER_LOAD_BYTES)
    a.jump_if64(ebpf.JNE, R0, 0, missing)
    a.map_address(R1, registry.records.fd)
    a.alu64_register(ebpf.MOV, R2, FP)
    a.alu64(ebpf.ADD, R2, _KEY_AT)
    a.call_helper(_HELPER_MAP_LOOKUP)
    a.jump_if64(ebpf.JEQ, R0, 0, missing)
    a.alu64_register(ebpf.MOV, _RECORD, R0)


def _find_row(a: Assembler, registry: Registry, missing: int) -> None:
    """_ROW = the cells of the VM in _RECORD."""
    a.load(4, R1, _RECORD, INDEX_AT)
    a.store(4, FP, _INDEX_KEY_AT, R1)
    a.map_address(R1, registry.cells.fd)
    a.alu64_register(ebpf.MOV, R2, FP)
    a.alu64(ebpf.ADD, R2, _INDEX_KEY_AT)
    a.call_helper(_HELPER_MAP_LOOKUP)
    a.jump_if64(ebpf.JEQ, R0, 0, missing)
    a.alu64_register(ebpf.MOV, _ROW, R0)


def _count(a: Assembler, cell: int) -> None:
    a.alu64(ebpf.MOV, R1, 1)
    a.atomic_add64(_ROW, _CELL_BYTES * cell, R1)


def _redirect_marked(a: Assembler, ifindex: int, mark: int) -> None:
    a.alu(ebpf.MOV, R1, mark)
    a.store(4, CONTEXT, _MARK, R1)
    a.alu(ebpf.MOV, R1, ifindex)
    a.alu(ebpf.MOV, R2, 0)
    a.call_helper(_HELPER_REDIRECT)
    a.exit()


def ward_program(registry: Registry, *, faces_host: bool) -> int:
    """Load a port's first program; its descriptor.

    :param faces_host: behind a port of clients there is never a VM: what pretends to be one counts as spoofed.
    """

    def append(a: Assembler) -> None:
        stranger, drop, owned, not_passing = (a.new_label() for _ in range(4))
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        _look_up(a, registry, _SOURCE, stranger)
        _find_row(a, registry, drop)
        if faces_host:
            a.load(4, R1, CONTEXT, _IFINDEX)
            a.load(4, R2, _RECORD, OWNER_AT)
            a.jump_if_register(ebpf.JEQ, R1, R2, owned)
        _count(a, FENCED if faces_host else SPOOFED)
        a.jump(drop)
        if faces_host:
            a.place(owned)
            a.load(4, R1, _RECORD, MODE_AT)
            a.jump_if(ebpf.JEQ, R1, MODES[GateMode.PASS], stranger)
            a.jump_if(ebpf.JNE, R1, MODES[GateMode.HOLD], not_passing)
            a.alu64_register(ebpf.MOV, R1, CONTEXT)
            a.map_address(R2, registry.slots.fd)
            a.load(4, R3, _RECORD, INDEX_AT)
            a.call_helper(_HELPER_TAIL_CALL)  # comes back only if the slot is empty
            _count(a, ORPHANED)
            a.jump(drop)
            a.place(not_passing)
            _count(a, CLOSED)
        a.place(drop)
        _verdict(a, TC_ACT_SHOT)
        a.place(stranger)
        _verdict(a, TC_ACT_UNSPEC)

    return _load("kage_ward", append)


def replay_program(registry: Registry, mark: int) -> int:
    """Load the second program of ports and hold taps; its descriptor.

    :param mark: of the replay taps.
    """

    def append(a: Assembler) -> None:
        go_on, divert, drop = (a.new_label() for _ in range(3))
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        _look_up(a, registry, _DESTINATION, go_on)
        a.load(4, R1, _RECORD, INBOUND_AT)
        a.jump_if(ebpf.JEQ, R1, Inbound.OFF, go_on)
        a.load(4, R1, CONTEXT, _IFINDEX)
        a.load(4, R2, _RECORD, OWNER_AT)
        a.jump_if_register(ebpf.JEQ, R1, R2, go_on)  # the bridge will not send it back where it came from
        _find_row(a, registry, drop)
        a.load(4, R1, _RECORD, INBOUND_AT)
        a.jump_if(ebpf.JEQ, R1, Inbound.DIVERT, divert)
        _count(a, GIVEN)
        a.load(4, _SAVED, CONTEXT, _MARK)
        a.alu(ebpf.MOV, R1, mark)
        a.store(4, CONTEXT, _MARK, R1)
        a.alu64_register(ebpf.MOV, R1, CONTEXT)
        a.load(4, R2, _RECORD, REPLAY_AT)
        a.alu(ebpf.MOV, R3, 0)
        a.call_helper(_HELPER_CLONE_REDIRECT)
        a.store(4, CONTEXT, _MARK, _SAVED)
        a.jump(go_on)

        a.place(divert)
        a.load(8, R1, _ROW, _CELL_BYTES * GIVEN)
        a.load(8, R2, _ROW, _CELL_BYTES * RETURNED)
        a.jump_if64_register(ebpf.JLE, R1, R2, go_on)
        _count(a, GIVEN)
        a.alu(ebpf.MOV, R1, mark)
        a.store(4, CONTEXT, _MARK, R1)
        a.load(4, R1, _RECORD, REPLAY_AT)
        a.alu(ebpf.MOV, R2, 0)
        a.call_helper(_HELPER_REDIRECT)
        a.exit()

        a.place(drop)
        _verdict(a, TC_ACT_SHOT)
        a.place(go_on)
        _verdict(a, TC_ACT_UNSPEC)

    return _load("kage_replay", append)


def outlet_program(registry: Registry) -> int:
    """Load the program at a hold tap's ingress, where released frames come from; its descriptor."""

    def append(a: Assembler) -> None:
        drop = a.new_label()
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        _look_up(a, registry, _SOURCE, drop)
        a.load(4, R1, _RECORD, MODE_AT)
        a.jump_if(ebpf.JEQ, R1, MODES[GateMode.CLOSED], drop)
        _verdict(a, TC_ACT_UNSPEC)
        a.place(drop)
        _verdict(a, TC_ACT_SHOT)

    return _load("kage_outlet", append)


def back_program(registry: Registry) -> int:
    """Load the program at a port's egress; its descriptor.

    A bridge does not send a frame out of the port it came in on. A released one comes from another, so its VM's host
    would hear what its own VM says, and learn that it is elsewhere.
    """

    def append(a: Assembler) -> None:
        go_on = a.new_label()
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        _look_up(a, registry, _SOURCE, go_on)
        a.load(4, R1, CONTEXT, _IFINDEX)
        a.load(4, R2, _RECORD, OWNER_AT)
        a.jump_if_register(ebpf.JNE, R1, R2, go_on)
        _verdict(a, TC_ACT_SHOT)
        a.place(go_on)
        _verdict(a, TC_ACT_UNSPEC)

    return _load("kage_back", append)


def inlet_program(mark: int) -> int:
    """Load the program at a tap's egress; its descriptor."""

    def append(a: Assembler) -> None:
        ours = a.new_label()
        a.load(4, R2, R1, _MARK)
        a.jump_if(ebpf.JEQ, R2, mark, ours)
        _verdict(a, TC_ACT_SHOT)
        a.place(ours)
        _verdict(a, TC_ACT_UNSPEC)

    return _load("kage_inlet", append)


def by_rules_program(slot_fd: int, count_fd: int, hold_ifindex: int, mark: int) -> int:
    """Load the program that leaves the decision to the classifier in a slot of its own; its descriptor.

    While that is empty, every frame is held.
    """

    def append(a: Assembler) -> None:
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        a.map_address(R2, slot_fd)
        a.alu(ebpf.MOV, R3, 0)
        a.call_helper(_HELPER_TAIL_CALL)
        _append_hold(a, count_fd, hold_ifindex, mark)

    return _load("kage_by_rules", append)


def drain_program(count_fd: int, hold_ifindex: int, mark: int) -> int:
    """Load the program that lets frames go on when no earlier one is in the hold tap, else sends them after it."""

    def append(a: Assembler) -> None:
        behind = a.new_label()
        a.alu64_register(ebpf.MOV, CONTEXT, R1)
        a.map_value_address(R1, count_fd)
        a.load(8, R2, R1, 0)
        a.load(8, R3, R1, _CELL_BYTES)
        a.jump_if64_register(ebpf.JGT, R2, R3, behind)
        _verdict(a, TC_ACT_UNSPEC)
        a.place(behind)
        _append_hold(a, count_fd, hold_ifindex, mark)

    return _load("kage_drain", append)


def ending_of(count_fd: int, hold_ifindex: int, mark: int) -> Ending:
    """The ending of a switched VM's classifier: what a rule lets go is left to the next place, the rest is held."""

    def append(a: Assembler) -> None:
        transmit = a.new_label()
        a.jump_if(ebpf.JSET, WORD, TRANSMIT, transmit)
        _append_hold(a, count_fd, hold_ifindex, mark)
        a.place(transmit)
        _verdict(a, TC_ACT_UNSPEC)

    return append


def _append_hold(a: Assembler, count_fd: int, hold_ifindex: int, mark: int) -> None:
    a.map_value_address(R1, count_fd)
    a.alu64(ebpf.MOV, R2, 1)
    a.atomic_add64(R1, 0, R2)
    _redirect_marked(a, hold_ifindex, mark)


assert CONTEXT == R6  # also in the programs made here, where R7 to R9 are kept
