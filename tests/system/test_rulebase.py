"""The rules service as a process: both sockets, hostile clients, death at any moment, and the commands."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.harness.conditions import wait_until
from tests.harness.rules_service import (
    GUEST,
    VM,
    GuestSide,
    RunningService,
    ask_as_guest,
    running_service,
)

import kagemusha
from kagemusha.errors import PeerError, TransientError
from kagemusha.gate.rulebase import clients
from kagemusha.gate.rulebase.client import RulesClient
from kagemusha.gate.rulebase.service import MAX_HOST_CLIENTS, RulesService
from kagemusha.gate.rulebase.store import RuleStore
from kagemusha.gate.rulebase.version import RuleVersion
from kagemusha.gate.rules.counters import CounterReading
from kagemusha.model.rule_policy import RulesTable
from kagemusha.model.rules import VmAddresses

PACKAGE = Path(kagemusha.__file__).parent
MEDIA = {"name": "x", "match": "udp src port 2000", "class": "media", "ttl": "30s"}
CONFIG = """
state_dir = "{folder}"
runtime_dir = "{folder}"
[vm]
name = "vm1"
command = ["true"]
[network]
bridge = "br0"
[tls]
insecure = true
[primary]
standby = "192.0.2.1:7000"
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with running_service(tmp_path) as running:
        yield running


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[tuple[RunningService, socket.socket, GuestSide]]:
    """A service, and the guest's end of its port."""
    side = GuestSide(tmp_path / "port")
    with running_service(tmp_path, guest_port=tmp_path / "port") as running:
        connection = side.accept()
        yield running, connection, side
        connection.close()
        side.close()


def kage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kagemusha.cli.main", "rules", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "kage.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


# --- the host's socket ------------------------------------------------------------------------------------------------


def test_changes_are_in_force_when_they_are_answered(service: RunningService) -> None:
    assert service.path.stat().st_mode & 0o777 == 0o600
    with service.client() as client:
        answer = client.ask({"op": "add", "rules": [{**MEDIA, "ttl": None}], "before": "fragments"})
        assert (answer["ok"], answer["version"], answer["added"]) == (True, 2, ["x"])
        assert service.in_force()[-1].startswith("2 x fragments")
        refused = client.ask({"op": "del", "names": ["x"], "base": 1})
        assert (refused["ok"], refused["error"]["key"]) == (False, "base")
        for comment, kind in (("fail", "GuestError"), ("break", "BugError")):
            failed = client.ask({"op": "del", "names": ["x"], "comment": comment})
            assert (failed["ok"], failed["error"]["kind"]) == (False, kind)
            assert service.in_force()[-1].startswith("2 x")
        assert client.ask({"op": "rollback", "number": 1})["version"] == 3
        counted = client.ask({"op": "counters"})["counters"]
        assert counted[0] == {"rule": None, "frames": 1, "bytes": 60}
        assert counted[1]["rule"] == "fragments"
        history = client.ask({"op": "history"})["versions"]
        assert [(each["number"], each["comment"]) for each in history] == [
            (3, "rollback to 1"),
            (2, "add x"),
            (1, "the configuration"),
        ]
        assert history[0]["author"] == f"host:{_user()}"
    assert service.stop() == 0
    assert not service.path.exists()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def test_a_detector_speaks_through_the_hosts_socket(service: RunningService) -> None:
    answer = service.ask(op="add", detector="sip", rules=[{**MEDIA, "name": "call-1"}])
    assert answer["added"] == ["flow.call-1"]
    assert service.ask(op="history")["versions"][0]["author"] == "detector:sip"
    assert service.ask(op="set", detector="sip", rules=[])["removed"] == ["flow.call-1"]
    assert service.ask(op="del", detector="sip", names=["flow.call-1"])["error"]["cause"] == "there is no such rule"


def test_rules_lapse_and_subscribers_hear_of_it(service: RunningService) -> None:
    with service.client() as client:
        assert client.ask({"op": "subscribe"})["ok"]
        service.ask(op="add", rules=[{**MEDIA, "ttl": "50ms"}])
        assert [client.next_line()["comment"] for _ in range(2)] == ["add x", "lapsed: x"]
        assert " x" not in service.in_force()[-1]


