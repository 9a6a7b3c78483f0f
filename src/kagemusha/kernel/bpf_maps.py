"""eBPF maps: arrays of counters, one copy of each per CPU, added up when they are read.

A program adds to its own CPU's copy without an atomic operation; a reader sees every cell either before or after an
addition. Source: bpf(2), Documentation/bpf/map_array.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kagemusha.kernel.libc import SYS_BPF, syscall

BPF_MAP_CREATE, BPF_MAP_UPDATE, BPF_MAP_LOOKUP_BATCH = 0, 2, 24
BPF_MAP_TYPE_PERCPU_ARRAY = 6
CELLS = 2  # 64-bit counters per entry
ENTRY_BYTES = 8 * CELLS

MAP_ATTRIBUTES = struct.Struct("<IIIIIII16s")  # type, key, value, entries, flags, inner fd, numa node, name
_ELEMENT_ATTRIBUTES = struct.Struct("<I4xQQQ")  # descriptor, key, value, flags
_BATCH_ATTRIBUTES = struct.Struct("<QQQQIIQQ")  # batch in/out, keys, values, count, descriptor, flags of both kinds


def create_map(kind: int, *, value_bytes: int, entries: int, flags: int, name: bytes, key_bytes: int = 4) -> int:
    """Make a map; its descriptor.

    :raise OSError: EPERM; ENOMEM or E2BIG: too large.
    """
    attributes = ctypes.create_string_buffer(
        MAP_ATTRIBUTES.pack(kind, key_bytes, value_bytes, entries, flags, 0, 0, name), MAP_ATTRIBUTES.size
    )
    return syscall(SYS_BPF, BPF_MAP_CREATE, ctypes.addressof(attributes), MAP_ATTRIBUTES.size)


def possible_cpus() -> int:
    """How many copies a per-CPU map keeps: CPUs that could ever be there."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


class PerCpuCounters:
    """An array of entries of two counters each. Loaded programs keep the map alive after ``close``.

    :param entries: how many.
    :ivar fd: of the map, for programs.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._cpus = possible_cpus()
        self.fd = create_map(
            BPF_MAP_TYPE_PERCPU_ARRAY, value_bytes=ENTRY_BYTES, entries=entries, flags=0, name=b"kage_rules"
        )

    def read(self) -> NDArray[np.uint64]:
        """All entries added up over the CPUs, of shape (entries, 2)."""
        values = np.zeros((self.entries, self._cpus, CELLS), np.uint64)
        keys = np.zeros(self.entries, np.uint32)
        position = ctypes.c_uint32()
        attributes = ctypes.create_string_buffer(
            _BATCH_ATTRIBUTES.pack(
                0, ctypes.addressof(position), keys.ctypes.data, values.ctypes.data, self.entries, self.fd, 0, 0
            ),
            _BATCH_ATTRIBUTES.size,
        )
        syscall(SYS_BPF, BPF_MAP_LOOKUP_BATCH, ctypes.addressof(attributes), _BATCH_ATTRIBUTES.size)
        total: NDArray[np.uint64] = values.sum(axis=1, dtype=np.uint64)
        return total

    def clear(self, entries: Iterable[int]) -> None:
        """Set entries to zero. What a program adds at the same moment may be lost."""
        zeros = ctypes.create_string_buffer(ENTRY_BYTES * self._cpus)
        key = ctypes.c_uint32()
        attributes = ctypes.create_string_buffer(
            _ELEMENT_ATTRIBUTES.pack(self.fd, ctypes.addressof(key), ctypes.addressof(zeros), 0),
            _ELEMENT_ATTRIBUTES.size,
        )
        for entry in entries:
            key.value = entry
            syscall(SYS_BPF, BPF_MAP_UPDATE, ctypes.addressof(attributes), _ELEMENT_ATTRIBUTES.size)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)
