"""Numbered questions to the guest's memory witness over UDP, which nobody repeats, and what they show.

The witness (``pattern SIZE RATE PORT``, see ``demo/guest``) answers a datagram with its number and the newest line of
its own: whether its memory is sound, and how many pages it has written so far. That count only grows, so a client that
has seen it at 500 must not, of a question asked later, be told 480: the guest would have gone back behind something
that was let out.

This judges a record; :mod:`kagemusha.chaos.history_load` makes it.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from kagemusha.errors import WireError

NUMBER = struct.Struct("!Q")
_SOUND = re.compile(r"PATTERN-OK passes=(\d+) written_pages=(\d+)\n")
_BAD = re.compile(r"(PATTERN-BAD [ -~]*)\n")


@dataclass(frozen=True, slots=True)
class Condition:
    """What the witness says of itself.

    :ivar damage: the first fault that it has found; empty: none. Then its counters are not told.
    :ivar passes: how often it has read all of its memory.
    :ivar written_pages: how many pages it has written since it was started.
    """

    damage: str
    passes: int
    written_pages: int


def condition_of(line: str) -> Condition:
    """Of the witness's line, with its end.

    :raise WireError: it is none.
    """
    if sound := _SOUND.fullmatch(line):
        return Condition("", int(sound[1]), int(sound[2]))
    if bad := _BAD.fullmatch(line):
        return Condition(bad[1], 0, 0)
    raise WireError(f"not a witness's line: {line[:200]!r}", operation="ask the witness")


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the record: a question was sent, or an answer to it has come. CLOCK_MONOTONIC.

    :ivar answered_ns: None: this notes the sending.
    :ivar line: the answer.
    """

    number: int
    sent_ns: int
    answered_ns: int | None = None
    line: str = ""

    def to_line(self) -> str:
        """JSON, with its end."""
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """To one question."""

    t_ns: int
    condition: Condition


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, and the answers to it as they came: one if all is well."""

    number: int
    sent_ns: int
    answers: tuple[Answer, ...]

    def open_at(self, t_ns: int) -> bool:
        """Sent before, not answered by then."""
        return self.sent_ns <= t_ns and not any(answer.t_ns <= t_ns for answer in self.answers)


def from_lines(lines: Iterable[str]) -> list[Exchange]:
    """Exchanges by number; a last line without an end is left out.

    :raise WireError: a line is none of the record, or an answer's content none of a witness.
    """
    sent: dict[int, int] = {}
    answers: dict[int, list[Answer]] = defaultdict(list)
    for line in lines:
        if not line.endswith("\n"):
            break
        try:
            note = Note(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise WireError(f"not an exchange: {line[:200]!r} ({error})", operation="read exchanges") from error
        sent[note.number] = note.sent_ns
        if note.answered_ns is not None:
            answers[note.number].append(Answer(note.answered_ns, condition_of(note.line)))
    return [Exchange(number, sent[number], tuple(answers[number])) for number in sorted(sent)]


@dataclass(frozen=True, slots=True)
class Account:
    """Of all exchanges of one run.

    :ivar unanswered: questions without any answer: UDP may lose them, so this alone is no fault.
    :ivar doubled: answers beyond the first.
    :ivar in_flight_answered: questions that were open when the fault came and got their answer nevertheless, without
        anybody having asked again; ``in_flight_lost``: those that never did.
    :ivar answered_after: answers that came after the fault: the witness lives.
    :ivar gap_ms: the longest time between two answers, of those that were not over at the fault; None: there is none.
    :ivar went_back: answers whose count is below one seen before their question was asked.
    :ivar damage: what the witness has found, each once.
    """

    asked: int
    unanswered: int
    doubled: int
    in_flight_answered: int
    in_flight_lost: int
    answered_after: int
    gap_ms: float | None
    went_back: int
    damage: tuple[str, ...]


def account(exchanges: Sequence[Exchange], struck_ns: int) -> Account:
    """Sum up a run in which a fault came at ``struck_ns``."""
    in_flight = [each for each in exchanges if each.open_at(struck_ns)]
    answers = [answer for each in exchanges for answer in each.answers]
    return Account(
        asked=len(exchanges),
        unanswered=sum(not each.answers for each in exchanges),
        doubled=sum(max(0, len(each.answers) - 1) for each in exchanges),
        in_flight_answered=sum(bool(each.answers) for each in in_flight),
        in_flight_lost=sum(not each.answers for each in in_flight),
        answered_after=sum(answer.t_ns > struck_ns for answer in answers),
        gap_ms=_longest_gap_ms(answers, struck_ns),
        went_back=_went_back(exchanges),
        damage=tuple(sorted({answer.condition.damage for answer in answers} - {""})),
    )


def _longest_gap_ms(answers: Iterable[Answer], struck_ns: int) -> float | None:
    times = sorted(answer.t_ns for answer in answers)
    return max(((later - earlier) / 1e6 for earlier, later in pairwise(times) if later >= struck_ns), default=None)


def _went_back(exchanges: Iterable[Exchange]) -> int:
    """Only what was seen before the asking counts: answers may overtake each other on their way."""
    found = known = place = 0
    sound = [
        (each.sent_ns, answer.t_ns, answer.condition.written_pages)
        for each in exchanges
        for answer in each.answers
        if not answer.condition.damage
    ]
    arrivals = sorted((t_ns, written) for _, t_ns, written in sound)
    for sent_ns, _, written in sorted(sound):
        while place < len(arrivals) and arrivals[place][0] < sent_ns:
            known = max(known, arrivals[place][1])
            place += 1
        found += written < known
    return found
