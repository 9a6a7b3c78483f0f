"""Copies of what a gate holds, and what a successor sends of them: real processes, programs and namespaces."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import xxhash
from tests.harness.gate import PLAIN, WAIT_S, Lab, frame, lab

from kagemusha.gate.namespace import GateMode
from kagemusha.gate.process import GateClient
from kagemusha.kernel.output_channel import OutputChannel
from kagemusha.model.ids import Epoch, Term
from kagemusha.wire.frame import HELD_OUTPUT_BYTES, FrameHeader, FrameType
from kagemusha.wire.messages import decode
from kagemusha.wire.output import HeldOutput

pytestmark = pytest.mark.root
ONE, TWO = Epoch(1), Epoch(2)


@pytest.fixture
def copies() -> Iterator[OutputChannel]:
    with closing(OutputChannel(HELD_OUTPUT_BYTES)) as channel:
        yield channel


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        yield made


def holding(host: Lab, copies: OutputChannel) -> GateClient:
    network = host.build_network()
    gate = host.spawn_gate(copies=copies)
    network.set_mode(GateMode.HOLD)
    return gate


def seal(gate: GateClient, epoch: Epoch) -> None:
    gate.seal(epoch)
    gate.wait_sealed(epoch, WAIT_S)


def copied(copies: OutputChannel) -> HeldOutput:
    """The next copy. It is there a moment after the seal was answered."""
    deadline = time.monotonic() + WAIT_S
    while (copy := copies.take_copy()) is None:
        assert time.monotonic() < deadline, "nothing was copied"
        time.sleep(0.001)
    epoch, payload = copy
    digest = xxhash.xxh3_64_intdigest(payload)
    message = decode(FrameHeader(FrameType.HELD_OUTPUT, Term(1), epoch, 0, len(payload), digest), payload)
    assert isinstance(message, HeldOutput)
    return message


def left(copies: OutputChannel) -> Epoch:
    """The next epoch that has left."""
    assert select.select([copies], (), (), WAIT_S)[0], "nothing was told"
    epoch = copies.take_left()
    assert epoch is not None
    return epoch


def frames(*numbers: int, size: int = 100) -> tuple[bytes, ...]:
    return tuple(PLAIN + frame(number, size) for number in numbers)


def test_each_epoch_s_frames_are_told_at_its_seal_and_when_they_have_left(host: Lab, copies: OutputChannel) -> None:
    """A frame that comes behind the seal is the next epoch's, whenever the copies are looked at."""
    gate = holding(host, copies)
    host.send(1, 2)
    seal(gate, ONE)
    host.send(3)
    seal(gate, TWO)
    gate.statistics()  # answered in order: what is to be told is told
    assert copied(copies) == HeldOutput(ONE, frames(1, 2))
    assert copied(copies) == HeldOutput(TWO, frames(3))
    assert copies.take_copy() is None
    assert copies.take_left() is None
    gate.release(ONE)
    assert left(copies) == ONE
    gate.release(TWO)
    assert left(copies) == TWO
    assert host.numbers(3) == [1, 2, 3]


def test_copies_are_bounded_and_small_answers_are_not_left_out_for_large_ones(host: Lab, copies: OutputChannel) -> None:
    gate = holding(host, copies)
    large = range(1, 101)
    host.send(*large, size=1000)
    host.send(101, 102)
    seal(gate, ONE)
    message = copied(copies)
    assert len(message.payload()) <= HELD_OUTPUT_BYTES
    assert set(message.frames) < {*frames(*large, size=1000), *frames(101, 102)}
    assert message.frames[-2:] == frames(101, 102)


def test_nobody_waits_for_one_that_does_not_read(host: Lab, copies: OutputChannel) -> None:
    gate = holding(host, copies)
    last = 60
    for number in range(1, last + 1):
        host.send(*range(60 * number, 60 * number + 60), size=1000)
        seal(gate, Epoch(number))
    gate.release(Epoch(last))
    assert len(host.numbers(60 * last)) == 60 * last
    epochs = []
    while (copy := copies.take_copy()) is not None:
        epochs.append(copy[0])
    assert 0 < len(epochs) < last
    assert epochs == sorted(epochs)


def test_an_epoch_without_output_has_no_copy(host: Lab, copies: OutputChannel) -> None:
    gate = holding(host, copies)
    seal(gate, ONE)
    gate.release(ONE)
    assert left(copies) == ONE
    assert copies.take_copy() is None


# --- the successor ----------------------------------------------------------------------------------------------------


def test_what_a_predecessor_has_sent_leaves_ahead_of_what_waits(host: Lab) -> None:
    network = host.build_network()
    network.lease.end()
    network.set_mode(GateMode.HOLD)
    host.send(3, 4)
    assert host.numbers() == [], "the predecessor may still be heard"
    assert network.send_ahead(frames(1, 2)) == 2
    host.send(5)
    network.set_mode(GateMode.PASS)
    host.send(6)
    assert host.numbers(6) == [1, 2, 3, 4, 5, 6]


def test_a_frame_that_the_kernel_refuses_does_not_hinder_the_others(host: Lab) -> None:
    network = host.build_network()
    network.set_mode(GateMode.HOLD)
    broken = b"\x01\x7f" + bytes(8) + frame(2)  # segmentation of a kind that there is none
    assert network.send_ahead([*frames(1), broken, *frames(3)]) == 2
    assert host.numbers(2) == [1, 3]
