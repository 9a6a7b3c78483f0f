"""SDP (RFC 8866, and RFC 4566 before it) as far as it says where media goes: c=, m=, a=rtcp, a=rtcp-mux.

Strict where it matters and deaf elsewhere: a stream whose address is a name, a multicast group or unspecified, or
whose port is several, is there but has no place (``address`` None), so it is held. Pure and bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from kagemusha.errors import PeerError
from kagemusha.model.flows import MAX_PORT, Host

MAX_BYTES = 32_768
MAX_LINES = 1000
MAX_STREAMS = 32
_MEDIA = re.compile(r"([a-z0-9-]{1,32}) ([0-9]{1,5})(?:/([0-9]{1,5}))? ([A-Za-z0-9/]{1,64}) [\x20-\x7e]*", re.ASCII)
_ADDRESS = re.compile(r"IN (IP4|IP6) ([0-9A-Fa-f.:]{2,45})")
_RTCP = re.compile(r"([0-9]{1,5})(?: (IN IP[46] [0-9A-Fa-f.:]{2,45}))?")


class MalformedError(PeerError):
    """Bytes that are no message of the protocol they were read as."""


@dataclass(frozen=True, slots=True)
class MediaStream:
    """One m= line.

    :param protocol: ``RTP/AVP`` and the like.
    :param address: where it is received; None: nowhere that can be told.
    :param port: 0: refused or switched off.
    :param rtcp_port: given by a=rtcp.
    :param rtcp_address: given by a=rtcp.
    :param mux: RTCP may come on the same port (RFC 5761).
    """

    kind: str
    protocol: str
    address: Host | None
    port: int
    rtcp_port: int | None = None
    rtcp_address: Host | None = None
    mux: bool = False

    @property
    def is_rtp(self) -> bool:
        """Whether it is RTP in datagrams."""
        return self.protocol.upper().startswith(("RTP/", "UDP/TLS/RTP/"))

    @property
    def rtcp_place(self) -> tuple[Host | None, int]:
        """Where its RTCP is received if it is not on the same port (RFC 3605)."""
        address = self.rtcp_address or self.address
        return address, self.rtcp_port if self.rtcp_port is not None else self.port + 1


def parse_sdp(body: bytes) -> tuple[MediaStream, ...]:
    """The streams of a session description, in order.

    :raise MalformedError: it is none, or beyond the bounds.
    """
    if len(body) > MAX_BYTES:
        raise MalformedError("a session description that is too long", operation="read SDP")
    lines = body.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_LINES or lines[0] != "v=0":
        raise MalformedError("not a session description", operation="read SDP")
    session: Host | None = None
    streams: list[MediaStream] = []
    for line in lines[1:]:
        kind, _, value = line.partition("=")
        if kind == "m":
            streams.append(_media(value, session))
            if len(streams) > MAX_STREAMS:
                raise MalformedError("too many streams", operation="read SDP")
        elif kind == "c" and not streams:
            session = _address(value)
        elif kind == "c":
            streams[-1] = replace(streams[-1], address=_address(value) if streams[-1].port else None)
        elif kind == "a" and streams:
            streams[-1] = _attribute(streams[-1], value)
    return tuple(streams)


def _media(value: str, session: Host | None) -> MediaStream:
    match = _MEDIA.fullmatch(value)
    if match is None or int(match[2]) > MAX_PORT:
        raise MalformedError("an m= line that is none", operation="read SDP")
    several = match[3] is not None and int(match[3]) != 1
    return MediaStream(match[1], match[4], session, 0 if several else int(match[2]))


def _address(value: str) -> Host | None:
    """The address that a c= line names; None: a name, a group (with a ttl behind a slash), or nobody."""
    match = _ADDRESS.fullmatch(value.rstrip())
    if match is None:
        return None
    try:
        address: Host = IPv4Address(match[2]) if match[1] == "IP4" else IPv6Address(match[2])
    except ValueError:
        return None
    nobody = address.is_unspecified or address.is_multicast or address.is_loopback
    return None if nobody or address == IPv4Address("255.255.255.255") else address


def _attribute(stream: MediaStream, value: str) -> MediaStream:
    if value.rstrip() == "rtcp-mux":
        return replace(stream, mux=True)
    name, _, rest = value.partition(":")
    if name != "rtcp":
        return stream
    match = _RTCP.fullmatch(rest.rstrip())
    if match is None or not 1 <= int(match[1]) <= MAX_PORT:
        raise MalformedError("an a=rtcp line that is none", operation="read SDP")
    return replace(stream, rtcp_port=int(match[1]), rtcp_address=_address(match[2]) if match[2] else None)
