"""Whether to copy pages while QEMU saves the devices, or after it: what this host has shown to be quicker.

Beside the save the two overlap, but compete for cores and caches, and pages that were written last are copied twice.
With spare cores and much to copy the overlap wins; on few cores, or with little to copy, it loses.
docs/adr/0003-copy-order.md has the measurement. So both are tried: the one with the shorter recent pauses is used, the
other now and then, so that a change is noticed.

Both orders give the same checkpoint; nothing but the length of the pause depends on the choice.
"""

from __future__ import annotations

import enum

EXPLORE_EVERY = 24
WEIGHT = 1 / 8


class CopyOrder(enum.Enum):
    """When pages are copied."""

    BESIDE_SAVE = "beside"  # and what was written last is copied after it
    AFTER_SAVE = "after"

    @property
    def other(self) -> CopyOrder:
        """The other one."""
        return CopyOrder.AFTER_SAVE if self is CopyOrder.BESIDE_SAVE else CopyOrder.BESIDE_SAVE


class OrderChoice:
    """Keeps a moving average of the pauses of each order."""

    def __init__(self) -> None:
        self._average_us: dict[CopyOrder, float] = {}
        self._taken = 0

    @property
    def better(self) -> CopyOrder:
        """The order with the shorter pauses so far."""
        after, beside = (self._average_us.get(order, 0.0) for order in (CopyOrder.AFTER_SAVE, CopyOrder.BESIDE_SAVE))
        return CopyOrder.BESIDE_SAVE if beside < after else CopyOrder.AFTER_SAVE

    def next(self) -> CopyOrder:
        """The order of the next checkpoint."""
        self._taken += 1
        return self.better.other if self._taken % EXPLORE_EVERY == 0 else self.better

    def observed(self, order: CopyOrder, pause_us: int) -> None:
        """A pause with this order took so long."""
        before = self._average_us.get(order, float(pause_us))
        self._average_us[order] = before + WEIGHT * (pause_us - before)
