"""Clients whose whole history is recorded: registers, lists and counters of one redis, over a few connections.

A process in the client's network namespace, until SIGTERM. Each connection makes one operation after the other and is
kept over a takeover; if it ends all the same, that is counted, the operation in flight has no answer, and a client with
a new number begins on a new connection. Speaks RESP on a bare socket, so that nothing repeats a request unseen.

With ``--witness PORT FILE`` numbered questions go to the guest's memory witness as well, which nobody repeats either.

    python -m kagemusha.chaos.history_load --host H --port P --seed N --file F [--clients 3] [--witness PORT FILE]

Prints one line of JSON at its end, see :class:`Totals`. It records; it does not judge.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from kagemusha.chaos.exchanges import NUMBER, Note
from kagemusha.chaos.history import Action, Operation, to_line

CONNECT_LIMIT_S = 2.0  # and then again
ANSWER_LIMIT_S = 30.0
GAP_S = 0.002
AGAIN_S = 0.2
QUESTION_S = 0.01
OBJECTS = 2
KINDS = ((Action.WRITE, Action.READ), (Action.APPEND, Action.LIST), (Action.INCREMENT, Action.COUNT))
COMMANDS = {
    Action.WRITE: "SET",
    Action.READ: "GET",
    Action.APPEND: "RPUSH",
    Action.LIST: "LRANGE",
    Action.INCREMENT: "INCR",
    Action.COUNT: "GET",
}
_WITH_ARGUMENT = (Action.WRITE, Action.APPEND)
_DATAGRAM_BYTES = 512


class Redis:
    """One connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=CONNECT_LIMIT_S)
        self._socket.settimeout(ANSWER_LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")

    def ask(self, *words: str) -> Any:
        """The answer: text, number, list or None.

        :raise OSError, EOFError: the connection has ended, or no answer came in time.
        :raise ValueError: an error, or no RESP.
        """
        parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
        self._socket.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        return self._answer()

    def end(self) -> None:
        """Wake whoever waits for an answer; there will be none."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free it."""
        self._lines.close()
        self._socket.close()

    def _answer(self) -> Any:
        line = self._lines.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("the connection has ended")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest.decode()
            case b":":
                return int(rest)
            case b"$":
                return self._bulk(int(rest))
            case b"*":
                return [self._answer() for _ in range(int(rest))]
        raise ValueError(f"redis answered {line!r}")

    def _bulk(self, size: int) -> str | None:
        if size < 0:
            return None
        data = self._lines.read(size + 2)
        if len(data) < size + 2:  # half a value is no answer: taken for one it would look like a lost write
            raise EOFError("the connection has ended")
        return data[:size].decode()


def words_of(action: Action, key: str, argument: str | None) -> tuple[str, ...]:
    """The request."""
    more = ("0", "-1") if action is Action.LIST else () if argument is None else (argument,)
    return COMMANDS[action], key, *more


def result_of(action: Action, answer: Any) -> Any:
    """What the answer means for the object."""
    if action is Action.WRITE:
        return None
    return int(answer or 0) if action is Action.COUNT else answer


@dataclass(frozen=True, slots=True)
class Totals:
    """What was done, of all clients.

    :ivar operations: answered ones.
    :ivar resets: connections that ended before we did; ``timeouts``: that gave no answer for ANSWER_LIMIT_S;
        ``refusals``: errors of redis, or what is no RESP. Each cost the connection.
    :ivar questions: datagrams to the witness; ``answers``: from it.
    """

    operations: int
    resets: int
    timeouts: int
    refusals: int
    questions: int
    answers: int


class HistoryLoad:
    """The clients of one process, each on a thread."""

    def __init__(self, host: str, port: int, seed: int, file: int) -> None:
        self._host, self._port, self._seed, self._file = host, port, seed, file
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._numbers = count()
        self._counts = dict.fromkeys(Totals.__dataclass_fields__, 0)
        self._connections: set[Redis] = set()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, clients: int) -> None:
        """Begin with this many connections."""
        for _ in range(clients):
            self._begin(self._client)

    def start_questions(self, port: int, file: int) -> None:
        """Ask the witness behind this UDP port as well."""
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        asking.connect((self._host, port))
        self._begin(lambda: self._questions(asking, file))

    def end(self) -> Totals:
        """Begin nothing more; operations in flight stay without an answer.

        :raise BaseException: whatever has ended a client before its time.
        """
        self._end.set()
        with self._lock:
            for connection in self._connections:
                connection.end()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return Totals(**self._counts)

    def _begin(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again at the end: a client that is gone must not pass unseen
                self._errors.append(error)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def _add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _client(self) -> None:
        while not self._end.is_set():
            try:
                connection = Redis(self._host, self._port)
            except OSError:
                self._end.wait(AGAIN_S)
                continue
            with self._lock:
                self._connections.add(connection)
            why = self._operate(connection, next(self._numbers))
            if why:
                self._add(why)
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _operate(self, connection: Redis, client: int) -> str:
        """One operation after the other; gives the count to which the connection's end belongs, if it was not ours."""
        chance = random.Random(f"{self._seed}/{client}")
        for turn in count(1):
            if self._end.is_set():
                break
            kind = chance.randrange(len(KINDS))
            action = chance.choice(KINDS[kind])
            key = f"history:{self._seed}:{kind}:{chance.randrange(OBJECTS)}"
            argument = f"{client}.{turn}" if action in _WITH_ARGUMENT else None
            invoked_ns = time.monotonic_ns()
            # Noted before it is sent: if this process is killed, it may have happened all the same.
            self._note(Operation(client, key, action, argument, None, invoked_ns, None))
            try:
                result = result_of(action, connection.ask(*words_of(action, key, argument)))
            except (OSError, EOFError, ValueError) as error:
                return "" if self._end.is_set() else _count_of(error)
            self._note(Operation(client, key, action, argument, result, invoked_ns, time.monotonic_ns()))
            self._add("operations")
            self._end.wait(GAP_S)
        return ""

    def _note(self, operation: Operation) -> None:
        os.write(self._file, to_line(operation).encode())

    def _questions(self, asking: socket.socket, file: int) -> None:
        """Send at a steady pace, whatever comes back, and note all that does."""
        sent: dict[int, int] = {}
        begin_ns = time.monotonic_ns()
        with asking:
            for number in count(1):
                if self._end.is_set():
                    return
                sent[number] = time.monotonic_ns()
                os.write(file, Note(number, sent[number]).to_line().encode())
                with suppress(OSError):  # nobody is there (any more): a question like others without an answer
                    asking.send(NUMBER.pack(number))
                    self._add("questions")
                until_ns = begin_ns + int(number * QUESTION_S * 1e9)
                while (left_s := (until_ns - time.monotonic_ns()) / 1e9) > 0:
                    self._take(asking, left_s, sent, file)

    def _take(self, asking: socket.socket, limit_s: float, sent: dict[int, int], file: int) -> None:
        asking.settimeout(limit_s)
        try:
            data = asking.recv(_DATAGRAM_BYTES)
        except TimeoutError:
            return
        except OSError:  # "connection refused" tells of an earlier question; until it is time for the next
            self._end.wait(limit_s)
            return
        (number,) = NUMBER.unpack_from(data)
        if number not in sent:  # meant for somebody who had this port before
            return
        line = data[NUMBER.size :].decode()
        os.write(file, Note(number, sent[number], time.monotonic_ns(), line).to_line().encode())
        self._add("answers")


def _count_of(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "timeouts"
        case ValueError():
            return "refusals"
    return "resets"


def completed(operations: list[Operation]) -> list[Operation]:
    """Each operation once: with its answer, if there was one."""
    last = {(each.client, each.invoked_ns): each for each in operations}
    return list(last.values())


def _created(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)


def main() -> None:
    """Run all clients until SIGTERM."""
    parser = argparse.ArgumentParser(prog="kagemusha.chaos.history_load")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--witness", nargs=2, metavar=("PORT", "FILE"))
    options = parser.parse_args()
    # Blocked in all threads and waited for in this one: it may come at any time, also before the first connection.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    load = HistoryLoad(options.host, options.port, options.seed, _created(options.file))
    load.start(options.clients)
    if options.witness:
        load.start_questions(int(options.witness[0]), _created(options.witness[1]))
    signal.sigwait({signal.SIGTERM})
    print(json.dumps(asdict(load.end())), flush=True)


if __name__ == "__main__":
    main()
