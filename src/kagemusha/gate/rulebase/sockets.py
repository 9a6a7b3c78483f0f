"""The host's control socket: made, found stale, refused, asked.

Invariants: only root and the worker's own user can connect: the socket is never there with a wider mode than 0600. And
it is never there before it listens: one that refuses is a dead worker's.
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path

from kagemusha.errors import ConfigError, TransientError
from kagemusha.model.rules import NAME

SUFFIX = ".rules"
_PATH_BYTES_MAX = 107  # sun_path of unix(7), without the end mark
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of struct ucred, SO_PEERCRED in socket(7)


def socket_path(runtime_dir: Path, vm: str) -> Path:
    """Where the rules of a VM are asked for."""
    return runtime_dir / f"{vm}{SUFFIX}"


def listen(path: Path) -> socket.socket:
    """The listening socket; one that a dead worker left behind is replaced.

    :raise ConfigError: the path is too long, something else is there, or the folder cannot be used.
    :raise TransientError: another worker serves it.
    """
    operation = f"listen on {path}"
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise ConfigError(f"the path is longer than {_PATH_BYTES_MAX} bytes", operation=operation, hint="runtime_dir")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    umask = os.umask(0o077)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.umask(0o177)
        made = path.with_name(f".{os.getpid():x}")  # no longer than the path itself
        made.unlink(missing_ok=True)
        listener.bind(os.fspath(made))
        try:
            listener.listen(16)
            _remove_stale(path, operation)
            os.link(made, path)
        finally:
            made.unlink()
    except FileExistsError as error:
        listener.close()
        raise TransientError("another worker begins to serve it", operation=operation) from error
    except OSError as error:
        listener.close()
        raise ConfigError(error.strerror or str(error), operation=operation) from error
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def _remove_stale(path: Path, operation: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("something else is there", operation=operation, hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full: it lives
    raise TransientError("another worker serves this VM's rules", operation=operation, hint="is it running twice?")


def remove(path: Path, inode: int) -> None:
    """Remove the socket unless another worker's stands there by now."""
    with suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def peer_name(connection: socket.socket) -> str:
    """The user at the other end (SO_PEERCRED)."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user_name(uid)


def user_name(uid: int) -> str:
    """A user for the record of changes; ``uid-N`` where it has no name that can be recorded."""
    with suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
        if NAME.fullmatch(name):
            return name
    return f"uid-{uid}"


def dial(path: Path) -> socket.socket | None:
    """A connection to a socket that listens, without waiting; None if none does.

    Used for QEMU's end of the guest's port (``-chardev socket,server=on,wait=off``).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(os.fspath(path))
    except (OSError, ValueError):
        connection.close()
        return None
    return connection
