"""One checkpoint from a paused guest's memory into a staging slot.

What is known from before the pause may be copied while QEMU saves the devices. Saving them must not write guest memory,
but that is QEMU's business and not a promise: so the look comes after the save, and what it finds becomes a further
part that is applied after the first.
"""

from __future__ import annotations

from kagemusha.capture.dirty import DirtyMemory, Found, page_count
from kagemusha.errors import BugError
from kagemusha.kernel.staging import StagingSlot
from kagemusha.model.checkpoint import SealedCheckpoint
from kagemusha.model.ids import Epoch
from kagemusha.model.memory import PAGE_BYTES


class CheckpointCapture:
    """Fills one slot: :meth:`copy_noted` if there is time, :meth:`copy_pages` after the save, then :meth:`finish`.

    :ivar runs: page runs of the finished checkpoint.
    """

    def __init__(self, epoch: Epoch, index: int, slot: StagingSlot, dirty: DirtyMemory) -> None:
        self._epoch = epoch
        self._index = index
        self._slot = slot
        self._dirty = dirty
        self._found: list[Found] = []
        self.runs = 0
        self.data_bytes = 0

    def copy_noted(self) -> int:
        """Copy what was known before the pause into the slot; returns the bytes of this part."""
        return self._add(*self._dirty.copy_noted(self._slot.data))

    def copy_pages(self) -> int:
        """Copy what was written and is not copied yet into the slot; returns the bytes of this part."""
        return self._add(*self._dirty.copy_written(self._slot.data[self.data_bytes :]))

    def _add(self, found: Found, size: int) -> int:
        if size:
            self._found.append(found)
            self.data_bytes += size
        return size

    def finish(
        self, device_state: bytes, rules: bytes = b"", *, inbound_seen: int = 0, switch_session: int = 0
    ) -> SealedCheckpoint:
        """The checkpoint is complete: pages of all parts and this device state. The guest may run by now.

        :param rules: the rule set in force, encoded; empty: as in the checkpoint before.
        :param inbound_seen: number of the last frame that the guest had read from its NIC; 0: not known.
        :param switch_session: in which the switch has sealed the epoch's output; 0: in none.
        """
        parts = [self._dirty.runs_of(found) for found in self._found]
        for part in parts:
            end = self.runs + len(part)
            if end > len(self._slot.runs):
                raise BugError("more page runs than a slot takes", operation="copy pages", epoch=self._epoch)
            self._slot.runs[self.runs : end] = part
            self.runs = end
        if sum(map(page_count, parts)) * PAGE_BYTES != self.data_bytes:
            raise BugError("page runs and copied pages do not agree", operation="copy pages", epoch=self._epoch)
        self._slot.put_device_state(device_state, rules)
        lengths = tuple(map(len, parts))
        return SealedCheckpoint(
            self._epoch,
            self._index,
            lengths,
            self.data_bytes,
            len(device_state),
            len(rules),
            inbound_seen,
            switch_session,
        )
