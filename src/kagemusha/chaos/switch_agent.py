"""``kage switch`` as a process: it guards the topology's bridge, holds the VM's frames and is the arbiter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kagemusha.chaos.arbiter_process import ArbiterProcess
from kagemusha.demo.follow import EventReader
from kagemusha.demo.sides import kage_program
from kagemusha.demo.topology import BRIDGE, SWITCH, management_host
from kagemusha.errors import TransientError
from kagemusha.model.events import SwitchServes

SWITCH_PORT = 7400
START_LIMIT_S = 30.0
_LOOK_S = 0.02


class SwitchAgent(ArbiterProcess):
    """The agent in the topology's switch.

    :ivar address: where hosts find it.
    """

    def __init__(
        self, folder: Path, hosts: Sequence[str], prefix: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """:param hosts: their names, each behind the port ``port-NAME``."""
        super().__init__(folder, prefix, environment)
        self.address = f"{management_host(SWITCH)}:{SWITCH_PORT}"
        self._hosts = tuple(hosts)
        self._reader: EventReader | None = None
        self._served = 0

    def command(self) -> list[str]:
        """As :class:`ArbiterProcess` says."""
        (self.folder / "switch.toml").write_text(self._configuration())
        return [kage_program(), "switch", "--config", "switch.toml", "--events", "events.jsonl"]

    def _configuration(self) -> str:
        ports = [f'[[ports]]\ndevice = "port-{host}"\nnode = "{host}"' for host in self._hosts]
        head = [
            f'name = "switch"\nlisten = "{self.address}"\nbridge = "{BRIDGE}"',
            f"state_dir = {json.dumps(str(self.folder / 'state'))}",
            f"runtime_dir = {json.dumps(str(self.folder / 'run'))}",
        ]
        return "\n".join((*head, *ports, '[[ports]]\ndevice = "port-client"', "[tls]\ninsecure = true")) + "\n"

    def wait_serving(self) -> None:
        """As :class:`ArbiterProcess` says. :raise TransientError: it does not come about."""
        self._served += 1
        if self._reader is None:
            self._reader = EventReader(self.folder / "events.jsonl")
        served, deadline = self._served - 1, time.monotonic() + START_LIMIT_S
        while served < self._served:
            served += sum(isinstance(event, SwitchServes) for event in self._reader.poll())
            if not self.alive or time.monotonic() > deadline:
                raise TransientError(f"the switch does not serve: {self.last_words()}", operation="start it")
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """End it."""
        super().close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
