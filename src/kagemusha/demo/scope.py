"""What consists of parts that are there together for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Scope(ABC):
    """A context manager whose parts are left in reverse order, also those that were there when entering failed.

    :ivar _stack: takes down the parts; further ones can be added while it is entered.
    """

    _stack: ExitStack

    @abstractmethod
    def _enter(self, stack: ExitStack) -> None:
        """Make the parts; the stack takes each down again."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
