"""Watching a real gate: what the socket at the tap sees, what reports say of it, and how the command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw
from tests.harness.conditions import PATIENCE_S, wait_until
from tests.harness.gate import Lab, frame, ip, lab
from tests.harness.rule_frames import FRAMES, PEER_MAC, VM_IP, VM_IP6, VM_MAC
from tests.harness.watched import WatchedVm, watched_vm

from kagemusha.errors import ConfigError, PeerError
from kagemusha.gate.rules.matcher import bind
from kagemusha.gate.rules.profiles import load_profile
from kagemusha.gate.watch import session
from kagemusha.gate.watch.flow_key import flow_of, name_of
from kagemusha.gate.watch.session import Watch, WatchReport, open_tap_of
from kagemusha.kernel import netns
from kagemusha.kernel.packet_socket import PacketSocket
from kagemusha.model.rules import Action

pytestmark = pytest.mark.root
PROFILE = "telephony"
SENT = [each for each in FRAMES.values() if len(each) >= 14]  # a tap takes nothing shorter


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab() as made:
        yield made


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[WatchedVm]:
    with watched_vm(tmp_path, mac=VM_MAC, ips=(VM_IP, VM_IP6), profile=PROFILE) as made:
        yield made


# --- the socket -------------------------------------------------------------------------------------------------------


def _all(tap: PacketSocket) -> list[bytes]:
    frames: list[bytes] = []
    while (received := tap.receive()) is not None:
        frames.append(bytes(received))
    return frames


def test_the_socket_sees_whole_frames_that_the_gate_redirects(vm: WatchedVm) -> None:
    """Those that are held and those that are sent, tags and all, exactly as the guest sent them."""
    sent = [*SENT, frame(1), frame(2, 1500)]
    with open_tap_of(vm.vm) as tap:
        vm.send(*sent)
        assert _all(tap) == sent


@pytest.mark.parametrize(
    "tags",
    [
        Dot1Q(vlan=5),
        Dot1Q(vlan=0, prio=7),
        Dot1Q(vlan=4095, prio=5, dei=1),
        Dot1AD(vlan=100) / Dot1Q(vlan=5),
        Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3),
    ],
    ids=lambda tags: tags.summary(),
)
def test_tags_are_put_back_as_they_were(vm: WatchedVm, tags: Any) -> None:
    sent = bytes(Ether(src=VM_MAC, dst=PEER_MAC) / tags / IP(src=VM_IP, dst="10.0.0.9") / UDP() / Raw(b"x" * 64))
    with open_tap_of(vm.vm) as tap:
        vm.send(sent)
        assert _all(tap) == [sent]


def test_the_socket_does_not_see_what_the_guest_is_sent(vm: WatchedVm) -> None:
    with open_tap_of(vm.vm) as tap:
        vm.host.send_in(frame(7))
        assert vm.host.network is not None
        tap_fd = vm.host.network.tap_fd
        wait_until(lambda: _read_own(tap_fd), "the frame came in")
        assert _all(tap) == []
        assert tap.statistics().queued == 0


def _read_own(tap_fd: int) -> bool:
    try:
        return bool(os.read(tap_fd, 1 << 16))
    except BlockingIOError:
        return False


def test_what_is_beyond_the_queue_is_missed_and_counted(vm: WatchedVm) -> None:
    """A watcher that does not read costs the kernel no more than its queue."""
    count, size = 6000, 1500
    namespace = netns.open_named(vm.host.network.name if vm.host.network else "")
    try:
        with netns.entered(namespace):
            tap = PacketSocket("vm0", queue_bytes=1 << 20)
    finally:
        os.close(namespace)
    with tap:
        vm.send(*(frame(number, size) for number in range(count)))
        statistics = tap.statistics()
        assert statistics.queued + statistics.missed == count
        assert 100 < statistics.queued <= (1 << 20) / size
        assert len(_all(tap)) == statistics.queued
        assert tap.statistics() == statistics


@pytest.mark.parametrize("one_in", [2, 16])
def test_sampling_takes_its_share(vm: WatchedVm, one_in: int) -> None:
    count = 4000
    with open_tap_of(vm.vm) as tap:
        tap.take_one_in(one_in)
        vm.send(*(frame(number) for number in range(count)))
        taken = len(_all(tap))
        expected, spread = count / one_in, (count / one_in) ** 0.5
        assert abs(taken - expected) < 6 * spread
        assert tap.statistics().queued == taken
        tap.take_one_in(1)
        vm.send(*(frame(number) for number in range(100)))
        assert len(_all(tap)) == 100


def test_a_share_is_at_least_one(vm: WatchedVm) -> None:
    with open_tap_of(vm.vm) as tap, pytest.raises(ValueError, match="one in 0"):
        tap.take_one_in(0)


def test_no_such_device(host: Lab) -> None:
    with pytest.raises(OSError, match="No such device"):
        PacketSocket("none0", queue_bytes=1 << 20)


def test_a_device_that_is_down(host: Lab) -> None:
    ip("link", "set", "client", "down")
    with pytest.raises(OSError, match="client"):
        PacketSocket("client", queue_bytes=1 << 20)


# --- the session ------------------------------------------------------------------------------------------------------


def _until_seen(watch: Watch, frames: int) -> list[WatchReport]:
    """Reports until so many frames are in them."""
    reports: list[WatchReport] = []
    for report in watch.reports(0.1, top=100):
        reports.append(report)
        if sum(each.flows.frames for each in reports) >= frames:
            return reports
        assert report.number * 0.1 < PATIENCE_S, "the frames are not seen"
    raise AssertionError


def test_each_flow_has_the_rule_that_the_kernel_counts(vm: WatchedVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CPU_SHARE", 100)  # a busy machine's time is not its own
    bound = bind(load_profile(PROFILE), vm.addresses)
    with vm.watch() as watch:
        vm.send(*SENT)
        reports = _until_seen(watch, len(SENT))
    seen: dict[str | None, float] = {}
    for report in reports:
        for load in report.flows.flows:
            for met, share in load.met:
                seen[met.rule] = seen.get(met.rule, 0.0) + share * load.frames
    counted: dict[str | None, int] = {}
    for report in reports:
        for rule in report.rules or ():
            counted[rule.met.rule] = counted.get(rule.met.rule, 0) + rule.since.frames
    expected: dict[str | None, int] = {}
    for data in SENT:
        verdict = bound.classify(data)
        name = verdict.rule.name if verdict.rule else None
        expected[name] = expected.get(name, 0) + 1
    assert {name: count for name, count in counted.items() if count} == expected
    assert {name: round(count, 6) for name, count in seen.items()} == expected
    assert all(report.sampling.level == 0 and not report.missed for report in reports)


def test_a_change_of_the_rules_is_followed(vm: WatchedVm) -> None:
    data = FRAMES["sip-udp"]
    name = str(name_of(flow_of(memoryview(data))))
    with vm.watch() as watch:
        vm.send(data)
        (load,) = _until_seen(watch, 1)[-1].flows.flows
        assert load.met[0][0].action is Action.HOLD
        first = next(each for each in vm.ask(op="list")["classes"] if each["action"] == "transmit")["name"]
        rule = {"name": "open", "match": "udp port 5060", "class": first}
        before = vm.ask(op="list")["rules"][0]["name"]
        answer = vm.ask(op="add", rules=[rule], before=before)
        vm.send(data)
        report = _until_seen(watch, 1)[-1]
    assert report.version == answer["version"]
    (load,) = report.flows.flows
    assert str(name_of(load.key)) == name
    assert [(met.rule, met.action, share) for met, share in load.met] == [("open", Action.TRANSMIT, 1.0)]
    assert next(each for each in report.rules or () if each.met.rule == "open").total.frames == 1


def test_watching_changes_nothing_for_the_guest(vm: WatchedVm) -> None:
    """What the gate sends at once still arrives, in order and as it was."""
    media = [FRAMES["rtp"]] * 500
    with vm.watch() as watch:
        listener = type(vm.host.client)("client", protocol=3)
        try:
            vm.send(*media)
            arrived = listener.wait_for(len(media))
        finally:
            listener.close()
        assert arrived == media
        assert _until_seen(watch, len(media))[-1].flows.other_frames == 0


def test_more_than_there_is_time_for_is_sampled_and_estimated(vm: WatchedVm) -> None:
    """A flood that the watch is too slow for: it says so, and its estimate stays near the kernel's count."""
    data = FRAMES["rtp"]
    with vm.watch() as watch:
        seen = estimated = 0
        levels = set()
        for report in watch.reports(0.2, top=10):
            vm.send(*[data] * 20_000)
            levels.add(report.sampling.level)
            seen += sum(each.since.frames for each in report.rules or ())
            estimated += report.flows.frames + report.missed
            if report.number == 8:
                break
        for report in watch.reports(0.2, top=10):
            seen += sum(each.since.frames for each in report.rules or ())
            estimated += report.flows.frames + report.missed
            if report.number == 4:
                break
    assert max(levels) > 0
    assert seen == 160_000
    assert abs(estimated - seen) < 0.2 * seen


