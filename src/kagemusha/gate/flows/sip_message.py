"""SIP messages (RFC 3261) as far as the SIP detector needs them: which dialog, which transaction, and the SDP.

Strict: a message that could be read in two ways (a header that must be there once is there twice, fewer bytes than
Content-Length says) is none. Pure; time and memory are linear in the message, whose size is bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kagemusha.gate.flows.sdp import MalformedError

MAX_MESSAGE_BYTES = 65_535
MAX_HEADER_BYTES = 16_384
MAX_HEADERS = 256
MAX_LINE_CHARS = 2048
MAX_ID_CHARS = 256
_COMPACT = {
    "i": "call-id", "f": "from", "t": "to", "l": "content-length", "c": "content-type", "e": "content-encoding",
    "x": "session-expires",
}  # fmt: skip
_ONCE = frozenset({"call-id", "from", "to", "cseq", "content-length", "content-type", "session-expires", "rack"})
_TOKEN = r"[A-Za-z0-9.!%*_+`'~-]+"
_REQUEST = re.compile(rf"({_TOKEN}) [^ ]+ SIP/2\.0", re.ASCII)
_STATUS = re.compile(r"SIP/2\.0 ([1-6][0-9]{2}) .*|SIP/2\.0 ([1-6][0-9]{2})", re.ASCII)
_HEADER_NAME = re.compile(_TOKEN, re.ASCII)
_CSEQ = re.compile(rf"([0-9]{{1,10}})[ \t]+({_TOKEN})", re.ASCII)
_RACK = re.compile(rf"[0-9]{{1,10}}[ \t]+([0-9]{{1,10}})[ \t]+({_TOKEN})", re.ASCII)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_TAG = re.compile(rf";[ \t]*tag[ \t]*=[ \t]*({_TOKEN})", re.ASCII | re.IGNORECASE)
_EXPIRES = re.compile(r"([0-9]{1,9})(?:[ \t]*;.*)?", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,6}", re.ASCII)
# what a message can begin with: told apart from the middle of one without looking further
BEGINNING = re.compile(rb"SIP/2\.0 |[A-Z]{3,16} sips?:|[A-Z]{3,16} tel:")


@dataclass(frozen=True, slots=True)
class SipMessage:
    """A request or a response.

    :param method: of the request, or that the response is to.
    :param status: None: a request.
    :param acknowledged: of PRACK: number and method of the request whose provisional response it acknowledges.
    :param session_expires_s: of a session timer (RFC 4028).
    :param sdp: its body, if that is SDP.
    """

    method: str
    status: int | None
    call_id: str
    from_tag: str
    to_tag: str
    number: int
    acknowledged: tuple[int, str] | None = None
    session_expires_s: int | None = None
    sdp: bytes | None = None


def header_size(data: bytes) -> int:
    """Bytes up to and with the empty line behind the headers; 0: it is not there yet.

    :raise MalformedError: they are longer than they may be.
    """
    end = data.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
    if end < 0 and len(data) >= MAX_HEADER_BYTES:
        raise _malformed("its headers do not end")
    return end + 4 if end >= 0 else 0


def body_size(headers: bytes) -> int:
    """What Content-Length says, which must be there on a stream (RFC 3261 section 18.3).

    :raise MalformedError: it does not say.
    """
    _, fields = _fields(headers)
    return _length(fields["content-length"]) if "content-length" in fields else _no_length()


def _no_length() -> int:
    raise _malformed("Content-Length is missing")


def parse_sip(data: bytes) -> SipMessage:
    """The message that the bytes are: a datagram's, or cut out of a stream.

    :raise MalformedError: they are none.
    """
    size = header_size(data)
    if not size or len(data) > MAX_MESSAGE_BYTES:
        raise _malformed("no end of the headers, or too long")
    start, fields = _fields(data[:size])
    body = data[size:]
    if "content-length" in fields:
        length = _length(fields["content-length"])
        if length > len(body):
            raise _malformed("it is cut short")
        body = body[:length]
    for name in ("call-id", "from", "to", "cseq"):
        if name not in fields:
            raise _malformed(f"{name} is missing")
    if not 1 <= len(fields["call-id"]) <= MAX_ID_CHARS:
        raise _malformed("a Call-ID of no acceptable length")
    cseq = _CSEQ.fullmatch(fields["cseq"])
    if cseq is None:
        raise _malformed("a CSeq that is none")
    status = _STATUS.fullmatch(start)
    request = _REQUEST.fullmatch(start)
    if status is None and (request is None or request[1] != cseq[2]):
        raise _malformed("a start line that is none, or not that of its CSeq")
    rack = _RACK.fullmatch(fields.get("rack", ""))
    expires = _EXPIRES.fullmatch(fields.get("session-expires", ""))
    return SipMessage(
        cseq[2],
        None if status is None else int(status[1] or status[2]),
        fields["call-id"],
        _tag(fields["from"]),
        _tag(fields["to"]),
        int(cseq[1]),
        None if rack is None else (int(rack[1]), rack[2]),
        None if expires is None else int(expires[1]),
        body if body and _is_sdp(fields) else None,
    )


def _is_sdp(fields: dict[str, str]) -> bool:
    encoding = fields.get("content-encoding", "identity").lower()
    return encoding == "identity" and fields.get("content-type", "").split(";")[0].strip().lower() == "application/sdp"


def _fields(headers: bytes) -> tuple[str, dict[str, str]]:
    """The start line, and the headers by their long names in lower case; of several of a name the first."""
    lines = headers[:-4].decode("utf-8", "replace").split("\r\n")
    if len(lines) > MAX_HEADERS:
        raise _malformed("too many headers")
    fields: dict[str, str] = {}
    last = ""
    for line in lines[1:]:
        if len(line) > MAX_LINE_CHARS:
            raise _malformed("a header that is too long")
        if line[:1] in (" ", "\t"):  # it goes on with the one before
            if last in fields and len(fields[last]) < MAX_LINE_CHARS:
                fields[last] = f"{fields[last]} {line.strip()}"[:MAX_LINE_CHARS]
            continue
        name, colon, value = line.partition(":")
        name = name.rstrip(" \t").lower()
        if not colon or not _HEADER_NAME.fullmatch(name):
            raise _malformed("a header without a name")
        last = _COMPACT.get(name, name)
        if last in fields and last in _ONCE:
            raise _malformed(f"{last} is there twice")
        fields.setdefault(last, value.strip(" \t"))
    return lines[0], fields


def _length(text: str) -> int:
    if not _LENGTH.fullmatch(text) or int(text) > MAX_MESSAGE_BYTES:
        raise _malformed("a Content-Length that is none")
    return int(text)


def _tag(value: str) -> str:
    """The tag of a From or To; empty: it has none. What stands in quotes or in the URI is none of its parameters."""
    bare = _QUOTED.sub("", value)
    parameters = bare.rpartition(">")[2] if "<" in bare else bare
    match = _TAG.search(parameters)
    if match is not None and len(match[1]) > MAX_ID_CHARS:
        raise _malformed("a tag that is too long")
    return "" if match is None else match[1]


def _malformed(cause: str) -> MalformedError:
    return MalformedError(cause, operation="read SIP")
