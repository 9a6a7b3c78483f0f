"""Network devices and tc filters of one namespace, over rtnetlink.

A ``Links`` stays bound to the namespace in which it was opened, wherever its thread goes afterwards. Errors are
OSErrors that name the device. Knows nothing of what the devices are for. Source: rtnetlink(7), tc-bpf(8).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

IFF_UP, IFF_NOARP, IFF_PROMISC = 0x1, 0x80, 0x100
ETH_P_ALL = 3
CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFF_FFF2, 0xFFFF_FFF3
_ROOT = 0xFFFF_FFFF
_DIRECT_ACTION = 1
_BR_STATE_FORWARDING = 3


@dataclass(frozen=True, slots=True)
class Link:
    """A network device as the kernel describes it. ``master`` is the bridge's name, or empty."""

    index: int
    name: str
    flags: int
    mtu: int
    master: str
    alias: str


@contextmanager
def named(operation: str) -> Iterator[None]:
    """Errors of netlink become OSErrors that tell the operation."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, f"{operation}: {error.args[-1]}") from error


class Links:
    """The devices of the namespace in which the thread was when it made this."""

    def __init__(self) -> None:
        self._route: Any = IPRoute()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._route.close()

    def find(self, name: str) -> Link | None:
        """A device by name, or None."""
        with named(f"find {name}"):
            try:
                found = self._route.link("get", ifname=name)
            except NetlinkError as error:
                if error.code == errno.ENODEV:
                    return None
                raise
        return self._link(found[0])

    def get(self, name: str) -> Link:
        """A device by name.

        :raise OSError: ENODEV: there is none.
        """
        link = self.find(name)
        if link is None:
            raise OSError(errno.ENODEV, f"{name}: no such network device")
        return link

    def all(self) -> list[Link]:
        """Every device."""
        with named("list devices"):
            return [self._link(message) for message in self._route.link("dump")]

    def _link(self, message: Any) -> Link:
        master = message.get_attr("IFLA_MASTER")
        master_name = ""
        if master:
            master_name = self._route.link("get", index=master)[0].get_attr("IFLA_IFNAME")
        return Link(
            index=int(message["index"]),
            name=str(message.get_attr("IFLA_IFNAME")),
            flags=int(message["flags"]),
            mtu=int(message.get_attr("IFLA_MTU")),
            master=master_name,
            alias=str(message.get_attr("IFLA_IFALIAS") or ""),
        )

    def add_veth(self, name: str, *, peer: str, peer_namespace: int, mtu: int) -> None:
        """Make a veth pair, both ends down; the peer is born inside another namespace (descriptor)."""
        with named(f"make {name}"):
            self._route.link(
                "add",
                ifname=name,
                kind="veth",
                mtu=mtu,
                peer={"ifname": peer, "net_ns_fd": peer_namespace, "mtu": mtu},
            )

    def delete(self, name: str) -> None:
        """Delete a device. Not an error if there is none."""
        link = self.find(name)
        if link is None:
            return
        try:
            with named(f"delete {name}"):
                self._route.link("del", index=link.index)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def change(self, name: str, **attributes: int | str) -> None:
        """Change attributes: mtu, txqlen, ifalias, …"""
        with named(f"set {name} {attributes}"):
            self._route.link("set", index=self.get(name).index, **attributes)

    def enslave(self, name: str, master: str) -> None:
        """Make a device a port of a bridge."""
        with named(f"put {name} into {master}"):
            self._route.link("set", index=self.get(name).index, master=self.get(master).index)

    def forwards(self, name: str) -> bool:
        """Whether a bridge port has come to forwarding (the kernel lets it, a moment after its link is up)."""
        with named(f"look at {name}"):
            message = self._route.link("get", ifname=name)[0]
        state = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_STATE")
        return bool(state == _BR_STATE_FORWARDING)

    def set_flags(self, name: str, *, flags: int, mask: int) -> None:
        """Set those flags that are in ``mask``; the other ones stay."""
        with named(f"set flags of {name}"):
            self._route.link("set", index=self.get(name).index, flags=flags, change=mask)

    def move(self, name: str, *, namespace: int, new_name: str) -> None:
        """Move a device that is down to another namespace (descriptor) under a new name."""
        with named(f"move {name}"):
            self._route.link("set", index=self.get(name).index, net_ns_fd=namespace, ifname=new_name)

    def without_queue(self, name: str) -> None:
        """Give a device the noqueue discipline: frames go to its driver at once."""
        with named(f"set noqueue on {name}"):
            self._route.tc("replace", "noqueue", self.get(name).index, parent=_ROOT)

    def add_clsact(self, name: str) -> None:
        """Make room for programs at a device's ingress and egress."""
        with named(f"add clsact to {name}"):
            self._route.tc("add", "clsact", self.get(name).index)

    def set_ingress_program(self, ifindex: int, program: int, *, name: str = "kage", place: int = 1) -> None:
        """Put a program (descriptor) at a device's ingress in the place of the one there, atomically.

        :param name: up to 255 characters, told by whoever lists the device's programs.
        :param place: programs that do not decide (TC_ACT_UNSPEC) leave it to that of the next place.
        """
        self._set_program(ifindex, program, CLSACT_INGRESS, name, place)

    def set_egress_program(self, ifindex: int, program: int) -> None:
        """The same at its egress, which every frame passes that is sent through the device."""
        self._set_program(ifindex, program, CLSACT_EGRESS, "kage", 1)

    def _set_program(self, ifindex: int, program: int, hook: int, name: str, place: int) -> None:
        with named(f"attach a program to device {ifindex}"):
            self._route.tc(
                "replace-filter",
                "bpf",
                ifindex,
                handle=1,
                fd=program,
                name=name,
                parent=hook,
                protocol=ETH_P_ALL,
                prio=place,
                classid=1,
                flags=_DIRECT_ACTION,
            )
