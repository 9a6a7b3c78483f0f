"""An operator resumes the guest while it is being captured: what was captured never becomes a checkpoint.

The worker is frozen at the end of a capture, the guest let run by hand, then the worker goes on. The standby takes over
at the last checkpoint of a guest that stood, and nothing that the client was told is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from tests.harness.commands import Command, wait
from tests.harness.site import Site, Writer, site

from kagemusha.demo.sides import kage_program
from kagemusha.demo.topology import inside
from kagemusha.guest.accel import READY_LINE
from kagemusha.guest.qmp import QmpSession
from kagemusha.kernel.fault_point import FILE_VARIABLE, FaultBoard
from kagemusha.model.events import EpochCommitted, TakenOver
from kagemusha.model.faults import Fault, FaultAction, FaultOrder

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
EPOCH_MS = 8000
MONITOR = "socket,id=operator,path=operator,server=on,wait=off"


class Pair:
    """A node that runs the VM, with long epochs and a second monitor, and the one that protects it."""

    def __init__(self, hosts: Site) -> None:
        self.hosts = hosts
        self._board = FaultBoard.create(hosts.folder / "points")
        hosts.environment = {**hosts.environment, FILE_VARIABLE: str(hosts.folder / "points")}
        changes = {
            "primary.epoch_ms": EPOCH_MS,
            "primary.stall_ms": 30_000,
            "vm.command": list(hosts.guest("-chardev", MONITOR, "-mon", "chardev=operator,mode=control")),
        }
        self.first = hosts.node("a", changes)
        self.first.wait(lambda: READY_LINE in self.first.console(), "the guest is up")
        self.writer: Writer = hosts.writer()
        self.second = hosts.node("b", changes)
        self.first.wait_state("PROTECTED")

    def wait_next_epoch(self) -> EpochCommitted:
        """An epoch has just been committed; the next is long."""
        seen = len(self.first.of(EpochCommitted))
        self.first.wait(lambda: len(self.first.of(EpochCommitted)) > seen, "another checkpoint")
        return self.first.of(EpochCommitted)[-1]

    def arm(self) -> None:
        """The worker freezes when the next capture is complete."""
        self._board.arm(FaultOrder(Fault.PRIMARY_CAPTURED, FaultAction.FREEZE))

    def meddle(self) -> None:
        """Once it has: let the guest run by hand, and then the worker."""
        wait(lambda: self._board.struck == 1, "the worker is frozen in its pause")
        with QmpSession.connect(self.first.folder / "operator") as operator:
            assert operator.execute("query-status")["status"] == "paused"
            operator.execute("cont")
            assert operator.execute("query-status")["status"] == "running"
        self.first.strike(signal.SIGCONT, "worker")

    def assert_untouched(self, last: EpochCommitted) -> None:
        """The standby goes on from that epoch, and the client has not noticed."""
        assert self.second.wait_event(TakenOver).epoch == last.epoch
        self.first.wait_printed("somebody else resumed the guest during our pause")
        self.writer.wait_more()
        self.hosts.verify(self.writer)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with site() as hosts:
        yield Pair(hosts)


def test_a_guest_resumed_by_hand_in_a_capture(pair: Pair) -> None:
    last = pair.wait_next_epoch()
    pair.arm()
    pair.meddle()
    pair.assert_untouched(last)


def switchover(node: Command, hosts: Site) -> subprocess.Popen[str]:
    """An operator's command on host A."""
    return subprocess.Popen(
        inside(hosts.topology.hosts["a"], [kage_program(), "switchover", "--config", "kage.toml"]),
        cwd=node.folder,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_a_guest_resumed_by_hand_in_the_last_capture_of_a_switchover(pair: Pair) -> None:
    last = pair.wait_next_epoch()
    pair.arm()
    with switchover(pair.first, pair.hosts) as asked:
        pair.meddle()
        pair.assert_untouched(last)
        _, said = asked.communicate()
    assert asked.returncode != 0
    assert "somebody else" in said
