"""Where a worker's event records go: a JSON lines file, and a line for people on standard error.

A full disk must not end a worker, and its guest with it: what cannot be written is counted, and left out whole.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from kagemusha.errors import ConfigError
from kagemusha.model.events import (
    CallersRefused,
    Ended,
    Event,
    FloorMeasured,
    StateChanged,
    SwitchRefusedPeer,
    SwitchServes,
    SyncProgress,
    TakenOver,
)


class EventLog:
    """Appends one line per event with a single write, so that a SIGKILL never leaves half a line behind.

    :ivar lost: events that could not be written.
    """

    def __init__(self, path: Path | None) -> None:
        """:raise ConfigError: the file cannot be opened for appending."""
        self.lost = 0
        self._descriptor: int | None = None
        if path is not None:
            try:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            except OSError as error:
                raise ConfigError(f"--events {path}: {error.strerror}", operation="open the event file") from error

    def write(self, event: Event) -> None:
        """Record one event, if the file system takes it."""
        if self._descriptor is not None:
            self._append(self._descriptor, event.to_json().encode() + b"\n")
        sentence = _sentence(event)
        if sentence is not None:
            _say(sentence)

    def _append(self, descriptor: int, line: bytes) -> None:
        try:
            written = os.write(descriptor, line)
            if written == len(line):
                return
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)  # there was room for a part
            why = "no room for a whole line"
        except OSError as error:
            why = str(error.strerror)
        self.lost += 1
        if self.lost == 1:
            _say(f"events cannot be written, and are left out: {why}")


def _say(sentence: str) -> None:
    with suppress(OSError):  # its disk may be full, too
        print(sentence, file=sys.stderr, flush=True)


def _sentence(event: Event) -> str | None:
    """What a person watching the terminal wants to read of it; None for the many."""
    match event:
        case StateChanged():
            return f"{event.role}: {event.state} (term {event.term}): {event.reason}"
        case SyncProgress():
            return (
                f"sync round {event.round}: {event.sent_bytes / 1e6:.1f} MB of pages sent as "
                f"{event.wire_bytes / 1e6:.1f} MB, {event.remaining_bytes / 1e6:.1f} MB written meanwhile"
            )
        case TakenOver():
            return (
                f"standby: took over at checkpoint {event.epoch}, {(event.resumed_t - event.decided_t) * 1e3:.1f} ms "
                f"after the decision: {event.reason}"
            )
        case CallersRefused():
            return f"standby: sent away (number {event.callers}): {event.reason}"
        case SwitchServes():
            again = ", as its predecessor did" if event.adopted else ""
            return f"switch: {event.name} guards {event.bridge}{again}; hosts connect to {event.listen}"
        case SwitchRefusedPeer():
            return f"switch: {event.peer}: refused ({event.code}): {event.reason}"
        case Ended():
            return f"{event.role}: ended: {event.reason}"
        case FloorMeasured():
            return None
    return None
