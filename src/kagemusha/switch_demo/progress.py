"""What is shown of a run with several VMs: where each runs, who protects it, and what the client sees."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kagemusha.demo.live import WAITS_LONG_MS, headed, state_text
from kagemusha.switch_demo.phones import NO_CALLS, CallCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class VmMoment:
    """One VM just now.

    :ivar states: of its nodes on host A and on host B.
    :ivar waiting_ms: since the last answer to its writer; 0: nobody writes.
    """

    name: str
    profile: str
    states: tuple[str, str]
    epochs: int = 0
    pause_ms: float = 0.0
    writes: int = 0
    waiting_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMoment:
    """One moment of a run."""

    step: str
    elapsed_s: float
    vms: tuple[VmMoment, ...] = ()
    calls: CallCounts = NO_CALLS

    def as_line(self) -> str:
        """For where lines are printed one below the other."""
        parts = [f"{self.elapsed_s:6.1f} s  {self.step}"]
        parts += [f"{vm.name} {vm.states[0] or '-'}/{vm.states[1] or '-'}" for vm in self.vms if any(vm.states)]
        writes = sum(vm.writes for vm in self.vms)
        if writes:
            parts.append(f"{writes} writes")
        if self.calls.placed:
            parts.append(f"{self.calls.current} calls, {self.calls.completed} completed")
        return "; ".join(parts)

    def as_table(self) -> Group:
        """For a terminal on which it is drawn over the moment before."""
        table = Table(box=None, padding=(0, 2))
        for name in ("VM", "rules", "host A", "host B", "checkpoints", "client"):
            table.add_column(name)
        for vm in self.vms:
            cycle = f"{vm.epochs}, pause {vm.pause_ms:.1f} ms" if vm.epochs else ""
            table.add_row(vm.name, vm.profile, *map(state_text, vm.states), cycle, _client_text(vm))
        if self.calls.placed:
            text = f"{self.calls.current} under way, {self.calls.completed} completed, {self.calls.failed} failed"
            table.add_row("calls", "", "", "", "", text)
        return headed(self.elapsed_s, self.step, table)


def _client_text(vm: VmMoment) -> Text:
    if vm.waiting_ms > 2 * WAITS_LONG_MS:
        return Text(f"waiting for {vm.waiting_ms:.0f} ms", style="bold red")
    return Text(f"{vm.writes} writes" if vm.writes else "")
