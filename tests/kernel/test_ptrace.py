"""Injections into a process that checks itself, with the injector killed wherever it can be."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.kernel.busy_target import (
    MODES,
    BusyTarget,
    compile_target,
    running_target,
    status_field,
    wait_until,
)

from kagemusha.errors import GuestGoneError, TransientError, UnsupportedError
from kagemusha.kernel import remote_code
from kagemusha.kernel.injector import steal_descriptor
from kagemusha.kernel.ptrace import InjectFault

SYS_DUP, SYS_EVENTFD2, SYS_GETPID = 32, 290, 39
O_CLOEXEC = os.O_CLOEXEC
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="host lacks: gcc"),
]
SOURCE_ROOT = str(Path(remote_code.__file__).parents[2])

# An injector that never stops injecting: sessions of several calls, one behind the other.
ENDLESS = f"""
import signal, sys
sys.path.insert(0, {SOURCE_ROOT!r})
from kagemusha.kernel.ptrace import InjectedThread
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGCHLD}})
pid = int(sys.argv[1])
while True:
    with InjectedThread(pid) as thread:
        for _ in range(3):
            assert thread.syscall({SYS_GETPID}) == pid
    print("session", flush=True)
"""

HOLDER = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return compile_target("busy.c", folder, "-pthread")


@pytest.fixture
def busy(program: Path, tmp_path: Path) -> Iterator[BusyTarget]:
    with running_target(program, tmp_path, "all") as target:
        yield target


def wait_queued(target: BusyTarget, signals: int) -> None:
    wait_until(lambda: target.value("queued") == signals, f"{signals} signals arrive")


def steal_eventfd(target: BusyTarget, fault: InjectFault | None = None) -> int:
    return steal_descriptor(target.pid, SYS_EVENTFD2, 7, O_CLOEXEC, fault=fault)


def injector(target: BusyTarget) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(target.pid)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "session\n"
    return process


def count_sessions(process: subprocess.Popen[str], sessions: int) -> None:
    assert process.stdout is not None
    for _ in range(sessions):
        assert process.stdout.readline() == "session\n"


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_descriptor_is_brought_over_and_the_target_keeps_none(busy: BusyTarget) -> None:
    before = busy.descriptors()
    descriptor = steal_eventfd(busy)
    try:
        assert os.eventfd_read(descriptor) == 7
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
    busy.check_unharmed()
    assert busy.descriptors() == before


@pytest.mark.parametrize("mode", [*MODES, "all"])
def test_two_hundred_injections_are_not_noticed(program: Path, tmp_path: Path, mode: str) -> None:
    with running_target(program, tmp_path, mode) as target:
        before = target.descriptors()
        code = ENDLESS.replace("while True:", "for _ in range(200):")
        subprocess.run([sys.executable, "-c", code, str(target.pid)], check=True, stdout=subprocess.DEVNULL)
        target.check_unharmed()
        assert target.descriptors() == before


# Between these two the frame brings the thread back, and a timed wait may end with EINTR.
FRAME_RESTORES = list(InjectFault)[
    list(InjectFault).index(InjectFault.CALL_SET) : list(InjectFault).index(InjectFault.REGISTERS_RESTORED)
]


@pytest.mark.parametrize("fault", [fault for fault in InjectFault if fault is not InjectFault.SIGNAL_SEEN])
def test_an_injector_killed_at_any_point_leaves_the_target_running(
    program: Path, tmp_path: Path, fault: InjectFault
) -> None:
    leave_it_running(program, tmp_path, fault, ("compute", MODES[list(InjectFault).index(fault) % len(MODES)]))


@pytest.mark.long
@pytest.mark.parametrize("fault", [fault for fault in InjectFault if fault is not InjectFault.SIGNAL_SEEN])
def test_an_injector_killed_at_any_point_in_any_call(program: Path, tmp_path: Path, fault: InjectFault) -> None:
    leave_it_running(program, tmp_path, fault, MODES)


def leave_it_running(program: Path, folder: Path, fault: InjectFault, modes: Sequence[str]) -> None:
    for mode in modes:
        with running_target(program, folder, mode) as target:
            with pytest.raises(TransientError, match="died"):
                steal_eventfd(target, fault)
            target.check_unharmed(may_eintr=fault in FRAME_RESTORES)
            os.close(steal_eventfd(target))
            target.check_unharmed(may_eintr=fault in FRAME_RESTORES)


@pytest.mark.parametrize("mode", [*MODES, "all"])
def test_injectors_killed_at_random_moments(program: Path, tmp_path: Path, mode: str) -> None:
    choose = random.Random(f"kill {mode}")
    with running_target(program, tmp_path, mode) as target:
        for _ in range(12):
            process = injector(target)
            threading.Event().wait(choose.uniform(0, 0.01))  # the moment is what varies; any will do
            end(process)
            target.check_unharmed(may_eintr=True)


class SignalRain:
    """Sends signals as fast as the target handles them, each queued one counted."""

    def __init__(self, target: BusyTarget) -> None:
        self._target = target
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signal-rain")
        self.queued = 0

    def __enter__(self) -> SignalRain:
        self._thread.start()
        wait_until(lambda: self._target.value("queued") > 100, "signals are handled")
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            # A full queue would merge signals: never more than a few underway.
            if self.queued - self._target.value("queued") < 16:
                os.kill(self._target.pid, signal.SIGRTMIN)
                self.queued += 1
            else:
                threading.Event().wait(0.0002)
            os.kill(self._target.pid, signal.SIGUSR1)


@pytest.mark.parametrize("mode", [*MODES, "all"])
def test_no_signal_is_lost_by_injections(program: Path, tmp_path: Path, mode: str) -> None:
    with running_target(program, tmp_path, mode) as target:
        with SignalRain(target) as rain:
            code = ENDLESS.replace("while True:", "for _ in range(100):")
            subprocess.run([sys.executable, "-c", code, str(target.pid)], check=True, stdout=subprocess.DEVNULL)
        wait_queued(target, rain.queued)
        assert target.value("plain") > 0
        target.check_unharmed(may_eintr=True)


@pytest.mark.parametrize("mode", ["all", "compute"])
def test_no_signal_is_lost_by_killed_injectors(program: Path, tmp_path: Path, mode: str) -> None:
    choose = random.Random(f"rain {mode}")
    with running_target(program, tmp_path, mode) as target:
        with SignalRain(target) as rain:
            for _ in range(20):
                process = injector(target)
                threading.Event().wait(choose.uniform(0, 0.01))
                end(process)
        wait_queued(target, rain.queued)
        target.check_unharmed(may_eintr=True)


# Makes the first stop one for a signal, and ends (or does not) before it is passed on.
SIGNALLED = f"""
import os, signal, sys
sys.path.insert(0, {SOURCE_ROOT!r})
from kagemusha.kernel.ptrace import InjectedThread, InjectFault
from kagemusha.kernel.remote_code import status_of
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGCHLD}})
pid, dies = int(sys.argv[1]), sys.argv[2] == "dies"
def at(point):
    if point is InjectFault.SEIZED:
        os.kill(pid, signal.SIGRTMIN)
        while status_of(pid)["State"][0] != "t":
            pass
    if point is InjectFault.SIGNAL_SEEN:
        print("seen", flush=True)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
