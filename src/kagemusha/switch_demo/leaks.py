"""Frames that a client has seen before the checkpoint of their epoch was committed. There must be none.

Pure. A frame departs where the guest writes it into its tap, and arrives at the client. What the rules let go is not
judged, nor is what arrives when the guest is not protected. The standby may tell the switch of a commit before the
primary knows of it; so a checkpoint counts as committed from the moment that the standby had all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kagemusha.chaos.recorder import Epochs, Frame, Passage, passages
from kagemusha.demo.observations import of_kind
from kagemusha.model.events import CheckpointApplied, EpochCommitted, Event, StateChanged
from kagemusha.switch_demo.media import is_media


def committed_by_standby(primary: Sequence[Event], standby: Sequence[Event]) -> list[EpochCommitted]:
    """The primary's epochs, each committed when its standby had it whole, if it tells."""
    whole_t = {event.epoch: event.whole_t for event in of_kind(standby, CheckpointApplied) if event.whole_t}

    def commit_us(event: EpochCommitted) -> int:
        known = whole_t.get(event.epoch)
        return event.commit_us if known is None else int((known - event.stop_t) * 1e6)

    return [replace(event, commit_us=commit_us(event)) for event in of_kind(primary, EpochCommitted)]


def last_session(primary: Sequence[Event]) -> Sequence[Event]:
    """A primary's events since it last began to synchronise: before that the guest may have run unprotected."""
    begins = [
        place
        for place, event in enumerate(primary)
        if isinstance(event, StateChanged) and event.role == "primary" and event.state == "SYNCING"
    ]
    return primary[begins[-1] :] if begins else primary


def leaked(
    departed: Iterable[Frame], arrived: Iterable[Frame], epochs: Sequence[EpochCommitted], until_t: float, last: int
) -> list[Passage]:
    """The frames that came too early.

    :param epochs: of one session, in order, from its first on.
    :param until_t: the guest was protected up to this moment.
    :param last: the newest epoch that is known to be committed, as the takeover tells; its end may not have been told.
    """
    if not epochs:
        return []
    known = Epochs(epochs)
    until_ns = int(until_t * 1e9)
    found, _ = passages(_held(departed), _held(arrived))
    judged = [each for each in found if each.arrived_ns is not None and each.arrived_ns < until_ns]
    return [each for each in known.unprotected(judged) if known.of(each.departed_ns) or known.last.epoch >= last]


def _held(frames: Iterable[Frame]) -> list[Frame]:
    return [frame for frame in frames if not is_media(frame.content)]
