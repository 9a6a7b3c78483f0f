"""The VM's rules as its worker sees them: the processes that change them, and what of them the standby has.

Neither process has to live for the rules to be in force, so one that ends is started again, and nothing else happens.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Container

from kagemusha.agents.flows_process import FlowsProcess
from kagemusha.agents.output import Output
from kagemusha.agents.rules_process import RulesProcess
from kagemusha.errors import KageError

RESTART_S = 1.0


class VmRules:
    """Of one worker.

    :param start: a rules process.
    :param poll: of the worker's loop; the rules process's descriptor is kept in it.
    """

    def __init__(
        self, start: Callable[[], RulesProcess], flows: FlowsProcess, output: Output, poll: select.poll
    ) -> None:
        self._start_process = start
        self._flows = flows
        self._output = output
        self._poll = poll
        self._process: RulesProcess | None = None
        self._start_t = 0.0
        self._shipped = b""

    def begin(self) -> None:
        """Returns when the first version is in force.

        :raise ConfigError, BugError: it cannot be.
        """
        process = self._start()
        process.wait_in_force()
        self._output.set_rules(process.expanded, process.flows)

    def _start(self) -> RulesProcess:
        self._process = process = self._start_process()
        self._poll.register(process, select.POLLIN)
        return process

    def take(self, ready: Container[int]) -> None:
        """Let the version come into force that the process wants to, if it says so.

        :param ready: descriptors at which something has happened.
        """
        process = self._process
        if process is None or process.fileno() not in ready:
            return
        try:
            process.take()
            self._output.set_rules(process.expanded, process.flows)
        except KageError:
            # What it put into force stays so; it was stored, and a new process takes it from there.
            self._poll.unregister(process)
            self._process = None
            self._start_t = time.monotonic() + RESTART_S
            process.close()

    def tend(self, now: float) -> None:
        """Start what is to run and does not; often. ``now``: CLOCK_MONOTONIC seconds."""
        if self._process is None and now >= self._start_t:
            self._start()
        self._flows.tend(now)

    def to_ship(self) -> bytes:
        """The version for the next checkpoint; empty if the standby has it."""
        version = self._process.version if self._process is not None else b""
        if not version or version is self._shipped:
            return b""
        self._shipped = version
        return version

    def session_over(self) -> None:
        """The next standby has none."""
        self._shipped = b""

    def close(self) -> None:
        """End both processes; what is in force stays so."""
        self._flows.close()
        if self._process is not None:
            self._process.close()