with InjectedThread(pid, at=at) as thread:
    thread.syscall({SYS_GETPID})
"""


@pytest.mark.parametrize(("end", "status"), [("dies", -signal.SIGKILL), ("lives", 0)])
def test_a_signal_that_stopped_the_thread_is_passed_on(busy: BusyTarget, end: str, status: int) -> None:
    for round_ in range(1, 6):
        command = [sys.executable, "-c", SIGNALLED, str(busy.pid), end]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        assert (process.returncode, process.stdout) == (status, "seen\n")
        wait_queued(busy, round_)
    busy.check_unharmed(may_eintr=True)


def is_stopped(target: BusyTarget) -> bool:
    return status_field(target.pid, "State")[0] == "T"


def test_a_stopped_process_stays_stopped(busy: BusyTarget) -> None:
    os.kill(busy.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(busy), "the target stops")
    os.close(steal_eventfd(busy))
    wait_until(lambda: is_stopped(busy), "the target is still stopped")
    for fault in (InjectFault.CALL_ENTERED, InjectFault.LEFT):
        with pytest.raises(TransientError, match="died"):
            steal_eventfd(busy, fault)
        wait_until(lambda: is_stopped(busy), "the target is still stopped")
    os.kill(busy.pid, signal.SIGCONT)
    busy.check_unharmed(may_eintr=True)


def test_stops_and_continues_in_the_middle_of_injections(busy: BusyTarget) -> None:
    process = injector(busy)
    for _ in range(50):
        os.kill(busy.pid, signal.SIGSTOP)
        count_sessions(process, 1)
        os.kill(busy.pid, signal.SIGCONT)
        count_sessions(process, 1)
    end(process)
    busy.check_unharmed(may_eintr=True)


def test_an_error_of_the_call_is_told_and_everything_restored(busy: BusyTarget) -> None:
    with pytest.raises(OSError, match="inside process") as caught:
        steal_descriptor(busy.pid, SYS_DUP, 9999)
    assert caught.value.errno == errno.EBADF
    busy.check_unharmed()


def test_uninterruptible_sleep_ends_in_a_timeout(program: Path, tmp_path: Path) -> None:
    with running_target(program, tmp_path, "vfork") as target:
        try:
            wait_until(lambda: status_field(target.pid, "State")[0] == "D", "the target waits for its child")
            with pytest.raises(TransientError, match="did not stop within"):
                steal_descriptor(target.pid, SYS_EVENTFD2, 0, O_CLOEXEC, timeout_s=0.2)
            assert status_field(target.pid, "TracerPid") == "0"
        finally:
            target.release()
        target.check_unharmed()


def test_a_traced_process_is_refused_and_its_tracer_named(busy: BusyTarget) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(busy.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "holding\n"
        with pytest.raises(UnsupportedError, match=rf"traced by process {tracer.pid} \(python"):
            steal_eventfd(busy)
        tracer.kill()
    busy.check_unharmed()


def test_a_missing_permission_is_told(busy: BusyTarget) -> None:
    # The session itself, not the injector: another user may not be able to start our interpreter.
    code = f"""
