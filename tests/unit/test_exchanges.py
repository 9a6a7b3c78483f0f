"""What numbered questions to the witness show, on records that are known."""

from __future__ import annotations

import pytest

from kagemusha.chaos.exchanges import Account, Condition, Note, account, condition_of, from_lines
from kagemusha.errors import WireError

MS = 1_000_000


def ok(written: int, passes: int = 1) -> str:
    return f"PATTERN-OK passes={passes} written_pages={written}\n"


BAD = "PATTERN-BAD fault=stale page=3 generation=5 found_page=3 found_generation=4\n"


def record(*exchanges: tuple[float, list[tuple[float, str]]]) -> list[str]:
    """Lines of questions by (sent, answers), in milliseconds."""
    lines = []
    for number, (sent_ms, answers) in enumerate(exchanges, 1):
        sent_ns = int(sent_ms * MS)
        lines.append(Note(number, sent_ns).to_line())
        lines += [Note(number, sent_ns, int(t_ms * MS), line).to_line() for t_ms, line in answers]
    return lines


def judged(*exchanges: tuple[float, list[tuple[float, str]]], struck_ms: float = 0) -> Account:
    return account(from_lines(record(*exchanges)), int(struck_ms * MS))


def test_lines_of_the_witness() -> None:
    assert condition_of(ok(12, 3)) == Condition("", 3, 12)
    assert condition_of(BAD) == Condition(BAD.strip(), 0, 0)
    for text in (
        "",
        "PATTERN-OK passes=1 written_pages=2",
        "PATTERN-OK passes=-1 written_pages=2\n",
        BAD + BAD,
        "hi\n",
    ):
        with pytest.raises(WireError):
            condition_of(text)


def test_a_run_without_anything() -> None:
    assert judged((0, [(1, ok(1))]), (10, [(11, ok(2))]), struck_ms=20) == Account(2, 0, 0, 0, 0, 0, None, 0, ())
    assert account([], 0) == Account(0, 0, 0, 0, 0, 0, None, 0, ())


def test_questions_in_flight_are_told_apart_from_others() -> None:
    found = judged(
        (0, [(5, ok(1))]),
        (10, [(400, ok(2))]),  # in flight, given to the new instance
        (20, []),  # in flight, gone
        (31, []),  # sent after the fault: nobody was there, it is no question in flight
        (500, [(505, ok(3))]),
        struck_ms=30,
    )
    assert (found.in_flight_answered, found.in_flight_lost, found.unanswered) == (1, 1, 2)
    assert (found.gap_ms, found.answered_after) == (395, 2)


def test_an_answer_twice_is_counted_and_in_flight_only_until_its_first() -> None:
    found = judged((0, [(5, ok(1)), (300, ok(9))]), (400, [(405, ok(10))]), struck_ms=30)
    assert (found.doubled, found.in_flight_answered, found.in_flight_lost) == (1, 0, 0)


def test_only_gaps_that_the_fault_can_have_made_count() -> None:
    assert judged((0, [(1, ok(1))]), (90, [(91, ok(2))]), (95, [(96, ok(3))]), struck_ms=92).gap_ms == 5


def test_a_count_that_falls_is_a_guest_that_went_back() -> None:
    assert judged((0, [(5, ok(500))]), (10, [(15, ok(480))])).went_back == 1
    assert judged((0, [(5, ok(500))]), (10, [(15, ok(500))])).went_back == 0

    # what counts is the most that was seen, not the last
    assert judged((0, [(9, ok(20))]), (1, [(10, ok(10))]), (50, [(51, ok(15))])).went_back == 1


def test_answers_that_overtook_each_other_accuse_nobody() -> None:
    assert judged((0, [(9, ok(10))]), (1, [(8, ok(20))])).went_back == 0
    assert judged((0, [(90, ok(10))]), (1, [(8, ok(20))]), (50, [(51, ok(21))])).went_back == 0


def test_damage_is_told_once_and_its_counters_are_not_believed() -> None:
    found = judged((0, [(5, ok(500))]), (10, [(15, BAD)]), (20, [(25, BAD)]))
    assert (found.damage, found.went_back) == ((BAD.strip(),), 0)


def test_a_record_that_was_cut_is_read_and_a_wrong_one_is_not() -> None:
    lines = record((0, [(5, ok(1))]), (10, []))
    assert len(from_lines([*lines, '{"number":3'])) == 2
    for bad in ("nonsense\n", "{}\n", "[]\n", Note(1, 0, 1, "what").to_line()):
        with pytest.raises(WireError):
            from_lines([*lines, bad])
