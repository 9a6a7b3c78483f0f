"""SIP with SDP: the media that a call has negotiated may be sent for as long as the call lasts.

Offer and answer (RFC 3264) are told by the transaction that carries them: a description in an INVITE, UPDATE or PRACK
is an offer, one from the other side in an answer to it (or in its ACK or PRACK) the answer; in an answer to an INVITE
without one it is the offer, and the ACK has the answer. An offer alone brings nothing about.

::

    INVITE/UPDATE with SDP ── 18x, 2xx, ACK, PRACK with SDP ──► flows of the leg       (leg: Call-ID and both tags)
    2xx ──► they are confirmed       3xx–6xx ──► those confirmed before       BYE, CANCEL (of an early leg) ──► none

A leg's name is a digest of Call-ID and tags, so it can be found again from its rules' names, also by a monitor on
another host that has never seen the call being set up. Which flows are permitted ``guard`` decides.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kagemusha.errors import ConfigError
from kagemusha.gate.flows.packet import Direction, Packet
from kagemusha.gate.flows.sdp import MalformedError, MediaStream, parse_sdp
from kagemusha.gate.flows.sip_message import BEGINNING, SipMessage, parse_sip
from kagemusha.gate.flows.sip_stream import SipStreams
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowAddress, FlowEnd, FlowEvent, FlowInformation, Host, Payload, Transport

OFFER_TTL_S = 180.0  # timer C of RFC 3261: no transaction takes longer
SESSION_MIN_S, SESSION_MAX_S = 90.0, 7200.0  # RFC 4028: the least; and what we let somebody else ask for
_CARRIERS = frozenset({"INVITE", "UPDATE", "PRACK"})
_SHOWN_CHARS = 100
_Transaction = tuple[str, Direction, int]


@dataclass(frozen=True, slots=True)
class _Offer:
    side: Direction
    streams: tuple[MediaStream, ...]
    at_s: float


@dataclass(slots=True)
class _Leg:
    """:ivar flows: in force, by name. ``confirmed``: to go back to when a change of the session fails."""

    ttl_s: float
    until_s: float
    flows: dict[str, FlowInformation] = field(default_factory=dict)
    confirmed: dict[str, FlowInformation] = field(default_factory=dict)


class SipDetector:
    """Reads the signalling of a VM."""

    protocol = "sip"

    def __init__(self, table: FlowsTable) -> None:
        self._table = table
        self._ports = frozenset(table.sip_ports)
        self._streams = SipStreams()
        self._offers: OrderedDict[_Transaction, _Offer] = OrderedDict()
        self._early: OrderedDict[_Transaction, set[str]] = OrderedDict()
        self._legs: OrderedDict[str, _Leg] = OrderedDict()

    @property
    def size(self) -> tuple[int, int, int]:
        """Offers, legs, and bytes of signalling that are kept."""
        return len(self._offers) + len(self._early), len(self._legs), self._streams.buffered_bytes()

    def feed(self, packet: Packet) -> Sequence[FlowEvent]:
        """Look at a packet; anything but signalling is passed over."""
        if packet.source_port not in self._ports and packet.target_port not in self._ports:
            return ()
        if packet.transport is Transport.TCP:
            messages = self._streams.feed(packet)
        else:
            messages = [packet.payload] if not packet.cut and BEGINNING.match(packet.payload) else []
        events: list[FlowEvent] = []
        for data in messages:
            try:
                events += self._take(parse_sip(data), packet.direction, packet.time_s)
            except MalformedError:
                continue  # nobody acts on it; whoever it was for may
        return events

    def used(self, names: Collection[str], now_s: float) -> Sequence[FlowEvent]:
        """Calls whose media the VM has sent go on."""
        events: list[FlowEvent] = []
        for name in {_leg_of(name) for name in names} & self._legs.keys():
            events += self._refresh(name, now_s)
        return events

    def expire(self, now_s: float) -> Sequence[FlowEvent]:
        """Calls that were last heard of too long ago."""
        while self._offers and next(iter(self._offers.values())).at_s + OFFER_TTL_S <= now_s:
            transaction, _ = self._offers.popitem(last=False)
            self._early.pop(transaction, None)
        over = [name for name, leg in self._legs.items() if leg.until_s <= now_s]
        return [event for name in over for event in self._end(name, "nothing was heard of the call")]

    def resume(self, flows: Sequence[FlowInformation], now_s: float) -> None:
        """Take over the calls that these flows belong to."""
        for flow in flows:
            leg = self._leg(_leg_of(flow.name), now_s)
            if leg is not None:
                leg.ttl_s, leg.until_s = flow.ttl_s, now_s + flow.ttl_s
                leg.flows[flow.name] = leg.confirmed[flow.name] = flow

    # --- messages -------------------------------------------------------------------------------------------------

    def _take(self, message: SipMessage, side: Direction, now_s: float) -> Sequence[FlowEvent]:
        requester = side if message.status is None else side.other
        transaction = (message.call_id, requester, message.number)
        events: list[FlowEvent] = []
        if message.status is None and message.method == "BYE":
            return self._end(_name(message), "the call was ended (BYE)")
        if message.status is None and message.method == "CANCEL":
            return self._fail(transaction, "the call was cancelled")
        if message.status is not None and message.status >= 300:
            if message.method in _CARRIERS:
                self._offers.pop(transaction, None)
                return self._fail(transaction, f"refused ({message.status})")
            return ()
        if message.sdp is not None:
            events += self._describe(message, side, transaction, now_s)
        if message.method in ("INVITE", "UPDATE") and message.status is not None and message.status >= 200:
            events += self._confirm(message, transaction, now_s)
        return events

    def _describe(
        self, message: SipMessage, side: Direction, transaction: _Transaction, now_s: float
    ) -> Sequence[FlowEvent]:
        """A session description: an offer, or the answer to one."""
        if message.method not in (*_CARRIERS, "ACK"):
            return ()
        streams = parse_sdp(message.sdp or b"")
        if message.method == "PRACK" and message.status is None and message.acknowledged is not None:
            answered = (message.call_id, side, message.acknowledged[0])
            offer = self._offers.get(answered)
            transaction = answered if offer is not None and offer.side is not side else transaction
        offer = self._offers.get(transaction)
        if offer is None or offer.side is side:
            if message.method != "ACK":
                self._remember(transaction, _Offer(side, streams, now_s))
            return ()
        ours, theirs = (streams, offer.streams) if side is Direction.FROM_VM else (offer.streams, streams)
        return self._negotiated(message, transaction, ours, theirs, now_s)

    def _remember(self, transaction: _Transaction, offer: _Offer) -> None:
        self._offers[transaction] = offer
        self._offers.move_to_end(transaction)
        if len(self._offers) > self._table.max_calls:
            forgotten, _ = self._offers.popitem(last=False)
            self._early.pop(forgotten, None)

    def _negotiated(
        self,
        message: SipMessage,
        transaction: _Transaction,
        ours: tuple[MediaStream, ...],
        theirs: tuple[MediaStream, ...],
        now_s: float,
    ) -> Sequence[FlowEvent]:
        if not (message.from_tag and message.to_tag):
            return ()
        name = _name(message)
        leg = self._leg(name, now_s)
        if leg is None:
            return ()
        if message.status is not None and message.status < 200:
            self._early.setdefault(transaction, set()).add(name)
            if len(self._early) > self._table.max_calls:
                self._early.popitem(last=False)
        leg.ttl_s = self._ttl_s(message, leg)
        leg.until_s = now_s + leg.ttl_s
        flows: dict[str, FlowInformation] = {
            each.name: each for each in self._flows(name, leg.ttl_s, message.call_id, ours, theirs)
        }
        events = self._exchange(leg, flows, "the call's media have changed")
        if message.status is None:
            leg.confirmed = dict(flows)  # in an ACK or PRACK: nothing can refuse it any more
        return events

    def _confirm(self, message: SipMessage, transaction: _Transaction, now_s: float) -> Sequence[FlowEvent]:
        """A 2xx: this leg stays; others that rang at the same time do not."""
        name = _name(message)
        others = self._early.pop(transaction, set()) - {name}
        events = [event for other in others for event in self._end(other, "another one answered the call")]
        leg = self._legs.get(name)
        if leg is not None:
            leg.confirmed = dict(leg.flows)
            leg.ttl_s = self._ttl_s(message, leg)
            events += self._refresh(name, now_s)
        return events

    def _fail(self, transaction: _Transaction, why: str) -> Sequence[FlowEvent]:
        events: list[FlowEvent] = []
        for name in self._early.pop(transaction, set()):
            leg = self._legs.get(name)
            if leg is not None and leg.confirmed:
                events += self._exchange(leg, leg.confirmed, why)
            elif leg is not None:
                events += self._end(name, why)
        return events

    # --- legs -----------------------------------------------------------------------------------------------------

    def _leg(self, name: str, now_s: float) -> _Leg | None:
        """The leg of this name, a new one if need be; None: there are too many."""
        if name not in self._legs:
            if len(self._legs) >= self._table.max_calls:
                return None
            ttl_s = self._table.call_ttl_s
            self._legs[name] = _Leg(ttl_s, now_s + ttl_s)
        return self._legs[name]

    def _ttl_s(self, message: SipMessage, leg: _Leg) -> float:
        asked = message.session_expires_s
        return leg.ttl_s if asked is None else min(max(float(asked), SESSION_MIN_S), SESSION_MAX_S)

    def _refresh(self, name: str, now_s: float) -> Sequence[FlowEvent]:
        leg = self._legs[name]
        leg.until_s = now_s + leg.ttl_s
        return list(leg.flows.values())

    def _end(self, name: str, why: str) -> Sequence[FlowEvent]:
        leg = self._legs.pop(name, None)
        return [] if leg is None else [FlowEnd(flow, why) for flow in leg.flows]

    def _exchange(self, leg: _Leg, flows: dict[str, FlowInformation], why: str) -> list[FlowEvent]:
        events: list[FlowEvent] = [FlowEnd(name, why) for name in leg.flows if name not in flows]
        leg.flows = dict(flows)
        return [*events, *flows.values()]

    def _flows(
        self,
        leg: str,
        ttl_s: float,
        call_id: str,
        ours: tuple[MediaStream, ...],
        theirs: tuple[MediaStream, ...],
    ) -> list[FlowInformation]:
        """What the VM sends of the streams that both sides have."""
        found: dict[FlowAddress, FlowInformation] = {}
        control = self._table.rtcp == "transmit"
        shown = "".join(char if char.isprintable() else "?" for char in call_id[:_SHOWN_CHARS])
        for index, (own, peer) in enumerate(zip(ours, theirs, strict=False)):
            if not (own.is_rtp and peer.is_rtp and own.port and peer.port):
                continue
            mux = own.mux and peer.mux
            payload = Payload.RTP_AND_RTCP if mux and control else Payload.RTP
            places = [("", payload, (own.address, own.port), (peer.address, peer.port))]
            if control and not mux:
                places.append(("c", Payload.RTCP, own.rtcp_place, peer.rtcp_place))
            for suffix, kind, source, target in places:
                address = _address(source, target)
                if address is not None and address not in found:
                    why = f"SIP call {shown}: {own.kind}{' (RTCP)' if suffix else ''}"
                    flow = f"sip-{leg}-{index}{suffix}"
                    found[address] = FlowInformation(
                        self.protocol, flow, address, kind, self._table.media_class, ttl_s, why
                    )
        return list(found.values())


def _address(source: tuple[Host | None, int], target: tuple[Host | None, int]) -> FlowAddress | None:
    if source[0] is None or target[0] is None:
        return None
    try:
        return FlowAddress(Transport.UDP, source[0], source[1], target[0], target[1])
    except ConfigError:  # of two families, or a port beyond the last
        return None


def _name(message: SipMessage) -> str:
    """The leg that a message belongs to, whichever side sent it."""
    parts = (message.call_id, *sorted((message.from_tag, message.to_tag)))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _leg_of(name: str) -> str:
    return name.split("-")[1] if name.count("-") == 2 else name
