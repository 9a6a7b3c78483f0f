"""A captured checkpoint as a value: where its bytes lie in a staging slot."""

from __future__ import annotations

from dataclasses import dataclass

from kagemusha.model.ids import Epoch


@dataclass(frozen=True, slots=True)
class SealedCheckpoint:
    """Where a captured checkpoint lies, small enough to be sent to another process.

    :ivar slot: index of its staging slot.
    :ivar parts: run counts of the parts it consists of; runs ascend inside a part, and a later part is
        applied after an earlier one.
    :ivar data_bytes: bytes of page contents.
    :ivar device_bytes: bytes of device state.
    :ivar rules_bytes: bytes of the rule set behind it; 0: none, it is as it was.
    :ivar inbound_seen: number of the last frame that the guest had read from its NIC when it stood; 0: not known.
    :ivar switch_session: in which the switch has sealed its output, and may be told of its commit; 0: in none.
    """

    epoch: Epoch
    slot: int
    parts: tuple[int, ...]
    data_bytes: int
    device_bytes: int
    rules_bytes: int = 0
    inbound_seen: int = 0
    switch_session: int = 0
