"""Follow the events files of workers, as `kagemusha.model.events` writes them.

A worker may die in the middle of a line: an unfinished last line is left where it is. An event of an
unknown kind or with other fields is an error, since demo and worker are of one version.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import BinaryIO

from kagemusha.errors import WireError
from kagemusha.model import events

KINDS: dict[str, type[events.Event]] = {
    kind.kind: kind
    for kind in (
        events.StateChanged,
        events.SyncProgress,
        events.EpochCommitted,
        events.FloorMeasured,
        events.GateCounted,
        events.CheckpointApplied,
        events.CallersRefused,
        events.TakenOver,
        events.SwitchServes,
        events.SwitchRefusedPeer,
        events.Ended,
    )
}


def parse(line: str) -> events.Event:
    """One line of an events file.

    :raise WireError: not JSON, of an unknown kind, or with missing or unknown fields.
    """
    try:
        content = json.loads(line)
        kind = KINDS[content.pop("event")]
        known = {field.name for field in fields(kind)}
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        if not needed <= content.keys() <= known:
            raise KeyError(*sorted(known ^ content.keys()))
        return kind(**content)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WireError(f"not an event: {line[:200]!r} ({error})", operation="read events") from error


class EventReader:
    """Reads an events file from its beginning, as far as it has got, again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def poll(self) -> tuple[events.Event, ...]:
        """The events added since the last call; empty while there is no file.

        :raise WireError: see `parse`.
        """
        if self._file is None:
            if not self._path.exists():
                return ()
            self._file = self._path.open("rb")
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return tuple(parse(line.decode()) for line in lines if line)

    def close(self) -> None:
        """Give up the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
