"""A real ``kage switch`` at a bridge of taps, and hosts that are its clients."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.harness.commands import wait
from tests.harness.gate import ip
from tests.harness.switch import CLIENTS, HOSTS, Switch, switch

from kagemusha.demo.follow import EventReader
from kagemusha.demo.processes import descendants
from kagemusha.demo.sides import kage_program
from kagemusha.model.config import Address
from kagemusha.model.events import Event, SwitchRefusedPeer, SwitchServes
from kagemusha.model.ids import Epoch, Term
from kagemusha.switching.channel import Channel
from kagemusha.switching.client import Registration, SwitchClient

NODES = dict(zip(("a", "b"), HOSTS, strict=True))
VM = "vm1"
WAIT_S = 30.0
ADDRESS = Address(host="127.0.0.1", port=7400)


def mac_of(address: bytes) -> str:
    return address.hex(":")


class SwitchCommand:
    """The process, its folder and the clients that were made. ``here``: the ports."""

    def __init__(self, here: Switch, folder: Path, stack: ExitStack, more: Sequence[str]) -> None:
        self.here = here
        self.folder = folder
        self._stack = stack
        self._more = tuple(more)
        ports = [*(f'[[ports]]\ndevice = "{device}"\nnode = "{node}"' for node, device in NODES.items())]
        ports += [f'[[ports]]\ndevice = "{device}"' for device in CLIENTS]
        head = f'name = "sw"\nlisten = "{ADDRESS}"\nbridge = "br0"\n'
        head += f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/run"\n'
        (folder / "switch.toml").write_text("\n".join((head, *ports, "[tls]\ninsecure = true\n")))
        self._events: list[Event] = []
        self._reader = EventReader(folder / "events.jsonl")
        stack.callback(self._reader.close)
        self.start()

    def start(self) -> None:
        """Start it, or its successor; returns when it serves."""
        begun = len(self.served())
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "--", kage_program(), "switch", "--config", "switch.toml"),
                    *("--events", "events.jsonl", *self._more),
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def serves() -> bool:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            return len(self.served()) > begun

        wait(serves, "the switch serves")

    def served(self) -> list[SwitchServes]:
        return [event for event in self._poll() if isinstance(event, SwitchServes)]

    def refused(self) -> list[SwitchRefusedPeer]:
        return [event for event in self._poll() if isinstance(event, SwitchRefusedPeer)]

    def _poll(self) -> list[Event]:
        self._events += self._reader.poll()
        return self._events

    def kage(self, *arguments: str) -> str:
        """What ``kage switch`` with these words prints."""
        command = [kage_program(), "switch", "--config", "switch.toml", *arguments]
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=True, timeout=WAIT_S
        ).stdout

    def gate_pids(self) -> list[int]:
        """Its gate processes, one for each VM."""
        return [each.pid for each in descendants(self.process.pid) if each.name == "kage-gate"]

    def waits_for_a_gate(self) -> bool:
        """It is in a call that ends with an answer of a gate process, not in its loop."""
        return Path(f"/proc/{self.process.pid}/wchan").read_text() not in ("0", "ep_poll")

    def kill(self) -> None:
        """SIGKILL, and nothing else."""
        self.process.kill()
        self.process.wait()

    def part(self, name: str) -> int:
        """The process of this name, of the VM that came first; 0: there is none at the moment."""
        found = sorted(each.pid for each in descendants(self.process.pid) if each.name == name)
        return found[0] if found else 0

    def end(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def host(
        self, node: str, mac: bytes, *, term: int = 1, vm: str = VM, first_epoch: int = 1, seal_s: float = WAIT_S
    ) -> SwitchClient:
        """A host that registers its guest, not waited for."""
        client = SwitchClient(
            Channel(ADDRESS, None, node=node),
            Registration(vm, (mac_of(mac),), "", f"{node}/guest"),
            Term(term),
            first_epoch=Epoch(first_epoch),
            seal_s=seal_s,
        )
        self._stack.callback(client.close)
        return client


@contextmanager
def switch_command(folder: Path, *more: str) -> Iterator[SwitchCommand]:
    """One, in a namespace of its own in which the thread is meanwhile."""
    with ExitStack() as stack:
        here = stack.enter_context(switch())
        ip("link", "set", "lo", "up")
        command = SwitchCommand(here, folder, stack, more)
        try:
            yield command
        finally:
            command.end()
            assert not os.path.exists(f"/proc/{command.process.pid}")
