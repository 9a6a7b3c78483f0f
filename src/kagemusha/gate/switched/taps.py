"""The taps of a protected VM at the switch: ports of the bridge that nobody speaks through but their reader.

A tap is a silent port: the bridge learns nothing from it and floods nothing to it, no forwarding entry names it, and
its egress lets only frames through that our programs redirect there (they carry its mark). What its reader writes back
comes into the bridge like a frame from any port, synchronously: it is sent on before ``write`` returns.

``HoldTap`` is where a VM's held frames wait, together with the programs that lead there, and whose lives are the same.
``ReplayTap`` is where frames towards the VM, or copies of them, wait for the process that keeps them.

Invariant (I1): a tap ends with the process that owns its descriptor, and what is redirected to a device that is gone
is dropped. The kernel counts interface indices upwards, so nothing else comes into its place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass

from kagemusha.gate import devices
from kagemusha.gate.rules.classifier import Ending
from kagemusha.gate.switched import programs
from kagemusha.gate.switched.registry import GIVEN, RETURNED, Registry
from kagemusha.kernel.bpf import HoldCount
from kagemusha.kernel.bpf_slot import ProgramSlot
from kagemusha.kernel.bpf_table import CellRow
from kagemusha.kernel.bridge import BridgeLinks
from kagemusha.kernel.netlink import IFF_NOARP, IFF_UP
from kagemusha.kernel.tap import OFFLOADS, open_tap

_TOKEN = 1  # is given and not a frame, so that no frame need have been for DIVERT to begin with
FIRST, SECOND = 1, 2  # places of programs
TAP_MTU = 65_521  # the most there is: taps are not what limits a frame, nor the bridge's MTU, which is its ports' least
_LEFT_TIMEOUT_S = 2.0
_LEFT_LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the taps of a switch have in common.

    :param namespace_fd: descriptor of the namespace, in which the calling thread is.
    :param replay_program: descriptor; of the second place, for hold taps.
    :param replay_mark: of replay taps.
    """

    bridge: str
    namespace_fd: int
    links: BridgeLinks
    registry: Registry
    replay_program: int
    replay_mark: int


def new_mark() -> int:
    """A mark that no frame has by chance."""
    return secrets.randbits(31) + 1


def tap_name(kind: str, bridge: str, mac: bytes) -> str:
    """A VM's tap: at most 15 characters, the same for the same bridge and VM. ``kind`` is one letter."""
    return f"kg{kind}" + hashlib.sha256(bridge.encode() + mac).hexdigest()[:10]


def _open_tap(name: str) -> int:
    """Make the tap. A killed predecessor's process may live, and own it, a moment longer."""
    deadline = time.monotonic() + _LEFT_TIMEOUT_S
    while True:
        try:
            return open_tap(name, offloads=OFFLOADS)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EEXIST) or time.monotonic() > deadline:
                raise
        time.sleep(_LEFT_LOOK_S)


def _make_port(around: Surroundings, name: str, *, inlet: int, queue_frames: int) -> int:
    """Make a tap and the silent port that it is, up and forwarding; its descriptor."""
    links = around.links
    fd = _open_tap(name)
    try:
        devices.silence_ipv6(name)
        address = hashlib.sha256(name.encode()).digest()[:5]  # the highest kind: a bridge takes its ports' lowest
        links.change(name, txqlen=queue_frames, mtu=TAP_MTU, address="fe:" + address.hex(":"))
        links.without_queue(name)
        links.add_clsact(name)
        links.set_egress_program(links.get(name).index, inlet)
        links.enslave(name, around.bridge)
        links.make_silent_port(name)
        links.set_flags(name, flags=IFF_UP | IFF_NOARP, mask=IFF_UP | IFF_NOARP)
        devices.wait_forwarding(links, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


class HoldTap:
    """Where a VM's frames are held.

    :ivar hold_fd: the tap's descriptor, or -1 once the gate process owns it.
    :ivar hold_device: its name.
    :ivar ifindex: of it.
    :ivar count: frames given to it and returned from it.
    :ivar slot: of the program that says which frames are held.
    :ivar by_rules: program (descriptor) that asks the slot's.
    :ivar drain: program that lets frames go on behind those that are held.
    """

    def __init__(self, around: Surroundings, mac: bytes) -> None:
        self.namespace_fd = around.namespace_fd
        self.hold_device = tap_name("h", around.bridge, mac)
        self._mark = new_mark()
        with ExitStack() as undo:
            self.count = HoldCount()
            undo.callback(self.count.close)
            self.slot = ProgramSlot()
            undo.callback(self.slot.close)
            inlet = programs.inlet_program(self._mark)
            undo.callback(os.close, inlet)
            self.hold_fd = _make_port(around, self.hold_device, inlet=inlet, queue_frames=devices.HOLD_QUEUE_FRAMES)
            undo.callback(self.drop_hold_fd)
            self.ifindex = around.links.get(self.hold_device).index
            outlet = programs.outlet_program(around.registry)
            undo.callback(os.close, outlet)
            around.links.set_ingress_program(self.ifindex, outlet, place=FIRST)
            around.links.set_ingress_program(self.ifindex, around.replay_program, place=SECOND)
            self.by_rules = programs.by_rules_program(self.slot.fd, self.count.fd, self.ifindex, self._mark)
            undo.callback(os.close, self.by_rules)
            self.drain = programs.drain_program(self.count.fd, self.ifindex, self._mark)
            undo.callback(os.close, self.drain)
            self._undo = undo.pop_all()

    def ending(self) -> Ending:
        """What becomes of a frame that the rules have judged."""
        return programs.ending_of(self.count.fd, self.ifindex, self._mark)

    def drop_hold_fd(self) -> None:
        """Close this process's descriptor of the tap: the gate process's is to be the only one."""
        if self.hold_fd >= 0:
            os.close(self.hold_fd)
            self.hold_fd = -1

    def close(self) -> None:
        """Give everything back; the tap is gone unless a gate process has it."""
        self._undo.close()


class ReplayTap:
    """Where frames towards a VM are kept. Its owner reads it, and writes what is to be sent on.

    :ivar fd: the tap's descriptor, or -1 once another process owns it.
    :ivar device: its name.
    :ivar ifindex: of it.
    """

    def __init__(self, around: Surroundings, mac: bytes, row: CellRow, *, queue_frames: int) -> None:
        self._row = row
        row[GIVEN], row[RETURNED] = _TOKEN, 0
        self.device = tap_name("r", around.bridge, mac)
        self.namespace_fd = around.namespace_fd
        inlet = programs.inlet_program(around.replay_mark)
        try:
            self.fd = _make_port(around, self.device, inlet=inlet, queue_frames=queue_frames)
        finally:
            os.close(inlet)
        self.ifindex = around.links.get(self.device).index

    @property
    def given(self) -> int:
        """Frames that were put into it."""
        return self._row[GIVEN] - _TOKEN

    @property
    def returned(self) -> int:
        """Of those, how many count as sent on; DIVERT lets frames by once it is all of them."""
        return self._row[RETURNED] - _TOKEN

    @returned.setter
    def returned(self, frames: int) -> None:
        self._row[RETURNED] = frames + _TOKEN

    def divert_all(self) -> None:
        """DIVERT lets nothing by until ``returned`` is set, even if nothing was ever put in here."""
        self._row[RETURNED] = 0

    def drop_fd(self) -> None:
        """Close this process's descriptor. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
