"""The VM's rules as its worker sees them: the processes that change them, and what of them the standby has.

Neither process has to live for the rules to be in force, so one that ends is started again, and nothing else happens.
Until the first version is in force the VM is not protected: there is none that a standby could be given.
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
    :ivar in_force: a version is in force.
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
        self.in_force = False
        self._why_not = ""

    @property
    def trouble(self) -> str:
        """Why no version is in force, for people; empty: one is."""
        return "" if self.in_force else self._why_not

    def begin(self, *, needed: bool) -> None:
        """Returns when the first version is in force.

        :param needed: else, if it cannot be, that is told (``trouble``), and tried again and again.
        :raise ConfigError, BugError: it cannot be, and is needed.
        """
        try:
            process = self._start()
            process.wait_in_force()
            self._output.set_rules(process.expanded, process.flows)
            self.in_force = True
        except (KageError, OSError) as error:
            if needed:
                raise
            self._give_up(error)

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
            self.in_force |= process.in_force
        except (KageError, OSError) as error:  # OSError: it has ended before it was answered
            self._give_up(error)

    def _give_up(self, error: KageError | OSError) -> None:
        """What the process put into force stays so; it was stored, and a new process takes it from there."""
        self._why_not = str(error)
        self._start_t = time.monotonic() + RESTART_S
        if self._process is not None:
            self._poll.unregister(self._process)
            self._process.close()
            self._process = None

    def tend(self, now: float) -> None:
        """Start what is to run and does not; often. ``now``: CLOCK_MONOTONIC seconds."""
        if self._process is None and now >= self._start_t:
            try:
                self._start()
            except OSError as error:  # no process can be had now
                self._give_up(error)
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
