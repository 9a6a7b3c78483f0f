"""Runs of a chaos cluster as tests want them."""

from __future__ import annotations

from itertools import count

from kagemusha.chaos.faults import AnyFault
from kagemusha.chaos.runner import Runner, RunResult

ATTEMPTS = 3
_numbers = count(1)


def struck_by(runner: Runner, fault: AnyFault) -> RunResult:
    """A run in which the fault found what it was meant for. A machine that stands still for a moment may have ended the
    protection just before, and then there is another run; each has to end well.
    """
    for _ in range(ATTEMPTS):
        result = runner.run(next(_numbers), (fault,))
        assert result.ok, result
        if result.reached:
            return result
    raise AssertionError(f"{fault} was not reached: {result}")