import os, sys
sys.path.insert(0, {SOURCE_ROOT!r})
from kagemusha.errors import UnsupportedError
from kagemusha.kernel.ptrace import InjectedThread
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    InjectedThread({busy.pid}).__enter__()
except UnsupportedError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "may not be traced" in answer
    assert "CAP_SYS_PTRACE" in answer
    busy.check_unharmed()


@pytest.mark.parametrize(
    ("source", "flags", "reason"),
    [
        ("bare.c", ("-nostdlib", "-static"), "no libc"),
        ("narrow.c", ("-nostdlib", "-static", "-m32"), "32-bit"),
    ],
)
def test_programs_whose_state_could_not_be_restored_are_refused(
    folder: Path, source: str, flags: tuple[str, ...], reason: str
) -> None:
    try:
        program = compile_target(source, folder, *flags)
        process = subprocess.Popen([str(program)])
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("host lacks: 32-bit programs or a compiler for them")
    try:
        with pytest.raises(UnsupportedError, match=reason):
            steal_descriptor(process.pid, SYS_EVENTFD2, 0, 0)
        assert process.poll() is None
        assert status_field(process.pid, "TracerPid") == "0"
    finally:
        process.kill()
        process.wait()


def test_a_shadow_stack_is_refused() -> None:
    status = {"State": "S (sleeping)", "TracerPid": "0"}
    remote_code.check_status(1, {**status, "x86_Thread_features": ""})
    with pytest.raises(UnsupportedError, match="shadow stack"):
        remote_code.check_status(1, {**status, "x86_Thread_features": "shstk wrss"})


def test_a_process_that_has_ended_is_told(program: Path, tmp_path: Path) -> None:
    with running_target(program, tmp_path, "all") as target:
        target.process.kill()
        os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(GuestGoneError, match="has ended"):
            steal_eventfd(target)
        target.process.wait()
        with pytest.raises(GuestGoneError, match="is gone"):
            steal_eventfd(target)


def test_a_target_killed_during_injections_is_told(program: Path, tmp_path: Path) -> None:
    code = ENDLESS.replace("while True:", "from kagemusha.errors import GuestGoneError\nwhile True:")
    for _ in range(5):
        with running_target(program, tmp_path, "all") as target:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(target.pid)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            count_sessions(process, 3)
            target.process.kill()
            _, told = process.communicate()
            assert "GuestGoneError" in told
