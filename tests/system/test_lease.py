"""A frozen primary falls silent by itself: its guest runs on and sends, and from the end of its lease nobody hears it.

A real guest whose media are sent at once. Everything of host A's worker is frozen, QEMU is not. Frames are recorded at
the guest's tap and behind the gate, on both hosts' sides of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable

import pytest
from tests.harness.commands import wait
from tests.harness.observed import OBSERVED_LEASE_MS, Observed, Stream, observed, start_streams

from kagemusha.chaos.recorder import Frame, Recorder
from kagemusha.demo.processes import Process, signal_together
from kagemusha.gate.devices import host_end_name

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
RTP = Stream(128, 20_000, 30_000)
INTERVAL_US = 5_000
AT_GATE, BEHIND_GATE = "primary", "behind the gate of A"
MANY = 50
SHORT_S = 0.3


def sent(recorder: Recorder, place: str, since_ns: int) -> list[Frame]:
    """The stream's frames at a place from a moment on."""
    return [each for each in recorder.frames(place) if each.t_ns > since_ns and RTP.number(each.content) is not None]


def freeze(guest: Observed) -> tuple[tuple[Process, ...], int]:
    """SIGSTOP to all of host A's worker but QEMU, while the guest runs; what was frozen, and when it was all."""
    while True:
        frozen = tuple(each for each in guest.primary.left() if not each.is_qemu)
        assert len(signal_together(frozen, signal.SIGSTOP).names) == len(frozen) >= 4
        frozen_ns = time.monotonic_ns()
        deadline = time.monotonic() + SHORT_S
        while time.monotonic() < deadline:
            if len(sent(guest.recorder, AT_GATE, frozen_ns)) > 3:
                return frozen, frozen_ns
            time.sleep(0.01)
        signal_together(frozen, signal.SIGCONT)  # it was in a pause
        guest.wait_epochs(2)


def numbers(frames: Iterable[Frame]) -> list[int]:
    return [number for frame in frames if (number := RTP.number(frame.content)) is not None]


def test_a_frozen_primary_is_silent_when_its_lease_is_over() -> None:
    with observed("media", {"primary.epoch_ms": 100}) as guest:
        recorder = guest.recorder
        recorder.add(BEHIND_GATE, guest.hosts.topology.hosts["a"], host_end_name(guest.hosts.name, "primary"))
        start_streams(guest.hosts, INTERVAL_US, RTP)
        guest.protect()
        guest.wait_epochs(10)
        frozen, frozen_ns = freeze(guest)
        heard_ns = int(guest.taken_over().t * 1e9)
        wait(lambda: len(sent(recorder, AT_GATE, heard_ns)) > MANY, "the frozen side's guest runs on")
        wait(lambda: len(sent(recorder, "client", heard_ns)) > MANY, "the other is heard")
        left = sent(recorder, BEHIND_GATE, frozen_ns)
        assert left, "within its lease it was heard"
        assert left[-1].t_ns < min(frozen_ns + OBSERVED_LEASE_MS * 1_000_000, heard_ns)
        assert len(sent(recorder, AT_GATE, left[-1].t_ns)) > MANY
        signal_together(frozen, signal.SIGCONT)
        assert guest.primary.ended() == 4, "it is told that it was superseded"
        assert [frame for frame in recorder.frames(BEHIND_GATE) if frame.t_ns > left[-1].t_ns] == []
        after = numbers(sent(recorder, "client", heard_ns))
        assert after == list(range(after[0], after[0] + len(after))), "only one guest is heard"
