"""One running ``kage`` worker: what it says, which processes it has, and what is done to them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from kagemusha.demo.follow import EventReader
from kagemusha.demo.processes import Process, descendants, marked, signal_together
from kagemusha.demo.sides import SERIAL_FILE, kage_program
from kagemusha.model.events import Event, StateChanged

Role = Literal["primary", "standby", "node"]
Part = Literal["worker", "gate", "ship", "rules", "claims", "inbound", "qemu"]
COMMAND_MARK = "KAGE_TEST_COMMAND"
LIMIT_S = 90.0
POLL_S = 0.01
_EventT = TypeVar("_EventT", bound=Event)


def wait(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Poll until the condition holds. The limit is there for a test that has already failed."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(POLL_S)


class Command:
    """One running ``kage primary``, ``kage standby`` or ``kage node``.

    :ivar folder: its working directory: ``kage.toml``, ``events.jsonl``, ``worker.log``, ``serial.log``.
    :ivar events: what it has reported, as far as :meth:`poll` has read.
    """

    def __init__(self, role: Role, folder: Path, prefix: Sequence[str], environment: Mapping[str, str]) -> None:
        self.role = role
        self.folder = folder
        self.events: list[Event] = []
        self._mark = environment[COMMAND_MARK]
        self._reader = EventReader(folder / "events.jsonl")
        arguments = [kage_program(), role, "--config", "kage.toml", "--events", "events.jsonl"]
        with (folder / "worker.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, "setpriv", "--pdeathsig", "KILL", "--", *arguments],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> Sequence[Event]:
        """All events up to now."""
        self.events += self._reader.poll()
        return self.events

    def of(self, kind: type[_EventT]) -> list[_EventT]:
        """All events of one kind up to now."""
        return [event for event in self.poll() if isinstance(event, kind)]

    @property
    def state(self) -> str:
        """The state it reported last; empty before the first."""
        changes = self.of(StateChanged)
        return changes[-1].state if changes else ""

    def printed(self) -> str:
        """Everything it and its QEMU have printed."""
        return (self.folder / "worker.log").read_text(errors="replace")

    def console(self) -> str:
        """What the guest has printed here."""
        serial = self.folder / SERIAL_FILE
        return serial.read_text(errors="replace") if serial.exists() else ""

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until the condition holds, while the command lives."""

        def holds() -> bool:
            if condition():
                return True
            status = self.process.poll()
            assert status is None or condition(), f"kage {self.role} ended with {status}; awaited: {what}"
            return False

        try:
            wait(holds, f"kage {self.role}: {what}")
        except AssertionError as error:
            error.add_note(f"it printed:\n{self.printed()}")
            raise

    def wait_state(self, state: str) -> None:
        """Until this is the state."""
        self.wait(lambda: self.state == state, f"state {state}")

    def wait_printed(self, text: str) -> None:
        """Until this text has been printed."""
        self.wait(lambda: text in self.printed(), f"prints {text!r}")

    def wait_event(self, kind: type[_EventT]) -> _EventT:
        """Until there is an event of this kind; the latest."""
        self.wait(lambda: bool(self.of(kind)), kind.kind)
        return self.of(kind)[-1]

    @contextmanager
    def changes(self, *states: str) -> Iterator[None]:
        """After the block, wait until these states have been entered in this order, others between them or not."""
        seen = len(self.of(StateChanged))
        yield
        self.wait(lambda: self._entered(seen, states), f"then the states {', '.join(states)}")

    def _entered(self, since: int, states: Sequence[str]) -> bool:
        later = iter(event.state for event in self.of(StateChanged)[since:])
        return all(state in later for state in states)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(LIMIT_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.ended()

    def part(self, part: Part) -> Process:
        """One of its processes, by the name that it gives itself."""
        found: list[Process] = []

        def named() -> bool:  # a moment after it was forked
            found[:] = [each for each in descendants(self.process.pid) if self._is(each, part)]
            return len(found) == 1

        wait(named, f"there is a process {part}")
        return found[0]

    def _is(self, process: Process, part: Part) -> bool:
        if part == "worker":
            return process.pid == self.process.pid
        return process.is_qemu if part == "qemu" else process.name == f"kage-{part}"

    def strike(self, number: signal.Signals, *parts: Part) -> None:
        """Signal some of its processes, all in one go."""
        targets = [self.part(part) for part in parts]
        assert len(signal_together(targets, number).names) == len(targets)

    def left(self) -> tuple[Process, ...]:
        """Every process that it ever started and that is still there."""
        return marked(COMMAND_MARK, self._mark)

    def wait_gone(self) -> None:
        """Until none of its processes is there."""
        wait(lambda: self.left() == (), f"all processes of kage {self.role} have ended")

    def close(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.close()
