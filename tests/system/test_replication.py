"""The standby's memory is the primary's, byte for byte, and the guest goes on there: every kind of guest memory.

Each guest runs ``pattern``, which writes all the time and reports the first page that is not what it last wrote.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.harness.demo_run import wait_until
from tests.harness.huge_pages import huge_pages
from tests.harness.replica import Replica, replica
from tests.harness.vm import PATTERN_LINE, Hardware, Vm

from kagemusha.guest.qmp import QmpSession
from kagemusha.model.memory import PAGE_BYTES

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: traces and reads other processes"),
]
RAM_MB = 256
PATTERN = "kage.run=pattern%2032%2040"


def backend(options: str) -> tuple[str, ...]:
    return (
        *("-object", f"memory-backend-memfd,id=ram,size={RAM_MB}M,{options}"),
        *("-machine", "memory-backend=ram"),
    )


PRIVATE, HUGETLB, MEMFD = "256-MB", "hugetlb", ("memfd-private", "memfd-shared")
MEMORIES = {
    PRIVATE: Hardware(ram_mb=RAM_MB, programs=PATTERN),
    "memfd-private": Hardware(ram_mb=RAM_MB, arguments=backend("share=off"), programs=PATTERN),
    "memfd-shared": Hardware(ram_mb=RAM_MB, arguments=backend("share=on"), programs=PATTERN),
    HUGETLB: Hardware(ram_mb=RAM_MB, arguments=backend("hugetlb=on,hugetlbsize=2M"), programs=PATTERN),
}
LARGER = {"4-vcpus": Hardware(vcpus=4, programs=PATTERN), "4-GB": Hardware(ram_mb=4096, programs=PATTERN)}


def has_come(monitor: QmpSession, event: str) -> bool:
    monitor.pump()
    return monitor.take_event(event) is not None


def resident_mb(vm: Vm) -> int:
    """What QEMU has in memory."""
    return int(Path(f"/proc/{vm.pid}/statm").read_text().split()[1]) * PAGE_BYTES >> 20


def start_second_pattern(vm: Vm, size_mb: int) -> None:
    """Have the guest fill memory with a second pattern, which only reads it then."""
    vm.run(f"pattern {size_mb} 0 >/tmp/second 2>&1 </dev/null & echo $! >/tmp/second.pid")


def second_passes(vm: Vm) -> int:
    """How often the second pattern has read its memory, -1 until all of it is written."""
    text = vm.run("cat /tmp/second")
    assert "PATTERN-BAD" not in text, text
    found = PATTERN_LINE.findall(text)
    return int(found[-1][0]) if found else -1


def see_pattern_go_on(pair: Replica) -> None:
    """After the takeover: it reads all of its memory and finds what it wrote before."""
    pair.standby.wait_passes(max(0, pair.primary.passes()) + 1)


def set_balloon(session: QmpSession, size_mb: int) -> None:
    session.execute("balloon", {"value": size_mb << 20})


def balloon_leaves(session: QmpSession, size_mb: int) -> bool:
    return int(session.execute("query-balloon")["actual"]) == size_mb << 20


@pytest.mark.parametrize("kind", [PRIVATE, *(pytest.param(kind, marks=pytest.mark.long) for kind in (HUGETLB, *MEMFD))])
def test_memory_that_a_balloon_takes_and_gives_back(kind: str, tmp_path: Path) -> None:
    """The standby takes over half-way: the balloon's rest is given back there."""
    given_back = kind != PRIVATE
    with (
        huge_pages(2 * RAM_MB << 20) if kind == HUGETLB else nullcontext(),
        replica(tmp_path, MEMORIES[kind]) as pair,
    ):
        pair.run(10)
        pair.assert_identical()
        set_balloon(pair.session, 160)
        pair.run_until(lambda: balloon_leaves(pair.session, 160), "the balloon grows")
        pair.assert_identical(given_back=given_back)
        set_balloon(pair.session, 220)
        pair.run_until(lambda: balloon_leaves(pair.session, 220), "the balloon shrinks")
        start_second_pattern(pair.primary, 50)
        pair.run_until(lambda: second_passes(pair.primary) >= 0, "the guest uses what it got back")
        pair.take_over(given_back=given_back)
        assert balloon_leaves(pair.standby_session, 220)
        set_balloon(pair.standby_session, RAM_MB)
        wait_until(lambda: balloon_leaves(pair.standby_session, RAM_MB), "the balloon is empty")
        second = second_passes(pair.standby)
        see_pattern_go_on(pair)
        wait_until(lambda: second_passes(pair.standby) > second, "the second pattern has read its memory")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in ("4-vcpus", "4-GB")])
def test_larger_guests(kind: str, tmp_path: Path) -> None:
    with replica(tmp_path, LARGER[kind]) as pair:
        pair.run(10)
        pair.assert_identical()
        pair.run(10)
        pair.take_over()
        see_pattern_go_on(pair)


def test_a_guest_that_fills_its_memory_frees_it_and_reboots(tmp_path: Path) -> None:
    """What it frees it gives back to the host, without being asked."""
    reporting = ("-global", "virtio-balloon-device.free-page-reporting=on")
    hardware = Hardware(ram_mb=RAM_MB, arguments=reporting, programs=PATTERN)
    with replica(tmp_path, hardware) as pair, pair.primary.connect(pair.primary.operator) as operator:
        start_second_pattern(pair.primary, 110)
        pair.run_until(lambda: second_passes(pair.primary) >= 0, "the guest fills its memory")
        pair.assert_identical()
        full_mb = resident_mb(pair.primary)
        pair.primary.run("kill $(cat /tmp/second.pid)")
        pair.run_until(lambda: resident_mb(pair.primary) < full_mb - 60, "the guest gives memory back")
        pair.assert_identical()
        pair.primary.run("(sleep 0.1; reboot -f) >/dev/null 2>&1 </dev/null &")
        pair.run_until(lambda: has_come(operator, "RESET"), "the guest resets")
        pair.assert_identical()
        pair.run_until(lambda: pair.primary.boots() == 2, "the guest is up again")
        pair.take_over()
        see_pattern_go_on(pair)
