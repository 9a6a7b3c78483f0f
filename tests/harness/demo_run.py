"""Demo runs as building blocks of system tests: its phases one by one, with the logs in any failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kagemusha.demo.options import DemoOptions
from kagemusha.demo.run import DemoRun


@contextmanager
def protected_run(options: DemoOptions) -> Iterator[DemoRun]:
    """A run whose guest is protected; a failure inside gets the tails of all logs as a note."""
    with DemoRun(options) as run:
        try:
            run.protect()
            yield run
        except BaseException as error:
            error.add_note(run.directory.tails())
            raise


@contextmanager
def loaded_run(options: DemoOptions) -> Iterator[DemoRun]:
    """A protected run whose client is writing."""
    with protected_run(options) as run:
        run.start_client()
        yield run


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Poll until ``condition`` holds; fails the test with ``what`` when the time is over."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
