"""Detectors on a capture file: what they would have found, frame by frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kagemusha.gate.flows.detection import Detection
from kagemusha.gate.flows.guard import Guard
from kagemusha.gate.flows.packet import Direction, parse
from kagemusha.gate.rules.libpcap import CapturedFrame
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowEvent, FlowInformation
from kagemusha.model.rules import VmAddresses


def replay(
    frames: Iterable[CapturedFrame], table: FlowsTable, addresses: VmAddresses
) -> Iterator[tuple[CapturedFrame, FlowEvent, str | None]]:
    """What is found at each frame, and why there could be no rule that transmits it; None: there could.

    A frame is the VM's if its source address is. What is neither from nor to the VM is passed over.
    """
    detection, guard = Detection(table), Guard(table, addresses)
    own = frozenset((*addresses.ipv4, *addresses.ipv6))
    for frame in frames:
        packet = parse(frame.frame, Direction.FROM_VM, frame.timestamp_s)
        if packet is not None and packet.source not in own:
            packet = parse(frame.frame, Direction.TO_VM, frame.timestamp_s) if packet.target in own else None
        events = detection.expire(frame.timestamp_s)
        events += detection.feed(packet) if packet is not None else []
        for event in events:
            yield frame, event, guard.refusal(event, transmits=True) if isinstance(event, FlowInformation) else None
