"""Fault points: what is armed, what strikes, and that each member is one of a place in the code."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import kagemusha
from kagemusha.chaos.fault_points import POINT_FAULTS, Side, Trigger
from kagemusha.errors import ConfigError
from kagemusha.kernel import fault_point
from kagemusha.kernel.fault_point import FILE_VARIABLE, ORDER_VARIABLE, FaultBoard, provide, reach
from kagemusha.model.faults import WRITING, Fault, FaultAction, FaultOrder, parse_fault

ROOT = Path(kagemusha.__file__).parent
ORDER = FaultOrder(Fault.STANDBY_WHOLE, FaultAction.KILL)


def reached_in_source() -> Iterator[str]:
    """The member of every ``reach(Fault.MEMBER)``; any other call of ``reach`` is a mistake."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                (argument,) = node.args
                assert isinstance(argument, ast.Attribute), ast.unparse(node)
                yield argument.attr


def test_every_member_is_reached_at_one_place() -> None:
    """Two roles that do the same thing have a point each, so a point says where it is."""
    assert Counter(reached_in_source()) == Counter(fault.name for fault in Fault)


def test_chaos_strikes_at_every_member_with_every_action_that_makes_sense() -> None:
    expected = {(fault, action) for fault in Fault for action in (FaultAction.KILL, FaultAction.FREEZE)}
    expected |= {(fault, FaultAction.FULL) for fault in WRITING}
    assert {(each.fault, each.action) for each in POINT_FAULTS} == expected
    assert len({str(each) for each in POINT_FAULTS}) == len(POINT_FAULTS)


def test_one_failure_is_not_taken_for_two() -> None:
    assert [each for each in POINT_FAULTS if each.trigger is Trigger.NOTHING and each.doubled] == []
    assert [each for each in POINT_FAULTS if each.side is Side.THIRD and each.doubled] == []


@pytest.mark.parametrize("fault", Fault)
def test_a_point_s_name_and_explanation(fault: Fault) -> None:
    assert Fault(fault.value) is fault  # type: ignore[call-arg]
    assert fault.value == fault.name.lower().replace("_", "-")
    assert fault.explanation != ""


# --- what is armed ----------------------------------------------------------------------------------------------------


def test_what_an_order_says() -> None:
    assert parse_fault("standby-whole:kill") == ORDER
    assert parse_fault(" standby-whole:freeze:12\n") == FaultOrder(Fault.STANDBY_WHOLE, FaultAction.FREEZE, 12)
    assert parse_fault(str(ORDER)) == ORDER
    assert parse_fault("term-recording:full").action is FaultAction.FULL


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "POINT:ACTION"),
        ("standby-whole", "POINT:ACTION"),
        ("standby-whole:kill:1:2", "POINT:ACTION"),
        ("standby-hole:kill", "'standby-hole'"),
        ("STANDBY_WHOLE:kill", "'STANDBY_WHOLE'"),
        ("standby-whole:stop", "'stop'"),
        ("standby-whole:kill:0", "'0'"),
        ("standby-whole:kill:-1", "'-1'"),
        ("standby-whole:kill:two", "'two'"),
        ("standby-whole:kill:٣", "number of times"),
        ("standby-whole:full", "nothing is written"),
    ],
)
def test_an_order_that_makes_no_sense_names_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fault(text)
    assert named in str(caught.value)
    with pytest.raises(ConfigError):
        provide({ORDER_VARIABLE: text})


@pytest.fixture
def board(tmp_path: Path) -> FaultBoard:
    return FaultBoard.create(tmp_path / "points")


def test_an_armed_point_strikes_once_at_its_time(board: FaultBoard) -> None:
    board.arm(FaultOrder(Fault.STANDBY_WHOLE, FaultAction.FREEZE, 3))
    taken = [board.take(fault) for fault in [Fault.STANDBY_PART, Fault.STANDBY_WHOLE] * 5]
    assert [place for place, action in enumerate(taken) if action is not None] == [5]
    assert taken[5] is FaultAction.FREEZE
    assert (board.struck, board.armed) == (1, False)
    assert (board.passed(Fault.STANDBY_WHOLE), board.passed(Fault.STANDBY_PART)) == (5, 5)
    assert board.passed(Fault.SHIP_SENT) == 0


