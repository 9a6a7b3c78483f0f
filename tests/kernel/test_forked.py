"""A forked process: what it has, when it ends, and that its maker need not wait for one that stands still."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref

import pytest
from tests.harness.conditions import wait_until

from kagemusha.kernel.forked import ForkedProcess, fork_process
from kagemusha.kernel.process import wait_ended

WAIT_S = 20.0
HOUR_S = 3600.0


def exit_code(process: ForkedProcess) -> int:
    assert wait_ended(process.pidfd, WAIT_S)
    status = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
    assert status is not None
    process.end()
    return int(status.si_status)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (7, 7)])
def test_its_result_is_its_exit_code(result: int | None, code: int) -> None:
    assert exit_code(fork_process(lambda: result, name="kage-test", keep=())) == code


def test_what_it_raises_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise ValueError("so it goes")

    assert exit_code(fork_process(main, name="kage-test", keep=())) == 1
    assert "ValueError: so it goes" in capfd.readouterr().err


def test_it_has_its_name_and_no_foreign_descriptor_and_takes_no_stop_signal() -> None:
    reader, writer = os.pipe()
    other, end = os.pipe()

    def main() -> None:
        os.write(writer, b"+")
        time.sleep(HOUR_S)

    process = fork_process(main, name="kage-test", keep={writer})
    try:
        assert os.read(reader, 1) == b"+"
        with open(f"/proc/{process.pid}/comm", encoding="ascii") as name:
            assert name.read() == "kage-test\n"
        assert {int(fd) for fd in os.listdir(f"/proc/{process.pid}/fd")} == {0, 1, 2, writer}
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        assert not wait_ended(process.pidfd, 0.2)
        assert not process.gone
    finally:
        process.end()
        for fd in (reader, writer, other, end):
            os.close(fd)
    assert process.gone


def test_one_that_stands_still_is_ended_and_may_be_ended_again() -> None:
    process = fork_process(lambda: time.sleep(HOUR_S), name="kage-test", keep=())
    os.kill(process.pid, signal.SIGSTOP)
    process.end(patience_s=0.05)
    process.end(patience_s=HOUR_S)
    assert process.gone
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


def test_it_dies_with_its_maker() -> None:
    reader, writer = os.pipe()

    def main() -> None:
        child = fork_process(lambda: time.sleep(HOUR_S), name="kage-test", keep={writer})
        os.write(writer, str(child.pid).encode())

    maker = fork_process(main, name="kage-maker", keep={writer})
    os.close(writer)
    pid = int(os.read(reader, 20))
    exit_code(maker)
    assert os.read(reader, 1) == b""  # whoever had the other end is gone
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it is gone")
    os.close(reader)


def test_its_collections_leave_its_makers_memory_alone() -> None:
    class Loop:
        pass

    loop = Loop()
    loop.__dict__["itself"] = loop
    there = weakref.ref(loop)

    def main() -> int:
        class Own:
            pass

        own = Own()
        own.__dict__["itself"] = own
        mine = weakref.ref(own)
        del own
        gc.collect()
        return (there() is None) + 2 * (mine() is None)

    gc.disable()
    try:
        del loop
        process = fork_process(main, name="kage-test", keep=())
    finally:
        gc.enable()
    assert exit_code(process) == 2
