"""What an onlooker sees, and what must never be seen: the invariants, written from outside.

Nothing here looks at a machine's state. A guest has a progress: the number of frames that it has sent. A checkpoint
is a guest and its progress, so it is known for each frame whether a takeover would take it back.

* I1: a held frame leaves only when a standby wholly holds a checkpoint that contains it; at a takeover nothing has left
  that the checkpoint does not contain, and nothing such leaves later.
* I2: never do two guests both reach the network, and no older instance is heard after a newer one.
* I3: what is brought to life is exactly one whole committed checkpoint, memory and devices of the same moment.
* I4: our own decisions never end the last copy of a guest.
* A recorded term never goes back, and no two nodes run a guest in the same term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kagemusha.protocol.simulate.arbiter import Holder
from kagemusha.protocol.simulate.guest import Guest


class Violation(AssertionError):
    """An invariant was broken."""


class Way(Protocol):
    """A node's way to the network: its gate, or its line to the switch."""

    guest: Guest | None

    def reaches(self) -> bool:
        """Whether the guest's frames may reach the network now, if it sends some."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint: the guest's progress as its memory, and as its devices, say.

    ``session``: at the switch, in which its commit may be told there; 0: in none.
    """

    guest: Guest
    epoch: int
    memory: int
    devices: int
    session: int = 0


class Judge:
    """Watches frames, checkpoints and terms. ``relaxed``: the operator allowed both to go on (I1, I2 are void)."""

    def __init__(self, *, relaxed: bool) -> None:
        self.relaxed = relaxed
        self.gates: list[Way] = []
        self.owner: tuple[int, Holder] | None = None
        self.heard: Guest | None = None
        self.held_whole: dict[int, int] = {}
        self.cap: dict[int, int] = {}
        self.runs: dict[int, int] = {}
        self.given_up: dict[int, str] = {}
        self.frames_left = 0
        self.takeovers = 0

    # --- frames -------------------------------------------------------------------------------------------------

    def frame_left(self, guest: Guest, progress: int, *, held: bool, transmit: bool) -> None:
        """A frame is on the network. ``held``: it had waited for a commit."""
        self.frames_left += 1
        if self.relaxed:
            return
        if self.owner is not None and self.owner[1] != (guest.node, guest.qemu):
            raise Violation(f"I2: {guest} is heard, and {self.owner[1]} was told to have term {self.owner[0]}")
        if self.heard is not guest:
            if self.heard is not None and guest.number < self.heard.number:
                raise Violation(f"I2: {guest} is heard after {self.heard}")
            self.heard = guest
        if held and progress > self.held_whole.get(guest.number, 0):
            raise Violation(f"I1: frame {progress} of {guest} left, and no standby holds it")
        if transmit:
            return
        if progress > self.cap.get(guest.number, progress):
            raise Violation(f"I1: frame {progress} of {guest} left after a takeover that takes it back")
        guest.left = max(guest.left, progress)

    def look(self) -> None:
        """After every step: how many guests reach the network now?"""
        if self.relaxed:
            return
        reaching: Way | None = None
        for gate in self.gates:
            if gate.reaches():
                if reaching is not None:
                    raise Violation(f"I2: both {reaching.guest} and {gate.guest} reach the network")
                reaching = gate

    # --- checkpoints --------------------------------------------------------------------------------------------

    def received_whole(self, snapshot: Snapshot) -> None:
        """A standby holds all of this checkpoint."""
        if snapshot.memory != snapshot.devices:
            raise Violation(f"I3: {snapshot} is of two moments")
        number = snapshot.guest.number
        self.given_up.pop(number, None)
        self.held_whole[number] = max(self.held_whole.get(number, 0), snapshot.memory)

    def activated(self, memory: Snapshot | None, committed: Snapshot | None, applying: int) -> None:
        """What is in QEMU's memory comes to life, and this is the last acknowledged checkpoint."""
        if memory is None or memory is not committed or applying:
            raise Violation(f"I3: {memory} comes to life, committed is {committed}")

    def taken_over(self, memory: Snapshot) -> None:
        """What came to life of this may be heard from now on."""
        self.takeovers += 1
        if self.relaxed:
            return
        guest = memory.guest
        self.given_up.pop(guest.number, None)
        if guest.left > memory.memory:
            raise Violation(f"I1: frame {guest.left} of {guest} has left, the takeover is from {memory.memory}")
        self.cap[guest.number] = min(self.cap.get(guest.number, memory.memory), memory.memory)

    def given(self, term: int, holder: Holder) -> None:
        """A switch says who has a term: from now on nobody else is heard."""
        if self.owner is None or term >= self.owner[0]:
            self.owner = term, holder

    # --- terms --------------------------------------------------------------------------------------------------

    def runs_in(self, term: int, node: int) -> None:
        """A guest runs on this node in this term."""
        if self.runs.setdefault(term, node) != node and not self.relaxed:
            raise Violation(f"term {term}: guests run on node {self.runs[term]} and on node {node}")

    def recorded(self, node: int, before: int, after: int) -> None:
        """A node's durable term changes."""
        if after < before:
            raise Violation(f"node {node}: the recorded term goes back from {before} to {after}")

    def killed(self, guest: Guest, why: str, copies: list[Guest]) -> None:
        """We ended a guest ourselves. ``copies``: of which guests somebody holds a checkpoint or runs an heir."""
        if self.relaxed or any(copy is guest for copy in copies):
            return
        reason = self.given_up.get(guest.number)
        if reason is not None:
            raise Violation(f"I4: {guest} was killed ({why}); its last copy had been given up: {reason}")
