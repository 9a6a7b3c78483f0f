"""A client, a switch and two hosts on which a test runs the real commands.

The demo's namespaces, configuration and client, but in the test's hands: which side runs with which keys, when it
starts, what is done to it. Everything of a site carries its name and is gone when the site is left.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.harness.commands import COMMAND_MARK, LIMIT_S, Command, Role, wait
from tests.harness.vm import demo_machine

from kagemusha.demo import client
from kagemusha.demo.image import COMMAND_PORT, REDIS_PORT
from kagemusha.demo.options import DemoOptions
from kagemusha.demo.processes import marked
from kagemusha.demo.records import Acknowledged, RecordReader, Verification
from kagemusha.demo.rundir import RunDirectory, sweep
from kagemusha.demo.sides import STREAM_PORT, configuration, kage_program, qemu_command
from kagemusha.demo.topology import GUEST_ADDRESS, Topology, apart, inside, management_host, namespaces_with
from kagemusha.guest.accel import KERNEL_WORDS, READY_LINE
from kagemusha.kernel import netns

Host = Literal["a", "b", "c"]
HOME: dict[Role, Host] = {"primary": "a", "standby": "b", "node": "a"}
GUEST_HOST = GUEST_ADDRESS.split("/")[0]
STANDBY_HOST = management_host("b")
LOAD_S = 600
# Nobody is to take a busy machine for a dead peer.
PATIENCE: dict[Role, dict[str, int]] = {
    "primary": {"heartbeat_ms": 100, "stall_ms": 2000},
}
LEASE_MS = 2000
CHOSEN_FLAGS = {"UP", "PROMISC", "NOARP"}  # the others follow from the state of the link
TAIL_LINES = 30


def toml(tables: Mapping[str, object]) -> str:
    """A configuration as TOML: plain keys first, then its tables and lists of tables."""
    plain = [f"{key} = {_value(value)}" for key, value in tables.items() if not _is_table(value)]
    for name, value in tables.items():
        if isinstance(value, dict):
            plain += [f"[{name}]", *(f"{key} = {_value(each)}" for key, each in value.items())]
        elif _is_table(value):
            assert isinstance(value, list)
            for table in value:
                plain += [f"[[{name}]]", *(f"{key} = {_value(each)}" for key, each in table.items())]
    return "\n".join(plain) + "\n"


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _value(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)  # JSON's scalars and lists are TOML's


class Writer:
    """The demo's client, which writes keys over one connection until it is told to end."""

    def __init__(self, process: subprocess.Popen[bytes], records: Path) -> None:
        self._process = process
        self._reader = RecordReader(records)
        self.acknowledged: list[Acknowledged] = []

    def poll(self) -> int:
        """How many writes have been acknowledged up to now."""
        self.acknowledged += self._reader.poll()
        return len(self.acknowledged)

    def wait_more(self, count: int = 10) -> None:
        """Wait for further acknowledgements, over the same connection: it never makes another."""
        wanted = self.poll() + count

        def more() -> bool:
            assert self._process.poll() is None, "the client's connection has ended"
            return self.poll() >= wanted

        wait(more, f"{count} more acknowledgements after {wanted - count}")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self.poll()
        self._reader.close()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended that was only waited for."""

    code: int
    printed: str


class Site:
    """Client, switch, host A and host B.

    :ivar name: unique; namespaces and the VM are called after it.
    """

    def __init__(self, folder: Path, topology: Topology, environment: Mapping[str, str], stack: ExitStack) -> None:
        self.folder = folder
        self.name = topology.prefix
        self.topology = topology
        self.environment = environment
        self._stack = stack
        self._labels = 0
        self._commands: list[Command] = []

    def keep(self, close: Callable[[], object]) -> None:
        """Have something done when the site is left."""
        self._stack.callback(close)

    # --- commands -------------------------------------------------------------------------------------------------

    def guest(self, *arguments: str, ram_mb: int = 256, programs: str = "") -> tuple[str, ...]:
        """QEMU's command line for the demo's guest, with its address and what it shall run."""
        machine = demo_machine()
        machine = replace(machine, append=f"{KERNEL_WORDS} kage.ip={GUEST_ADDRESS} {programs}".strip())
        return qemu_command(machine, DemoOptions(ram_mb=ram_mb, qemu_arguments=arguments))

    def settings(self, role: Role, changes: Mapping[str, object] | None = None) -> dict[str, object]:
        """The demo's configuration with some keys changed, named ``table.key``; None removes a key or table.

        State and runtime folders are the host's, so they outlive a command.
        """
        assert role != "node"
        folder = self.folder / HOME[role]
        tables = tomllib.loads(configuration(role, folder, self.name, demo_machine(), DemoOptions()))
        tables["vm"]["command"] = list(self.guest())
        tables[role] |= PATIENCE.get(role, {})
        tables["lease"]["duration_ms"] = LEASE_MS
        tables[role].pop("measure_floor", None)
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            table = tables
            for word in path:
                table = table.setdefault(word, {})
            if value is None:
                table.pop(last, None)
            else:
                table[last] = dict(value) if isinstance(value, Mapping) else value
        return tables

    def prepare(self, role: Role, text: str, host: Host | None = None) -> tuple[Path, dict[str, str]]:
        """A working directory with a configuration in it, and the environment of the command."""
        self._labels += 1
        folder = self.folder / f"{self._labels}-{role}"
        folder.mkdir()
        (self.folder / (host or HOME[role])).mkdir(exist_ok=True)
        (folder / "kage.toml").write_text(text)
        return folder, {**self.environment, COMMAND_MARK: f"{self.name}-{self._labels}"}

    def start(
        self,
        role: Role,
        changes: Mapping[str, object] | None = None,
        *,
        host: Host | None = None,
        isolated: bool = False,
    ) -> Command:
        """Start a command.

        :param host: where; by default where its role belongs.
        :param isolated: with files and names of network namespaces of its own, as if it ran on another machine.
        """
        settings = self.settings(role, changes)
        if isolated:
            settings |= {"state_dir": "state", "runtime_dir": "run"}
        return self._start(role, settings, host or HOME[role], isolated=isolated)

    def node(self, host: Host, changes: Mapping[str, object] | None = None) -> Command:
        """Start ``kage node`` on a host, as on a machine of its own; its state outlives the command."""
        settings = self.settings("primary", {"primary.standby": None, **(changes or {})})
        kept = self.folder / host
        settings |= {"node": host, "state_dir": str(kept / "state"), "runtime_dir": str(kept / "run")}
        settings["hosts"] = [
            {"name": name, "address": f"{management_host(name)}:{STREAM_PORT}"} for name in self.topology.hosts
        ]
        settings.setdefault("arbiter", {"kind": "file", "directory": str(self.folder / "arbiter")})
        return self._start("node", settings, host, isolated=True)

    def ask(self, command: Command, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        """An operator's command about what runs there, with the same configuration."""
        return subprocess.run(
            inside(self.topology.hosts[host], [kage_program(), *arguments, "--config", "kage.toml"]),
            cwd=command.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def _start(self, role: Role, settings: Mapping[str, object], host: Host, *, isolated: bool) -> Command:
        folder, environment = self.prepare(role, toml(settings), host)
        prefix = inside(self.topology.hosts[host], [])
        if isolated:
            prefix += apart([])
        command = Command(role, folder, prefix, environment)
        self._commands.append(command)
        self.keep(command.close)
        return command

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Commands that are started in the block and not ended in it are killed."""
        before = len(self._commands)
        try:
            yield
        finally:
            for command in self._commands[before:]:
                command.close()

    def run(self, role: Role, text: str, *, arguments: Sequence[str] = ()) -> Outcome:
        """Run a command that is to end by itself, with this text as its configuration."""
        folder, environment = self.prepare(role, text)
        program = [kage_program(), role, "--config", "kage.toml", *arguments]
        done = subprocess.run(
            inside(self.topology.hosts[HOME[role]], ["setpriv", "--pdeathsig", "KILL", "--", *program]),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert marked(COMMAND_MARK, environment[COMMAND_MARK]) == ()
        return Outcome(done.returncode, done.stdout + done.stderr)

    def standby(self, changes: Mapping[str, object] | None = None) -> Command:
        """Start a standby and wait until it listens; a primary that looks for one finds it at once."""
        command = self.start("standby", changes)
        command.wait(lambda: command.state != "", "listens")
        return command

    def protected(
        self, primary: Mapping[str, object] | None = None, standby: Mapping[str, object] | None = None
    ) -> tuple[Command, Command]:
        """A primary with a booted guest, and the standby that protects it: a guest boots faster without checkpoints."""
        running = self.start("primary", primary)
        running.wait(lambda: READY_LINE in running.console(), "the guest is up")
        with running.changes("PROTECTED"):
            waiting = self.standby(standby)
        return running, waiting

    # --- network --------------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, namespace: str) -> Iterator[None]:
        """The calling thread is in one of the namespaces; sockets made there stay there."""
        with open(f"/run/netns/{namespace}") as file, netns.entered(file.fileno()):
            yield

    def connect(self, host: Host) -> socket.socket:
        """A connection from one of the hosts to the standby's port."""
        with self.within(self.topology.hosts[host]):
            return socket.create_connection((STANDBY_HOST, STREAM_PORT), timeout=LIMIT_S)

    def to_guest(self, port: int) -> socket.socket:
        """A connection from the client to the guest."""
        with self.within(self.topology.client):
            return socket.create_connection((GUEST_HOST, port), timeout=LIMIT_S)

    def tell_guest(self, command: str) -> None:
        """Have a shell in the guest run something that ends the guest."""
        with self.to_guest(COMMAND_PORT) as connection:
            connection.sendall(f"{command}\n".encode())

    def devices(self, host: Host) -> dict[str, tuple[str, ...]]:
        """The network devices of a host: the bridge that each is in, its alias and its flags."""
        namespace = self.topology.hosts[host]
        text = subprocess.run(["ip", "-n", namespace, "-j", "link"], capture_output=True, text=True, check=True).stdout
        return {
            link["ifname"]: (
                link.get("master", ""),
                link.get("ifalias", ""),
                *sorted(CHOSEN_FLAGS & set(link["flags"])),
            )
            for link in json.loads(text)
        }

    def namespaces(self) -> set[str]:
        """Namespaces that commands have made and left so far."""
        return set(namespaces_with(self.name)) - set(self._own)

    def reboot(self, host: Host) -> None:
        """What a power failure leaves of a host besides its disk: nothing of what its commands made."""
        for role in ("primary", "standby"):
            if (name := f"kg-{self.name}-{role}") in self.namespaces() and HOME[role] == host:
                subprocess.run(["ip", "netns", "del", name], check=True)

    @property
    def _own(self) -> tuple[str, ...]:
        return (self.topology.client, self.topology.switch, self.topology.arbiter, *self.topology.hosts.values())

    # --- client ---------------------------------------------------------------------------------------------------

    def writer(self) -> Writer:
        """Start the client; it has written when this returns."""
        writer = Writer(self._client("write", "--seconds", str(LOAD_S)), self._records)
        self.keep(writer.close)
        writer.wait_more(1)
        return writer

    def verify(self, writer: Writer) -> None:
        """End the client and find every write that it was acknowledged, and no fewer than it says."""
        writer.close()
        reader = self._client("verify")
        assert reader.wait(LIMIT_S) == 0, (self.folder / "verify.log").read_text()
        found = Verification.from_json((self.folder / "verify.json").read_text())
        assert (found.checked, found.lost) == (len(writer.acknowledged), ())
        assert found.checked > 0

    @property
    def _records(self) -> Path:
        return self.folder / "acknowledged.bin"

    def _client(self, task: str, *more: str) -> subprocess.Popen[bytes]:
        arguments = client.command_line(
            sys.executable,
            task,
            host=GUEST_HOST,
            port=REDIS_PORT,
            records=self._records,
            outcome=self.folder / f"{task}.json",
            seed=7,
            value_bytes=64,
        )
        with (self.folder / f"{task}.log").open("wb") as log:
            process = subprocess.Popen(
                inside(self.topology.client, ["setpriv", "--pdeathsig", "KILL", "--", *arguments, *more]),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.keep(process.wait)
        self.keep(process.kill)
        return process

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for path in sorted(self.folder.rglob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            if lines:
                parts.append("\n".join([f"--- {path.relative_to(self.folder)}", *lines]))
        return "\n".join(parts)


@contextmanager
def site(hosts: Sequence[Host] = ("a", "b")) -> Iterator[Site]:
    """Make one; a failure inside gets the tails of all logs as a note."""
    sweep()
    with RunDirectory(keep=False) as directory, Topology(directory.name, hosts) as topology, ExitStack() as stack:
        made = Site(directory.path, topology, directory.environment, stack)
        try:
            yield made
        except BaseException as error:
            error.add_note(made.tails())
            raise
