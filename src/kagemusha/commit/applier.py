"""The thread that writes committed checkpoints into the waiting QEMU, one after the other, in order.

Invariant (I3): a checkpoint is given here only after it was acknowledged, and once begun it is finished, so when
the thread is idle the memory is exactly the last acknowledged checkpoint, and ``device_state`` belongs to it.
Almost all of its time is spent in process_vm_writev, where Python's lock is free.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import dataclass

from kagemusha.commit.memory import StandbyMemory
from kagemusha.kernel.fault_point import reach
from kagemusha.kernel.staging import StagingSlot
from kagemusha.model.faults import Fault
from kagemusha.model.ids import Epoch
from kagemusha.wire.tally import StreamTotals


@dataclass(frozen=True, slots=True)
class CommittedCheckpoint:
    """An acknowledged checkpoint that lies complete in a slot.

    :ivar inbound_seen: number of the last frame that its guest had read from its NIC; 0: not known.
    :ivar switch_session: in which the switch has sealed its output, and may be told of its commit; 0: in none.
    :ivar whole_t: when it was complete and verified, CLOCK_MONOTONIC seconds: from then on it may be acknowledged.
    """

    epoch: Epoch
    slot: int
    totals: StreamTotals
    inbound_seen: int = 0
    switch_session: int = 0
    whole_t: float = 0.0


@dataclass(frozen=True, slots=True)
class Applied:
    """It is in memory now, and its slot is free. ``error`` is set if it could not be written."""

    checkpoint: CommittedCheckpoint
    device_state: bytes
    apply_us: int
    error: OSError | None


class Applier:
    """Owns the thread; ``fileno`` is readable when :meth:`take` has a result."""

    def __init__(self, memory: StandbyMemory, slots: tuple[StagingSlot, ...]) -> None:
        self._memory = memory
        self._slots = slots
        self._todo: queue.SimpleQueue[CommittedCheckpoint | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Applied] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kage-apply", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """For select."""
        return self._wake_reader.fileno()

    def apply(self, checkpoint: CommittedCheckpoint) -> None:
        """Queue an acknowledged checkpoint."""
        self._todo.put(checkpoint)

    def take(self) -> Applied | None:
        """The next result, or None."""
        try:
            self._wake_reader.recv(1)
        except BlockingIOError:
            return None
        return self._done.get()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._todo.put(None)
        self._thread.join()
        self._wake_reader.close()
        self._wake_writer.close()

    def _run(self) -> None:
        while (checkpoint := self._todo.get()) is not None:
            self._done.put(self._apply(checkpoint))
            self._wake_writer.send(b"\0")

    def _apply(self, checkpoint: CommittedCheckpoint) -> Applied:
        slot, totals = self._slots[checkpoint.slot], checkpoint.totals
        began = time.monotonic()
        error = None
        try:
            self._memory.write(slot.runs[: totals.runs], slot.data[: totals.data_bytes])
        except OSError as failure:
            error = failure
        reach(Fault.STANDBY_APPLIED)
        device_state = slot.device[: totals.device_bytes].tobytes()
        slot.trim(totals.data_bytes)
        return Applied(checkpoint, device_state, int((time.monotonic() - began) * 1e6), error)