def test_a_second_service_is_refused_and_a_dead_ones_socket_replaced(service: RunningService, tmp_path: Path) -> None:
    with pytest.raises(TransientError):
        RuleStore(tmp_path, VM, wait_s=0.0)
    service.process.kill()
    service.process.wait()
    assert service.path.exists()
    with running_service(tmp_path) as again:
        wait_until(lambda: _answers(again), "the new service answers")
        assert again.ask(op="list")["version"] == 1


def _answers(service: RunningService) -> bool:
    with suppress(TransientError):
        return bool(service.ask(op="list")["ok"])
    return False


def test_more_connections_than_allowed_are_turned_away(service: RunningService) -> None:
    open_clients = [service.client() for _ in range(MAX_HOST_CLIENTS)]
    assert open_clients[-1].ask({"op": "list"})["ok"]
    with service.client() as late:
        assert late.next_line()["error"]["cause"] == "too many connections"
    for each in open_clients[1:]:
        each.close()
    wait_until(lambda: _admitted(service), "there is room again")
    assert open_clients[0].ask({"op": "list"})["ok"]
    open_clients[0].close()


def _admitted(service: RunningService) -> bool:
    with suppress(PeerError):
        return bool(service.ask(op="list")["ok"])
    return False


def test_who_does_not_read_holds_up_nobody(service: RunningService) -> None:
    with service.client() as lazy:
        lazy._socket.settimeout(0.5)
        with suppress(TimeoutError):
            for _ in range(100_000):
                lazy._socket.sendall(b'{"op":"list"}\n')
        before = service.memory_bytes()
        assert service.ask(op="list")["ok"]
        assert service.memory_bytes() <= before + clients.HOST_OUT_BYTES_MAX


@contextmanager
def service_in_a_thread(
    folder: Path,
    install: Callable[[RuleVersion], None] = lambda _: None,
    counters: Callable[[], CounterReading] | None = None,
) -> Iterator[RulesService]:
    """To look at its statistics, and to lower its bounds beforehand."""
    stopped, stop = os.pipe()
    service = RulesService(
        VM,
        state_dir=folder,
        runtime_dir=folder,
        table=RulesTable(),
        addresses=VmAddresses(),
        install=install,
        counters=counters,
    )
    thread = threading.Thread(target=service.run, args=(stopped,))
    thread.start()
    try:
        wait_until((folder / f"{VM}.rules").exists, "the control socket is there")
        yield service
    finally:
        os.close(stop)
        thread.join()
        os.close(stopped)


