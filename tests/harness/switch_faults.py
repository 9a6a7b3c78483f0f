"""A host that goes on with its epochs while its switch's processes fail: what leaves has to be committed by then.

Frames are numbered. What came out is looked up in what its epoch is worth: committed, still open, or never to leave.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.harness.switch import VM1
from tests.harness.switch_command import ADDRESS, WAIT_S, SwitchCommand

from kagemusha.demo.processes import descendants
from kagemusha.model.ids import Epoch, Term
from kagemusha.switching.channel import Channel
from kagemusha.switching.client import SwitchClient
from kagemusha.wire.switch_structs import Committed

NEVER = 1 << 60
PARTS = ("kage-gate", "kage-rules", "kage-keeper", "kage")


class FaultySwitch:
    """Strikes at the processes of a switch, and undoes it later."""

    def __init__(self, command: SwitchCommand, chance: random.Random) -> None:
        self._command, self._chance = command, chance
        self._heal: tuple[float, Callable[[], None]] | None = None
        self._next_t = time.monotonic()
        self.struck: list[str] = []

    def act(self) -> None:
        """Whatever is due."""
        now = time.monotonic()
        if self._heal is not None and now > self._heal[0]:
            self._heal[1]()
            self._heal = None
        if self._heal is None and now > self._next_t:
            self._next_t = now + self._chance.uniform(0.1, 1.0)
            self._strike(now)

    def heal(self) -> None:
        """Undo what was not undone yet."""
        if self._heal is not None:
            self._heal[1]()
            self._heal = None

    def _strike(self, now: float) -> None:
        part, number = self._chance.choice(PARTS), self._chance.choice((signal.SIGKILL, signal.SIGSTOP))
        self.struck.append(f"{number.name} {part}")
        found = [each.pid for each in descendants(self._command.process.pid) if each.name == part]
        _signal(found, number)
        if number is signal.SIGSTOP:
            self._heal = now + self._chance.uniform(0.1, 1.5), lambda: _signal(found, signal.SIGCONT)
        elif part == "kage":
            self._command.process.wait()
            self._heal = now + self._chance.uniform(0.1, 0.5), self._command.start


def _signal(pids: list[int], number: signal.Signals) -> None:
    """Some may have ended since they were seen."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class RestlessHost:
    """A guest, its primary and its standby in one. ``seen``: frames that have left so far."""

    def __init__(self, command: SwitchCommand, chance: random.Random) -> None:
        self._command, self._chance = command, chance
        self._term, self._epoch, self._committed, self._frame = 1, 0, 0, 0
        self._epoch_of: dict[int, int] = {}
        self.seen: list[int] = []
        self._primary = self._registered()
        self._primary.wait_registered(WAIT_S)  # a VM that is not protected yet is one like any other
        self._standby = Channel(ADDRESS, None, node="b")

    def _registered(self) -> SwitchClient:
        first = self._committed + 1
        return self._command.host(self._node, VM1, term=self._term, first_epoch=first, seal_s=0.05)

    @property
    def _node(self) -> str:
        return "ab"[self._term % 2 == 0]

    def move(self) -> None:
        """The other host takes over from the last checkpoint."""
        self._primary.close()
        self._term += 1
        for frame, epoch in self._epoch_of.items():
            if epoch > self._committed:
                self._epoch_of[frame] = NEVER
        self._epoch = self._committed
        self._primary = self._registered()

    def turn(self) -> None:
        """One epoch: frames, seal, commit, and the word of it by primary, standby or both."""
        self._epoch += 1
        self._frame += 1
        self._epoch_of[self._frame] = self._epoch
        self._command.here.send(f"h{self._node}", VM1, self._frame)
        epoch = Epoch(self._epoch)
        self._primary.seal(epoch)
        session = self._primary.wait_sealed(epoch, 1.0).session
        while self._standby.take() is not None:
            pass
        self.look()
        self._committed = self._epoch
        if session and self._chance.random() < 0.7:
            self._standby.say(Committed(epoch, session), Term(self._term))
        self._primary.pump()
        self._primary.release(epoch)
        time.sleep(self._chance.uniform(0.0, 0.02))
        self.look()

    def look(self) -> None:
        """What has left was committed by now."""
        for frame in self._command.here.numbers("ca", mac=VM1):
            assert self._epoch_of[frame] <= self._committed, (frame, self._epoch_of[frame], self._committed)
            self.seen.append(frame)

    def close(self) -> None:
        self._primary.close()
        self._standby.close()
