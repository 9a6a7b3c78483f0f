"""Nodes of one VM on hosts of a site, with an arbiter: an etcd, or the switch that holds the VM's frames too."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.harness.commands import Command, wait
from tests.harness.etcd import Member
from tests.harness.site import Host, Site, Writer

from kagemusha.chaos.switch_agent import SwitchAgent
from kagemusha.demo.topology import ARBITER, inside, management_host
from kagemusha.model.events import TakenOver

LEASE_MS = 2500  # a machine that stands still for a moment is not a dead one
HOSTS: tuple[Host, ...] = ("a", "b", "c")
ENDPOINT = f"http://{management_host(ARBITER)}:2379"
PEER = f"http://{management_host(ARBITER)}:2380"


@dataclass
class Cluster:
    """Which command runs on which host."""

    hosts: Site
    arbiter: Member | SwitchAgent
    nodes: dict[Host, Command] = field(default_factory=dict)
    writer: Writer | None = None

    def start(self, host: Host) -> Command:
        self.nodes[host] = self.hosts.node(host, {"lease.duration_ms": LEASE_MS, **self._who_decides()})
        return self.nodes[host]

    def _who_decides(self) -> dict[str, object]:
        if isinstance(self.arbiter, SwitchAgent):
            return {"arbiter.kind": "switch", "switch.address": self.arbiter.address}
        return {"arbiter.kind": "etcd", "arbiter.endpoints": [ENDPOINT]}

    @contextmanager
    def frozen_arbiter(self) -> Iterator[None]:
        """It answers nobody, and in the switch form lets nothing go that is held."""
        if isinstance(self.arbiter, Member):
            with self.arbiter.frozen():
                yield
            return
        self.arbiter.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.arbiter.signal(signal.SIGCONT)

    def of(self, state: str) -> list[Host]:
        return [host for host, node in self.nodes.items() if node.state == state and node.process.poll() is None]

    def wait_protected(self) -> tuple[Host, Host]:
        """Until one node is protected by another; which."""

        def holds() -> bool:
            return len(self.of("PROTECTED")) == 1 and len(self.of("PROTECTING")) == 1

        wait(holds, "one node is protected by another")
        return self.of("PROTECTED")[0], self.of("PROTECTING")[0]

    def has_taken_over(self, host: Host, times: int) -> bool:
        """As often as that."""
        return len(self.nodes[host].of(TakenOver)) == times

    def kage(self, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of an operator on a host."""
        return self.hosts.ask(self.nodes[host], host, *arguments)

    def goes_on(self) -> None:
        """The client is answered, over the connection it has had all the time."""
        assert self.writer is not None
        self.writer.wait_more(30)


def etcd_of(hosts: Site) -> Member:
    """A cluster of one member, started."""
    arbiter = Member("m0", hosts.folder / "etcd", ENDPOINT, PEER, prefix=inside(hosts.topology.arbiter, []))
    hosts.keep(arbiter.kill)
    arbiter.start([arbiter])
    return arbiter


def switch_of(hosts: Site) -> SwitchAgent:
    """The agent of the site's switch, started."""
    agent = SwitchAgent(hosts.folder / "switch", HOSTS, inside(hosts.topology.switch, []), hosts.environment)
    hosts.keep(agent.close)
    agent.start()
    return agent
