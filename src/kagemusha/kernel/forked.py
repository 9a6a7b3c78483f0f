"""Processes of ours that do something on behalf of the one that made them, and are gone with it.

Forked, not started: what they work on is in their memory and their descriptors. One that is ended takes what it alone
holds with it: a tap, and every frame in there.

Not ``multiprocessing``: what its ``join`` waits for is closed in a process that closes all that it does not need.
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

from kagemusha.kernel import netns
from kagemusha.kernel.priority import Urgency, calm, hurry
from kagemusha.kernel.process import close_descriptors_but, has_ended, pidfd_open, set_name, set_pdeathsig, wait_ended


class ForkedProcess:
    """Such a process as its maker sees it.

    :ivar pid: of it.
    :ivar pidfd: readable when it is gone.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = pidfd_open(pid)
        self._reaped = False

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._reaped or has_ended(self.pidfd)

    def end(self, *, patience_s: float = 0.0) -> None:
        """Wait so long for its end, then kill it. Closes ``pidfd``. May be called again."""
        if self._reaped:
            return
        if not wait_ended(self.pidfd, patience_s):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._reaped = True
        os.close(self.pidfd)


def fork_process(
    main: Callable[[], int | None],
    *,
    name: str,
    keep: Iterable[int],
    urgency: Urgency | None = None,
    nice: int = 0,
    namespace_fd: int | None = None,
) -> ForkedProcess:
    """Fork a process that does ``main``, whose result is its exit code (None: 0).

    Of its maker's threads only the calling one goes on in it, so ``main`` must need none of the others, nor a lock of
    theirs. It dies with the thread that made it, and SIGINT and SIGTERM are not for it. What ``main`` raises is
    printed, and the exit code is 1 then. Its collections leave out what its maker had in memory: to walk that would
    copy it, too.

    :param name: for ps(1), at most 15 characters.
    :param keep: descriptors beside the standard ones; it has no others.
    :param urgency: that it runs ahead of ordinary processes.
    :param nice: if it does not; without the right to lower it, it stays as it is.
    :param namespace_fd: of the network namespace to enter.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        try:
            return ForkedProcess(pid)
        except OSError:  # no descriptor is left for it
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    code = 1
    try:
        gc.freeze()  # first: what finalises its maker's garbage would close numbers that are ours by then
        set_pdeathsig(signal.SIGKILL)
        set_name(name)
        if os.getppid() == parent:  # else it died before the line above
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            if namespace_fd is not None:
                netns.enter(namespace_fd)
            close_descriptors_but({0, 1, 2, *keep})
            calm(nice)
            if urgency is not None:
                hurry(urgency)
            code = main() or 0
    except BaseException:
        with suppress(OSError):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