def test_a_bug_of_ours_fails_one_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the version in force is put into force again: nobody knows where the request broke off."""
    installed: list[int] = []

    def broken() -> CounterReading:
        raise ZeroDivisionError("a bug")

    with (
        service_in_a_thread(tmp_path, lambda version: installed.append(version.number), broken) as service,
        RulesClient(tmp_path / f"{VM}.rules") as client,
    ):
        assert client.ask({"op": "counters"})["error"]["kind"] == "BugError"
        wait_until(lambda: installed == [1, 1], "the version is put into force again")
        assert client.ask({"op": "list"})["ok"]
        assert service.statistics().bugs == 1
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_a_subscriber_that_does_not_read_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "HOST_OUT_BYTES_MAX", 3000)
    with service_in_a_thread(tmp_path) as service, RulesClient(tmp_path / f"{VM}.rules") as lazy:
        assert lazy.ask({"op": "subscribe"})["ok"]
        with RulesClient(tmp_path / f"{VM}.rules") as busy:
            rules = [{"name": "x", "match": "udp", "class": "held"}]
            while not service.statistics().disconnected:
                assert busy.ask({"op": "add", "rules": rules, "comment": "c" * 500})["ok"]
                assert busy.ask({"op": "del", "names": ["x"], "comment": "c" * 500})["ok"]
        heard = sum(1 for _ in iter(lambda: _event(lazy), None))
        assert 0 < heard < service.statistics().book.version  # type: ignore[union-attr]


def _event(client: RulesClient) -> dict[str, Any] | None:
    """The next event; None at the end of the connection."""
    with suppress(PeerError, ConnectionResetError):
        return client.next_line()
    return None


def test_an_answer_that_is_never_read_ends_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "UNREAD_S", 0.1)
    with service_in_a_thread(tmp_path) as service, RulesClient(tmp_path / f"{VM}.rules") as lazy:
        lazy._socket.settimeout(0.2)
        with suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            for _ in range(100_000):
                lazy._socket.sendall(b'{"op":"list"}\n')
        wait_until(lambda: service.statistics().disconnected == 1, "the client is disconnected")
        with RulesClient(tmp_path / f"{VM}.rules") as other:
            assert other.ask({"op": "list"})["ok"]


# --- the guest's port -------------------------------------------------------------------------------------------------


def test_a_guest_within_its_policy(guest: tuple[RunningService, socket.socket, GuestSide]) -> None:
    running, connection, _ = guest
    answer = ask_as_guest(connection, op="add", by="sipd", rules=[MEDIA])
    assert (answer["id"], answer["text"]) == ("t", "ok version 2; added guest.x")
    assert running.in_force()[-1].endswith(" guest.x")
    assert running.ask(op="history")["versions"][0]["author"] == "guest:sipd"
    listed = ask_as_guest(connection, op="list")
    assert {each["author"] for each in listed["rules"]} == {"host", "guest"}
    assert listed["text"].splitlines()[-1] == "guest.x media transmit ttl 30s udp src port 2000"
    assert ask_as_guest(connection, op="counters")["text"].splitlines() == ["(default) 1 60", "guest.x 2 120"]
    assert ask_as_guest(connection, op="set", rules=[{**MEDIA, "name": "y"}])["removed"] == ["guest.x"]
    assert ask_as_guest(connection, op="del", names=["y"])["removed"] == ["guest.y"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"op": "history"}, "for the host"),
        ({"op": "rollback", "number": 1}, "for the host"),
        ({"op": "subscribe"}, "for the host"),
        ({"op": "list", "version": 1}, "history is the host's"),
        ({"op": "set", "profile": "permissive"}, "a guest sets rules"),
        ({"op": "set", "text": "x"}, "a guest sets rules"),
        ({"op": "del", "names": ["fragments"]}, "no such rule"),
        ({"op": "add", "rules": [MEDIA], "before": "fragments"}, "no rule 'guest.fragments'"),
        ({"op": "add", "rules": [MEDIA], "detector": "sip"}, "no detector"),
        ({"op": "add", "rules": [{**MEDIA, "class": "held"}]}, "not for guests"),
        ({"op": "add", "rules": [{**MEDIA, "class": "none"}]}, "does not exist"),
        ({"op": "add", "rules": [{**MEDIA, "ttl": None}]}, "needs a ttl"),
        ({"op": "add", "rules": [{**MEDIA, "ttl": "61s"}]}, "too long"),
        ({"op": "add", "rules": [{**MEDIA, "ttl": "nan"}]}, "not a duration"),
        ({"op": "add", "rules": [{**MEDIA, "match": "udp portt 1"}]}, "column 5"),
        ({"op": "add", "rules": [{**MEDIA, "match": "port 1 or " * 60 + "port 1"}]}, "instructions"),
        ({"op": "add", "rules": [{**MEDIA, "name": str(n)} for n in range(5)]}, "at most 4"),
        ({"op": "add", "rules": [MEDIA, MEDIA]}, "exists already"),
        ({"op": "add", "rules": [{**MEDIA, "name": "a b"}]}, "name"),
        ({"op": "add", "rules": [MEDIA], "comment": "\x1b[2J"}, "control characters"),
        ({"op": "add", "rules": [MEDIA], "by": "../etc"}, "author"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_a_guest_beyond_its_policy(
    guest: tuple[RunningService, socket.socket, GuestSide], request_: dict[str, Any], words: str
) -> None:
    running, connection, _ = guest
    answer = ask_as_guest(connection, **request_)
    assert not answer["ok"]
    assert words in answer["text"]
    assert len(running.in_force()) == 1
    assert running.ask(op="list")["version"] == 1


def test_a_guest_has_so_many_rules_in_all(guest: tuple[RunningService, socket.socket, GuestSide]) -> None:
    _, connection, _ = guest
    for number in range(4):
        assert ask_as_guest(connection, op="add", rules=[{**MEDIA, "name": str(number)}])["ok"]
    assert "5 rules" in ask_as_guest(connection, op="add", rules=[{**MEDIA, "name": "4"}])["text"]
    assert ask_as_guest(connection, op="add", replace=True, rules=[{**MEDIA, "name": "3"}])["ok"]
    assert ask_as_guest(connection, op="set", rules=[{**MEDIA, "name": f"n{n}"} for n in range(4)])["ok"]


def test_a_guest_that_is_not_allowed(tmp_path: Path) -> None:
    side = GuestSide(tmp_path / "port")
    with running_service(tmp_path, GUEST.model_copy(update={"allowed": False}), tmp_path / "port"):
        connection = side.accept()
        for request in ({"op": "list"}, {"op": "add", "rules": [MEDIA]}, {"op": "check", "rules": [MEDIA]}):
            assert "does not let this guest" in ask_as_guest(connection, **request)["text"]
        connection.close()
    side.close()


def test_changes_beyond_the_rate_are_refused(tmp_path: Path) -> None:
    side = GuestSide(tmp_path / "port")
    policy = GUEST.model_copy(update={"max_changes_per_s": 0.01})
    with running_service(tmp_path, policy, tmp_path / "port") as running:
        connection = side.accept()
        assert ask_as_guest(connection, op="add", rules=[MEDIA])["ok"]
        assert "too many changes" in ask_as_guest(connection, op="del", names=["x"])["text"]
        assert ask_as_guest(connection, op="list")["ok"]
        connection.close()
        connection = side.accept()  # a new connection is no new allowance
        assert "too many changes" in ask_as_guest(connection, op="del", names=["x"])["text"]
        assert running.ask(op="del", names=["guest.x"])["ok"]
        connection.close()
    side.close()


def test_the_port_is_called_again_after_each_break(guest: tuple[RunningService, socket.socket, GuestSide]) -> None:
    _, connection, side = guest
    for _ in range(3):
        assert ask_as_guest(connection, op="list")["ok"]
        connection.sendall(b'{"op": "half a li')
        connection.close()
        connection = side.accept()
    assert ask_as_guest(connection, op="list")["ok"]
    connection.close()


def test_what_a_guest_leaves_unread_is_in_nobodys_way(
    guest: tuple[RunningService, socket.socket, GuestSide],
) -> None:
    """Its next program writes before it reads, behind requests whose answers nobody took."""
    running, connection, _ = guest
    before = running.memory_bytes()
    for number in range(600):  # one by one, or they would be thrown away as a flood
        connection.sendall(b'{"op":"list","by":"n%d"}\n' % number)
    connection.sendall(b'\n{"id":"mine","op":"counters"}\n')
    stale = 0
    while not (line := _line_of(connection)).startswith(b'{"id":"mine","ok":true'):
        stale += len(line)
    assert stale < 1 << 20
    assert running.memory_bytes() < before + (16 << 20)
    assert ask_as_guest(connection, op="list")["ok"]


def test_of_what_is_sent_in_bulk_the_last_line_is_answered(
    guest: tuple[RunningService, socket.socket, GuestSide],
) -> None:
    """Megabytes of valid requests at a few a second would keep the port's next user waiting for hours."""
    _, connection, _ = guest
    flood = b'{"op":"list"}\n' * 150_000 + b'{"id":"mine","op":"counters"}\n'
    sender = threading.Thread(target=connection.sendall, args=(flood,))
    sender.start()
    lines = 0
    while not (line := _line_of(connection)).startswith(b'{"id":"mine","ok":true'):
        lines += b"too much at once" in line
    sender.join()
    assert lines


