"""Four ways from a "guest" to a client on one machine, side by side: two without a gate, two with one.

::

    guest namespace          host namespace                                         client namespace
      plain    ══ g-plain   ─[bridge]─ n-plain   ═══════════════════════════════════  plain
      again    ══ g-again   ─[bridge]─ n-again   ═══════════════════════════════════  again
      uplink   ══ vm0 ─(gate)─ up0               ═══════════════════════════════════  uplink
      bridged  ══ vm0 ─(gate)─ up0 ══ kg… ─[bridge]─ n-bridged ═════════════════════  bridged

``═`` is a veth pair; its end in the host stands for the guest's tap on the left, for the NIC on the right. ``plain``
is what libvirt makes of a guest's device and a NIC; ``again`` is the same once more, and tells how far two equal paths
differ. ``uplink`` gives the same NIC to the gate, ``bridged`` lets the gate share a bridge with others.

Every path has a subnet of its own and fixed neighbour entries, and IPv6 is off: no frame but the measurement's.
Offloads are as the kernel sets them (TSO, checksums). Nothing is left of it after it was closed.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

from kagemusha.demo.scope import Scope
from kagemusha.demo.topology import delete_namespaces
from kagemusha.errors import UnsupportedError
from kagemusha.gate import devices
from kagemusha.gate.classification import Classification
from kagemusha.gate.namespace import GateMode, GateNetwork
from kagemusha.gate.process import GateClient, spawn_gate
from kagemusha.kernel import netns
from kagemusha.kernel.netlink import Links
from kagemusha.model.config import NetworkTable
from kagemusha.model.rules import VmAddresses

PLAIN, AGAIN, UPLINK, BRIDGED = "plain", "again", "uplink", "bridged"
LANES = (PLAIN, AGAIN, UPLINK, BRIDGED)
HOLD_BYTES = 256 << 20
_ROLE = "primary"


def guest_address(lane: str) -> str:
    """The guest's IPv4 address on a path."""
    return f"10.79.{LANES.index(lane)}.2"


def client_address(lane: str) -> str:
    """The client's."""
    return f"10.79.{LANES.index(lane)}.1"


def _mac(end: str, lane: str) -> str:
    return f"52:54:00:79:{'01' if end == 'guest' else '02'}:{LANES.index(lane):02x}"


def _ip(namespace: str, lines: list[str]) -> None:
    command = ["ip", "-n", namespace, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedError(done.stderr.strip(), operation="make the benchmark's network")


class Gate:
    """A gate of the lab: its network, its process, its rules."""

    def __init__(self, vm: str, host: int, network: NetworkTable, stack: ExitStack) -> None:
        with netns.entered(host):
            self.network = GateNetwork.build(vm, _ROLE, network)
        self.network.lease.forever()  # there is no other instance
        stack.callback(self.network.close)
        self.process: GateClient = spawn_gate(self.network, hold_bytes=HOLD_BYTES)
        stack.callback(self.process.close)
        self.rules = Classification(self.network, VmAddresses())
        stack.callback(self.rules.close)

    def hold(self) -> None:
        """What the rules do not transmit is held from now on."""
        if self.network.mode is not GateMode.HOLD:
            self.process.hold()
            self.network.set_mode(GateMode.HOLD)

    def pass_all(self) -> None:
        """No rules: everything goes straight through."""
        if self.network.mode is not GateMode.PASS:
            self.process.pass_all()
            self.network.set_mode(GateMode.PASS)


class GateLab(Scope):
    """The namespaces and gates. The process that enters it must have no threads: the gates are forked from it.

    :param prefix: unique, at most 12 characters; part of the name of every namespace.
    :ivar guest: name of the guest's namespace.
    :ivar client: name of the client's.
    :ivar gates: by path, ``uplink`` and ``bridged``; they pass everything at first.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.guest, self.client = f"{prefix}-guest", f"{prefix}-client"
        self.gates: dict[str, Gate] = {}

    def _enter(self, stack: ExitStack) -> None:
        """Make everything.

        :raise UnsupportedError: not root, no iproute2, or the kernel refuses something.
        """
        stack.callback(delete_namespaces, self._prefix)
        try:
            host = self._make_devices(stack)
        except OSError as error:
            raise UnsupportedError(
                str(error), operation="make the benchmark's network", hint="network namespaces need root"
            ) from error
        for lane, network in (
            (UPLINK, NetworkTable(uplink=f"n-{UPLINK}", tap=f"g-{UPLINK}")),
            (BRIDGED, NetworkTable(bridge=f"b-{BRIDGED}", tap=f"g-{BRIDGED}")),
        ):
            gate = Gate(f"{self._prefix}-{lane}", host, network, stack)
            gate.process.pass_all()
            gate.network.set_mode(GateMode.PASS)
            self.gates[lane] = gate

    def _make_devices(self, stack: ExitStack) -> int:
        """All namespaces and devices but the gates'; a descriptor of the host's namespace."""
        fds = {}
        for end in ("guest", "client", "host"):
            netns.create(f"{self._prefix}-{end}")
            fds[end] = netns.open_named(f"{self._prefix}-{end}")
            stack.callback(os.close, fds[end])
            with netns.entered(fds[end]):
                devices.silence_ipv6("all")
                devices.silence_ipv6("default")
        with netns.entered(fds["host"]), Links() as links:
            for lane in LANES:
                links.add_veth(f"g-{lane}", peer=lane, peer_namespace=fds["guest"], mtu=1500)
                links.add_veth(f"n-{lane}", peer=lane, peer_namespace=fds["client"], mtu=1500)
        _ip(f"{self._prefix}-host", [line for lane in LANES for line in _host_lines(lane)])
        _ip(self.guest, [line for lane in LANES for line in _end_lines("guest", lane)])
        _ip(self.client, [line for lane in LANES for line in _end_lines("client", lane)])
        return fds["host"]


def _host_lines(lane: str) -> list[str]:
    lines = [f"link set g-{lane} up", f"link set n-{lane} up"]
    if lane != UPLINK:
        lines.append(f"link add b-{lane} type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
        lines += [f"link set n-{lane} master b-{lane}", f"link set b-{lane} up"]
    if lane in (PLAIN, AGAIN):
        lines.append(f"link set g-{lane} master b-{lane}")
    return lines


def _end_lines(end: str, lane: str) -> list[str]:
    guest, client = guest_address(lane), client_address(lane)
    own, other, peer = (guest, client, "client") if end == "guest" else (client, guest, "guest")
    return [
        f"link set {lane} address {_mac(end, lane)}",
        f"addr add {own}/24 dev {lane}",
        f"link set {lane} up",
        f"neigh replace {other} lladdr {_mac(peer, lane)} dev {lane} nud permanent",
    ]
