"""The two ends of measured TCP traffic: a server beside the "guest", a client that asks for it and takes the time.

    python -m kagemusha.bench.traffic guest [--cpu N]                     prints "ready"
    python -m kagemusha.bench.traffic client --host A --host B [--cpu N]  a connection to each; one JSON line each way

A request on a connection is a letter and a count (:data:`REQUEST`)::

    G  count bytes, guest to client      the time until the last one has come
    P  count bytes, client to guest      the time until the guest's word that it has the last one
    R  count requests of one byte, each answered with one byte: the median of the times to an answer

Connections stay open and their receive buffers have a fixed size, so that neither set-up nor slow start nor tuning is
part of a measurement. All times are the client's (CLOCK_MONOTONIC). Both ends are bound to a processor, since where the
scheduler puts them decides more than any path between them; and to the same one unless told otherwise, so that all
work that a path makes is on the clock, and none of it in the shadow of a wakeup or of the other end.
"""

from __future__ import annotations

import argparse
import enum
import gc
import json
import os
import selectors
import socket
import statistics
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from kagemusha.bench.programs import Program
from kagemusha.demo.scope import Scope

PORT = 5001
REQUEST = struct.Struct("!cQ")
READY = "ready"
_BLOCK_BYTES = 1 << 20
_RECEIVE_BUFFER_BYTES = 1 << 19
_SO_RCVBUFFORCE = 33
_PRIORITY = -10  # as our workers; less of what else the machine does is measured


class Kind(enum.Enum):
    """What is measured."""

    GET = b"G"
    PUT = b"P"
    ROUND_TRIPS = b"R"


def _receive(connection: socket.socket, buffer: memoryview, count: int) -> None:
    """Take exactly ``count`` bytes.

    :raise ConnectionError: the peer ended before.
    """
    while count:
        got = connection.recv_into(buffer, min(count, len(buffer)))
        if not got:
            raise ConnectionError("the connection ended")
        count -= got


def _send(connection: socket.socket, buffer: memoryview, count: int) -> None:
    while count:
        size = min(count, len(buffer))
        connection.sendall(buffer[:size])
        count -= size


def _set_up(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)


def serve(listener: socket.socket) -> None:
    """The guest's end: answer requests until the last client has gone."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        connections: set[socket.socket] = set()
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    _set_up(connection)
                    selector.register(connection, selectors.EVENT_READ)
                    connections.add(connection)
                elif isinstance(key.fileobj, socket.socket) and not _answer(key.fileobj, buffer):
                    selector.unregister(key.fileobj)
                    connections.discard(key.fileobj)
                    key.fileobj.close()
                    if not connections:
                        return


def _answer(connection: socket.socket, buffer: memoryview) -> bool:
    """Whether there was another request; False: the client has gone."""
    if not connection.recv(1, socket.MSG_PEEK):
        return False
    _receive(connection, buffer, REQUEST.size)
    letter, count = REQUEST.unpack_from(buffer)
    match Kind(letter):
        case Kind.GET:
            _send(connection, buffer, count)
        case Kind.PUT:
            _receive(connection, buffer, count)
            connection.sendall(b"\0")
        case Kind.ROUND_TRIPS:
            for _ in range(count):
                connection.recv(1)
                connection.send(b"\0")
    return True


def measure(connection: socket.socket, kind: Kind, count: int, buffer: memoryview) -> int:
    """The client's end of one measurement, in nanoseconds."""
    if kind is Kind.ROUND_TRIPS:
        return _round_trip_ns(connection, count)
    begin = time.perf_counter_ns()
    connection.sendall(REQUEST.pack(kind.value, count))
    if kind is Kind.PUT:
        _send(connection, buffer, count)
        count = 1
    _receive(connection, buffer, count)
    return time.perf_counter_ns() - begin


def _round_trip_ns(connection: socket.socket, count: int) -> int:
    connection.sendall(REQUEST.pack(Kind.ROUND_TRIPS.value, count))
    clock, times = time.perf_counter_ns, []
    for _ in range(count):
        begin = clock()
        connection.send(b"\0")
        connection.recv(1)
        times.append(clock() - begin)
    return int(statistics.median(times))


def ask(hosts: Sequence[str]) -> None:
    """The client's end: measure what standard input says, a line ``[host index, kind, count]`` each."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    connections = [socket.create_connection((host, PORT)) for host in hosts]
    for connection in connections:
        _set_up(connection)
    print(READY, flush=True)
    for line in sys.stdin:
        index, name, count = json.loads(line)
        print(measure(connections[index], Kind[name], count, buffer), flush=True)


class Traffic(Scope):
    """Both processes, in their namespaces, for as long as it is entered.

    :param hosts: the guest's addresses as the client reaches them: one path each.
    :param separate: bind the ends to two different processors, if there are two.
    :param environment: of the processes.
    """

    def __init__(
        self, *, guest: str, client: str, hosts: Sequence[str], environment: dict[str, str], separate: bool = False
    ) -> None:
        self._guest, self._client, self._hosts, self._environment = guest, client, hosts, environment
        self._separate = separate

    def _enter(self, stack: ExitStack) -> None:
        """Start both and connect.

        :raise PeerError: one of them ended.
        """
        cpus = sorted(os.sched_getaffinity(0))
        addresses = [word for host in self._hosts for word in ("--host", host)]
        self._start(stack, self._guest, "guest", "--cpu", str(cpus[0]))
        self._asked = self._start(
            stack,
            self._client,
            "client",
            "--cpu",
            str(cpus[-1 if self._separate else 0]),
            *addresses,
        )

    def _start(self, stack: ExitStack, namespace: str, *words: str) -> Program:
        program = Program(namespace, "kagemusha.bench.traffic", *words, environment=self._environment)
        stack.enter_context(program)
        program.expect(READY)
        return program

    def measure_ns(self, path: int, kind: Kind, count: int) -> int:
        """One measurement on a path, in nanoseconds.

        :raise PeerError: a process ended.
        """
        return int(self._asked.ask(json.dumps([path, kind.name, count])))


def main() -> None:
    """Be one of the ends."""
    parser = argparse.ArgumentParser(prog="kagemusha.bench.traffic")
    parser.add_argument("end", choices=("guest", "client"))
    parser.add_argument("--host", action="append", default=[])
    parser.add_argument("--cpu", type=int)
    given = parser.parse_args()
    os.setpriority(os.PRIO_PROCESS, 0, int(os.environ.get("XN", "0")))
    if given.cpu is not None:
        os.sched_setaffinity(0, {given.cpu})
    gc.disable()
    if given.end == "guest":
        with socket.create_server(("", PORT)) as listener:
            print(READY, flush=True)
            serve(listener)
    else:
        ask(given.host)


if __name__ == "__main__":
    main()
