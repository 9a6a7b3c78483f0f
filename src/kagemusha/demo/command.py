"""``kage demo``: run once, print the table, write the files, and say by the exit code whether it held."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from kagemusha.demo.live import display_for
from kagemusha.demo.options import DemoOptions
from kagemusha.demo.run import run_demo
from kagemusha.demo.table import table_of, verdict
from kagemusha.demo.timeline import draw
from kagemusha.errors import KageError

EXIT_NOT_HELD = 1


def run_demo_command(options: DemoOptions, *, json_file: Path | None, png_file: Path | None) -> int:
    """Run the demo for a person at a terminal; 0 only if it took over without loss and without reset.

    :raise KageError: the demo could not be carried out; tails of all logs have been printed.
    """
    console = Console(highlight=False)
    with carried_out(console):
        report = run_demo(options, display_for(console))
    console.print(table_of(report))
    write_report(console, report.to_json(), json_file)
    if png_file is not None:
        draw(report, png_file)
        console.print(f"timeline  {png_file}", soft_wrap=True)
    if report.record.logs is not None:
        console.print(f"logs      {report.record.logs}", soft_wrap=True)
    console.print(verdict(report))
    return 0 if report.passed else EXIT_NOT_HELD


@contextmanager
def carried_out(console: Console) -> Iterator[None]:
    """A demo runs in the block: a plain `kill` cleans up as Ctrl-C does, and what an error has noted is printed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except KageError as error:
        for note in getattr(error, "__notes__", ()):
            console.print(note, markup=False, soft_wrap=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def write_report(console: Console, content: Mapping[str, Any], json_file: Path | None) -> None:
    """Write it where it is wanted, and say so."""
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=2) + "\n")
        console.print(f"report    {json_file}", soft_wrap=True)
