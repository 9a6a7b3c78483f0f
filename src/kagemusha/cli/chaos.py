"""``kage chaos``: faults on real nodes with a real guest; exit code 1 if anything happened that must not."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kagemusha.chaos.form import Form
from kagemusha.errors import ConfigError


def chaos(
    runs: Annotated[int, typer.Option(help="How many faults, one after the other.", min=1, max=100_000)] = 20,
    seed: Annotated[int | None, typer.Option(help="Decides faults and moments.")] = None,
    faults: Annotated[
        str | None,
        typer.Option(help="Only faults with one of these words, or named so; separated by commas.", metavar="WORDS"),
    ] = None,
    form: Annotated[Form, typer.Option(help="Frames are held on each host, or at the switch.")] = Form.HOST,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results.", metavar="FILE")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep logs and event files.")] = False,
    show: Annotated[
        bool, typer.Option("--list", help="Show all faults, or those of --faults, and do nothing.")
    ] = False,
) -> None:
    """Three nodes and a guest under load on this machine: strike, see who goes on, and judge.

    Counts acknowledged writes lost, frames that left before their commit, two instances heard at once, and damage in
    the guest: all have to be 0. About ten seconds a run.
    """
    from kagemusha.bench.promise import commit_of_checkout
    from kagemusha.chaos.faults import faults_with
    from kagemusha.chaos.report import summary
    from kagemusha.chaos.runner import Runner, RunResult

    words = [word.strip() for word in faults.split(",")] if faults else [""]
    chosen = faults_with(words, form)
    if not chosen:
        known = ", ".join(map(str, faults_with([""], form)))
        raise ConfigError(f"--faults {faults}: there is no such fault", operation="chaos", hint=f"there are: {known}")
    console = Console(highlight=False, soft_wrap=True)
    if show:
        for fault in chosen:
            console.print(f"{fault!s:44}  {'2' if fault.doubled else ' '}  {fault.explanation}")
        raise typer.Exit(0)
    seed = secrets.randbits(32) if seed is None else seed
    console.print(f"seed {seed}, {len(chosen)} kinds of faults")
    results: list[RunResult] = []

    def write() -> None:
        if json_file is not None:
            found = {"form": form, **summary(results), "seed": seed, "commit": commit_of_checkout()}
            json_file.write_text(json.dumps({**found, "runs_detail": [each.to_json() for each in results]}, indent=1))

    with Runner(seed, chosen, keep=keep, progress=console.print, form=form) as runner:
        for number in range(1, runs + 1):
            result = runner.run(number)
            results.append(result)
            write()
            outage = "-" if result.outage_ms is None else f"{result.outage_ms:.0f} ms"
            word = "ok" if result.ok else "FAILED"
            console.print(
                f"{number:4}  {word:6}  {' + '.join(result.faults):50}  outage {outage:>8}  "
                f"{'took over' if result.takeover_ms is not None else '':9}"
                f"{'  request sent again' if result.reached_standby is False else ''}"
                f"{'  service stopped' if result.stopped else ''}"
            )
            if not result.ok:
                console.print(f"      {result}")
            if result.failure:
                runner.start_anew()
    found = summary(results)
    console.print_json(json.dumps(found))
    raise typer.Exit(0 if found["ok"] == found["runs"] else 1)
