"""Which frames are copied for the detectors, as pcap-filter expressions: signalling, and nothing that is many.

Media is not among them. The RTP detector gets what looks like RTP and comes from the VM, at some moments only
(``monitor``).
"""

from __future__ import annotations

from kagemusha.gate.rules.libpcap import ClassicProgram, compile_expression
from kagemusha.model.flow_policy import FlowsTable

_TCP_CONTROL = (
    "(ip and tcp and tcp[tcpflags] & (tcp-syn|tcp-fin|tcp-rst) != 0) or (ip6 proto 6 and ip6[53] & 0x07 != 0)"
)
_LOOKS_LIKE_RTP = "(ip and udp and udp[8] & 0xc0 = 0x80) or (ip6 proto 17 and ip6[48] & 0xc0 = 0x80)"


def signalling_filter(table: FlowsTable) -> ClassicProgram | None:
    """What the detectors of signalling read; None: none of them is wanted."""
    parts = []
    if "sip" in table.detectors:
        parts += [f"({transport} port {port})" for transport in ("udp", "tcp") for port in table.sip_ports]
    if "dns" in table.detectors:
        parts.append("(udp port 53)")
    if "tcp" in table.detectors:
        parts.append(_TCP_CONTROL)
    return compile_expression(" or ".join(parts)) if parts else None


def rtp_filter(table: FlowsTable) -> ClassicProgram | None:
    """What the detector of RTP reads; None: it is not wanted."""
    return compile_expression(_LOOKS_LIKE_RTP) if "rtp" in table.detectors else None
