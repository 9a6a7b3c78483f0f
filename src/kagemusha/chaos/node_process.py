"""``kage node`` as a process of a chaos cluster: its events, its console, its parts, its guest's network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from kagemusha.demo.follow import EventReader
from kagemusha.demo.processes import Process, descendants, end_marked
from kagemusha.demo.sides import SERIAL_FILE
from kagemusha.kernel import netns
from kagemusha.model.events import Event, StateChanged

NODE_MARK = "KAGE_CHAOS_NODE"
_EventT = TypeVar("_EventT", bound=Event)


def part_of(found: Sequence[Process], name: str) -> tuple[Process, ...]:
    """Of a tree of processes, the deepest first: ``worker`` (its root), ``qemu``, ``host`` (all), or one by name."""
    if name == "host":
        return tuple(found)
    if name == "worker":
        return tuple(found[-1:])
    return tuple(each for each in found if (each.is_qemu if name == "qemu" else each.name == f"kage-{name}"))


class NodeProcess:
    """One start of ``kage node``.

    :ivar events: what it has reported so far.
    """

    def __init__(self, host: str, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.host = host
        self.folder = folder
        self.events: list[Event] = []
        self.mark = environment[NODE_MARK]
        self._reader = EventReader(folder / "events.jsonl")
        with (folder / "worker.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def of(self, kind: type[_EventT]) -> list[_EventT]:
        """All events of a kind up to now."""
        self.events += self._reader.poll()
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def state(self) -> str:
        """The last it has told; empty: none yet, or it has ended."""
        changes = self.of(StateChanged)
        return changes[-1].state if changes and self.alive else ""

    @property
    def alive(self) -> bool:
        """The worker runs (or is frozen)."""
        return self.process.poll() is None

    def console(self) -> str:
        """What the guest has printed here."""
        path = self.folder / SERIAL_FILE
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self) -> tuple[Process, ...]:
        """Worker, children and QEMU, deepest first."""
        return descendants(self.process.pid)

    def part(self, name: str) -> tuple[Process, ...]:
        """``worker``, ``qemu``, ``host`` (all), or one of its processes by name."""
        return part_of(self.processes(), name)

    @contextmanager
    def guest_network(self) -> Iterator[int]:
        """A descriptor of the network namespace with the guest's tap. No process need live in it: it has a name.

        :raise ValueError: this node has none.
        """
        (name,) = Path(f"/proc/{self.process.pid}/root{netns.NAMED}").iterdir()
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """End every process of it."""
        end_marked(NODE_MARK, self.mark)
        self.process.wait()

    def forget(self) -> None:
        """After :meth:`close`: nobody asks for its events any more."""
        self._reader.close()
