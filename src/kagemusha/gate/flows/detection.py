"""All detectors of a VM together: each packet goes to each; media that is signalled is left to the signalling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from kagemusha.gate.flows.detector import Detector
from kagemusha.gate.flows.packet import Packet
from kagemusha.gate.flows.plain import DnsDetector, TcpDetector
from kagemusha.gate.flows.rtp import RtpDetector
from kagemusha.gate.flows.sip import SipDetector
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowEvent, FlowInformation


class Detection:
    """The detectors that the table names."""

    def __init__(self, table: FlowsTable) -> None:
        makers: dict[str, Callable[[FlowsTable], Detector]] = {
            "sip": SipDetector,
            "rtp": RtpDetector,
            "dns": DnsDetector,
            "tcp": TcpDetector,
        }
        self._detectors: list[Detector] = [makers[name](table) for name in table.detectors]
        self._rtp = next((each for each in self._detectors if isinstance(each, RtpDetector)), None)

    def feed(self, packet: Packet) -> list[FlowEvent]:
        """What the detectors make of a packet."""
        return self._settled(event for each in self._detectors for event in each.feed(packet))

    def expire(self, now_s: float) -> list[FlowEvent]:
        """What has ended by itself."""
        return [event for each in self._detectors for event in each.expire(now_s)]

    def used(self, names: Collection[str], now_s: float) -> list[FlowEvent]:
        """The VM has sent frames of these flows lately."""
        return [event for each in self._detectors for event in each.used(names, now_s)]

    def resume(self, flows: Sequence[FlowInformation], now_s: float) -> None:
        """A predecessor, perhaps on another host, has left these flows behind."""
        for each in self._detectors:
            each.resume([flow for flow in flows if flow.protocol == each.protocol], now_s)
        self._settled(flows)

    def _settled(self, events: Iterable[FlowEvent]) -> list[FlowEvent]:
        told = list(events)
        signalled = [each.address for each in told if isinstance(each, FlowInformation) and each.protocol == "sip"]
        return [*told, *self._rtp.signalled(signalled)] if self._rtp is not None and signalled else told
