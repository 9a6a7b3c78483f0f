"""What has been heard of the calls at the client: when each packet of the guest's came, and the longest silence.

Pure. A packet counts once, whatever often it comes: the restored guest says the last fraction of an epoch again, with
the numbers that the client has heard already (RFC 3550, 5.1). A stream is a source (SSRC): SIPp sends all calls of a
process from one port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kagemusha.bench.media import ECHO_PORT, key_of
from kagemusha.chaos.recorder import Frame, datagram_of
from kagemusha.demo.report import longest_gap_s

_VERSION_2, _VERSION_MASK = 0x80, 0xC0


def is_media(content: bytes) -> bool:
    """Whether a frame of the SIP server's is RTP, which the rules let go."""
    datagram = datagram_of(content)
    return (
        datagram is not None
        and datagram.source[1] == ECHO_PORT
        and datagram.payload[:1] != b""
        and datagram.payload[0] & _VERSION_MASK == _VERSION_2
    )


def streams(heard: Iterable[Frame]) -> dict[int, list[float]]:
    """For each source the moments at which new packets came, seconds."""
    seen: set[tuple[int, int]] = set()
    found: dict[int, list[float]] = {}
    for frame in heard:
        if not is_media(frame.content):
            continue
        datagram = datagram_of(frame.content)
        key = key_of(datagram.payload) if datagram is not None else None
        if key is not None and key not in seen:
            seen.add(key)
            found.setdefault(key[0], []).append(frame.t_ns / 1e9)
    return found


@dataclass(frozen=True, slots=True)
class Media:
    """The calls that were heard before the kill.

    :ivar calls: how many.
    :ivar silent: of these, that were never heard again.
    :ivar packets: new ones, of all calls.
    :ivar gaps_ms: the longest silence of each other call, around the kill, ascending.
    """

    calls: int
    silent: int
    packets: int
    gaps_ms: tuple[float, ...]

    @property
    def gap_ms(self) -> float | None:
        """The longest silence of all; None: there is none that ended."""
        return max(self.gaps_ms, default=None)


def media_around(found: Mapping[int, list[float]], kill_t: float, resumed_t: float | None) -> Media:
    """Judge the streams by what came before and after the kill."""
    known = [times for times in found.values() if times[0] <= kill_t]
    gaps = [longest_gap_s(times, kill_t, resumed_t) for times in known]
    ended = sorted(gap * 1e3 for gap in gaps if gap is not None)
    return Media(len(known), len(known) - len(ended), sum(map(len, found.values())), tuple(ended))
