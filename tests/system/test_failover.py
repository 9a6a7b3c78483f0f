"""Host A fails under a client's load, host B takes over, and the client notices nothing but a wait.

Real guests, real kills. What is asserted are counts and conditions, never times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.harness.demo_run import loaded_run, wait_until
from tests.harness.output_commit import unexplained

from kagemusha.demo.options import DemoOptions, KillKind
from kagemusha.demo.processes import marked, signal_together
from kagemusha.demo.records import LoadEnd
from kagemusha.demo.report import DemoReport
from kagemusha.demo.sides import SIDE_MARK, kage_program
from kagemusha.demo.topology import namespaces_with
from kagemusha.model.events import Ended

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
FENCED_EXIT = 4
LEASE_MS = 1500  # a machine that stands still for a moment is not a dead one
WORDS = ("--seconds", "6", "--lease-ms", str(LEASE_MS), "--json", "report.json", "--png", "timeline.png")


def assert_held(report: DemoReport) -> None:
    """Nothing lost, one connection, real work on both sides of the kill, every answer after its commit."""
    assert report.lost_writes == 0
    assert report.connection_resets == 0, report.details["client"]
    assert report.details["client"]["connections"] == 1
    assert report.takeover_ms is not None
    assert report.epochs >= 10
    assert report.held_frames > 0
    after = report.details["client"]["after_takeover"]
    assert 0 < after < report.acknowledged_writes
    assert unexplained(report.record) == []


def test_the_command_shows_a_failover_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [kage_program(), "demo", *WORDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["lost_writes"], report["connection_resets"]) == (0, 0)
    assert report["acknowledged_writes"] > report["details"]["client"]["after_takeover"] > 0
    assert report["details"]["kill"]["killed"][0].startswith("qemu-system")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert "no acknowledged write was lost" in done.stdout


@pytest.mark.parametrize(
    ("kill", "pipeline"),
    [
        pytest.param(KillKind.HOST, 1, marks=pytest.mark.long),
        (KillKind.QEMU, 1),
        pytest.param(KillKind.WORKER, 8, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_no_acknowledged_write_is_lost_and_no_connection_reset(kill: KillKind, pipeline: int) -> None:
    """And what was not killed goes by itself: a dead QEMU ends its worker, a dead worker its gate and QEMU."""
    with loaded_run(DemoOptions(seconds=6, lease_ms=LEASE_MS, kill=kill, pipeline=pipeline)) as run:
        run.await_moment()
        run.kill()
        run.await_takeover()
        mark = run.side_mark("primary")
        wait_until(lambda: marked(SIDE_MARK, mark) == (), "every process of host A has ended")
        assert_held(run.report(run.finish_client(), run.verify()))


@pytest.mark.long
def test_a_frozen_primary_is_fenced_when_it_wakes_up() -> None:
    """SIGSTOP of everything on A, takeover, SIGCONT: A ends itself, and no frame of it gets out any more."""
    with loaded_run(DemoOptions(seconds=8, lease_ms=LEASE_MS)) as run:
        primary = run.progress.workers["primary"]
        run.await_moment()
        frozen = primary.processes()
        assert any(entry.is_qemu for entry in frozen)
        run.send(frozen, signal.SIGSTOP)
        run.await_takeover()
        before = run.topology.port_traffic("a")
        answered = len(run.progress.acknowledged)

        assert len(signal_together(frozen, signal.SIGCONT).names) == len(frozen)
        wait_until(lambda: primary.process.poll() is not None, "the woken worker has ended")
        mark = run.side_mark("primary")
        wait_until(lambda: marked(SIDE_MARK, mark) == (), "its QEMU and gate have ended")
        outcome, verification = run.finish_client(), run.verify()

        assert primary.process.returncode == FENCED_EXIT
        assert [event for event in run.progress.primary if isinstance(event, Ended)][-1].exit_code == FENCED_EXIT
        assert run.topology.port_traffic("a").received_frames == before.received_frames
        assert (outcome.end, outcome.connections) == (LoadEnd.FINISHED, 1)
        assert outcome.acknowledged > answered
        assert (verification.checked, verification.lost) == (outcome.acknowledged, ())
        name = run.directory.name
    assert namespaces_with(name) == ()
