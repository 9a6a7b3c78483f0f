"""Flow information without SIP: RTP by its looks, DNS, TCP, packets, the guard, the book; and bytes of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.harness.sip_calls import FROM, PEER, PEER6, TO, VM, VM6, Call, frame, rtp, sdp

from kagemusha.errors import ConfigError
from kagemusha.gate.flows.book import FlowBook
from kagemusha.gate.flows.detection import Detection
from kagemusha.gate.flows.guard import Guard
from kagemusha.gate.flows.packet import ACK, FIN, RST, SYN, Direction, Packet, parse
from kagemusha.gate.flows.plain import DNS_TTL_S, MAX_KNOWN, DnsDetector, TcpDetector
from kagemusha.gate.flows.rtp import MAX_CANDIDATES, RtpDetector
from kagemusha.gate.flows.sdp import MalformedError, parse_sdp
from kagemusha.gate.flows.sip_message import parse_sip
from kagemusha.gate.rules.libpcap import compile_expression
from kagemusha.model.config import Config
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import (
    FlowAddress,
    FlowEnd,
    FlowEvent,
    FlowInformation,
    Host,
    Payload,
    Transport,
    flow_of_rule,
)
from kagemusha.model.rules import Action, VmAddresses

ALL = FlowsTable(detectors=("sip", "rtp", "dns", "tcp"), dns_class="lookup", tcp_class="stream")
OWN = VmAddresses.parse((), (VM, VM6))
GUARD = Guard(ALL, OWN)
UDP = Transport.UDP


def packet(payload: bytes, *, source_port: int = 20_000, target_port: int = 30_000, time_s: float = 0.0) -> Packet:
    return Packet(FROM, time_s, UDP, ip_address(VM), source_port, ip_address(PEER), target_port, payload)


def media(**changes: object) -> FlowInformation:
    address = FlowAddress(UDP, ip_address(VM), 20_000, ip_address(PEER), 30_000)
    flow = FlowInformation("sip", "sip-0-0", address, Payload.RTP, "media", 60.0, "a call")
    places = {key: value for key, value in changes.items() if key in FlowAddress.__dataclass_fields__}
    rest = {key: value for key, value in changes.items() if key not in places}
    return replace(flow, address=replace(address, **places), **rest)  # type: ignore[arg-type]


# --- RTP --------------------------------------------------------------------------------------------------------------


def feed(detector: RtpDetector, numbers: Sequence[int], *, at_s: float = 0.0, **fields: int) -> list[FlowEvent]:
    found: list[FlowEvent] = []
    for index, number in enumerate(numbers):
        data = rtp(number, 160 * number, **fields)
        found += detector.feed(packet(data, time_s=at_s + index * 0.02))
    return found


def test_rtp_is_believed_after_so_many_in_a_row_and_its_source_alone() -> None:
    detector = RtpDetector(ALL)
    assert feed(detector, range(65_530, 65_530 + ALL.rtp_packets - 1)) == []
    (flow,) = feed(detector, [65_530 + ALL.rtp_packets - 1])
    assert isinstance(flow, FlowInformation)
    program = compile_expression(flow.expression)
    assert program.matches(frame(VM, 20_000, PEER, 30_000, rtp(5, 5)))
    assert not program.matches(frame(VM, 20_000, PEER, 30_000, rtp(5, 5, ssrc=1)))
    assert GUARD.refusal(flow, transmits=True) is None


@pytest.mark.parametrize(
    "numbers",
    [[5] * 40, list(range(40, 0, -1)), [0, 1000] * 20, [number * 4 for number in range(40)]],
    ids=["repeated", "backwards", "jumping", "with gaps"],
)
def test_what_does_not_ascend_is_not_believed(numbers: list[int]) -> None:
    assert feed(RtpDetector(ALL), numbers) == []


def test_changing_sources_types_and_time_stamps_are_not_believed() -> None:
    detector = RtpDetector(ALL)
    for number in range(60):
        assert detector.feed(packet(rtp(number, number * 160, ssrc=number))) == ()
        assert detector.feed(packet(rtp(number, number * 160, ssrc=1000, kind=number % 2))) == ()
        assert detector.feed(packet(rtp(number, number << 24, ssrc=2000))) == ()
        assert detector.feed(packet(rtp(number, number * 160, ssrc=3000, kind=72))) == (), "RTCP"
        assert detector.feed(replace(packet(rtp(number, number * 160, ssrc=4000)), direction=TO)) == ()
        assert detector.feed(packet(b"\x40" + rtp(number, number * 160)[1:])) == (), "another version"


def test_rtp_that_is_not_seen_any_more_is_over() -> None:
    detector = RtpDetector(ALL)
    (flow,) = feed(detector, range(ALL.rtp_packets))
    assert isinstance(flow, FlowInformation)
    (again,) = feed(detector, [500, 501], at_s=ALL.rtp_ttl_s - 1)
    assert again == flow
    assert detector.expire(ALL.rtp_ttl_s + 5) == []
    assert detector.expire(2 * ALL.rtp_ttl_s + 5) == [FlowEnd(flow.name, "no more of it was seen")]


def test_signalled_media_are_left_to_the_signalling() -> None:
    detection, call = Detection(ALL), Call(TO)
    before = [event for number in range(40) for event in detection.feed(packet(rtp(number, number)))]
    (believed,) = before
    detection.feed(call.packet(TO, call.request("INVITE", 1, sdp(PEER, port=30_000))))
    events = detection.feed(call.packet(FROM, call.response(200, "INVITE", 1, sdp(VM, port=20_000))))
    assert FlowEnd(believed.name, "a call has been signalled for it") in events
    detection.feed(call.packet(TO, call.request("BYE", 2, established=True)))
    assert [event for number in range(99) for event in detection.feed(packet(rtp(number, number)))] == []


def test_candidates_are_bounded() -> None:
    detector = RtpDetector(ALL)
    for source in range(MAX_CANDIDATES + 100):
        detector.feed(packet(rtp(1, 1, ssrc=source)))
    assert detector.size == MAX_CANDIDATES


# --- DNS and TCP ------------------------------------------------------------------------------------------------------


def test_dns_of_the_vm() -> None:
    detector = DnsDetector(ALL)
    query, answer = bytes((1, 2, 1, 0)) + bytes(20), bytes((1, 2, 0x81, 0x80)) + bytes(20)
    (asked,) = detector.feed(packet(query, source_port=40_000, target_port=53))
    (told,) = detector.feed(packet(answer, source_port=53, target_port=50_000))
    assert [str(each.address) for each in (asked, told) if isinstance(each, FlowInformation)] == [
        f"udp {VM}:* > {PEER}:53", f"udp {VM}:53 > {PEER}:*",
    ]  # fmt: skip
    assert detector.feed(packet(query, source_port=40_001, target_port=53)) == []
    assert detector.feed(replace(packet(query, target_port=53), direction=TO)) == []
    assert detector.feed(packet(b"short", target_port=53)) == []
    assert len(detector.expire(DNS_TTL_S)) == 2


def test_tcp_connections_from_syn_to_fin_or_reset() -> None:
    detector = TcpDetector(ALL)
    segment = replace(packet(b"", source_port=80, target_port=40_000), transport=Transport.TCP)
    for end in (FIN, RST):
        (opened,) = detector.feed(replace(segment, flags=SYN | ACK))
        assert isinstance(opened, FlowInformation)
        assert opened.class_name == "stream"
        assert detector.feed(replace(segment, flags=ACK, payload=b"x")) == []
        (closed,) = detector.feed(replace(segment, flags=end))
        assert closed.name == opened.name
    for port in range(1, MAX_KNOWN + 50):
        detector.feed(replace(segment, flags=SYN, target_port=port))
    assert detector.size == MAX_KNOWN


# --- the guard --------------------------------------------------------------------------------------------------------


def test_the_guard_lets_media_of_the_vm_pass() -> None:
    assert GUARD.refusal(media(), transmits=True) is None
    v6 = media(source=ip_address(VM6), target=ip_address(PEER6))
    assert GUARD.refusal(v6, transmits=True) is None


@pytest.mark.parametrize(
    "flow",
    [
        media(source=ip_address("192.0.2.11")), media(target=ip_address(VM)), media(payload=Payload.ANY),
        media(source_port=None), media(target_port=None), media(class_name="lookup"),
        media(target=ip_address("224.0.0.1")), media(target=ip_address("0.0.0.0")),
        media(transport=Transport.TCP, payload=Payload.ANY),
        media(protocol="dns", name="dns-0", class_name="lookup"), media(protocol="tcp", name="tcp-0"),
        media(protocol="other", name="other-0"),
        media(protocol="dns", name="dns-0", source_port=53, payload=Payload.ANY),
        *(media(source_port=port) for port in (5060, 5061, 53, 80, 1023, 7777)),
        *(media(target_port=port) for port in (5060, 5061, 53, 22, 7777)),
    ],
    ids=str,
)  # fmt: skip
def test_the_guard_refuses(flow: FlowInformation) -> None:
    guard = Guard(FlowsTable(dns_class="lookup", protected_ports=(7777,)), OWN)
    assert guard.refusal(flow, transmits=True) is not None


def test_a_class_that_holds_may_be_given_to_any_flow_of_the_vm() -> None:
    tcp = media(transport=Transport.TCP, payload=Payload.ANY, protocol="tcp", name="tcp-0", target_port=80)
    assert GUARD.refusal(tcp, transmits=False) is None
    assert GUARD.refusal(media(source=ip_address(PEER)), transmits=False) is not None


def test_dns_is_sent_only_where_the_table_names_its_class() -> None:
    flow = media(protocol="dns", name="dns-0", class_name="lookup", target_port=53, payload=Payload.ANY)
    assert GUARD.refusal(flow, transmits=True) is None
    assert Guard(FlowsTable(), OWN).refusal(flow, transmits=True) is not None


def test_a_forged_description_opens_no_port_of_signalling() -> None:
    for port in (5060, 53, 443):
        detection, book = Detection(ALL), FlowBook(ALL, GUARD)
        book.actions = {"media": Action.TRANSMIT}
        call = Call(TO)
        book.take(detection.feed(call.packet(TO, call.request("INVITE", 1, sdp(PEER, port=port)))), 0)
        book.take(detection.feed(call.packet(FROM, call.response(200, "INVITE", 1, sdp(VM, port=20_000)))), 0)
        assert [flow.address.target_port for flow in book.changes(0).add if flow.address.target_port == port] == []


# --- the book ---------------------------------------------------------------------------------------------------------


def book_with(*flows: FlowInformation, table: FlowsTable = ALL) -> FlowBook:
    book = FlowBook(table, Guard(table, OWN))
    book.actions = {"media": Action.TRANSMIT, "held": Action.HOLD}
    book.take(flows, 0.0)
    return book


def settle(book: FlowBook, now_s: float) -> tuple[list[str], list[str]]:
    changes = book.changes(now_s)
    book.made(changes, now_s)
    return [flow.name for flow in changes.add], list(changes.delete)


def test_a_flow_has_a_rule_until_it_ends() -> None:
    book = book_with(media())
    assert settle(book, 0) == (["sip-0-0"], [])
    assert not book.changes(1)
    book.take([FlowEnd("sip-0-0", "BYE")], 2)
    assert settle(book, 2) == ([], ["sip-0-0"])
    assert not book.changes(3)


def test_a_rule_is_made_anew_in_time_and_only_while_its_flow_goes_on() -> None:
    book = book_with(media())
    settle(book, 0)
    assert not book.changes(40), "nothing has been said since"
    book.take([media()], 40)
    assert settle(book, 40) == (["sip-0-0"], [])
    book.take([media()], 45)
    assert not book.changes(45), "it lasts long enough"
    assert settle(book, 105) == ([], ["sip-0-0"])


def test_without_the_class_there_is_no_rule_until_there_is() -> None:
    book = book_with(media())
    book.actions = {"held": Action.HOLD}
    assert not book.changes(0)
    book.actions = {"media": Action.TRANSMIT}
    assert settle(book, 1) == (["sip-0-0"], [])
    book.actions = {}
    assert settle(book, 2) == ([], ["sip-0-0"])


def test_the_number_of_rules_is_bounded_and_those_there_stay() -> None:
    table = FlowsTable(max_flows=3)
    book = book_with(*(media(name=f"sip-{n}-0", source_port=20_000 + n) for n in range(3)), table=table)
    settle(book, 0)
    book.take([media(name="sip-00-0", source_port=20_100)], 1)
    assert not book.changes(1)
    assert book.statistics().crowded == 1
    book.take([FlowEnd("sip-1-0", "BYE")], 2)
    assert settle(book, 2) == (["sip-00-0"], ["sip-1-0"])


def test_what_the_operator_deleted_does_not_come_again() -> None:
    book = book_with(media())
    settle(book, 0)
    book.found([], [], 1)
    book.take([media()], 1)
    assert not book.changes(1)
    book.take([FlowEnd("sip-0-0", "BYE"), media()], 2)
    assert settle(book, 2) == (["sip-0-0"], [])


def test_rules_of_a_predecessor_without_a_flow_are_deleted() -> None:
    book = book_with(media())
    book.found([(media(), 60.0), (media(name="sip-9-0"), 60.0)], ["sip-odd"], 0)
    assert settle(book, 0) == ([], ["sip-9-0", "sip-odd"])


# --- values and bytes -------------------------------------------------------------------------------------------------

hosts = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)
ports = st.one_of(st.none(), st.integers(1, 65_535))


@given(
    hosts, ports, ports, st.sampled_from(Transport), st.sampled_from(Payload), st.integers(0, (1 << 32) - 1) | st.none()
)
@settings(deadline=None, max_examples=150)
def test_flow_information_comes_back_from_its_rule(
    ends: tuple[Host, Host],
    source: int | None,
    target: int | None,
    transport: Transport,
    payload: Payload,
    ssrc: int | None,
) -> None:
    try:
        address = FlowAddress(transport, ends[0], source, ends[1], target)
        flow = FlowInformation("rtp", "rtp-0", address, payload, "media", 30.0, "why", ssrc)
    except ConfigError:
        return
    compile_expression(flow.expression)
    assert flow_of_rule("rtp-0", flow.expression, "media", 30.0, "why") == flow


@given(st.text(max_size=200))
@settings(deadline=None)
def test_other_rules_are_no_flows(text: str) -> None:
    assert flow_of_rule("sip-0-0", text, "media", 30.0, "") is None
    assert flow_of_rule("sip-0-0", media().expression + text, "media", 30.0, "") in (None, media(why="", ttl_s=30.0))


PIECES = st.sampled_from([
    b"\r\n", b"\r\n\r\n", b"SIP/2.0 200 OK", b"INVITE sip:a@b SIP/2.0", b"Call-ID: x", b"i: y", b"From: <sip:a>;tag=1",
    b"t: <sip:b>;tag=2", b"CSeq: 1 INVITE", b"Content-Length: 5", b"l: 99999", b'"', b"<", b";tag=", b"v=0",
    b"\nm=audio 1 RTP/AVP 0", b"\nc=IN IP4 1.2.3.4", b"\na=rtcp:5", b"c: application/sdp",
    b" folded", b"ACK", b"Content-Length: 0",
])  # fmt: skip
MESSAGES = st.one_of(
    st.binary(max_size=300), st.lists(st.one_of(PIECES, st.binary(max_size=4)), max_size=30).map(b"".join)
)


@given(MESSAGES)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for read in (parse_sip, parse_sdp):
        try:
            read(data)
        except MalformedError:
            continue


def mutated(data: bytes, places: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in places:
        changed[place % len(changed)] = value
    return bytes(changed)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4), st.sampled_from(Transport), st.data()
)
@settings(deadline=None, max_examples=200)
def test_no_packets_raise_or_get_past_the_guard(
    places: list[tuple[int, int]], transport: Transport, data: st.DataObject
) -> None:
    detection, call = Detection(ALL), Call(TO, transport=transport)
    talk = [
        (TO, call.request("INVITE", 1, sdp(PEER, port=30_000))),
        (FROM, call.response(200, "INVITE", 1, sdp(VM, port=20_000))),
        (TO, call.request("INVITE", 2, sdp(PEER, port=5060), established=True)),
        (FROM, call.response(200, "INVITE", 2, sdp(VM, port=53))),
        (FROM, rtp(1, 1)),
    ]
    book = FlowBook(ALL, GUARD)
    book.actions = {"media": Action.TRANSMIT, "stream": Action.TRANSMIT, "lookup": Action.TRANSMIT}
    for side, content in data.draw(st.lists(st.sampled_from(talk), max_size=10)):
        book.take(detection.feed(call.packet(side, mutated(content, places))), 0.0)
    for flow in book.changes(0.0).add:
        assert flow.address.transport is UDP
        assert flow.address.source in (ip_address(VM), ip_address(VM6))
        assert flow.protocol == "dns" or not any(
            ALL.protects(port or 0) for port in (flow.address.source_port, flow.address.target_port)
        )


@given(st.one_of(st.binary(max_size=120), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=6)))
@settings(deadline=None, max_examples=300)
def test_any_frame_is_a_packet_or_none(change: bytes | list[tuple[int, int]]) -> None:
    good = frame(VM, 5060, PEER, 5060, b"SIP/2.0 200 OK\r\n\r\n" * 3, tcp=True)
    data = change if isinstance(change, bytes) else mutated(good, change)
    found = parse(data, FROM, 0.0)
    if found is not None:
        Detection(ALL).feed(found)


@pytest.mark.parametrize(("source", "target"), [(VM, PEER), (VM6, PEER6)])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_frame_is_read(source: str, target: str, tcp: bool) -> None:
    found = parse(frame(source, 5060, target, 6000, b"content", tcp=tcp) + bytes(3), Direction.TO_VM, 7.0)
    assert found is not None
    assert (str(found.source), found.source_port) == (source, 5060)
    assert (str(found.target), found.target_port, found.payload, found.cut) == (target, 6000, b"content", False)
    cut = parse(frame(source, 5060, target, 6000, b"content", tcp=tcp)[:-2], Direction.TO_VM, 7.0)
    assert cut is not None
    assert cut.cut


BASE = {"vm": {"name": "a", "qmp": "/q"}, "network": {"bridge": "b", "tap": "t"}, "tls": {"insecure": True}}


def test_detectors_need_the_vms_addresses() -> None:
    assert Config.model_validate(BASE).flows.detectors == ()
    wanted = BASE | {"flows": {"detectors": ["sip"]}}
    with pytest.raises(ValueError, match=r"rules\.vm_ips is missing"):
        Config.model_validate(wanted)
    assert Config.model_validate(wanted | {"rules": {"vm_ips": [VM]}}).flows.detectors == ("sip",)
    wrongs: tuple[dict[str, object], ...] = (
        {"detectors": ["sip", "sip"]},
        {"media_class": "a b"},
        {"sip_ports": []},
        {"detectors": ["h323"]},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="flows"):
            Config.model_validate(BASE | {"flows": wrong})
