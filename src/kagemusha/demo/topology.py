"""Network namespaces: a client, a switch, two hosts or more, and where arbiters may run.

::

     client ── eth0 ═══╗                       ╔═══ lan0 ─[br0]─ (gate of the VM)   host A ─ mgmt0 ═╗
     10.77.0.1         ║      switch           ║                                                    ║
                  port-client [br0] port-a ════╝          10.78.0.0/24: checkpoints, claims    mgmt-a
                       └─ port-b ══════════════════ lan0 ─[br0]─ (gate of the VM)   host B ─ mgmt0 ═ mgmt-b [br1]
                                                                                  arbiter ─ mgmt0 ═══ mgmt-arb
                                                                                   switch ─ mgmt0 ═══ mgmt-switch

The lan's bridges have no addresses, no spanning tree, no forward delay and no multicast snooping, and IPv6 is off
everywhere, so the only frames on the lan are those of client and guest. The switch is an end of the management network
like any, and br1 answers for nobody (no ARP). Names carry the run's own prefix; everything disappears with the
namespaces. It does not start any process that stays.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kagemusha.demo.scope import Scope
from kagemusha.errors import UnsupportedError

NAMESPACE_DIR = Path("/run/netns")
BRIDGE = "br0"
MANAGEMENT_BRIDGE = "br1"
ARBITER = "arb"
CLIENT_ADDRESS = "10.77.0.1/24"
GUEST_ADDRESS = "10.77.0.10/24"
SWITCH = "switch"
MANAGEMENT = {
    "a": "10.78.0.1/24",
    "b": "10.78.0.2/24",
    "c": "10.78.0.3/24",
    ARBITER: "10.78.0.9/24",
    SWITCH: "10.78.0.254/24",
}
_BRIDGE_OPTIONS = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
_IPV6_OFF = "for f in /proc/sys/net/ipv6/conf/{all,default}/disable_ipv6; do [ ! -e $f ] || echo 1 >$f; done"


def _run(arguments: list[str], *, text: str | None = None, operation: str) -> str:
    try:
        done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"{arguments[0]} is not installed", operation=operation, hint="run scripts/setup"
        ) from error
    if done.returncode:
        raise UnsupportedError(
            f"{' '.join(arguments)}: {done.stderr.strip()}",
            operation=operation,
            hint="network namespaces need root and iproute2",
        )
    return done.stdout


def management_port(end: str) -> str:
    """The switch's port on the management network to a host or the arbiter."""
    return f"mgmt-{end}"


def management_host(end: str) -> str:
    """The address there, without the prefix length."""
    return MANAGEMENT[end].partition("/")[0]


def namespace_path(name: str) -> Path:
    """The file that names a namespace (ip-netns(8))."""
    return NAMESPACE_DIR / name


def inside(namespace: str, command: list[str], *, mounts: str | None = None, folder: Path | None = None) -> list[str]:
    """The command line that runs ``command`` in ``namespace``, without a process in between.

    :param mounts: file that names a mount namespace to enter, too; then ``folder`` is the working directory there.
    """
    more = [] if mounts is None else [f"--mount={mounts}", f"--wdns={folder}"]
    return ["nsenter", f"--net={namespace_path(namespace)}", *more, "--", *command]


def apart(command: list[str]) -> list[str]:
    """The command line that runs ``command`` with its own names of network namespaces, as on a machine of its own."""
    private = 'mount -t tmpfs none /run/netns && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", private, "sh", *command]


def namespaces_with(prefix: str) -> tuple[str, ...]:
    """Names of all namespaces that carry ``prefix`` anywhere: ours, and those that workers made."""
    if not NAMESPACE_DIR.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in NAMESPACE_DIR.iterdir() if prefix in entry.name))


