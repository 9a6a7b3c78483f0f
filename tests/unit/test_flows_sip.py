"""The SIP detector: which media of a call may be sent, from when, and until when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.harness.sip_calls import FROM, PEER, PEER6, TO, VM, VM6, Call, frame, rtp, sdp

from kagemusha.gate.flows.packet import Direction
from kagemusha.gate.flows.sip import OFFER_TTL_S, SipDetector
from kagemusha.gate.rules.libpcap import compile_expression
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowEnd, FlowEvent, FlowInformation, Payload, Transport

TABLE = FlowsTable(detectors=("sip",))
OURS, THEIRS = sdp(VM, port=20_000), sdp(PEER, port=30_000)
MEDIA, CONTROL = f"udp {VM}:20000 > {PEER}:30000", f"udp {VM}:20001 > {PEER}:30001"


class Ear:
    """A detector, and the flows that it says there are."""

    def __init__(self, table: FlowsTable = TABLE) -> None:
        self.detector = SipDetector(table)
        self.open: dict[str, FlowInformation] = {}

    def take(self, events: Sequence[FlowEvent]) -> None:
        for each in events:
            if isinstance(each, FlowEnd):
                self.open.pop(each.name, None)
            else:
                self.open[each.name] = each

    def hear(self, call: Call, side: Direction, data: bytes) -> None:
        self.take(self.detector.feed(call.packet(side, data)))

    def flows(self) -> list[str]:
        return sorted(str(each.address) for each in self.open.values())


def set_up(ear: Ear, call: Call, *, caller_sdp: str | None = None, callee_sdp: str | None = None) -> None:
    """INVITE, 180, 200, ACK."""
    callee = call.caller.other
    theirs = {FROM: OURS, TO: THEIRS}
    ear.hear(call, call.caller, call.request("INVITE", 1, theirs[call.caller] if caller_sdp is None else caller_sdp))
    ear.hear(call, callee, call.response(180, "INVITE", 1))
    assert ear.flows() == [], "an offer alone brings nothing about"
    ear.hear(call, callee, call.response(200, "INVITE", 1, theirs[callee] if callee_sdp is None else callee_sdp))
    ear.hear(call, call.caller, call.request("ACK", 1, established=True))


@pytest.mark.parametrize("caller", [FROM, TO])
@pytest.mark.parametrize("ender", [FROM, TO])
def test_a_call_has_its_media_until_bye(caller: Direction, ender: Direction) -> None:
    ear, call = Ear(), Call(caller)
    set_up(ear, call)
    assert ear.flows() == [MEDIA, CONTROL]
    assert [each.payload for each in sorted(ear.open.values(), key=lambda each: each.name)] == [
        Payload.RTP, Payload.RTCP,
    ]  # fmt: skip
    ear.hear(call, ender, call.request("BYE", 2, by=ender, established=True))
    assert ear.flows() == []


@pytest.mark.parametrize("caller", [FROM, TO])
def test_ipv6(caller: Direction) -> None:
    ear, call = Ear(), Call(caller, vm=VM6, peer=PEER6)
    sides = {FROM: sdp(VM6, port=20_000), TO: sdp(PEER6, port=30_000)}
    set_up(ear, call, caller_sdp=sides[caller], callee_sdp=sides[caller.other])
    assert f"udp [{VM6}]:20000 > [{PEER6}]:30000" in ear.flows()


def test_the_rule_matches_that_media_and_nothing_else() -> None:
    ear = Ear()
    set_up(ear, Call(TO))
    media = next(each for each in ear.open.values() if each.payload is Payload.RTP)
    program = compile_expression(media.expression)
    assert program.matches(frame(VM, 20_000, PEER, 30_000, rtp(1, 160)))
    control = bytes((0x80, 200)) + bytes(26)
    for wrong in (
        frame(VM, 20_002, PEER, 30_000, rtp(1, 160)),
        frame(VM, 20_000, PEER, 30_002, rtp(1, 160)),
        frame(VM, 20_000, VM, 30_000, rtp(1, 160)),
        frame(PEER, 20_000, PEER, 30_000, rtp(1, 160)),
        frame(VM, 20_000, PEER, 30_000, b"plain text, no mark of RTP"),
        frame(VM, 20_000, PEER, 30_000, control),
        frame(VM, 20_000, PEER, 30_000, rtp(1, 160), tcp=True),
    ):
        assert not program.matches(wrong)
    other = next(each for each in ear.open.values() if each.payload is Payload.RTCP)
    assert compile_expression(other.expression).matches(frame(VM, 20_001, PEER, 30_001, control))


def test_early_media_and_the_final_answer_without_sdp() -> None:
    ear, call = Ear(), Call(TO)
    ear.hear(call, TO, call.request("INVITE", 1, THEIRS))
    ear.hear(call, FROM, call.response(183, "INVITE", 1, OURS))
    assert ear.flows() == [MEDIA, CONTROL]
    ear.hear(call, FROM, call.response(200, "INVITE", 1))
    assert ear.flows() == [MEDIA, CONTROL]


@pytest.mark.parametrize("status", [302, 404, 486, 487, 503, 603])
def test_a_call_that_is_refused_loses_its_early_media(status: int) -> None:
    ear, call = Ear(), Call(FROM)
    ear.hear(call, FROM, call.request("INVITE", 1, OURS))
    ear.hear(call, TO, call.response(183, "INVITE", 1, THEIRS))
    assert ear.flows() == [MEDIA, CONTROL]
    ear.hear(call, TO, call.response(status, "INVITE", 1))
    assert ear.flows() == []


def test_cancel_ends_an_early_call_and_not_one_that_is_up() -> None:
    ear, call = Ear(), Call(FROM)
    ear.hear(call, FROM, call.request("INVITE", 1, OURS))
    ear.hear(call, TO, call.response(183, "INVITE", 1, THEIRS))
    ear.hear(call, FROM, call.request("CANCEL", 1))
    assert ear.flows() == []
    set_up(ear, call)
    ear.hear(call, FROM, call.request("CANCEL", 1))
    assert ear.flows() == [MEDIA, CONTROL]


@pytest.mark.parametrize("by", [FROM, TO])
def test_a_reinvite_moves_the_media(by: Direction) -> None:
    ear, call = Ear(), Call(TO)
    set_up(ear, call)
    ours, theirs = sdp(VM, port=22_000), sdp(PEER, port=32_000)
    first, second = (ours, theirs) if by is FROM else (theirs, ours)
    ear.hear(call, by, call.request("INVITE", 7, first, by=by, established=True))
    assert ear.flows() == [MEDIA, CONTROL], "until it is answered the old ones are in use"
    ear.hear(call, by.other, call.response(200, "INVITE", 7, second, to=by))
    assert f"udp {VM}:22000 > {PEER}:32000" in ear.flows()
    assert MEDIA not in ear.flows()


def test_a_reinvite_that_fails_changes_nothing() -> None:
    ear, call = Ear(), Call(TO)
    set_up(ear, call)
    ear.hear(call, TO, call.request("INVITE", 2, sdp(PEER, port=32_000), established=True))
    ear.hear(call, FROM, call.response(183, "INVITE", 2, sdp(VM, port=22_000)))
    assert MEDIA not in ear.flows()
    ear.hear(call, FROM, call.response(488, "INVITE", 2))
    assert ear.flows() == [MEDIA, CONTROL]


def test_an_offer_in_the_answer_is_answered_in_the_ack() -> None:
    ear, call = Ear(), Call(TO)
    ear.hear(call, TO, call.request("INVITE", 1))
    ear.hear(call, FROM, call.response(200, "INVITE", 1, OURS))
    assert ear.flows() == []
    ear.hear(call, TO, call.request("ACK", 1, THEIRS, established=True))
    assert ear.flows() == [MEDIA, CONTROL]


def test_an_offer_in_a_reliable_answer_is_answered_in_the_prack() -> None:
    ear, call = Ear(), Call(TO)
    ear.hear(call, TO, call.request("INVITE", 1))
    ear.hear(call, FROM, call.response(183, "INVITE", 1, OURS, more=("Require: 100rel", "RSeq: 1")))
    ear.hear(call, TO, call.request("PRACK", 2, THEIRS, established=True, more=("RAck: 1 1 INVITE",)))
    assert ear.flows() == [MEDIA, CONTROL]


def test_an_update_moves_the_media() -> None:
    ear, call = Ear(), Call(TO)
    set_up(ear, call)
    ear.hear(call, FROM, call.request("UPDATE", 1, sdp(VM, port=24_000), by=FROM))
    ear.hear(call, TO, call.response(200, "UPDATE", 1, THEIRS, to=FROM))
    assert f"udp {VM}:24000 > {PEER}:30000" in ear.flows()


def test_of_a_forked_call_the_one_that_answers_stays() -> None:
    ear, call = Ear(), Call(FROM)
    ear.hear(call, FROM, call.request("INVITE", 1, OURS))
    for tag, port in (("one", 31_000), ("two", 33_000)):
        call.to_tag = tag
        ear.hear(call, TO, call.response(183, "INVITE", 1, sdp(PEER, port=port)))
    assert len(ear.flows()) == 4
    ear.hear(call, TO, call.response(200, "INVITE", 1, sdp(PEER, port=33_000)))
    assert ear.flows() == [f"udp {VM}:20000 > {PEER}:33000", f"udp {VM}:20001 > {PEER}:33001"]


def test_streams_their_addresses_and_their_rtcp() -> None:
    ours = sdp(
        VM, "audio 20000 RTP/AVP 0\r\na=sendonly", "video 20010 RTP/AVPF 96\r\na=rtcp:20099", "image 20020 udptl t38",
        "audio 0 RTP/AVP 0", "video 20040 RTP/SAVP 97\r\na=rtcp-mux", "audio 20050/2 RTP/AVP 0", session=True,
    )  # fmt: skip
    theirs = sdp(
        PEER, "audio 30000 RTP/AVP 0\r\na=inactive", "video 30010 RTP/AVPF 96\r\nc=IN IP4 203.0.113.9",
        "image 30020 udptl t38", "audio 30030 RTP/AVP 0", "video 30040 RTP/SAVP 97\r\na=rtcp-mux",
        "audio 30050/2 RTP/AVP 0",
    )  # fmt: skip
    ear = Ear()
    set_up(ear, Call(TO), caller_sdp=theirs, callee_sdp=ours)
    assert ear.flows() == [
        MEDIA, CONTROL, f"udp {VM}:20010 > 203.0.113.9:30010", f"udp {VM}:20040 > {PEER}:30040",
        f"udp {VM}:20099 > 203.0.113.9:30011",
    ]  # fmt: skip
    muxed = next(each for each in ear.open.values() if each.address.source_port == 20_040)
    assert muxed.payload is Payload.RTP_AND_RTCP


def test_rtcp_is_held_where_the_table_says_so() -> None:
    ear = Ear(FlowsTable(detectors=("sip",), rtcp="hold"))
    mux = "audio {} RTP/AVP 0\r\na=rtcp-mux"
    theirs, ours = sdp(PEER, mux.format(30_000)), sdp(VM, mux.format(20_000))
    set_up(ear, Call(TO), caller_sdp=theirs, callee_sdp=ours)
    assert [each.payload for each in ear.open.values()] == [Payload.RTP]


@pytest.mark.parametrize("place", ["example.com", "224.2.1.1/127", "0.0.0.0", "127.0.0.1", "255.255.255.255", "1.2.3"])
def test_a_stream_without_a_place_is_held(place: str) -> None:
    ear = Ear()
    set_up(ear, Call(TO), caller_sdp=THEIRS.replace(f"c=IN IP4 {PEER}", f"c=IN IP4 {place}"))
    assert ear.flows() == []


def test_a_call_lapses_unless_it_is_used_or_refreshed() -> None:
    ear, call = Ear(), Call(TO)
    set_up(ear, call)
    ttl_s = TABLE.call_ttl_s
    ear.take(ear.detector.used([next(iter(ear.open))], ttl_s - 1))
    ear.take(ear.detector.expire(ttl_s + 1))
    assert ear.flows() == [MEDIA, CONTROL]
    ear.take(ear.detector.expire(2 * ttl_s))
    assert ear.flows() == []
    assert ear.detector.size == (0, 0, 0)


def test_a_session_timer_says_how_long() -> None:
    ear, call = Ear(), Call(TO)
    ear.hear(call, TO, call.request("INVITE", 1, THEIRS))
    ear.hear(call, FROM, call.response(200, "INVITE", 1, OURS, more=("x: 1800;refresher=uac",)))
    assert {each.ttl_s for each in ear.open.values()} == {1800.0}
    call.time_s = 1700.0
    ear.hear(call, TO, call.request("UPDATE", 2, established=True))
    ear.hear(call, FROM, call.response(200, "UPDATE", 2, more=("Session-Expires: 1800",)))
    ear.take(ear.detector.expire(3000))
    assert ear.flows() == [MEDIA, CONTROL]
    ear.take(ear.detector.expire(3501))
    assert ear.flows() == []


def test_a_successor_understands_the_end_of_a_call_and_its_changes() -> None:
    for by in (FROM, TO):
        first, call = Ear(), Call(TO)
        set_up(first, call)
        second = Ear()
        second.open = dict(first.open)
        second.detector.resume(list(first.open.values()), 0.0)
        second.take(second.detector.used(list(first.open), 100.0))
        second.take(second.detector.expire(TABLE.call_ttl_s + 50))
        assert second.flows() == [MEDIA, CONTROL]
        second.hear(call, by, call.request("BYE", 9, by=by, established=True))
        assert second.flows() == []


def test_of_another_call_nothing_ends() -> None:
    ear, call = Ear(), Call(TO)
    set_up(ear, call)
    other = Call(TO, call_id="another")
    ear.hear(other, TO, other.request("BYE", 2, established=True))
    call.to_tag = "guessed"
    ear.hear(call, TO, call.request("BYE", 2, established=True))
    assert ear.flows() == [MEDIA, CONTROL]


# --- TCP --------------------------------------------------------------------------------------------------------------


def test_signalling_over_tcp_in_any_segments() -> None:
    for size in (1, 7, 100, 10_000):
        ear, call = Ear(), Call(TO, transport=Transport.TCP)
        stream = {
            TO: b"\r\n\r\n" + call.request("INVITE", 1, THEIRS) + call.request("ACK", 1, established=True),
            FROM: call.response(180, "INVITE", 1) + call.response(200, "INVITE", 1, OURS),
        }
        for side in (TO, FROM):
            ear.take(ear.detector.feed(call.packet(side, b"", syn=True)))
            for at in range(0, len(stream[side]), size):
                ear.hear(call, side, stream[side][at : at + size])
        assert ear.flows() == [MEDIA, CONTROL], size
        ear.hear(call, FROM, call.request("BYE", 2, by=FROM))
        assert ear.flows() == []
        assert ear.detector.size[2] == 0


def test_segments_out_of_order_repeated_and_across_the_wrap() -> None:
    ear, call = Ear(), Call(TO, transport=Transport.TCP)
    call.sequences = {FROM: 0xFFFF_FFF0, TO: 0xFFFF_FF00}
    for side, data in ((TO, call.request("INVITE", 1, THEIRS)), (FROM, call.response(200, "INVITE", 1, OURS))):
        ear.take(ear.detector.feed(call.packet(side, b"", syn=True)))
        parts = [call.packet(side, data[at : at + 90]) for at in range(0, len(data), 90)]
        for part in (parts[0], parts[0], *reversed(parts[1:]), parts[2]):
            ear.take(ear.detector.feed(part))
    assert ear.flows() == [MEDIA, CONTROL]


def test_a_reader_that_comes_late_or_misses_a_segment_goes_on_at_a_message() -> None:
    ear, call = Ear(), Call(TO, transport=Transport.TCP)
    ear.hear(call, TO, b"the middle of something")
    ear.hear(call, TO, call.request("OPTIONS", 1))
    call.sequences[TO] += 500_000  # missed
    ear.hear(call, TO, call.request("INVITE", 2, THEIRS))
    ear.hear(call, FROM, call.response(200, "INVITE", 2, OURS))
    assert ear.flows() == [MEDIA, CONTROL]


def test_the_ports_of_signalling_alone_are_read() -> None:
    ear, call = Ear(FlowsTable(detectors=("sip",), sip_ports=(5080,))), Call(TO)
    set_up(ear, call)
    assert ear.flows() == []


def test_what_is_kept_is_bounded() -> None:
    ear = Ear(FlowsTable(detectors=("sip",), max_calls=10))
    for number in range(100):
        set_up_quietly(ear, Call(TO, call_id=f"call-{number}"))
        tcp = Call(TO, call_id="x" * 200, transport=Transport.TCP, peer=f"198.51.100.{number}")
        ear.hear(tcp, TO, tcp.request("INVITE", 1, THEIRS)[:-5])
    offers, legs, buffered = ear.detector.size
    assert offers <= 20
    assert legs == 10
    assert buffered < 256 * 65_536
    ear.take(ear.detector.expire(OFFER_TTL_S + TABLE.call_ttl_s))
    assert ear.detector.size[:2] == (0, 0)


def set_up_quietly(ear: Ear, call: Call) -> None:
    ear.hear(call, TO, call.request("INVITE", 1, THEIRS))
    ear.hear(call, FROM, call.response(200, "INVITE", 1, OURS))
