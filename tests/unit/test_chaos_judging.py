"""What a chaos run is told to have been, and what many sum up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kagemusha.chaos.exchanges import Account
from kagemusha.chaos.faults import ALL_FAULTS, ChaosFault, faults_with
from kagemusha.chaos.form import Form
from kagemusha.chaos.history import Action, Operation
from kagemusha.chaos.judge import Verdict
from kagemusha.chaos.report import summary
from kagemusha.chaos.runner import RunResult, explained

CLEAN = Verdict(leaked=0, double_active=0, damaged=(), frames=1000)
SOUND = Account(
    asked=100,
    unanswered=1,
    in_flight_answered=1,
    in_flight_lost=0,
    doubled=0,
    went_back=0,
    gap_ms=400.0,
    answered_after=50,
    damage=(),
)
GOOD = RunResult(
    number=1,
    faults=("kill primary host",),
    single=True,
    reached=True,
    acknowledged=100,
    lost=0,
    verdict=CLEAN,
    operations=50,
    history="",
    memory=SOUND,
    ended_connections=0,
    stopped=False,
    broken="",
    outage_ms=400.0,
    reached_standby=True,
    takeover_ms=50.0,
    replayed_frames=3,
    resent_frames=1,
    failure="",
)
STOPPED = replace(GOOD, stopped=True, outage_ms=None, memory=replace(SOUND, answered_after=0), ended_connections=2)


def test_a_run_in_which_all_went_well() -> None:
    assert GOOD.ok
    assert not GOOD.damaged


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, lost=1),
        replace(GOOD, verdict=replace(CLEAN, leaked=1)),
        replace(GOOD, verdict=replace(CLEAN, double_active=1)),
        replace(GOOD, verdict=replace(CLEAN, damaged=("Kernel panic",))),
        replace(GOOD, memory=replace(SOUND, damage=("PATTERN-BAD",))),
        replace(GOOD, memory=replace(SOUND, went_back=1)),
        replace(GOOD, history="k is not linearizable"),
        replace(GOOD, failure="one node is protected by another: not within 90 s"),
    ],
    ids=lambda result: str(result)[-40:],
)
def test_what_must_not_happen_whatever_has_failed(bad: RunResult) -> None:
    """Neither after one fault nor after two, nor when the service has stopped."""
    for single in (True, False):
        for stopped in (True, False):
            assert not replace(bad, single=single, stopped=stopped).ok


def test_two_faults_may_stop_the_service_and_one_must_not() -> None:
    assert not STOPPED.ok
    assert replace(STOPPED, single=False).ok
    assert replace(STOPPED, single=False, faults=("kill standby at term-recorded",)).ok


def test_one_fault_must_not_end_a_connection() -> None:
    ended = replace(GOOD, ended_connections=1)
    assert not ended.ok
    assert replace(ended, single=False).ok


def test_frames_that_were_not_seen_show_nothing() -> None:
    assert not replace(GOOD, verdict=replace(CLEAN, frames=0)).ok


def test_clients_that_failed_themselves_show_nothing() -> None:
    assert not replace(GOOD, ended_connections=None).ok
    assert not replace(GOOD, single=False, ended_connections=None).ok


def test_a_pattern_that_died_unseen_is_noticed() -> None:
    """The service goes on and the witness in the guest does not: nobody watches its memory any more."""
    dead = replace(GOOD, memory=replace(SOUND, answered_after=0))
    assert not dead.ok
    assert not replace(dead, single=False).ok


def _write(returned_ns: int | None) -> Operation:
    return Operation(1, "k", Action.WRITE, "a", None, 10, returned_ns)


def _read(result: str, invoked_ns: int) -> Operation:
    return Operation(2, "k", Action.READ, None, result, invoked_ns, invoked_ns + 5)


def test_an_empty_history_shows_nothing() -> None:
    assert "not decided" in explained([])
    assert "not decided" in explained([_write(None)])


def test_the_history_of_a_stopped_run_is_judged_as_any() -> None:
    assert explained([_write(20), _read("a", 30)]) == ""
    assert "is not linearizable" in explained([_write(20), _read("b", 30)])
    assert not replace(STOPPED, single=False, history=explained([_write(20), _read("b", 30)])).ok


def test_the_summary_counts_single_faults_apart() -> None:
    point = ("kill standby at claims-asking",)
    found = summary(
        [
            GOOD,
            replace(GOOD, lost=2, verdict=replace(CLEAN, leaked=1)),
            replace(STOPPED, single=False, faults=point),
            replace(GOOD, single=False, faults=("kill arbiter", "kill primary ship"), outage_ms=9000.0),
        ]
    )
    assert (found["runs"], found["ok"], found["lost"], found["leaked"]) == (4, 3, 2, 1)
    assert (found["double_faults"], found["double_faults_that_stopped_the_service"]) == (2, 1)
    assert found["single_faults_that_stopped_the_service"] == 0
    assert found["outage_ms"]["max"] == 400.0  # of single faults alone
    assert found["by_fault"].keys() == {"kill primary host", *point}  # two at once belong to neither
    assert (found["by_fault"][point[0]]["runs"], found["by_fault"][point[0]]["stopped"]) == (1, 1)


def test_outages_of_requests_that_were_sent_again_are_told_apart() -> None:
    """Whatever else was replayed: it is the waiting request that counts. Of unknown ones neither is said."""
    again = replace(GOOD, outage_ms=520.0, reached_standby=False)
    found = summary([GOOD, again, again, replace(GOOD, outage_ms=900.0, reached_standby=None)])
    for part in (found, found["by_fault"]["kill primary host"]):
        assert part["outage_reached_ms"] == {"n": 1, "p50": 400.0, "p95": 400.0, "max": 400.0}
        assert part["outage_retransmitted_ms"] == {"n": 2, "p50": 520.0, "p95": 520.0, "max": 520.0}
        assert part["outage_ms"]["n"] == 4


def test_a_summary_of_nothing() -> None:
    found = summary([])
    assert (found["runs"], found["ok"], found["outage_ms"]) == (0, 0, None)


def test_faults_are_found_by_words_and_each_says_what_it_does() -> None:
    assert faults_with(["arbiter"], Form.HOST) != ()
    assert all("arbiter" in str(fault) for fault in faults_with(["arbiter"], Form.HOST))
    assert faults_with(["flood"], Form.HOST) == ()
    assert faults_with(["kill primary host"], Form.HOST) == (ChaosFault.KILL_PRIMARY_HOST,)
    assert faults_with(["kill primary host", "fill"], Form.HOST) == (
        ChaosFault.KILL_PRIMARY_HOST,
        *faults_with(["fill"], Form.HOST),
    )
    names = [str(fault) for fault in ALL_FAULTS]
    assert len(names) == len(set(names))
    assert [fault for fault in ALL_FAULTS if not fault.explanation] == []
    assert not ChaosFault.SLOW_ARBITER.doubled


def test_each_form_has_its_faults() -> None:
    """Every fault is one of a form at least, and none strikes at what is not there."""
    host, switch = (faults_with([""], form) for form in Form)
    assert {*host, *switch} == set(ALL_FAULTS)
    assert [str(fault) for fault in host if "switch" in str(fault)] == []
    assert [str(fault) for fault in switch if "primary gate" in str(fault) or "inbound" in str(fault)] == []
    assert ChaosFault.KILL_ARBITER in {*host} & {*switch}
