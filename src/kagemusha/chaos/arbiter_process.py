"""An arbiter as a process that can be killed, frozen, slowed down and started again: an etcd, or the switch's agent."""

from __future__ import annotations

import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kagemusha.chaos.node_process import part_of
from kagemusha.demo.processes import Process, descendants, signal_together

SLOW_STANDS_S, SLOW_RUNS_S = 0.18, 0.02


class ArbiterProcess(ABC):
    """Base of both. A subclass says what runs, and when it serves."""

    def __init__(self, folder: Path, prefix: Sequence[str], environment: Mapping[str, str]) -> None:
        """:param prefix: of the command line: where it runs."""
        self.folder = folder
        self._prefix = prefix
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What runs."""

    @abstractmethod
    def wait_serving(self) -> None:
        """Return when it serves."""

    def start(self) -> None:
        """Start it, or start it again with its data."""
        self.folder.mkdir(exist_ok=True)
        command = [*self._prefix, *("setpriv", "--pdeathsig", "KILL", "--"), *self.command()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
            )
        self.wait_serving()

    @property
    def alive(self) -> bool:
        """It runs (or is frozen)."""
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    @property
    def pid(self) -> int | None:
        """Of the process; None: it does not run."""
        return None if self._process is None else self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Signal it."""
        if self._process is not None:
            self._process.send_signal(number)

    def part(self, name: str) -> tuple[Process, ...]:
        """Of its processes; see :func:`part_of`."""
        return part_of(descendants(self._process.pid), name) if self._process is not None else ()

    def revive(self) -> None:
        """Whatever of it stands still goes on; if it has ended, it is started again."""
        signal_together(self.part("host"), signal.SIGCONT)
        if not self.alive:
            self.kill()
            self.start()

    def slow_down(self) -> Callable[[], None]:
        """Let it run for a tenth of the time from now on; what ends that."""
        enough = threading.Event()

        def alternate() -> None:
            while not enough.is_set():
                self.signal(signal.SIGSTOP)
                enough.wait(SLOW_STANDS_S)
                self.signal(signal.SIGCONT)
                enough.wait(SLOW_RUNS_S)

        thread = threading.Thread(target=alternate, name="slow arbiter", daemon=True)
        thread.start()

        def heal() -> None:
            enough.set()
            thread.join()

        return heal

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it."""
        self.kill()
