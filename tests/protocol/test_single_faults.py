"""One fault at every moment of the first epochs: afterwards the service runs, in one place, with nothing taken back."""

from __future__ import annotations

import pytest
from tests.protocol.simulated import outcome_of, world_of

from kagemusha.protocol.simulate.scenario import KINDS, SWITCH_KINDS, Fault, Scenario

LAST = 230
"""Steps: from the start over the first synchronisation to some committed checkpoints."""
COVERED = 150
"""From here on there is a checkpoint to take over with."""
LAST_AT_SWITCH = 320
"""The same behind a switch, where more is said."""
LOSES_THE_GUEST = {"host dies", "worker dies with its guest", "guest crashes", "guest powers off", "die amid effects"}
"""These end a guest of which the standby may not have a checkpoint yet: it is booted again."""


def single(
    kind: str, node: int, step: int, *, seed: int = 1, number: int = 7, policy: str = "claim", last: int = LAST
) -> Scenario:
    return Scenario(seed, 2, policy, (Fault(step, kind, node, number),), last + 400)


def test_by_then_there_is_a_checkpoint() -> None:
    world = world_of(Scenario(1, 2, "claim", (), COVERED))
    for _ in range(COVERED):
        world.agenda.step()
    assert any(role.data.covered for role in world.primaries)


@pytest.mark.parametrize("node", [0, 1], ids=["primary", "standby"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_service_runs_on_in_one_place(kind: str, node: int) -> None:
    for step in range(1, LAST, 3):
        scenario = single(kind, node, step, number=step)
        assert outcome_of(scenario).serving, str(scenario)


@pytest.mark.parametrize("node", [0, 1], ids=["primary", "standby"])
@pytest.mark.parametrize("kind", sorted(KINDS | SWITCH_KINDS))
def test_behind_a_switch_too(kind: str, node: int) -> None:
    for step in range(1, LAST_AT_SWITCH, 17):
        scenario = single(kind, node, step, number=step, policy="switch", last=LAST_AT_SWITCH)
        assert outcome_of(scenario).serving, str(scenario)


@pytest.mark.parametrize("kind", sorted(LOSES_THE_GUEST))
def test_a_guest_that_has_a_standby_is_taken_over_and_not_booted_again(kind: str) -> None:
    for step in range(COVERED, LAST, 2):
        outcome = outcome_of(single(kind, 0, step, number=0))
        restarted = kind in ("guest powers off", "die amid effects") and outcome.takeovers == 0
        assert outcome.takeovers == 1 or restarted, (kind, step)


@pytest.mark.parametrize("policy", ["hold", "alone"])
@pytest.mark.parametrize("kind", ["host dies", "worker dies with its guest", "guest crashes", "freeze all processes"])
def test_without_an_arbiter_the_standby_takes_over(kind: str, policy: str) -> None:
    for step in range(COVERED, LAST, 3):
        scenario = Scenario(1, 2, policy, (Fault(step, kind, 0, 0),), LAST + 400)
        outcome = outcome_of(scenario)
        assert outcome.takeovers == 1, str(scenario)
