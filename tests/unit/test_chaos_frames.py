"""What the record of frames says about output commit and one active VM, where the standby tells commits to a switch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kagemusha.chaos.judge import strangers_after_the_first
from kagemusha.chaos.recorder import Epochs, Frame, Passage, StandbyRecord, passages
from kagemusha.model.events import EpochCommitted

MS = 1_000_000


def epoch(number: int) -> EpochCommitted:
    """Epoch n stops at 100 n ms, its guest stands 2 ms later, and its primary hears of the commit 40 ms after stop."""
    return EpochCommitted(
        t=0.1 * number + 0.05,
        epoch=number,
        stop_t=0.1 * number,
        pause_us=3000,
        pause_wall_us=5000,
        commit_us=40_000,
        interval_us=100_000,
        dirty_bytes=0,
        zero_bytes=0,
        wire_bytes=0,
        device_bytes=0,
        runs=0,
        held_frames=1,
        held_bytes=60,
    )


EVENTS = [epoch(number) for number in range(1, 6)]
TOLD = {number: 100 * number * MS + 30 * MS for number in range(1, 7)}
WHOLE = StandbyRecord(TOLD, whole=True)


def leaks(departed_ms: float, arrived_ms: float, record: StandbyRecord | None) -> bool:
    """Whether a frame of these times counts as one that left unprotected."""
    found = Passage(int(departed_ms * MS), int(arrived_ms * MS), b"x")
    return bool(Epochs(EVENTS, record).unprotected([found]))


@pytest.mark.parametrize(
    ("departed_ms", "arrived_ms", "leaked"),
    [
        (250, 341, False),  # after the primary has heard
        (250, 331, False),  # the standby has told the switch before
        (250, 329, True),
        (303, 331, True),  # it was sent after the pause: one of the next epoch
        (510, 631, False),  # of an epoch that only the standby knows to be committed
        (510, 629, True),
        (610, 631, False),  # of one behind it: too late to tell which, and never wrongly accused
    ],
)
def test_a_commit_is_the_earlier_of_both_words(departed_ms: float, arrived_ms: float, leaked: bool) -> None:
    assert leaks(departed_ms, arrived_ms, WHOLE) is leaked


def test_without_a_standby_s_word_the_primary_s_counts() -> None:
    assert leaks(250, 331, None)
    assert leaks(510, 900, None)
    assert not leaks(250, 341, None)


def test_a_standby_that_lives_has_told_all() -> None:
    """What came out of an epoch that neither knows to be committed has leaked."""
    record = StandbyRecord({number: TOLD[number] for number in range(1, 6)}, whole=True)
    assert leaks(510, 900, record)


def test_a_standby_that_died_may_have_told_the_switch_more_than_us() -> None:
    record = StandbyRecord({number: TOLD[number] for number in range(1, 4)}, whole=False)
    assert not leaks(350, 410, record)  # epoch 4: its word is missing, and was not said before the guest stood
    assert leaks(350, 401, record)
    assert not leaks(510, 900, record)
    assert leaks(250, 329, record)  # of epoch 3 it has told


def test_a_primary_s_word_that_comes_first_counts() -> None:
    """The standby's clock is read before anybody is told, so this is only for records that are not what they seem."""
    assert replace(WHOLE, committed_ns={3: 900 * MS}).bound_ns(3, 0, 340 * MS) == 340 * MS


def test_an_arrival_is_never_that_of_a_later_departure() -> None:
    """The guest says some things again, to the letter (ARP). What was on its way when a record began is nobody's."""
    early, departed, arrived = Frame(10 * MS, b"arp"), Frame(500 * MS, b"arp"), Frame(530 * MS, b"arp")
    assert passages([departed], [early, arrived]) == ([Passage(500 * MS, 530 * MS, b"arp")], [early])


# --- one active VM ----------------------------------------------------------------------------------------------------


def frames(*found: tuple[int, bytes]) -> list[Frame]:
    return [Frame(t_ns * MS, content) for t_ns, content in found]


def test_the_new_instance_alone_is_heard() -> None:
    sent = frames((10, b"a"), (20, b"b"), (30, b"b"))
    assert strangers_after_the_first(sent, set(), frames((12, b"a"), (35, b"b"), (36, b"b"))) == []


def test_what_came_before_the_first_of_the_new_one_is_the_old_one_s_by_right() -> None:
    assert strangers_after_the_first(frames((10, b"a")), set(), frames((11, b"old"), (12, b"a"))) == []


def test_what_the_new_instance_has_not_sent_is_the_old_one_s() -> None:
    sent = frames((10, b"a"), (30, b"b"))
    found = frames((12, b"a"), (13, b"old"), (14, b"a"))
    assert strangers_after_the_first(sent, set(), found) == found[1:]
    early = frames((12, b"a"), (25, b"b"))  # before it was sent
    assert strangers_after_the_first(sent, set(), early) == early[1:]


def test_a_frame_that_both_have_sent_does_not_say_that_the_new_one_is_heard() -> None:
    """A restored guest may say the same again; the switch drops it while the old one's is still on its way out."""
    sent = frames((10, b"same"), (30, b"new"))
    arrived = frames((12, b"same"), (14, b"old"), (40, b"new"))
    assert strangers_after_the_first(sent, {b"same", b"old"}, arrived) == []


def test_nobody_is_judged_by_a_new_instance_that_was_never_heard() -> None:
    assert strangers_after_the_first([], set(), frames((12, b"old"))) == []
