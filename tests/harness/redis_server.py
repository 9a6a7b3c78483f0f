"""A real redis on this host: Debian's, as in the guest, run from its unpacked package with its own libraries."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.conditions import wait_until
from tests.harness.etcd import free_port

from kagemusha.demo.debian import LOADER, PackageTree, candidates
from kagemusha.demo.image import default_cache_dir


def redis_command(folder: Path) -> list[str]:
    """What starts it, unpacked below ``folder``."""
    tree = PackageTree(folder / "tree", default_cache_dir() / "packages", print)
    tree.add(candidates(("redis-server", "redis-tools")))
    program = tree.program("redis-server")
    libraries = folder / "lib"
    libraries.mkdir()
    for name, path in tree.libraries([program]).items():
        shutil.copy(path, libraries / name)
    (libraries / LOADER).chmod(0o755)
    named = shutil.copy(
        program.path, folder / "redis-server"
    )  # one program with several names, and it looks at its own
    return [str(libraries / LOADER), "--library-path", str(libraries), str(named)]


@contextmanager
def redis_server(command: list[str], port: int | None = None) -> Iterator[int]:
    """A server that keeps nothing; its port."""
    port = port or free_port()
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: _answers(port), "redis answers")
            yield port
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
