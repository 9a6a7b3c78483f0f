"""A program in a real guest changes its VM's rules over a real virtio port, and cannot do more than that."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.harness.conditions import wait_until
from tests.harness.rules_service import GUEST, RunningService, running_service
from tests.harness.vm import Hardware, Vm, started

import kagemusha
from kagemusha.guest_tools.kage_rules import PORT_NAME

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("rulebase_guest")]
PROGRAM = Path(kagemusha.__file__).parent / "demo" / "guest" / "kage-rules"


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vm, RunningService]]:
    """A guest with a port, and the service that calls it."""
    folder = tmp_path_factory.mktemp("rules")
    port = folder / "port"
    devices = (
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=rules,path={port},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=rules,name={PORT_NAME}"),
    )
    policy = GUEST.model_copy(update={"max_changes_per_s": 5.0, "max_requests_per_s": 1000.0, "max_cpu_share": 0.05})
    with (
        started(folder / "vm", Hardware(ram_mb=128).command(), *devices) as vm,
        running_service(folder, policy, port) as service,
    ):
        vm.wait_boots(1)
        vm.run(
            f"cat >/bin/kage-rules <<'END-OF-PROGRAM'\n{PROGRAM.read_text()}\nEND-OF-PROGRAM\nchmod +x /bin/kage-rules"
        )
        yield vm, service


def test_the_guests_program_in_a_guest(sides: tuple[Vm, RunningService]) -> None:
    vm, service = sides
    said = vm.run("kage-rules add call 'udp src port 20000' media 30s; echo status $?")
    assert said == "ok version 2; added guest.call\nstatus 0\n"
    assert service.in_force()[-1].endswith(" guest.call")
    said = vm.run("kage-rules add call 'udp src prt 20000' media 30s 2>&1; echo status $?")
    assert said.startswith("kage-rules: rule guest.call, match, column 9: 'prt' is not a word")
    assert said.endswith("status 1\n")
    assert "guest.call media transmit ttl 30s udp src port 20000" in vm.run("kage-rules list").splitlines()
    assert vm.run("kage-rules del call") == "ok version 3; removed guest.call\n"
    assert vm.run("kage-rules add x udp held 30s 2>&1").startswith("kage-rules: rule guest.x, class: class held is not")


def test_one_program_after_another(sides: tuple[Vm, RunningService]) -> None:
    vm, service = sides
    number = service.ask(op="list")["version"]
    said = vm.run("for i in 1 2 3; do kage-rules add call 'udp src port 20000' media 30s; done")
    assert said.count("ok version") == 3
    assert service.ask(op="list")["version"] == number + 3


def test_a_hostile_guest_is_held_up_itself(sides: tuple[Vm, RunningService]) -> None:
    """It writes garbage for as long as it likes; the host is answered all the time, and the port works afterwards."""
    vm, service = sides
    names = [each["name"] for each in service.ask(op="list")["rules"] if each["author"].startswith("host")]
    vm.run(
        "device=$(grep -l rules /sys/class/virtio-ports/*/name); device=/dev/$(basename $(dirname $device));"
        ' (timeout 3 sh -c "exec cat /dev/urandom >$device" 2>/dev/null >/dev/null &)'
    )
    before_s = service.cpu_s()
    for _ in range(20):
        listed = service.ask(op="list")
        assert [each["name"] for each in listed["rules"] if each["author"].startswith("host")] == names
    wait_until(lambda: "version" in vm.run("KAGE_RULES_TIMEOUT=5 kage-rules list"), "the port is free")
    assert vm.run("kage-rules add call udp media 9s").startswith("ok version")
    assert service.cpu_s() - before_s < 5


def test_a_service_that_ends_while_the_guest_floods_is_followed_by_one_that_hears_it(
    sides: tuple[Vm, RunningService],
) -> None:
    """Both directions are full when it is killed, and megabytes of requests wait in the guest's queue."""
    vm, service = sides
    device = "$(basename $(dirname $(grep -l rules /sys/class/virtio-ports/*/name)))"
    vm.run(f"(timeout 6 sh -c 'exec yes {{{{ >/dev/{device}' >/dev/null 2>&1 &)".replace("{{", "{"))
    wait_until(lambda: bool(vm.run("ps | grep '[y]es {'")), "the guest writes")
    service.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: _full(service.folder / "port"), "the port's socket is full")
    service.process.kill()
    service.process.wait()
    with running_service(service.folder, GUEST, service.folder / "port") as again:
        wait_until(
            lambda: "version" in vm.run("KAGE_RULES_TIMEOUT=5 kage-rules list"), "the new service hears the guest"
        )
        assert again.process.poll() is None


def _full(port: Path) -> bool:
    """Whether QEMU can write no more: what it has written stays the same for a while, and is a lot."""
    looks = []
    for _ in range(2):
        listed = subprocess.run(["ss", "-xH"], capture_output=True, text=True, check=True).stdout
        looks.append([line.split()[2:4] for line in listed.splitlines() if str(port) in line])
        time.sleep(0.3)
    return looks[0] == looks[1] and any(int(sent) > 50_000 for _, sent in looks[0])
