"""The gate process and the worker's hold on it.

The process is the only owner of hold0's descriptor: however it ends, hold0 ends with it, and frames redirected there
are dropped. It dies with the thread that made it (PDEATHSIG), and closes every descriptor it inherited but its own.
Does not decide anything (see ``protocol.gate``) and does not change programs (see ``namespace``).
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from typing import Protocol

from kagemusha.errors import BugError, KageError, TransientError
from kagemusha.gate import messages
from kagemusha.gate.loop import HoldLoop, QueueDrops
from kagemusha.gate.messages import Command, GateStatistics, Reply, Sealed
from kagemusha.kernel.bpf import HoldCount
from kagemusha.kernel.forked import ForkedProcess, fork_process
from kagemusha.kernel.output_channel import OutputChannel
from kagemusha.kernel.priority import Urgency
from kagemusha.kernel.process import wait_ended
from kagemusha.model.ids import Epoch
from kagemusha.protocol.gate import Demand

ANSWER_TIMEOUT_S = 5.0
_PASS_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 1.0


class HoldPoint(Protocol):
    """Where frames are held: ``GateNetwork`` on a host, ``switched.hold.HoldTap`` on a switch.

    :ivar hold_fd: descriptor of the hold tap, or -1 once a gate process owns it.
    """

    hold_fd: int

    @property
    def hold_device(self) -> str:
        """The hold tap's name."""

    @property
    def namespace_fd(self) -> int:
        """Descriptor of the namespace in which it is."""

    @property
    def count(self) -> HoldCount:
        """Frames given to the hold tap and returned from it."""

    def drop_hold_fd(self) -> None:
        """Close this process's descriptor."""


def spawn_gate(
    network: HoldPoint,
    *,
    hold_bytes: int,
    stands_at_seal: bool = True,
    copies: OutputChannel | None = None,
    answer_s: float = ANSWER_TIMEOUT_S,
) -> GateClient:
    """Start the gate process; it holds from the first moment. To be called from a process without threads.

    :param hold_bytes: frames beyond this many pending bytes are dropped.
    :param stands_at_seal: once the guest is paused, no frame of it is on its way here any more.
    :param copies: for what waits for a commit, see :class:`HoldLoop`.
    :param answer_s: how long the caller can wait for an answer.
    :raise KageError: the network's gate process was started before.
    """
    if network.hold_fd < 0:
        raise KageError("the network has a gate process already", operation="start the gate process")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def main() -> None:
        drops = QueueDrops(network.hold_device)
        HoldLoop(network.hold_fd, theirs, network.count, drops, hold_bytes, stands_at_seal, copies).run()

    kept = copies.writer_fds if copies is not None else set()
    process = fork_process(
        main,
        name="kage-gate",
        keep={network.hold_fd, theirs.fileno(), *kept},
        urgency=Urgency.HOLD,
        namespace_fd=network.namespace_fd,
    )
    theirs.close()
    network.drop_hold_fd()
    return GateClient(process, ours, answer_s)


