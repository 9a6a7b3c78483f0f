"""What the simulation needs of a source of randomness; it is passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Chance(Protocol):
    """As ``random.Random``."""

    def random(self) -> float:
        """In [0, 1)."""

    def randrange(self, stop: int, /) -> int:
        """In 0 … stop - 1."""

    def choice(self, seq: Sequence[T], /) -> T:
        """One of them."""