def test_what_is_disarmed_or_armed_anew_does_not_strike(board: FaultBoard) -> None:
    board.arm(ORDER)
    board.disarm()
    assert board.take(ORDER.fault) is None
    board.arm(ORDER)
    board.arm(FaultOrder(Fault.SHIP_SENT, FaultAction.KILL))
    assert board.take(ORDER.fault) is None
    assert board.take(Fault.SHIP_SENT) is FaultAction.KILL


def test_who_has_the_file_arms_a_process_that_runs(tmp_path: Path, board: FaultBoard) -> None:
    theirs = FaultBoard.open(tmp_path / "points")
    assert theirs.take(ORDER.fault) is None
    board.arm(ORDER)
    assert theirs.take(ORDER.fault) is FaultAction.KILL
    assert (board.struck, board.passed(ORDER.fault)) == (1, 2)


def test_files_that_are_refused(tmp_path: Path, board: FaultBoard) -> None:
    path = tmp_path / "points"
    with pytest.raises(FileExistsError):
        FaultBoard.create(path)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "short").write_bytes(b"")
    (tmp_path / "short").chmod(0o600)
    (tmp_path / "open").write_bytes(path.read_bytes())
    (tmp_path / "open").chmod(0o620)
    for name in ("none", "link", "short", "open", "."):
        with pytest.raises(ConfigError) as caught:
            provide({FILE_VARIABLE: str(tmp_path / name)})
        assert FILE_VARIABLE in str(caught.value)
    assert fault_point._board is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file to somebody else")
def test_somebody_else_s_file_is_refused(tmp_path: Path, board: FaultBoard) -> None:
    os.chown(tmp_path / "points", 65534, 65534)
    with pytest.raises(ConfigError):
        FaultBoard.open(tmp_path / "points")


# --- what strikes -----------------------------------------------------------------------------------------------------

PROGRAM = """
import os
from kagemusha.kernel.fault_point import provide, reach
from kagemusha.model.faults import Fault
print(provide(os.environ), flush=True)
if os.fork() == 0:  # the processes of a worker are its forks
    reach(Fault.TERM_RECORDING)
    reach(Fault.TERM_RECORDING)
    os._exit(7)
_, status = os.wait()
print(os.waitstatus_to_exitcode(status), flush=True)
"""


def run_with(variables: dict[str, str], program: str = PROGRAM) -> list[str]:
    """What the program prints."""
    environment = {key: value for key, value in os.environ.items() if key not in (FILE_VARIABLE, ORDER_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    return done.stdout.split() + done.stderr.strip().splitlines()[-1:]


def test_without_the_variables_nothing_can_be_armed(tmp_path: Path, board: FaultBoard) -> None:
    board.arm(FaultOrder(Fault.TERM_RECORDING, FaultAction.KILL))
    assert run_with({}) == ["False", "7"]
    assert (board.struck, board.passed(Fault.TERM_RECORDING)) == (0, 0)
    reach(Fault.TERM_RECORDING)  # this process has none either


def test_a_process_that_reaches_the_point_is_killed_and_no_other() -> None:
    assert run_with({ORDER_VARIABLE: "term-recording:kill:2"}) == ["True", "-9"]
    assert run_with({ORDER_VARIABLE: "term-recording:kill:3"}) == ["True", "7"]


def test_a_full_disk_is_an_error_where_it_is_written() -> None:
    program = PROGRAM.replace("os._exit(7)", "").replace("if os.fork() == 0:", "if True:")
    found = run_with({ORDER_VARIABLE: "term-recording:full"}, program)
    assert "No space left on device" in found[-1]


def test_a_frozen_process_goes_on_when_it_is_told_to(tmp_path: Path, board: FaultBoard) -> None:
    board.arm(FaultOrder(Fault.TERM_RECORDING, FaultAction.FREEZE))
    program = PROGRAM.replace("if os.fork() == 0:", "if True:")
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, FILE_VARIABLE: str(tmp_path / "points")}
    )
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert found is not None
    assert (found.si_code, found.si_status) == (os.CLD_STOPPED, signal.SIGSTOP)
    assert (board.struck, board.passed(Fault.TERM_RECORDING)) == (1, 1)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 7
    assert board.passed(Fault.TERM_RECORDING) == 2


def test_an_order_that_makes_no_sense_ends_a_worker_at_once() -> None:
    assert "there is no point 'x'" in run_with({ORDER_VARIABLE: "x:kill"})[-1]
