"""What a takeover may send of its predecessor's output: that of committed epochs, in order, and once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagemusha.commit.output import EPOCHS, KeptOutput
from kagemusha.model.ids import Epoch
from kagemusha.wire.output import HeldOutput


def output(epoch: int) -> HeldOutput:
    return HeldOutput(Epoch(epoch), (b"%d first" % epoch, b"%d second" % epoch))


def frames(*epochs: int) -> list[bytes]:
    return [frame for epoch in epochs for frame in output(epoch).frames]


def kept(*epochs: int) -> KeptOutput:
    found = KeptOutput()
    for epoch in epochs:
        found.add(output(epoch))
    return found


@pytest.mark.parametrize(("committed", "sent"), [(4, ()), (5, (5,)), (6, (5, 6)), (7, (5, 6, 7))])
def test_nothing_of_an_epoch_that_is_not_committed(committed: int, sent: tuple[int, ...]) -> None:
    assert kept(5, 6, 7).take(Epoch(committed)) == frames(*sent)


def test_what_has_left_is_not_sent_again() -> None:
    found = kept(5, 6, 7)
    found.left(Epoch(6))
    assert found.take(Epoch(7)) == frames(7)


def test_it_is_sent_once() -> None:
    found = kept(5, 6)
    found.take(Epoch(5))
    assert found.take(Epoch(6)) == []


def test_another_session_has_nothing_of_the_one_before() -> None:
    found = kept(5)
    found.clear()
    assert found.take(Epoch(5)) == []


@given(st.integers(1, 12))
def test_the_oldest_make_room(count: int) -> None:
    assert kept(*range(1, count + 1)).take(Epoch(count)) == frames(*range(max(1, count + 1 - EPOCHS), count + 1))
    left = kept(*range(1, count + 1))
    left.left(Epoch(1))
    for epoch in range(count + 1, count + 9):
        left.add(output(epoch))
    assert len(left.take(Epoch(count + 8))) == 2 * EPOCHS
