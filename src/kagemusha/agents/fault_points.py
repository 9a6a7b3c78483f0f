"""Fault points for a process that tests and chaos have started with them, and the word that it has some."""

from __future__ import annotations

import os
import sys

from kagemusha.kernel import fault_point


def provide_fault_points() -> None:
    """If the environment asks for them. To be called before processes are forked.

    :raise ConfigError: what it says makes no sense.
    """
    if fault_point.provide(os.environ):
        print("fault points are provided: this worker can be made to fail, for tests only", file=sys.stderr, flush=True)
