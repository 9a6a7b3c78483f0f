"""The management network of a chaos cluster: cut one way, slow, lossy and whole again, for hosts and switch alike."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest
from tests.harness.commands import wait
from tests.harness.conditions import PATIENCE_S
from tests.harness.gate import unique

from kagemusha.chaos.network import ManagementNetwork
from kagemusha.demo.topology import SWITCH, Topology, management_host
from kagemusha.kernel import netns

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
DELAY_S = 0.1
NO_ANSWER_S = 0.8


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Topology(f"kgm{unique()}"[:12], ("a", "b", "c")) as made:
        yield made


@pytest.fixture
def network(topology: Topology) -> Iterator[ManagementNetwork]:
    made = ManagementNetwork(topology, SWITCH, os.environ)
    yield made
    made.heal()


def reaches(topology: Topology, sender: str, receiver: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether an answer comes, after a frame that was lost with the next try: that nobody listens."""
    namespace = netns.open_named(topology.managed[sender])
    try:
        with netns.entered(namespace), socket.socket() as asking:
            asking.settimeout(patience_s)
            return asking.connect_ex((management_host(receiver), 1)) == errno.ECONNREFUSED
    finally:
        os.close(namespace)


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a", SWITCH)])
def test_what_is_cut_gets_through_again(topology: Topology, network: ManagementNetwork, one: str, other: str) -> None:
    for sender, receiver in ((one, other), (other, one)):
        assert reaches(topology, one, other)
        network.cut(sender, (receiver,))
        assert not reaches(topology, one, other, NO_ANSWER_S)
        assert reaches(topology, one, "c"), "nobody else is cut off"
        network.heal()
        wait(lambda: reaches(topology, one, other), "it gets through")


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a", SWITCH), (SWITCH, "a")])
def test_each_way_takes_longer(topology: Topology, network: ManagementNetwork, one: str, other: str) -> None:
    assert reaches(topology, one, other)
    network.delay(DELAY_S)
    begin_t = time.monotonic()
    assert reaches(topology, one, other)
    assert time.monotonic() - begin_t >= 2 * DELAY_S
    network.heal()
    wait(lambda: reaches(topology, one, other), "it gets through")


def test_what_is_lost_altogether_is_lost_for_the_switch_too(topology: Topology, network: ManagementNetwork) -> None:
    network.lose(1.0)
    assert not reaches(topology, "a", SWITCH, NO_ANSWER_S)
    assert not reaches(topology, SWITCH, "a", NO_ANSWER_S)
    network.heal()
    assert reaches(topology, "a", SWITCH)
