"""The recorded clients against a real redis: what they note is what happened, also when connections end."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from tests.harness.conditions import wait_until
from tests.harness.etcd import free_port
from tests.harness.redis_server import redis_command, redis_server

from kagemusha.chaos.exchanges import NUMBER, Exchange
from kagemusha.chaos.exchanges import from_lines as exchanges_from_lines
from kagemusha.chaos.history import Action, Operation, from_lines
from kagemusha.chaos.history_load import Redis, Totals, completed
from kagemusha.chaos.linearizability import check

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("history_load")]
SEED = 5


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return redis_command(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def server(command: list[str]) -> Iterator[int]:
    with redis_server(command) as port:
        yield port


@dataclass(frozen=True, slots=True)
class Clients:
    """The process and its records."""

    process: subprocess.Popen[str]
    folder: Path

    def operations(self) -> list[Operation]:
        path = self.folder / "history"
        return completed(list(from_lines(path.read_text().splitlines(keepends=True)))) if path.exists() else []

    def answered(self) -> int:
        return sum(each.returned_ns is not None for each in self.operations())

    def exchanges(self) -> list[Exchange]:
        path = self.folder / "exchanges"
        return exchanges_from_lines(path.read_text().splitlines(keepends=True)) if path.exists() else []

    def end(self) -> Totals:
        self.process.terminate()
        said, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return Totals(**json.loads(said))


@contextmanager
def clients(folder: Path, port: int, *more: str) -> Iterator[Clients]:
    arguments = [sys.executable, "-m", "kagemusha.chaos.history_load", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--seed", str(SEED), "--file", str(folder / "history"), *more]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Clients(process, folder)
        finally:
            process.kill()


class Proxy:
    """Between clients and redis. ``reset`` ends what there is with RST, as a host that knows nothing of it does."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((client, server))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(one, other)).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def reset(self) -> int:
        pairs, self._pairs = self._pairs, []
        for client, server in pairs:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
            # close() alone waits for the thread that still reads; AF_UNSPEC would need ctypes
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)
            client.close()
        return len(pairs)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        self.reset()


def test_what_they_note_is_linearizable_and_complete(tmp_path: Path, server: int) -> None:
    with clients(tmp_path, server) as run:
        wait_until(lambda: run.answered() > 300, "operations are answered")
        totals = run.end()
    history = run.operations()
    assert check(history).linearizable
    assert {each.action for each in history} == set(Action)
    assert len({each.client for each in history}) == 3
    assert totals.operations == run.answered()
    assert (totals.resets, totals.timeouts, totals.refusals, totals.questions) == (0, 0, 0, 0)
    written = [each.argument for each in history if each.argument is not None]
    assert len(written) == len(set(written))


@pytest.mark.parametrize("action", [Action.WRITE, Action.APPEND, Action.INCREMENT])
def test_a_change_behind_their_backs_is_found(tmp_path: Path, server: int, action: Action) -> None:
    """As after a failover that has lost or repeated something."""
    with clients(tmp_path, server) as run, redis.Redis(port=server) as meddler:
        wait_until(lambda: run.answered() > 200, "operations are answered")
        match action:
            case Action.WRITE:

                def ghost_is_seen() -> bool:  # the next write hides it, so it may take more than one
                    meddler.set(f"history:{SEED}:0:0", "a ghost's")
                    return any(each.result == "a ghost's" for each in run.operations())

                wait_until(ghost_is_seen, "a value that nobody wrote is read")
            case Action.APPEND:
                meddler.rpop(f"history:{SEED}:1:0")
            case Action.INCREMENT:
                meddler.decr(f"history:{SEED}:2:0")
        before = run.answered()
        # The next increment or append of that object tells a number that has been told before.
        wait_until(lambda: run.answered() > before + 300, "operations go on")
        run.end()
    assert check(run.operations()).violated is not None


def test_connections_that_end_are_counted_and_replaced(tmp_path: Path, server: int) -> None:
    with closing(Proxy(server)) as proxy, clients(tmp_path, proxy.port) as run:
        wait_until(lambda: run.answered() > 60, "operations are answered")
        assert proxy.reset() == 3
        before = run.answered()
        wait_until(lambda: run.answered() > before + 100, "operations go on")
        totals = run.end()
    history = run.operations()
    assert totals.resets == 3
    assert {each.client for each in history} == set(range(6))
    assert totals.operations == run.answered()
    assert check(history).linearizable


def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path: Path, command: list[str]) -> None:
    port = free_port()
    with clients(tmp_path, port) as run:
        wait_until(lambda: (tmp_path / "history").exists(), "they have begun")
        assert run.operations() == []
        with redis_server(command, port):
            wait_until(lambda: run.answered() > 20, "operations are answered")
            totals = run.end()
    assert totals.resets == 0
    assert check(run.operations()).linearizable


def test_sigterm_ends_them_with_an_operation_in_flight(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, clients(tmp_path, silent.getsockname()[1]) as run:
        wait_until(lambda: len(run.operations()) == 3, "each has sent one")
        totals = run.end()
    assert totals == Totals(0, 0, 0, 0, 0, 0)
    assert [each.returned_ns for each in run.operations()] == [None] * 3


def test_sigkill_leaves_a_record_that_can_be_read(tmp_path: Path, server: int) -> None:
    with clients(tmp_path, server) as run:
        wait_until(lambda: run.answered() > 50, "operations are answered")
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
    assert check(run.operations()).linearizable


@pytest.mark.parametrize("half", [b"$5\r\nab", b"$5\r\nabcde", b"$5\r\nabcde\r", b"$5\r", b"*2\r\n$1\r\na\r\n", b":1"])
def test_half_an_answer_is_none(half: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        asking = Redis("127.0.0.1", server.getsockname()[1])
        connection, _ = server.accept()
        connection.sendall(half)
        connection.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            asking.ask("GET", "k")
        asking.close()
        connection.close()


def test_questions_and_their_answers_are_noted(tmp_path: Path, server: int) -> None:
    """Number 3 is never answered, number 5 twice, and one answer is to nobody's question."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as witness:
        witness.bind(("127.0.0.1", 0))
        witness.settimeout(20)
        port = witness.getsockname()[1]
        with clients(tmp_path, server, "--witness", str(port), str(tmp_path / "exchanges")) as run:
            for _ in range(20):
                data, client = witness.recvfrom(64)
                (number,) = NUMBER.unpack(data)
                line = f"PATTERN-OK passes=0 written_pages={number}\n".encode()
                for _ in range({3: 0, 5: 2}.get(number, 1)):
                    witness.sendto(data + line, client)
                witness.sendto(NUMBER.pack(10**9) + line, client)
            wait_until(lambda: sum(len(each.answers) for each in run.exchanges()) >= 20, "answers are noted")
            totals = run.end()
    found = {each.number: each for each in run.exchanges()}
    assert [len(found[number].answers) for number in range(1, 7)] == [1, 1, 0, 1, 2, 1]
    assert all(answer.t_ns >= each.sent_ns for each in found.values() for answer in each.answers)
    assert totals.answers == 20
    assert totals.questions == len(found)


def test_a_witness_that_is_not_there_leaves_questions_without_answers(tmp_path: Path, server: int) -> None:
    with clients(tmp_path, server, "--witness", str(free_port()), str(tmp_path / "exchanges")) as run:
        wait_until(lambda: len(run.exchanges()) > 10, "questions are sent all the same")
        totals = run.end()
    assert totals.answers == 0
    assert os.path.getsize(tmp_path / "history") > 0
