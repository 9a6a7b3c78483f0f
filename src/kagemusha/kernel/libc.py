"""Raw system calls and libc functions with errno turned into OSError.

x86-64 only: the system call numbers, the register layout of the injection and QEMU's device state are all of that
architecture.
"""

from __future__ import annotations

import ctypes
import os
import platform

from kagemusha.errors import UnsupportedError

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

SYS_BPF = 321
SYS_USERFAULTFD = 323
SYS_PIDFD_GETFD = 438


def require_x86_64() -> None:
    """:raise UnsupportedError: another architecture."""
    if platform.machine() != "x86_64":
        raise UnsupportedError(f"only x86-64 hosts are supported, this one is {platform.machine()}")


def syscall(number: int, *arguments: int) -> int:
    """Make a system call with integer (or address) arguments; the caller keeps buffers alive.

    :raise OSError: with the errno.
    """
    result = int(LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
