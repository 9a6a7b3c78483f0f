"""What passes between client and guests, at the places where it has to be judged.

::

    client ◄─ "heard" ── switch ◄─ "port-b" ── host B, or A ◄── gate ◄─ a VM's name ── guest
           ── "asked" ─►
"""

from __future__ import annotations

from contextlib import ExitStack

from kagemusha.chaos.recorder import Frame, Recorder, mac_bytes
from kagemusha.demo.scope import Scope
from kagemusha.gate.devices import VM as TAP
from kagemusha.switch_demo.plan import CLIENT_PORT, HOSTS, Vm, host_port
from kagemusha.switch_demo.site import Site

_HEARD, _ASKED = "heard", "asked"


class Witness(Scope):
    """Use as a context manager while the guests of a site run on their first host."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._client = site.topology.client_mac
        self._recorder = Recorder(self._client, *(vm.mac for vm in site.vms))

    def _enter(self, stack: ExitStack) -> None:
        site, recorder = self._site, self._recorder
        stack.enter_context(recorder)
        for vm in site.vms:  # before the client's: whatever arrives has departed
            with site.gate_namespace(vm, vm.home) as fd:
                recorder.add_in(vm.name, fd, TAP)
        recorder.add(_HEARD, site.topology.client, "eth0")
        recorder.add(_ASKED, site.topology.switch, CLIENT_PORT)
        for host in HOSTS:
            recorder.add(host_port(host), site.topology.switch, host_port(host))

    @property
    def client(self) -> bytes:
        """The client's MAC address."""
        return mac_bytes(self._client)

    def departed(self, vm: Vm) -> list[Frame]:
        """What a VM has sent where it began."""
        return self._recorder.frames(vm.name)

    def come_from(self, vm: Vm, host: str) -> list[Frame]:
        """What has come to the switch from a VM on this host."""
        return self._of(vm, host_port(host))

    def heard(self, vm: Vm) -> list[Frame]:
        """What the client has got from a VM, in order."""
        return self._of(vm, _HEARD)

    def talk(self, vm: Vm) -> list[Frame]:
        """What went between client and a VM, both ways, in order of time."""
        to = mac_bytes(vm.mac)
        asked = [frame for frame in self._recorder.frames(_ASKED) if frame.content[:6] == to]
        return sorted([*asked, *self.heard(vm)], key=lambda frame: frame.t_ns)

    def _of(self, vm: Vm, place: str) -> list[Frame]:
        own = mac_bytes(vm.mac)
        return [frame for frame in self._recorder.frames(place) if frame.content[6:12] == own]
