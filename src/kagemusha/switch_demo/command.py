"""``kage demo --topology switch``: run once, print the tables, and say by the exit code whether it held."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kagemusha.demo.command import EXIT_NOT_HELD, carried_out, write_report
from kagemusha.demo.live import display_for
from kagemusha.switch_demo.options import SwitchDemoOptions
from kagemusha.switch_demo.run import run_switch_demo
from kagemusha.switch_demo.table import client_table, verdict, vms_table


def run_switch_demo_command(options: SwitchDemoOptions, *, json_file: Path | None) -> int:
    """Run the demo for a person at a terminal; 0 only if nothing was lost, leaked or dropped.

    :raise KageError: the demo could not be carried out; tails of all logs have been printed.
    """
    console = Console(highlight=False)
    with carried_out(console):
        report = run_switch_demo(options, display_for(console))
    console.print(vms_table(report))
    console.print(client_table(report))
    write_report(console, report.to_json(), json_file)
    logs = report.victim.report.record.logs
    if logs is not None:
        console.print(f"logs      {logs}", soft_wrap=True)
    console.print(verdict(report))
    return 0 if report.passed else EXIT_NOT_HELD
