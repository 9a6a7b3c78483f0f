"""The control socket's beginning."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

from kagemusha.gate.rulebase.sockets import listen


def test_the_socket_is_there_only_while_it_listens(tmp_path: Path) -> None:
    """Or a client, and another worker, would take a beginning one for dead."""
    path, done = tmp_path / "vm1.rules", threading.Event()
    refused: list[OSError] = []
    listening = ExitStack()

    def ask() -> None:
        while not done.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
                try:
                    client.connect(os.fspath(path))
                except (FileNotFoundError, BlockingIOError):
                    pass
                except OSError as error:
                    refused.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(300):
            listening.enter_context(listen(path))
            path.unlink()
    finally:
        done.set()
        thread.join()
        listening.close()
    assert refused == []
