"""What a detector is: packets in, flow information out. Detectors are pure: time comes with the packets.

Invariants of each: any packet is taken, and nothing is raised; state is bounded, whatever comes; what a detector has
said lapses unless it says it again. A detector may be wrong: what it says is looked at by ``guard`` before it counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from kagemusha.gate.flows.packet import Packet
from kagemusha.model.flows import FlowEvent, FlowInformation


class Detector(Protocol):
    """A detector of one protocol.

    :ivar protocol: that its flows' names begin with.
    """

    protocol: str

    def feed(self, packet: Packet) -> Sequence[FlowEvent]:
        """Look at a packet."""
        ...

    def used(self, names: Collection[str], now_s: float) -> Sequence[FlowEvent]:
        """The VM has sent frames of these flows since the last call."""
        ...

    def expire(self, now_s: float) -> Sequence[FlowEvent]:
        """What has ended by nothing having been said of it any more."""
        ...

    def resume(self, flows: Sequence[FlowInformation], now_s: float) -> None:
        """A predecessor, perhaps on another host, has said that there are these flows of this protocol."""
        ...
