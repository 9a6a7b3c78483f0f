"""``kage switch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def switch(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The switch's configuration file (TOML).", metavar="FILE")
    ],
    events: Annotated[
        Path | None, typer.Option("--events", help="Append one JSON line for each event.", metavar="FILE")
    ] = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove-at-end", help="Make the bridge a plain one again when it ends: VMs are not protected any more."
        ),
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Say what the agent that runs is doing, and nothing else.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="With --status: print JSON.")] = False,
) -> None:
    """Guard a bridge, and hold and release the frames of the VMs behind it as their hosts say. Stays in the foreground.

    It also gives each term of a VM to one host, and takes frames only from the one that has the newest. When it ends,
    the bridge stays guarded: frames of protected VMs are dropped, unless they run alone, until it is started again.
    """
    from kagemusha.agents.switch import run_switch
    from kagemusha.model.switch_config import load_switch

    if json_output and not status:
        raise typer.BadParameter("it is the form of --status", param_hint="--json")
    loaded = load_switch(config)
    if status:
        from kagemusha.cli.control import switch_status

        raise typer.Exit(switch_status(loaded, json_output=json_output))
    raise typer.Exit(run_switch(loaded, events, remove=remove))
