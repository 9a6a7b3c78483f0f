"""What a detector's word may bring about, whatever the detector. The last look before flow information becomes a rule.

Invariant: a rule that transmits is of UDP, from an address of the VM. Of media: it asks for the mark of RTP, names both
addresses and both ports, and neither port is below 1024, SIP's, DNS's or otherwise protected. Of DNS: only if the table
names a class, and with DNS's port on one side. Nothing of TCP is ever transmitted. So a forged description, or a
detector that is mistaken, sends ahead of its commit at most what looks like RTP, of the flow that it names.
"""

from __future__ import annotations

from kagemusha.gate.flows.plain import DNS_PORT
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowAddress, FlowInformation, Host, Payload, Transport
from kagemusha.model.rules import VmAddresses


class Guard:
    """Judges flow information for one VM.

    :param addresses: the VM's own.
    """

    def __init__(self, table: FlowsTable, addresses: VmAddresses) -> None:
        self._table = table
        self._own: frozenset[Host] = frozenset((*addresses.ipv4, *addresses.ipv6))

    def refusal(self, flow: FlowInformation, *, transmits: bool) -> str | None:
        """Why there must be no rule for a flow; None: there may be.

        :param transmits: whether its class does.
        """
        address = flow.address
        if address.source not in self._own:
            return f"{address.source} is no address of the VM"
        if address.target in self._own:
            return f"{address.target} is the VM itself"
        if not transmits:
            return None
        if address.transport is not Transport.UDP:
            return "TCP is never sent ahead of its commit"
        if flow.protocol == "dns":
            asked = self._table.dns_class == flow.class_name
            return None if asked and DNS_PORT in (address.source_port, address.target_port) else "it is not DNS"
        return self._refuse_media(flow, address)

    def _refuse_media(self, flow: FlowInformation, address: FlowAddress) -> str | None:
        if flow.protocol not in ("sip", "rtp") or flow.class_name != self._table.media_class:
            return "it is no media"
        if flow.payload is Payload.ANY:
            return "it does not ask for the mark of RTP"
        for port in (address.source_port, address.target_port):
            if port is None:
                return "it does not name both ports"
            if self._table.protects(port):
                return f"port {port} is protected"
        if address.target.is_multicast or address.target.is_unspecified or address.target.is_loopback:
            return f"{address.target} is no address of a peer"
        return None
