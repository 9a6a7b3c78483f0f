"""Where processes of ours say how far they are, and may be made to fail: see ``model/faults.py``.

Nothing is there by default: :func:`reach` looks at one name and returns. A worker whose environment names a file in
``KAGE_FAULTS`` shares that file with all its processes (they are forked later and inherit the mapping) and with
whoever arms it: a process that reaches a point counts it there, and strikes itself if it is the one that is armed. So a
running node can be armed, and it can be seen which points it has passed. ``KAGE_FAULT`` arms one from the start.

A node in production has neither, and then nothing can arm it. The file has to be the worker's own and writable by
nobody else.

::

    u32 action   0: nothing is armed, else the place in FaultAction + 1; written last, and cleared before it strikes
    u32 point    place in Fault
    u32 left     how many more times the point has to be reached
    u32 struck   how often a point has struck
    u32 passed[] how often each point was reached

A point is reached by one process at a time; counts of two would lose at worst one.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
from collections.abc import Mapping
from pathlib import Path

from kagemusha.errors import ConfigError
from kagemusha.model.faults import Fault, FaultAction, FaultOrder, parse_fault

FILE_VARIABLE = "KAGE_FAULTS"
ORDER_VARIABLE = "KAGE_FAULT"
_ACTION, _POINT, _LEFT, _STRUCK, _PASSED = range(5)
_FAULTS = tuple(Fault)
_PLACE = {fault: place for place, fault in enumerate(_FAULTS)}
_ACTIONS = tuple(FaultAction)
_WORDS = _PASSED + len(_FAULTS)
_OPERATION = "provide fault points"


class FaultBoard:
    """The memory that says what is armed and what was reached, with or without a file."""

    def __init__(self, descriptor: int = -1) -> None:
        """:param descriptor: of a file of the right size; -1: memory of this process and its children."""
        self._words = memoryview(mmap.mmap(descriptor, 4 * _WORDS)).cast("I")

    @classmethod
    def create(cls, path: Path) -> FaultBoard:
        """Make the file, with nothing armed.

        :raise OSError: it cannot be, or there is one.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, 4 * _WORDS)
            return cls(descriptor)
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path) -> FaultBoard:
        """Share a file that :meth:`create` has made.

        :raise ConfigError: there is none, others may write it, or it is of another version.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{FILE_VARIABLE}={path}: {error.strerror}", operation=_OPERATION) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"{FILE_VARIABLE}={path}: it has to be a file of our own, of mode 600", operation=_OPERATION
                )
            if found.st_size != 4 * _WORDS:
                raise ConfigError(f"{FILE_VARIABLE}={path}: it is not of this version of kage", operation=_OPERATION)
            return cls(descriptor)
        finally:
            os.close(descriptor)

    def arm(self, order: FaultOrder) -> None:
        """From now on; what was armed before is not any more."""
        words = self._words
        words[_ACTION] = 0
        words[_POINT], words[_LEFT] = _PLACE[order.fault], order.times
        words[_ACTION] = _ACTIONS.index(order.action) + 1

    def disarm(self) -> None:
        """Nothing is armed from here on."""
        self._words[_ACTION] = 0

    @property
    def armed(self) -> bool:
        """Whether something is, and has not struck."""
        return self._words[_ACTION] != 0

    @property
    def struck(self) -> int:
        """How often an armed point was reached and struck."""
        return self._words[_STRUCK]

    def passed(self, fault: Fault) -> int:
        """How often a point was reached, by whatever process."""
        return self._words[_PASSED + _PLACE[fault]]

    def take(self, fault: Fault) -> FaultAction | None:
        """A process has reached this point; what is to happen to it."""
        words, place = self._words, _PLACE[fault]
        words[_PASSED + place] = (words[_PASSED + place] + 1) & 0xFFFF_FFFF
        action = words[_ACTION]
        if not action or words[_POINT] != place:
            return None
        words[_LEFT] -= 1
        if words[_LEFT]:
            return None
        words[_ACTION] = 0
        words[_STRUCK] += 1
        return _ACTIONS[action - 1]


_board: FaultBoard | None = None


def reach(fault: Fault) -> None:
    """The calling process is at this point.

    :raise OSError: ENOSPC, where that is armed.
    """
    if _board is not None:
        _strike(_board.take(fault))


def _strike(action: FaultAction | None) -> None:
    match action:
        case FaultAction.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultAction.FREEZE:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultAction.FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def provide(environment: Mapping[str, str]) -> bool:
    """Have fault points if the environment asks for them; whether it does. To be called before processes are forked.

    :raise ConfigError: what it says makes no sense.
    """
    global _board
    path, text = environment.get(FILE_VARIABLE), environment.get(ORDER_VARIABLE)
    if path is None and text is None:
        return False
    order = None if text is None else parse_fault(text)
    board = FaultBoard() if path is None else FaultBoard.open(Path(path))
    if order is not None:
        board.arm(order)
    _board = board
    return True