class GateClient:
    """The worker's end. Answers come in the order of the requests.

    Every method raises :class:`BugError` when the process has died: hold0 is gone then, and what it held with it.

    :ivar process: the process.
    :ivar demand: how much the open epoch's output wants it to end, as far as was heard.
    """

    def __init__(self, process: ForkedProcess, control: socket.socket, answer_s: float = ANSWER_TIMEOUT_S) -> None:
        self.process = process
        self._answer_s = answer_s
        self._control = control
        self._sealed: dict[Epoch, Sealed] = {}
        self.demand = Demand.NONE

    def fileno(self) -> int:
        """The control socket: readable when an answer is there, or the process is gone."""
        return self._control.fileno()

    def seal(self, epoch: Epoch) -> None:
        """Ask for everything that is in hold0 to be read and given to this epoch. Returns at once.

        The guest has to stand. Epochs ascend.
        """
        self._send(Command.SEAL, epoch)

    def wait_sealed(self, epoch: Epoch, timeout_s: float) -> Sealed:
        """The answer to :meth:`seal`.

        :raise TransientError: none in time; the process may be frozen. Nothing leaks.
        """
        deadline = time.monotonic() + timeout_s
        while epoch not in self._sealed:
            self._take(deadline, f"seal epoch {epoch}")
        return self._sealed.pop(epoch)

    def take_sealed(self, epoch: Epoch) -> Sealed | None:
        """The answer to :meth:`seal`, if it is there. Does not wait."""
        self.pump()
        return self._sealed.pop(epoch, None)

    def pump(self) -> None:
        """Take in what the process has said without being asked. Does not wait."""
        while select.select([self._control], (), (), 0)[0]:
            self._take(time.monotonic(), "listen to the gate")

    def release(self, epoch: Epoch) -> None:
        """The standby has acknowledged this sealed epoch: let it and all before it leave. Returns at once."""
        self._send(Command.RELEASE, epoch)

    def pass_all(self) -> None:
        """Let out what is held and whatever comes; returns when all that was held has left.

        Set ``GateMode.PASS`` afterwards. :raise TransientError: not done within a minute.
        """
        self._ask(Command.PASS, Reply.PASSED, _PASS_TIMEOUT_S)

    def begin_pass(self) -> None:
        """The same without waiting: ``HoldCount.returned`` tells how far it is."""
        self._send(Command.PASS)

    def hold(self) -> None:
        """Hold from now on; set ``GateMode.HOLD`` afterwards. What is held already waits for the next commit.

        :raise TransientError: no answer in time.
        """
        self._ask(Command.HOLD, Reply.HOLDS, self._answer_s)

    def discard(self) -> int:
        """Forget what is held and not released: another instance goes on from the last commit. How many frames.

        Frames that were released still leave. Nothing more of the old instance may come in by now.

        :raise TransientError: no answer in time.
        """
        return self._ask(Command.DISCARD, Reply.DISCARDED, self._answer_s)[0]

    def statistics(self) -> GateStatistics:
        """The totals now. :raise TransientError: no answer in time."""
        return GateStatistics(*self._ask(Command.COUNT, Reply.COUNTED, self._answer_s)[:6])

    def close(self) -> None:
        """End the process; what it still holds is gone. May be called again, and after its death."""
        self._control.close()
        self.process.end(patience_s=_END_TIMEOUT_S)

    def kill(self) -> None:
        """The same at once, of a process that may be frozen."""
        self._control.close()
        self.process.end()

    def _send(self, command: Command, epoch: Epoch | int = 0) -> None:
        operation = f"{command.name.lower()} the gate"
        try:
            self._control.send(messages.encode(command, epoch), socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise TransientError("the gate process takes no orders: is it frozen?", operation=operation) from error
        except OSError as error:
            raise self._death(operation) from error

    def _ask(self, command: Command, reply: Reply, timeout_s: float) -> tuple[int, ...]:
        self._send(command)
        deadline = time.monotonic() + timeout_s
        while True:
            kind, numbers = self._take(deadline, f"{command.name.lower()} the gate")
            if kind is reply:
                return numbers

    def _take(self, deadline: float, operation: str) -> tuple[Command | Reply, tuple[int, ...]]:
        """The next answer; a late one to an earlier question is told by its kind."""
        self._control.settimeout(max(0.000_001, deadline - time.monotonic()))
        try:
            message = self._control.recv(messages.MESSAGE_BYTES + 1)
        except TimeoutError as error:
            raise TransientError("the gate process does not answer in time", operation=operation) from error
        except OSError as error:
            raise self._death(operation) from error
        if not message:
            raise self._death(operation)
        kind, numbers = messages.decode(message)
        if kind is Reply.DEMAND:
            self.demand = Demand(numbers[0])
        elif kind is Reply.SEALED:
            self.demand = Demand.NONE
            epoch = Epoch(numbers[0])
            self._sealed[epoch] = Sealed(epoch, *numbers[1:4])
        return kind, numbers

    def _death(self, operation: str) -> BugError:
        how = "is gone"
        wait_ended(self.process.pidfd, _END_TIMEOUT_S)  # its socket closes a moment before it has ended
        with suppress(ChildProcessError):
            end = os.waitid(os.P_PIDFD, self.process.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                how = f"ended with {'exit code' if end.si_code == os.CLD_EXITED else 'signal'} {end.si_status}"
        return BugError(
            f"the gate process {how}",
            operation=operation,
            hint="what it held is lost and nothing of it left; start the worker again",
        )
