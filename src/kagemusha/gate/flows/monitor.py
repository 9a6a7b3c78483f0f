"""The flow monitor's loop: copies of frames to detectors, their word to the rule base.

::

    vm0, both directions ─ filter ─► signalling ──► detectors ──► book ──► rules service ──► version, gate, standby
    vm0, from the VM ─ filter, at times ─► RTP ──────┘   ▲                       │
                                                         └── counters: is it used? ◄┘

Invariants: never on the data path: nobody waits for it, its queues are bounded, it takes at most half of a CPU, and
when it dies its rules lapse. When a monitor begins, it takes its predecessor's flows from the rule base, which came
here with the checkpoints if the predecessor ran on another host; so the end of a call is understood after a takeover.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from pathlib import Path

from kagemusha.errors import PeerError, TransientError
from kagemusha.gate.devices import VM
from kagemusha.gate.flows.book import BookStatistics, FlowBook, RuleChanges
from kagemusha.gate.flows.detection import Detection
from kagemusha.gate.flows.filters import rtp_filter, signalling_filter
from kagemusha.gate.flows.guard import Guard
from kagemusha.gate.flows.packet import Direction, parse
from kagemusha.gate.flows.rules_link import RefusedError, RulesLink
from kagemusha.kernel.frame_filter import NOTHING, FilteredSocket
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowInformation
from kagemusha.model.rules import VmAddresses

QUEUE_BYTES = 4 << 20
RTP_QUEUE_BYTES = 1 << 20
LOOK_FRAMES = 256
TICK_S = 0.5
COUNT_S = 5.0
RECONNECT_S = 0.2
LISTEN_S, DEAF_S = 0.6, 1.4  # for RTP: longer than rtp_packets of the usual 20 ms
_Waitable = socket.socket | FilteredSocket | RulesLink


class FlowSources:
    """Where frames come from: made in the VM's namespace.

    :raise OSError: the tap is not there, or down.
    """

    def __init__(self, table: FlowsTable) -> None:
        signalling, rtp = signalling_filter(table), rtp_filter(table)
        self.signalling = FilteredSocket(
            VM, NOTHING if signalling is None else signalling.instructions, queue_bytes=QUEUE_BYTES
        )
        self.rtp: FilteredSocket | None = None
        self._rtp_program = NOTHING if rtp is None else rtp.instructions
        if rtp is not None:
            self.rtp = FilteredSocket(VM, NOTHING, queue_bytes=RTP_QUEUE_BYTES)

    def listen_for_rtp(self, listens: bool) -> None:
        """Whether RTP is copied from now on."""
        if self.rtp is not None:
            self.rtp.take_only(self._rtp_program if listens else NOTHING)

    def close(self) -> None:
        """End them."""
        self.signalling.close()
        if self.rtp is not None:
            self.rtp.close()


class FlowMonitor:
    """Watches one VM.

    :param rules: the path of its rules service.
    """

    def __init__(self, table: FlowsTable, addresses: VmAddresses, sources: FlowSources, rules: Path) -> None:
        self._table = table
        self._sources = sources
        self._path = rules
        self._detection = Detection(table)
        self._book = FlowBook(table, Guard(table, addresses))
        self._link: RulesLink | None = None
        self._version = 0
        self._resumed = self._listens = False
        self._counts: dict[str, int] = {}
        self._tick_t = self._count_t = self._connect_t = self._turn_t = self._look_t = 0.0

    def statistics(self) -> BookStatistics:
        """Totals now."""
        return self._book.statistics()

    def run(self, control: socket.socket) -> None:
        """Until the other end of ``control`` is closed.

        :raise OSError: ENETDOWN: the tap is gone.
        """
        while True:
            if control in self._wait(control):
                return
            now = time.monotonic()
            try:
                self._follow_rules(now)
                if self._sees(now):
                    self._look()
                self._tick(now)
                self._change_rules()
            except (PeerError, TransientError):
                self._disconnect()

    def _wait(self, control: socket.socket) -> set[_Waitable]:
        """Until something is to be done; what is ready."""
        now = time.monotonic()
        waited: list[_Waitable] = [control, *([self._link] if self._link is not None else [])]
        until = min(self._tick_t, self._turn_t if self._sources.rtp is not None else self._tick_t)
        if self._sees(now):
            waited += [self._sources.signalling, *([self._sources.rtp] if self._sources.rtp is not None else [])]
        elif self._resumed:
            until = min(until, self._look_t)
        if self._link is None:
            until = min(until, self._connect_t)
        ready, _, _ = select.select(waited, [], [], max(0.0, until - now))
        return set(ready)

    def _sees(self, now: float) -> bool:
        """Whether frames are looked at: what a predecessor knew comes first, or the end of its calls means nothing."""
        return self._resumed and now >= self._look_t

    # --- frames ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take some frames, and then no more for as long as that took."""
        began = time.thread_time()
        for source in (self._sources.signalling, self._sources.rtp):
            for _ in range(LOOK_FRAMES if source is not None else 0):
                assert source is not None
                frame = source.receive()
                if frame is None:
                    break
                if frame.tagged:
                    continue
                direction = Direction.TO_VM if frame.leaves else Direction.FROM_VM
                packet = parse(frame.data, direction, time.monotonic())
                if packet is not None:
                    self._book.take(self._detection.feed(packet), packet.time_s)
        self._look_t = time.monotonic() + time.thread_time() - began

    def _tick(self, now: float) -> None:
        if self._sources.rtp is not None and now >= self._turn_t:
            self._listens = not self._listens
            self._sources.listen_for_rtp(self._listens)
            self._turn_t = now + (LISTEN_S if self._listens else DEAF_S)
        if now < self._tick_t:
            return
        self._tick_t = now + TICK_S
        if self._link is not None and now >= self._count_t:
            self._count_t = now + COUNT_S
            version, counts = self._link.counts()
            if version is not None and version != self._version:
                self._read_rules(self._link)
            used = [name for name, frames in counts.items() if frames > self._counts.get(name, 0)]
            self._counts = counts
            self._book.take(self._detection.used(used, now), now)
        self._book.take(self._detection.expire(now), now)

    # --- rules ----------------------------------------------------------------------------------------------------

    def _follow_rules(self, now: float) -> None:
        """Connect if need be, and note a version that others have made."""
        if self._link is None:
            if now < self._connect_t:
                return
            self._connect_t = now + RECONNECT_S
            self._link = RulesLink(self._path)
            self._read_rules(self._link)
        while select.select([self._link], [], [], 0)[0]:
            try:
                event = self._link.next_line()
            except OSError as error:
                raise PeerError(error.strerror or str(error), operation="follow the rules") from error
            if event.get("event") == "version" and int(event["version"]) > self._version:
                self._read_rules(self._link)

    def _read_rules(self, link: RulesLink) -> None:
        there = link.in_force()
        now = time.monotonic()
        self._version = there.version
        self._book.actions = there.actions
        self._book.found([(flow, now + left_s) for flow, left_s in there.flows], there.strangers, now)
        if not self._resumed:
            self._resumed = True
            flows = [flow for flow, _ in there.flows]
            self._detection.resume(flows, now)
            self._book.take(flows, now)

    def _change_rules(self) -> None:
        if self._link is None:
            return
        changes = self._book.changes(time.monotonic())
        if changes.delete:
            try:
                self._made(self._link, self._link.delete(changes.delete), RuleChanges((), changes.delete))
            except RefusedError:  # one has lapsed meanwhile: look again at what there is
                self._read_rules(self._link)
                return
        if changes.add:
            try:
                self._made(self._link, self._link.add(changes.add), RuleChanges(changes.add, ()))
            except RefusedError:
                self._add_one_by_one(self._link, changes.add)

    def _made(self, link: RulesLink, version: int, changes: RuleChanges) -> None:
        """A change of ours is in force; if it is not the next version, others have changed something before it."""
        expected, self._version = self._version + 1, version
        self._book.made(changes, time.monotonic())
        if version > expected:
            self._read_rules(link)

    def _add_one_by_one(self, link: RulesLink, flows: tuple[FlowInformation, ...]) -> None:
        """One of them is refused, and is held; the others are not to suffer for it."""
        for flow in flows:
            try:
                link.add([flow])
            except RefusedError:
                self._book.deny(flow.name)
        self._read_rules(link)

    def _disconnect(self) -> None:
        if self._link is not None:
            with suppress(OSError):
                self._link.close()
        self._link = None
        self._connect_t = time.monotonic() + RECONNECT_S