def delete_namespaces(prefix: str) -> None:
    """Delete every namespace that carries ``prefix``, and the devices in it."""
    for name in namespaces_with(prefix):
        _run(["ip", "netns", "delete", name], operation="remove the demo's network")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a device has seen: frames and bytes, received and sent."""

    received_frames: int
    received_bytes: int
    sent_frames: int
    sent_bytes: int


class Topology(Scope):
    """The namespaces of one run, made on entry, deleted on exit.

    :param prefix: unique for the run; at most 12 characters.
    :param hosts: their names, of those in ``MANAGEMENT``.
    :ivar managed: the namespace of each end of the management network.
    """

    def __init__(self, prefix: str, hosts: Sequence[str] = ("a", "b")) -> None:
        self.prefix = prefix
        self.client = f"{prefix}-client"
        self.switch = f"{prefix}-switch"
        self.arbiter = f"{prefix}-{ARBITER}"
        self.hosts = {side: f"{prefix}-{side}" for side in hosts}
        self.managed = {**self.hosts, ARBITER: self.arbiter, SWITCH: self.switch}

    def _enter(self, stack: ExitStack) -> None:
        """Make everything.

        :raise UnsupportedError: not root, no iproute2, or the kernel lacks a device type.
        """
        stack.callback(delete_namespaces, self.prefix)
        self._make_namespaces()
        self._make_links()

    def _make_namespaces(self) -> None:
        names = (self.client, self.switch, self.arbiter, *self.hosts.values())
        self._batch(None, [f"netns add {name}" for name in names])
        for name in names:
            # Before any device exists: a device takes over the default when it is made.
            _run(inside(name, ["bash", "-c", _IPV6_OFF]), operation="turn IPv6 off")

    def _make_links(self) -> None:
        ends = {"client": (self.client, "eth0")} | {s: (name, "lan0") for s, name in self.hosts.items()}
        pairs = {f"port-{end}": place for end, place in ends.items()}
        pairs |= {management_port(end): (name, "mgmt0") for end, name in self.managed.items()}
        self._batch(
            None,
            [
                f"link add {port} netns {self.switch} type veth peer name {device} netns {namespace}"
                for port, (namespace, device) in pairs.items()
            ],
        )
        self._bridge(self.switch, [f"port-{end}" for end in ends])
        self._bridge(self.switch, [management_port(end) for end in self.managed], MANAGEMENT_BRIDGE)
        self._batch(self.switch, [f"link set {MANAGEMENT_BRIDGE} arp off"])
        address = f"addr add {CLIENT_ADDRESS} dev eth0"
        self._batch(self.client, ["link set lo up", address, "link set eth0 up"])
        for name in self.hosts.values():
            self._bridge(name, ["lan0"])
        for end, name in self.managed.items():
            self._batch(name, ["link set lo up", f"addr add {MANAGEMENT[end]} dev mgmt0", "link set mgmt0 up"])

    def _bridge(self, namespace: str, ports: list[str], bridge: str = BRIDGE) -> None:
        up = [f"link set {port} master {bridge} up" for port in ports]
        self._batch(
            namespace,
            ["link set lo up", f"link add {bridge} {_BRIDGE_OPTIONS}", *up, f"link set {bridge} up"],
        )

    def _batch(self, namespace: str | None, lines: list[str]) -> None:
        where = ["-n", namespace] if namespace else []
        _run(["ip", *where, "-batch", "-"], text="\n".join(lines), operation="make the demo's network")

    @property
    def client_mac(self) -> str:
        """The address of the client's NIC."""
        command = ["ip", "-n", self.client, "-j", "link", "show", "dev", "eth0"]
        text = _run(command, operation="look at the client's NIC")
        return str(json.loads(text)[0]["address"])

    def port_traffic(self, end: str) -> Traffic:
        """What has passed the switch's port to ``end`` ('client', 'a' or 'b'); received: from that end."""
        text = _run(
            ["ip", "-n", self.switch, "-j", "-s", "link", "show", "dev", f"port-{end}"],
            operation="read the switch's counters",
        )
        counters = json.loads(text)[0]["stats64"]
        received, sent = counters["rx"], counters["tx"]
        return Traffic(received["packets"], received["bytes"], sent["packets"], sent["bytes"])
