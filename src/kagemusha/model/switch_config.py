"""The configuration file of a switch (``kage switch``): a TOML schema of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from kagemusha.model.config import NODE_NAME, Address, Table, TlsTable, own_name, read_config

_DEVICE = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,15}$")]


class PortTable(Table):
    """``[[ports]]``: a device that is a port of the bridge; ``node``: the host behind it. Without: clients are."""

    device: _DEVICE
    node: Annotated[str, Field(pattern=NODE_NAME)] | None = None


class ReplayTable(Table):
    """``[replay]``: how much is kept of what was sent to a VM since its last commit, for each VM."""

    enabled: bool = True
    frames: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    mb: Annotated[int, Field(ge=1, le=4096)] = 8


class SwitchConfig(Table):
    """A switch's whole configuration file.

    ``name``: what it calls itself to hosts. ``listen``: where hosts connect. ``bridge``: made if it is not there.
    ``hold_mb``: frames beyond so much are dropped, for each VM. ``state_dir``: who was given which term.
    ``runtime_dir``: the socket for ``kage switch --status``.
    """

    name: Annotated[str, Field(pattern=NODE_NAME)] | None = None
    listen: Address
    bridge: _DEVICE
    ports: Annotated[tuple[PortTable, ...], Field(min_length=1)]
    tls: TlsTable
    hold_mb: Annotated[int, Field(ge=1, le=65_536)] = 64
    replay: ReplayTable = ReplayTable()
    state_dir: Path = Path("/var/lib/kagemusha/switch")
    runtime_dir: Path = Path("/run/kagemusha")

    @property
    def own_name(self) -> str:
        """``name``, or what the kernel calls this machine."""
        return self.name or own_name()

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        devices = [port.device for port in self.ports]
        twice = next((name for name in devices if devices.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the port {twice!r} is there twice")
        if not any(port.node for port in self.ports):
            raise ValueError("no port has a 'node': name the hosts behind those that lead to protected VMs")
        return self

    def ports_of(self, node: str) -> tuple[str, ...]:
        """The devices behind which this host is."""
        return tuple(port.device for port in self.ports if port.node == node)


def load_switch(path: Path) -> SwitchConfig:
    """Read and check a switch's configuration file.

    :raise ConfigError: unreadable, not TOML, or a key is missing, unknown or out of range.
    """
    return read_config(path, SwitchConfig)
