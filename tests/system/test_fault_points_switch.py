"""The same behind a switch that holds: its agent, its gate, and those who tell it of commits, fail at their points.

One cluster through all of it, each run judged like any chaos run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.harness.chaos_runs import struck_by

from kagemusha.chaos.fault_points import POINT_FAULTS
from kagemusha.chaos.form import Form
from kagemusha.chaos.runner import Runner

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
SAMPLE = (
    "kill switch at switch-sealing",  # a guest stands, and waits for nobody
    "kill standby at standby-switch-told",  # what it has told is let go, and its primary does not know of the commit
    "full switch at switch-recording",  # by then the primary host is dead: nobody gets the term until it is recorded
)
FAULTS = {str(fault): fault for fault in POINT_FAULTS}
LEASE_MS = 1000  # a machine that stands still for a moment is not a dead one


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner(7, POINT_FAULTS, keep=False, progress=lambda _: None, form=Form.SWITCH, lease_ms=LEASE_MS) as found:
        yield found


@pytest.mark.parametrize("name", SAMPLE)
def test_a_process_that_fails_at_a_point(runner: Runner, name: str) -> None:
    result = struck_by(runner, FAULTS[name])
    assert result.lost == 0
    assert result.acknowledged > 0


def test_every_point_of_the_switch_was_passed(runner: Runner) -> None:
    boards = runner.cluster.boards.values()
    here = {each.fault for each in POINT_FAULTS if each.form is Form.SWITCH}
    assert [fault.value for fault in here if not any(board.passed(fault) for board in boards)] == []
