"""What a run has shown: nothing here knows which fault it was.

In the host form a frame has left when it comes to the switch. In the switch form held frames come to the switch as soon
as they are sent, and have left when they come to the client.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kagemusha.chaos.cluster import HOSTS
from kagemusha.chaos.form import Form
from kagemusha.chaos.node_process import NodeProcess
from kagemusha.chaos.recorder import CLOCK_SLACK_NS, Epochs, Frame, Passage, Recorder, StandbyRecord, passages
from kagemusha.model.events import CheckpointApplied, EpochCommitted, StateChanged, TakenOver

CLIENT = "client"
"""The record of what the client has received."""
TOLD_LATE_S = 0.1
SESSION_BEFORE_S = 1.0
EXAMPLES, EXAMPLE_LENGTH = 3, 400
_DAMAGE = re.compile(r"PATTERN-BAD.*|Kernel panic.*|Oops:.*|BUG:.*|general protection fault.*|segfault at.*")


def gate_name(host: str) -> str:
    """The record of what the guest has sent on a host."""
    return f"gate-{host}"


def port_name(host: str) -> str:
    """The record of what has come to the switch from a host."""
    return f"port-{host}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts that have to be 0, and some examples of what was counted.

    :ivar leaked: frames that left before the checkpoint of their epoch was committed.
    :ivar double_active: frames of the old instance that came after the first of the new one.
    :ivar damaged: what the guest has printed that an undamaged one does not.
    :ivar frames: how many were judged; 0: nothing is known.
    """

    leaked: int
    double_active: int
    damaged: tuple[str, ...]
    frames: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Course:
    """A run, as it is to be judged.

    :ivar active: was protected by ``standby`` when it began.
    :ivar nodes: all that there were.
    :ivar begin_t: CLOCK_MONOTONIC seconds.
    """

    form: Form
    active: NodeProcess
    standby: NodeProcess
    nodes: Sequence[NodeProcess]
    begin_t: float


def judge(recorder: Recorder, course: Course) -> Verdict:
    """Judge it."""
    consoles = {line for node in course.nodes for line in _DAMAGE.findall(node.console())}
    leaked, frames = _leaked(recorder, course)
    doubled_of = _doubled_at_ports if course.form is Form.HOST else _doubled_at_client
    doubled = [frame for reign in _reigns(course) for frame in doubled_of(recorder, *reign)]
    examples = tuple(str(each)[:EXAMPLE_LENGTH] for each in (*leaked[:EXAMPLES], *doubled[:EXAMPLES]))
    return Verdict(len(leaked), len(doubled), tuple(sorted(consoles)), frames, examples)


# --- output commit ----------------------------------------------------------------------------------------------------


def _leaked(recorder: Recorder, course: Course) -> tuple[list[Passage], int]:
    """Which, of how many. Judged as long as the node was protected all the time, and the frames can only be its own:
    whatever came after that passes by right. It does so a moment before the state is told. Epochs of a later session
    say nothing of these frames.
    """
    active, since_t = course.active, course.begin_t - SESSION_BEFORE_S
    others = (event.t for event in active.of(StateChanged) if event.t > course.begin_t and event.state != "PROTECTED")
    other_t = min(others, default=float("inf"))
    until_ns = (other_t - TOLD_LATE_S) * 1e9
    epochs = [event for event in active.of(EpochCommitted) if event.stop_t > since_t and event.t < other_t]
    if not epochs:
        return [], 0
    record, where = None, port_name(active.host)
    if course.form is Form.SWITCH:
        record, where = _record_of(course.standby, since_t), CLIENT
        until_ns = min(until_ns, _first_elsewhere_ns(recorder, active.host))
    found, _ = passages(recorder.frames(gate_name(active.host)), recorder.frames(where))
    judged = [each for each in found if _is_judged(each, course.begin_t * 1e9, until_ns)]
    return Epochs(epochs, record).unprotected(judged), len(judged)


def _is_judged(each: Passage, since_ns: float, until_ns: float) -> bool:
    return each.departed_ns > since_ns and each.arrived_ns is not None and each.arrived_ns < until_ns


def _record_of(standby: NodeProcess, since_t: float) -> StandbyRecord:
    """What a node that lives on has not told has not been."""
    told = {each.epoch: int(each.whole_t * 1e9) for each in standby.of(CheckpointApplied) if each.t > since_t}
    return StandbyRecord(told, whole=standby.alive)


def _first_elsewhere_ns(recorder: Recorder, host: str) -> float:
    """When another instance was heard at the switch."""
    times = (frame.t_ns for other in HOSTS if other != host for frame in recorder.frames(port_name(other)))
    return min(times, default=float("inf"))


# --- one active VM ----------------------------------------------------------------------------------------------------


def _reigns(course: Course) -> list[tuple[str, float, float]]:
    """Each host that took over, from its decision to that of the next. Nanoseconds."""
    takeovers = sorted(
        (event.decided_t * 1e9, node.host)
        for node in course.nodes
        for event in node.of(TakenOver)
        if event.t > course.begin_t
    )
    ends = (*(decided_ns for decided_ns, _ in takeovers[1:]), float("inf"))
    return [(host, decided_ns, end_ns) for (decided_ns, host), end_ns in zip(takeovers, ends, strict=False)]


def _doubled_at_ports(recorder: Recorder, host: str, decided_ns: float, until_ns: float) -> list[Frame]:
    """After a takeover the switch hears the guest from one host alone, until the next takeover."""
    first_ns = next((f.t_ns for f in recorder.frames(port_name(host)) if f.t_ns > decided_ns), None)
    if first_ns is None:
        return []
    others = (frame for other in HOSTS if other != host for frame in recorder.frames(port_name(other)))
    return [frame for frame in others if first_ns < frame.t_ns < until_ns]


def _doubled_at_client(recorder: Recorder, host: str, decided_ns: float, until_ns: float) -> list[Frame]:
    """After the first frame of the new instance the client gets only what has come to the switch from its host."""
    sent = [frame for frame in recorder.frames(port_name(host)) if frame.t_ns > decided_ns]
    others = {f.content for other in HOSTS if other != host for f in recorder.frames(port_name(other))}
    arrived = [frame for frame in recorder.frames(CLIENT) if decided_ns < frame.t_ns < until_ns]
    return strangers_after_the_first(sent, others, arrived)


def strangers_after_the_first(sent: Sequence[Frame], others: set[bytes], arrived: Sequence[Frame]) -> list[Frame]:
    """Which arrivals, from the first that can only be the sender's on, are none of what it had sent by then.

    :param others: what somebody else has sent; the same from the sender tells nothing about who is heard.
    """
    own = {frame.content for frame in sent} - others
    first_ns = next((frame.t_ns for frame in arrived if frame.content in own), None)
    if first_ns is None:
        return []
    left, waiting, strangers = Counter[bytes](), sorted(sent, key=lambda frame: frame.t_ns, reverse=True), []
    for frame in arrived:
        if frame.t_ns < first_ns:
            continue
        while waiting and waiting[-1].t_ns <= frame.t_ns + CLOCK_SLACK_NS:
            left[waiting.pop().content] += 1
        if left[frame.content]:
            left[frame.content] -= 1
        else:
            strangers.append(frame)
    return strangers