def _line_of(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        assert byte, "the service broke off"
        line += byte
    return line


def test_a_flood_from_the_guest_costs_a_bounded_share(tmp_path: Path) -> None:
    """Requests whose faults are dear to find, as fast as the port takes them, answers never read in time."""
    side = GuestSide(tmp_path / "port")
    policy = GUEST.model_copy(update={"max_cpu_share": 0.05})
    dear = json.dumps({"op": "check", "rules": [{**MEDIA, "match": "port 1 or " * 60 + "port = ="}]}).encode() + b"\n"
    with running_service(tmp_path, policy, tmp_path / "port") as running, side.accept() as connection:
        connection.setblocking(False)
        began, began_cpu_s, memory = time.monotonic(), running.cpu_s(), running.memory_bytes()
        while time.monotonic() < began + 5:
            _, writable, _ = select.select([], [connection], [], 0.2)
            if writable:
                with suppress(BlockingIOError):
                    connection.send(dear * 50)
            with suppress(BlockingIOError):
                connection.recv(65_536)
        spent_s, took_s = running.cpu_s() - began_cpu_s, time.monotonic() - began
        # the share, its burst, the one request that goes into debt, and as much again for reading and waiting
        assert spent_s <= 2 * (0.05 * took_s + clients.GUEST_CPU_BURST_S + 0.5)
        assert running.memory_bytes() <= memory + (32 << 20)
        assert running.ask(op="list")["ok"]
    side.close()


FUZZ_SECONDS = 2.5


@pytest.mark.parametrize("who", ["guest", "host"])
def test_garbage_harms_nobody(tmp_path: Path, who: str) -> None:
    """Random bytes, cut and broken requests, from either side, while the host asks and is answered."""
    side = GuestSide(tmp_path / "port")
    dice = random.Random(20_260)
    with running_service(tmp_path, guest_port=tmp_path / "port") as running:
        connection = side.accept()
        until = time.monotonic() + FUZZ_SECONDS
        rounds = 0
        while time.monotonic() < until or rounds <= 20:
            rounds += 1
            victim = connection if who == "guest" else socket.socket(socket.AF_UNIX)
            if who == "host":
                victim.connect(os.fspath(running.path))
            victim.settimeout(0.05)
            with suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                for _ in range(dice.randint(1, 6)):
                    victim.sendall(_garbage(dice))
                if dice.random() < 0.5:
                    victim.recv(65_536)
            if who == "host" or dice.random() < 0.3:
                victim.close()
                connection = side.accept() if who == "guest" else connection
            if rounds % 10 == 0:
                assert running.ask(op="list")["ok"]
        listed = running.ask(op="list")
        assert listed["ok"]
        assert running.process.poll() is None
        if who == "guest":
            assert [each["name"] for each in listed["rules"] if not each["author"].startswith("guest")] == _host_names()
        connection.close()
    side.close()


def _host_names() -> list[str]:
    from kagemusha.gate.rules.profiles import load_profile

    return [each.name for each in load_profile("media").rules]


def _garbage(dice: random.Random) -> bytes:
    names = ["a", "b", "\ud800", "", "x" * 99]
    request = dice.choice(
        [
            {
                "op": "add",
                "replace": True,
                "rules": [{**MEDIA, "name": dice.choice(names)}],
            },
            {"op": "del", "names": [dice.choice(["a", "fragments", "\x00", "guest."])]},
            {"op": "list", "offset": dice.choice([0, 10**30, -1])},
            {"op": "set", "rules": [{**MEDIA, "match": dice.choice(["udp", "(" * 900, "vlan " * 150, "\\" * 500])}]},
            {"op": dice.choice(["", None, 3, "subscribe"]), "by": dice.choice(["a", "\x1b", None, []])},
        ]
    )
    line = json.dumps(request).encode() + b"\n"
    kind = dice.randrange(6)
    if kind == 0:
        return dice.randbytes(dice.randint(1, 3000))
    if kind == 1:
        return line[: dice.randrange(len(line))]
    if kind == 2:
        at = dice.randrange(len(line))
        return line[:at] + dice.randbytes(dice.randint(1, 4)) + line[at + 1 :]
    if kind == 3:
        return b"[" * dice.randint(1, 20_000) + b"\n"
    if kind == 4:
        return b"x" * dice.randint(1, 60_000)
    return line


# --- death ------------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_the_version_in_force_is_defined(tmp_path: Path) -> None:
    """A client changes rules all the time; the next service has what was acknowledged, or one version more."""
    dice = random.Random(7)
    known: dict[int, str] = {}
    for round_ in range(8):
        with running_service(tmp_path) as running:
            wait_until(lambda running=running: _answers(running), "the service answers")  # type: ignore[misc]
            listed = running.ask(op="list")
            if known:
                newest = max(known)
                assert listed["version"] in (newest, newest + 1)
                if listed["version"] == newest:
                    assert listed["toml"] == known[newest]
            if round_ % 4 == 3:
                with pytest.raises((PeerError, TransientError)):
                    running.ask(op="set", profile="strict", comment="die")
                known = {listed["version"]: listed["toml"]}
                continue
            killer = threading.Timer(dice.uniform(0.005, 0.15), running.process.send_signal, [signal.SIGKILL])
            known = {listed["version"]: listed["toml"]}
            killer.start()
            with suppress(PeerError, TransientError, OSError), running.client() as client:
                for number in range(10_000):
                    rules = [{"name": f"r{round_}-{number}", "match": f"udp port {number % 9999}", "class": "media"}]
                    answer = client.ask({"op": "add", "rules": rules})
                    assert answer["ok"]
                    known[answer["version"]] = client.ask({"op": "list"})["toml"]
            killer.join()
            running.process.wait()
        with RuleStore(tmp_path, VM) as store:
            numbers = [each.number for each in store.history(10_000)]
            assert numbers == list(range(len(numbers), 0, -1))
            assert store.in_force is not None
            installed = (tmp_path / "in-force").read_text().splitlines()
            assert f"{store.in_force.number} " in {line[: line.index(" ") + 1] for line in installed}
            if store.in_force.number > max(known):
                known[store.in_force.number] = _host_toml(store)


def _host_toml(store: RuleStore) -> str:
    from kagemusha.gate.rulebase.changes import host_text

    assert store.in_force is not None
    return host_text(store.in_force)


def test_killed_while_a_version_is_put_into_force(service: RunningService, tmp_path: Path) -> None:
    service.ask(op="add", rules=[{**MEDIA, "ttl": None}])
    with pytest.raises(PeerError, match="broke off"):
        service.ask(op="del", names=["x"], comment="die")
    service.process.wait()
    with running_service(tmp_path) as again:
        wait_until(lambda: _answers(again), "the new service answers")
        assert again.ask(op="list")["version"] == 2
        assert again.in_force()[-1].endswith(" x")
        assert again.ask(op="del", names=["x"])["version"] == 3


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_commands_ask_the_running_service(service: RunningService, config: Path) -> None:
    done = kage("add", "x", "udp port 2000", "--class", "media", "--config", config, "--before", "fragments")
    assert (done.returncode, done.stdout) == (0, "vm1: version 2 is in force; added x\n")
    done = kage("add", "y", "udp prt 2000", "--class", "media", "-c", config)
    assert done.returncode == 2
    assert done.stderr.startswith("kage:y:5: match: 'prt' is not a word of pcap-filter")
    listed = kage("list", "-c", config).stdout.splitlines()
    assert listed[0].startswith("vm1: version 2, by host:")
    (row,) = (line for line in listed if line.endswith("  x: udp port 2000"))
    assert row.split()[:4] == ["2", "120", "transmit", "media"]
    assert json.loads(kage("list", "-c", config, "--json").stdout)["live"] is True
    rules = config.parent / "rules.toml"
    rules.write_text(kage("list", "-c", config, "--toml").stdout)
    assert kage("set", rules, "-c", config).stdout == "vm1: nothing to change: version 2 has these rules\n"
    rules.write_text(rules.read_text().replace("udp port 2000", "udp port = 2000"))
    done = kage("set", rules, "-c", config)
    assert (done.returncode, done.stderr.split(" match")[0]) == (2, f"{rules}:x:10:")
    assert kage("set", "--profile", "strict", "-c", config).stdout.startswith("vm1: version 3 is in force")
    assert kage("rollback", "2", "-c", config).stdout.startswith("vm1: version 4 is in force; added x")
    assert kage("del", "x", "-c", config, "--comment", "done").returncode == 0
    rows = kage("history", "-c", config, "-n", "2").stdout.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["5", "4"]
    assert rows[1].endswith("done")


def test_without_a_worker_the_change_is_made_in_the_database(tmp_path: Path, config: Path) -> None:
    done = kage("list", "-c", config)
    assert done.returncode == 2
    assert "there is no rule base" in done.stderr
    done = kage("add", "x", "udp port 2000", "--class", "held", "-c", config)
    assert done.stdout == (
        "vm1: version 2 is stored; no worker runs, so it comes into force when the VM is started; added x\n"
    )
    assert "no worker runs" in kage("list", "-c", config).stdout.splitlines()[0]
    assert kage("history", "-c", config).stdout.splitlines()[1].split()[0] == "2"
    assert kage("list", "-c", config, "--vm", "other").returncode == 2
    with RuleStore(tmp_path, VM):
        done = kage("del", "x", "-c", config)
        assert done.returncode == 6
        assert "another process of this host holds them" in done.stderr


# --- the guest's programs ---------------------------------------------------------------------------------------------


@contextmanager
def serial_port(connection: socket.socket) -> Iterator[str]:
    """A character device whose other end is the service: what a virtio port is to a program."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    stopped, stop = os.pipe()

    poller = select.poll()
    for fd in (ours, connection.fileno(), stopped):
        poller.register(fd, select.POLLIN)

    def relay() -> None:
        while True:
            readable = {fd for fd, _ in poller.poll()}
            if stopped in readable:
                return
            if ours in readable:
                connection.sendall(os.read(ours, 4096))
            if connection.fileno() in readable:
                os.write(ours, connection.recv(4096))

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield os.ttyname(theirs)
    finally:
        os.write(stop, b"x")
        thread.join()
        for fd in (ours, theirs, stopped, stop):
            os.close(fd)


PROGRAMS = {
    "python": [sys.executable, str(PACKAGE / "guest_tools" / "kage_rules.py")],
    "shell": ["sh", str(PACKAGE / "demo" / "guest" / "kage-rules")],
    "bash": ["bash", str(PACKAGE / "demo" / "guest" / "kage-rules")],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_guests_program(guest: tuple[RunningService, socket.socket, GuestSide], program: str) -> None:
    running, connection, _ = guest

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "KAGE_RULES_PORT": device}
        command = [*PROGRAMS[program], *(("--port", device) if program == "python" else ()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)

    def add(match: str) -> subprocess.CompletedProcess[str]:
        if program == "python":
            return run("add", "call", match, "--class", "media", "--ttl", "30s", "--replace")
        return run("add", "call", match, "media", "30s")

    with serial_port(connection) as device:
        os.write(os.open(device, os.O_RDWR | os.O_NOCTTY), b'{"op": "half')  # of a program that was killed
        assert add("udp src port 2000").stdout == "ok version 2; added guest.call\n"
        assert add("udp src port 2001").stdout == "ok version 3; added guest.call; removed guest.call\n"
        refused = add('udp "src" \\ port')
        assert refused.returncode == 1
        assert refused.stderr.startswith("kage-rules: rule guest.call, match, column 5: ")
        assert '"' in refused.stderr
        assert run("list").stdout.splitlines()[-1].startswith("guest.call media transmit")
        assert run("counters").stdout.splitlines()[0] == "(default) 1 60"
        assert run("del", "call").stdout == "ok version 4; removed guest.call\n"
        assert run("del", "call").returncode == 1
    assert running.ask(op="history")["versions"][0]["comment"] == "delete guest.call"
    assert run("frobnicate").returncode == 2
