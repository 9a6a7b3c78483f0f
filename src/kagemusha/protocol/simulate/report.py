"""What many runs amount to."""

from __future__ import annotations

from typing import Any

from kagemusha.protocol import primary as p
from kagemusha.protocol import standby as s
from kagemusha.protocol import switch, switch_host
from kagemusha.protocol.machine import Table
from kagemusha.protocol.simulate.scenario import Form
from kagemusha.protocol.simulate.world import Coverage, Outcome


class Totals:
    """Sums over runs of one form, and how often each transition was taken."""

    def __init__(self, form: Form = "host") -> None:
        self.form = form
        self.runs = self.steps = self.frames = self.takeovers = self.stopped = 0
        self.coverage: Coverage = {}

    def add(self, outcome: Outcome | None, steps: int) -> None:
        """One more run; None: it broke something."""
        self.runs += 1
        self.steps += steps
        if outcome is not None:
            self.frames += outcome.frames
            self.takeovers += outcome.takeovers
            self.stopped += not outcome.serving

    @property
    def untaken(self) -> list[str]:
        """Transitions of the form's tables that no run has taken."""
        tables: dict[str, Table[Any, Any]] = {"primary": p.TABLE, "standby": s.TABLE}
        if self.form == "switch":
            tables |= {"switch": switch.TABLE, "host": switch_host.TABLE}
        rows = [(who, *key) for who, table in tables.items() for key in table]
        return sorted(
            f"{who} {state.name} {event.__name__}" for who, state, event in rows if (state, event) not in self.coverage
        )

    def figures(self, **more: Any) -> dict[str, Any]:
        """For a file."""
        counts = {
            f"{state.name} {event.__name__} ({event.__module__.rpartition('.')[2]})": count
            for (state, event), count in self.coverage.items()
        }
        return {
            "form": self.form,
            "runs": self.runs,
            "steps": self.steps,
            "frames": self.frames,
            "takeovers": self.takeovers,
            "stopped": self.stopped,
            "untaken": self.untaken,
            **more,
            "transitions": dict(sorted(counts.items())),
        }

    def __str__(self) -> str:
        return (
            f"{self.runs:,} runs, {self.steps:,} steps, {self.frames:,} frames seen, {self.takeovers:,} takeovers, "
            f"{self.stopped} ended without service, {len(self.untaken)} transitions not taken"
        )
