"""Huge pages for a test: reserved in the kernel's pool, and given back."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PAGE_BYTES = 2 << 20
_POOL = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def huge_pages(size_bytes: int) -> Iterator[None]:
    """At least this much is free in huge pages of 2 MiB, on top of what was there; else the test is skipped.

    The pool is the machine's, so of tests that run side by side one has it at a time.
    """
    if not _POOL.exists():
        pytest.skip("host lacks: huge pages")
    with (Path(tempfile.gettempdir()) / "kagemusha-huge-pages").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(_POOL.read_text())
        wanted = before + size_bytes // _PAGE_BYTES
        try:
            try:
                _POOL.write_text(str(wanted))
            except OSError as error:
                pytest.skip(f"host lacks: the right to reserve huge pages ({error.strerror})")
            if int(_POOL.read_text()) < wanted:
                pytest.skip(f"host lacks: {size_bytes >> 20} MB of memory for huge pages")
            yield
        finally:
            if int(_POOL.read_text()) != before:
                _POOL.write_text(str(before))
