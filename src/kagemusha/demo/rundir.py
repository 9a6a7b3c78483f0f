"""The run's directory, its unique name, and what an earlier run that was killed has left behind.

A directory ``kgd<6 hex digits>`` in the temporary directory holds a file ``lock``, on which a living demo
keeps an exclusive flock(2). A lock that can be had belongs to a demo that is dead: its processes (found by
their environment), namespaces (found by name) and directory are then removed. The lock is close-on-exec, so
no child keeps it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from kagemusha.demo.processes import end_marked
from kagemusha.demo.topology import delete_namespaces
from kagemusha.errors import KageError

PREFIX = "kgd"
MARK = "KAGE_DEMO_RUN"
_NAME_LENGTH = len(PREFIX) + 6
TAIL_LINES = 25


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock on ``path``, or None if another process holds it or it is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _remove_everything(name: str) -> None:
    end_marked(MARK, name)
    delete_namespaces(name)


def sweep() -> tuple[str, ...]:
    """Remove what demos left that did not live to do it; returns their names."""
    removed = []
    for directory in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        try:
            if len(directory.name) != _NAME_LENGTH or directory.stat().st_uid != os.geteuid():
                continue
        except FileNotFoundError:
            continue  # its run has just removed it
        fd = _locked(directory / "lock")
        if fd is None:
            continue
        try:
            _remove_everything(directory.name)
            shutil.rmtree(directory)
        finally:
            os.close(fd)
        removed.append(directory.name)
    return tuple(removed)


class RunDirectory:
    """A unique name and a directory of that name, for the time of one run.

    :ivar name: ``kgd<6 hex>``; prefix of all namespaces and mark of all processes of the run.
    :ivar path: the directory.
    """

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.name = PREFIX + secrets.token_hex(3)
        self.path = Path(tempfile.gettempdir()) / self.name
        self._fd = -1

    @property
    def environment(self) -> dict[str, str]:
        """The environment for every child of the run."""
        return {**os.environ, MARK: self.name, "PYTHONUNBUFFERED": "1"}

    def tails(self) -> str:
        """The last lines of every log of the run: files ``log`` and ``*.log``."""
        parts = []
        logs = (path for path in self.path.rglob("*log") if path.name == "log" or path.suffix == ".log")
        for path in sorted(path for path in logs if path.is_file()):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            if lines:
                parts.append("\n".join([f"--- {path.relative_to(self.path)}", *lines]))
        return "\n".join(parts)

    @contextmanager
    def logs_in_errors(self) -> Iterator[None]:
        """What goes wrong meanwhile gets the tails of all logs as a note, and where they stay, if they do."""
        try:
            yield
        except KageError as error:
            error.add_note(self.tails())
            if self.keep:
                error.add_note(f"logs stay in {self.path}")
            raise

    def __enter__(self) -> Self:
        self.path.mkdir(mode=0o700)
        # Locked before it has its name: a sweep never sees it free.
        fresh = self.path / "lock.new"
        self._fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        fresh.rename(self.path / "lock")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _remove_everything(self.name)
            if self.keep:
                (self.path / "lock").unlink()
            else:
                shutil.rmtree(self.path)
        finally:
            os.close(self._fd)
