"""The management network of a chaos cluster: cut, slow and lossy between the hosts and the arbiter, and whole again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress

from kagemusha.chaos.delay import READY as RELAYS
from kagemusha.demo.topology import MANAGEMENT_BRIDGE, Topology, inside, management_host, management_port
from kagemusha.errors import TransientError
from kagemusha.kernel import bpf, netns
from kagemusha.kernel.netlink import Links

NOBODY = "02:00:00:00:00:01"


class ManagementNetwork:
    """Between ``hosts`` and the arbiter, which has the end ``arbiter`` of the topology."""

    def __init__(self, topology: Topology, arbiter: str, environment: Mapping[str, str]) -> None:
        self._topology = topology
        self._arbiter = arbiter
        self._environment = environment
        self._relay: subprocess.Popen[str] | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """Hosts and arbiter."""
        return (*self._topology.hosts, self._arbiter)

    def cut(self, sender: str, receivers: Iterable[str]) -> None:
        """What ``sender`` sends to these ends is lost: it believes in another address of theirs, which nobody has."""
        for other in receivers:
            if other != sender:
                self._neighbour(sender, "replace", other, "lladdr", NOBODY, "nud", "permanent")

    def delay(self, seconds: float) -> None:
        """Each frame between any two ends takes so much longer.

        :raise TransientError: the relay does not come up.
        """
        ports = [management_port(end) for end in self.ends]
        command = [sys.executable, "-m", "kagemusha.chaos.delay", MANAGEMENT_BRIDGE, f"{seconds:.4f}", *ports]
        self.close()
        self._relay = subprocess.Popen(
            inside(self._topology.switch, ["setpriv", "--pdeathsig", "KILL", "--", *command]),
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline().strip() != RELAYS:
            raise TransientError("frames cannot be delayed", operation="chaos")
        self._at_ports(1.0)

    def lose(self, share: float) -> None:
        """This share of what any end sends is lost at random."""
        self._at_ports(share)

    def heal(self) -> None:
        """All frames between all ends get through again."""
        for end in self.ends:
            for other in self.ends:
                if other != end:
                    self._neighbour(end, "del", other, check=False)
        self._at_ports(0.0)
        self.close()

    def close(self) -> None:
        """End what delays."""
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.kill()
            relay.wait()
            assert relay.stdout is not None
            relay.stdout.close()

    def _at_ports(self, share: float) -> None:
        namespace = netns.open_named(self._topology.switch)
        program = bpf.lossy_program(share)
        try:
            with netns.entered(namespace), Links() as links:
                for end in self.ends:
                    name = management_port(end)
                    with suppress(OSError):  # it has one
                        links.add_clsact(name)
                    links.set_ingress_program(links.get(name).index, program)
        finally:
            os.close(program)
            os.close(namespace)

    def _neighbour(self, end: str, verb: str, other: str, *more: str, check: bool = True) -> None:
        where = self._topology.managed[end]
        command = ["ip", "-n", where, "neigh", verb, management_host(other), "dev", "mgmt0", *more]
        subprocess.run(command, check=check, capture_output=True)
