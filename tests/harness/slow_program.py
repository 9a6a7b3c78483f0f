"""A tc program that takes many milliseconds for a frame, and lets it go on to the next place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kagemusha.gate.rules import ebpf
from kagemusha.gate.rules.ebpf import R0, R1, R2, R3, R6, R7, Assembler
from kagemusha.kernel.bpf_program import load_program
from kagemusha.kernel.bpf_slot import ProgramSlot
from kagemusha.kernel.bpf_table import CellTable

_ROUNDS = 240_000  # of a loop, as many as the verifier is willing to follow; and the kernel allows 33 tail calls
_TAIL_CALL, _UNSPEC = 12, -1


class SlowProgram:
    """Runs its loop, calls itself as often as it can, and lets the frame go on."""

    def __init__(self, stack: ExitStack) -> None:
        self._cells = CellTable(rows=1, cells=1)
        stack.callback(self._cells.close)
        self._row = self._cells.row(0)
        stack.callback(self._row.release)
        slot = ProgramSlot()
        stack.callback(slot.close)
        a = Assembler()
        again = a.new_label()
        a.alu64_register(ebpf.MOV, R7, R1)
        a.map_value_address(R1, self._cells.fd)
        a.store_immediate(8, R1, 0, 1)
        a.alu64(ebpf.MOV, R6, 0)
        a.place(again)
        a.alu64(ebpf.ADD, R6, 1)
        a.jump_if64(ebpf.JLT, R6, _ROUNDS, again)
        a.alu64_register(ebpf.MOV, R1, R7)
        a.map_address(R2, slot.fd)
        a.alu(ebpf.MOV, R3, 0)
        a.call_helper(_TAIL_CALL)
        a.alu(ebpf.MOV, R0, _UNSPEC)
        a.exit()
        self.fd = load_program(a.assemble().instructions, "test_slow")
        slot.put(self.fd)

    def forget(self) -> None:
        """Nothing has come yet."""
        self._row[0] = 0

    def started(self) -> bool:
        """Whether a frame has come to it."""
        return self._row[0] != 0


@contextmanager
def slow_program() -> Iterator[SlowProgram]:
    with ExitStack() as stack:
        yield SlowProgram(stack)
