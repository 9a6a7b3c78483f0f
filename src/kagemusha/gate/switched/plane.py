"""The switch's data path: a bridge, its guarded ports, and the VMs behind them.

::

    clients ── port ─WARD─REPLAY─┐            ┌─REPLAY─WARD─ port ── host A: VMs 1, 2       (out of a port: BACK)
                                 ├── bridge ──┤
    clients ── port ─WARD─REPLAY─┘   │    │   └─REPLAY─WARD─ port ── host B: VM 3
                            REPLAY   │    │                    │ held (redirected)
                            OUTLET   │    │                    ▼
               released ─► hold tap ─┘    └─ replay tap    hold tap ─► gate process of VM 3
               (of each VM)                  (of each VM)

The programs (``programs``) are at every port that was added. They and the maps they ask (``registry``) belong to the
ports and not to a process: whoever is killed, frames that would have been held are dropped then, and a VM that passed
passes on. A successor finds the maps by the name of the first program at the bridge's ports, closes what was not
passing, and puts programs of its own in place, one port after the other, each atomically.

A port gets its programs before it becomes one of the bridge's, if it is not yet. Plain forwarding is the kernel's: what
has no registered address is touched by nothing but the look for it. VLAN tags pass as they are; a bridge that filters
VLANs is refused, and so are one that snoops multicast, which would not learn of memberships that are held, and one with
a spanning tree.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Self

from kagemusha.errors import ConfigError, KageError, UnsupportedError
from kagemusha.gate.namespace import GateMode
from kagemusha.gate.switched import programs
from kagemusha.gate.switched.registry import Inbound, Registration, Registry
from kagemusha.gate.switched.taps import FIRST, SECOND, Surroundings, new_mark
from kagemusha.gate.switched.vm import VmPort
from kagemusha.kernel import netns
from kagemusha.kernel.bridge import BridgeLinks, mac_text
from kagemusha.kernel.netlink import IFF_UP
from kagemusha.model.rules import VmAddresses

_PROGRAM_NAME = "kage-switch"
_VERSION = 1
_CLAIM_TIMEOUT_S = 2.0
_CLAIM_LOOK_S = 0.01


class SwitchPlane:
    """A guarded bridge. Made by :meth:`open`.

    :ivar bridge: its name.
    :ivar around: what its taps have in common.
    :ivar adopted: a predecessor had left its programs here.
    """

    def __init__(self, bridge: str) -> None:
        self.bridge = bridge
        self.adopted = False
        self.around: Surroundings
        self._undo = ExitStack()
        self._host_ports: dict[str, int] = {}
        self._client_ports: dict[str, int] = {}
        self._vms: dict[str, VmPort] = {}

    @classmethod
    def open(cls, bridge: str, *, host_ports: Iterable[str] = (), client_ports: Iterable[str] = ()) -> Self:
        """Guard a bridge of the thread's current namespace; it is made if there is none of this name.

        :param host_ports: devices behind which hosts with protected VMs are.
        :param client_ports: other devices.
        :raise ConfigError: there is no such device; the bridge does what it must not; another process guards it.
        :raise UnsupportedError: the kernel refuses something; or a predecessor of another version is in place.
        """
        plane = cls(bridge)
        try:
            plane._open(tuple(host_ports), tuple(client_ports))
        except BaseException as error:
            plane._undo.close()
            if isinstance(error, OSError):
                raise UnsupportedError(str(error), operation=f"guard the bridge {bridge}") from error
            raise
        return plane

    def _open(self, host_ports: tuple[str, ...], client_ports: tuple[str, ...]) -> None:
        undo = self._undo
        namespace_fd = netns.open_current()
        undo.callback(os.close, namespace_fd)
        undo.enter_context(_claim(self.bridge))
        links = undo.enter_context(BridgeLinks())
        self._find_bridge(links)
        numbers = self._predecessor(links)
        self.adopted = numbers is not None
        registry = undo.enter_context(Registry(numbers))
        self._wards: dict[bool, int] = {}
        for faces_host in (True, False):
            self._wards[faces_host] = programs.ward_program(registry, faces_host=faces_host)
            undo.callback(os.close, self._wards[faces_host])
        self._back = programs.back_program(registry)
        undo.callback(os.close, self._back)
        mark = new_mark()
        replay = programs.replay_program(registry, mark)
        undo.callback(os.close, replay)
        self.around = Surroundings(self.bridge, namespace_fd, links, registry, replay, mark)
        for mac, left in registry.read().items():
            mode = left.mode if left.mode is GateMode.PASS else GateMode.CLOSED
            registry.put(mac, replace(left, mode=mode, inbound=Inbound.OFF, replay=0))
        for name in host_ports:
            self.add_port(name, faces_host=True)
        for name in client_ports:
            self.add_port(name, faces_host=False)
        self._free_others()
        registry.settle()

    def _find_bridge(self, links: BridgeLinks) -> None:
        if links.find(self.bridge) is None:
            links.add_bridge(self.bridge)
        settings = links.settings(self.bridge)
        if settings is None:
            raise ConfigError(f"{self.bridge!r} is no bridge", operation="guard the bridge")
        for wrong, key in (
            (settings.filters_vlans, "vlan_filtering"),
            (settings.snoops_multicast, "mcast_snooping"),
            (settings.spans_tree, "stp_state"),
        ):
            if wrong:
                raise ConfigError(
                    f"the bridge {self.bridge} has {key} on",
                    operation="guard the bridge",
                    hint=f"ip link set {self.bridge} type bridge {key} 0",
                )
        links.set_flags(self.bridge, flags=IFF_UP, mask=IFF_UP)

    def _predecessor(self, links: BridgeLinks) -> tuple[int, int, int] | None:
        """The numbers of the maps of a process that guarded this bridge before."""
        for link in links.all():
            if link.master != self.bridge:
                continue
            name, *rest = (links.ingress_program(link.index, FIRST) or "-").split()
            if name == _PROGRAM_NAME:
                version, *numbers = map(int, rest)
                if version != _VERSION:
                    raise UnsupportedError(
                        f"{link.name} is guarded by programs of version {version}, this is {_VERSION}",
                        operation="guard the bridge",
                        hint=f"tc qdisc del dev {link.name} clsact, once nothing behind it is protected",
                    )
                records, cells, slots = numbers
                return records, cells, slots
        return None

    # --- ports --------------------------------------------------------------------------------------------------------

    def add_port(self, name: str, *, faces_host: bool) -> None:
        """Guard a device and make it a port of the bridge, if it is not; or guard it as another kind than before.

        :raise ConfigError: there is no such device, or it belongs to another bridge.
        """
        links = self.around.links
        link = links.find(name)
        if link is None:
            raise ConfigError(f"there is no device {name!r}", operation=f"add a port to {self.bridge}")
        if link.master not in ("", self.bridge):
            raise ConfigError(f"{name} is a port of {link.master}", operation=f"add a port to {self.bridge}")
        links.ensure_clsact(name)
        for place in (FIRST, SECOND):
            there = links.ingress_program(link.index, place)
            if there is not None and not there.startswith(_PROGRAM_NAME):
                raise ConfigError(
                    f"{name} has a program {there!r} of somebody else at its ingress",
                    operation=f"add a port to {self.bridge}",
                    hint=f"tc filter show dev {name} ingress; put it at pref {SECOND + 1} or later",
                )
        numbers = " ".join(map(str, self.around.registry.numbers))
        links.set_egress_program(link.index, self._back)
        links.set_ingress_program(link.index, self.around.replay_program, name=_PROGRAM_NAME, place=SECOND)
        links.set_ingress_program(
            link.index, self._wards[faces_host], name=f"{_PROGRAM_NAME} {_VERSION} {numbers}", place=FIRST
        )
        if not link.master:
            links.enslave(name, self.bridge)
        links.set_flags(name, flags=IFF_UP, mask=IFF_UP)
        kind, other = (self._host_ports, self._client_ports) if faces_host else (self._client_ports, self._host_ports)
        other.pop(name, None)
        kind[name] = link.index

    def remove_port(self, name: str) -> None:
        """A port is taken out of the bridge, and is not guarded any more. VMs behind it are fenced.

        :raise ConfigError: it is none of the ports.
        """
        index = self._host_ports.get(name) or self._client_ports.get(name)
        if index is None:
            raise ConfigError(f"{name} is no port of {self.bridge}", operation="remove a port")
        for vm in self._vms.values():
            if vm.registration.owner == index:
                vm.set_owner(None)
        with suppress(OSError):  # the device is gone
            self.around.links.release(name)
        self.around.links.remove_programs(index, (FIRST, SECOND))
        self._host_ports.pop(name, None)
        self._client_ports.pop(name, None)

    def _free_others(self) -> None:
        """Ports that a predecessor guarded and that are not named any more."""
        ours = {*self._host_ports, *self._client_ports}
        links = self.around.links
        for link in links.all():
            if link.master != self.bridge or link.name in ours:
                continue
            if (links.ingress_program(link.index, FIRST) or "").startswith(_PROGRAM_NAME + " "):
                links.remove_programs(link.index, (FIRST, SECOND))

    def host_port(self, name: str) -> int:
        """The ifindex of a port towards hosts.

        :raise ConfigError: it is none, or the device is another than the one that was added.
        """
        index = self._host_ports.get(name)
        if index is None:
            raise ConfigError(f"{name} is no port of {self.bridge} towards hosts", operation="find a VM's port")
        link = self.around.links.find(name)
        if link is None or link.index != index:
            raise ConfigError(f"the device {name} was taken away", operation="find a VM's port", hint="add it again")
        return index

    def port_name(self, ifindex: int) -> str | None:
        """The name of a port towards hosts, or None."""
        return next((name for name, index in self._host_ports.items() if index == ifindex), None)

    # --- VMs ----------------------------------------------------------------------------------------------------------

    @property
    def vms(self) -> Mapping[str, VmPort]:
        """The protected VMs, by name."""
        return dict(self._vms)

    def add_vm(
        self,
        name: str,
        macs: bytes | tuple[bytes, ...],
        *,
        owner: str | None = None,
        mode: GateMode = GateMode.CLOSED,
        addresses: VmAddresses | None = None,
        hold_bytes: int = 64 << 20,
    ) -> VmPort:
        """Protect a VM. To be called from a process without threads: its gate process is forked.

        :param macs: its address, six bytes; or several, one for each of its NICs.
        :param owner: the port behind which it is; None: it is fenced.
        :param mode: PASS for a VM that runs already and is not to be interrupted.
        :param addresses: what the rules' ``$vm_mac``, … stand for; without, the MAC address alone.
        :param hold_bytes: frames beyond this many pending bytes are dropped.
        :raise ConfigError: the name or the address is taken, or there are too many.
        """
        macs = (macs,) if isinstance(macs, bytes) else macs
        taken = {mac for vm in self._vms.values() for mac in vm.macs}
        if name in self._vms or not macs or taken & set(macs):
            raise ConfigError(
                f"{name}, or one of its addresses {', '.join(map(mac_text, macs))}, is taken",
                operation="add a VM to the switch",
            )
        registry = self.around.registry
        left = next((found for mac in macs if (found := registry.get(mac)) is not None), None)
        index = registry.free_index() if left is None else left.index
        port = self.host_port(owner) if owner is not None else 0
        try:
            with netns.entered(self.around.namespace_fd):
                vm = VmPort(
                    self,
                    name,
                    macs,
                    Registration(port, mode, index),
                    addresses or VmAddresses(tuple(map(mac_text, macs))),
                    hold_bytes,
                )
        except OSError as error:
            raise KageError(str(error), operation=f"add {name} to the switch") from error
        if port:
            for mac in macs:
                self.around.links.put_entry(port, mac)
        self._vms[name] = vm
        registry.settle()
        return vm

    def forget_vm(self, name: str) -> None:
        """A VM has been removed."""
        self._vms.pop(name, None)

    def left_over(self) -> dict[bytes, Registration]:
        """What a predecessor had registered and nobody has added again, by MAC address: closed, or passing."""
        ours = {mac for vm in self._vms.values() for mac in vm.macs}
        return {mac: left for mac, left in self.around.registry.read().items() if mac not in ours}

    def forget(self, mac: bytes) -> None:
        """Give up a registration that was left over: its frames are forwarded like any."""
        for port in self.around.links.entries(mac):
            self.around.links.delete_entry(port, mac)
        self.around.registry.delete(mac)  # last: what is found of it says that there is something left
        self.around.registry.settle()

    # --- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End our processes. The ports stay guarded: VMs that were not passing are silent until a successor is there.

        May be called again.
        """
        for vm in self._vms.values():
            vm.close()
        self._vms.clear()
        self._undo.close()

    def remove(self) -> None:
        """Give everything up: every VM's frames are forwarded like any, and nothing of ours is left at the ports."""
        for vm in list(self._vms.values()):
            vm.remove()
        for mac in self.left_over():
            self.forget(mac)
        for index in (*self._host_ports.values(), *self._client_ports.values()):
            self.around.links.remove_programs(index, (FIRST, SECOND))
        self.close()


def _claim(bridge: str) -> socket.socket:
    """A socket whose name exists once in a namespace, for as long as this process has it open.

    What a killed process had just forked may have it a moment longer.

    :raise ConfigError: another process has it.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    deadline = time.monotonic() + _CLAIM_TIMEOUT_S
    while True:
        try:
            claim.bind(f"\0kagemusha/switch/{bridge}")
        except OSError as error:
            if time.monotonic() > deadline:
                claim.close()
                raise ConfigError(
                    f"another process guards the bridge {bridge}", operation="guard the bridge", hint="stop it first"
                ) from error
            time.sleep(_CLAIM_LOOK_S)
        else:
            return claim