def test_the_end_of_the_protection_ends_the_watch(vm: WatchedVm) -> None:
    with vm.watch() as watch:
        reports = watch.reports(0.1, top=1)
        next(reports)
        assert vm.host.network is not None
        vm.host.close()
        vm.host.network = vm.host.gate = None
        with pytest.raises(PeerError, match="vm0 is gone"):
            next(reports)


def test_a_vm_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match="no network namespace kg-nobody-primary"):
        open_tap_of("nobody")


# --- the command ------------------------------------------------------------------------------------------------------


def _command(vm: WatchedVm, *arguments: str) -> subprocess.Popen[str]:
    config = vm.folder / "kage.toml"
    config.write_text(
        f'state_dir = "{vm.folder}"\nruntime_dir = "{vm.folder}"\n'
        f'[vm]\nname = "{vm.vm}"\ncommand = ["qemu-system-x86_64"]\n'
        f'[network]\nmac = "{VM_MAC}"\nbridge = "br0"\n[rules]\nprofile = "{PROFILE}"\nvm_ips = ["{VM_IP}"]\n'
        '[tls]\ninsecure = true\n[primary]\nstandby = "192.0.2.2:7000"\n'
    )
    command = [sys.executable, "-m", "kagemusha.cli.main", "rules", "watch", "-c", str(config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_an_object_for_each_interval(vm: WatchedVm, signal_number: signal.Signals) -> None:
    with _command(vm, "--json", "--interval", "0.2") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert (first["vm"], first["number"], first["version"]) == (vm.vm, 1, 1)
        assert {rule["rule"] for rule in first["rules"]} >= {"fragments", None}
        vm.send(FRAMES["rtp"], FRAMES["arp-reply"])
        flows: list[dict[str, Any]] = []
        while len(flows) < 2:
            flows += json.loads(process.stdout.readline())["flows"]
        assert {each["rules"][0]["action"] for each in flows} == {"hold", "transmit"}
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        process.send_signal(signal_number)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_command_ends_after_so_many_intervals(vm: WatchedVm) -> None:
    with _command(vm, "--count", "2", "--interval", "0.1") as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")
    assert out.count("all frames counted and classified") == 2
    assert f"{vm.vm}, rules version 1: 0 frames/s" in out


def test_the_command_ends_with_its_reader(vm: WatchedVm) -> None:
    process = _command(vm, "--json", "--interval", "0.1")
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0


def test_the_command_without_a_worker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kagemusha.cli.main", "rules", "watch", "--vm", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 6
    assert "no worker serves VM nobody" in done.stderr
