"""SIGINT and SIGTERM as something to select on, so that they interrupt waiting and nothing else."""

from __future__ import annotations

import signal
import socket
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the signals only set ``requested`` and make ``fileno`` readable. Main thread only."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """For select."""
        return self._reader.fileno()

    def take(self) -> str | None:
        """The signal that asked for the end, once; None if there was none since."""
        requested, self.requested = self.requested, None
        if requested is not None:
            self._reader.recv(64)
        return requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._writer.send(b"\0")
