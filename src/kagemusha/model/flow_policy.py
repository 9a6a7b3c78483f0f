"""``[flows]``: which detectors look at a VM's traffic, and what they may bring about. The host sets it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kagemusha.model.rules import NAME, NAME_RULE

DetectorName = Literal["sip", "rtp", "dns", "tcp"]
Port = Annotated[int, Field(ge=1, le=65_535)]
ALWAYS_PROTECTED = frozenset({53, 5060, 5061})
_FIRST_UNPRIVILEGED = 1024


class FlowsTable(BaseModel):
    """``[flows]``. Without detectors, which is the default, nothing is looked at and no process runs.

    :ivar media_class: class of media that a detector has found; where the VM's rules have no such class, or it holds,
        all is held.
    :ivar rtcp: whether RTCP has that class too.
    :ivar sip_ports: where signalling is read.
    :ivar protected_ports: never part of a flow of media, besides those below 1024, SIP's and DNS's.
    :ivar dns_class: class of DNS datagrams of the VM; None: they are what the other rules say.
    :ivar tcp_class: class of TCP connections while they are known to be open; it must hold.
    :ivar call_ttl_s: a call's flows lapse so long after its last signalling or media, unless it has a session timer.
    :ivar rtp_packets: so many packets of a source in a row before it is believed to be RTP.
    :ivar rtp_ttl_s: it lapses so long after it was last seen.
    :ivar max_flows: that may have rules at once; of more, all is held.
    :ivar max_calls: whose signalling is kept in mind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    detectors: tuple[DetectorName, ...] = ()
    media_class: str = "media"
    rtcp: Literal["transmit", "hold"] = "transmit"
    sip_ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=8)] = (5060,)
    protected_ports: Annotated[tuple[Port, ...], Field(max_length=256)] = ()
    dns_class: str | None = None
    tcp_class: str | None = None
    call_ttl_s: Annotated[float, Field(ge=5, le=86_400)] = 300.0
    rtp_packets: Annotated[int, Field(ge=4, le=1000)] = 16
    rtp_ttl_s: Annotated[float, Field(ge=5, le=3600)] = 30.0
    max_flows: Annotated[int, Field(ge=1, le=1024)] = 256
    max_calls: Annotated[int, Field(ge=1, le=65_536)] = 4096

    @model_validator(mode="after")
    def _are_names(self) -> Self:
        for key in ("media_class", "dns_class", "tcp_class"):
            name = getattr(self, key)
            if name is not None and not NAME.fullmatch(name):
                raise ValueError(f"{key}: {name[:80]!r} is not a name: {NAME_RULE}")
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError("detectors: one is there twice")
        return self

    def protects(self, port: int) -> bool:
        """Whether no flow of media may have this port."""
        return (
            port < _FIRST_UNPRIVILEGED
            or port in ALWAYS_PROTECTED
            or port in self.sip_ports
            or port in self.protected_ports
        )
