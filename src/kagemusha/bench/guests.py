"""A protected guest without a client and without a kill: what its checkpoints cost, in one run.

The guest's load is ``pattern SIZE_MB RATE_MB_S`` (see ``demo/guest``), which fills a buffer with data that do not
compress and goes on rewriting it at a steady rate. Beside it a guest may hold memory that was written once, so that
its pages exist and have to be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kagemusha.demo.facts import memcpy_s
from kagemusha.demo.live import Display
from kagemusha.demo.observations import MachineFacts, of_kind
from kagemusha.demo.options import DemoOptions
from kagemusha.demo.report import MB, median_dirty_bytes, percentile
from kagemusha.demo.run import DemoRun
from kagemusha.errors import TransientError
from kagemusha.guest.accel import READY_LINE
from kagemusha.model.events import EpochCommitted, FloorMeasured, SyncProgress

WARM_UP_S = 2.0
_PATTERN_RUNS = "PATTERN-OK"


@dataclass(frozen=True, slots=True)
class Load:
    """What the guest does: keeps ``buffer_mb`` and rewrites ``rate_mb_s`` of it. A buffer of 0: nothing.

    :ivar held_mb: MiB of memory written once, before the buffer, and not touched again; at most half of the RAM.
    """

    buffer_mb: int = 0
    rate_mb_s: int = 0
    held_mb: int = 0

    @property
    def guest_program(self) -> str | None:
        """Shell text for the guest's boot; None: it is idle."""
        if not self.buffer_mb:
            return None
        held = f"dd if=/dev/zero of=/dev/shm/held bs=1M count={self.held_mb} && " if self.held_mb else ""
        return f"{held}exec pattern {self.buffer_mb} {self.rate_mb_s}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: its checkpoints after the warm-up, and what the whole run took.

    :ivar peak_bytes: peak memory of our processes by side, first synchronisation included, QEMU left out.
    :ivar largest_bytes: of the largest checkpoint of the whole run, pages and devices.
    :ivar synced_bytes: page bytes of all rounds of the first synchronisation.
    :ivar memcpy_s: one memcpy of the median dirty set, seconds, timed once after the run.
    """

    epochs: tuple[EpochCommitted, ...]
    floors: tuple[FloorMeasured, ...]
    peak_bytes: dict[str, int]
    largest_bytes: int
    synced_bytes: int
    facts: MachineFacts
    memcpy_s: float

    @property
    def pause_ms(self) -> float:
        """Median full pause."""
        return percentile([epoch.pause_us / 1e3 for epoch in self.epochs], 0.5) or 0.0

    @property
    def dirty_bytes(self) -> int:
        """Median dirty set."""
        return median_dirty_bytes(self.epochs)

    @property
    def floor_ms(self) -> float:
        """Median bare pause plus one memcpy of the median dirty set."""
        bare = percentile([floor.pause_us / 1e3 for floor in self.floors], 0.5) or 0.0
        return bare + self.memcpy_s * 1e3

    @property
    def epochs_per_s(self) -> float:
        """Checkpoints a second."""
        return (len(self.epochs) - 1) / (self.epochs[-1].stop_t - self.epochs[0].stop_t)

    def to_json(self) -> dict[str, Any]:
        """Figures with raw samples."""
        pauses = [epoch.pause_us / 1e3 for epoch in self.epochs]
        return {
            "pause_ms": {name: percentile(pauses, share) for name, share in QUANTILES},
            "pause_floor_ms": {"p50": self.floor_ms, "memcpy": self.memcpy_s * 1e3, "samples": len(self.floors)},
            "epochs": len(self.epochs),
            "epochs_per_s": round(self.epochs_per_s, 2),
            "dirty_mb": {"p50": self.dirty_bytes / MB},
            "peak_mb": {role: size / MB for role, size in self.peak_bytes.items()},
            "largest_checkpoint_mb": self.largest_bytes / MB,
            "synced_mb": self.synced_bytes / MB,
            "samples": {
                "pause_us": [epoch.pause_us for epoch in self.epochs],
                "dirty_bytes": [epoch.dirty_bytes for epoch in self.epochs],
                "commit_us": [epoch.commit_us for epoch in self.epochs],
                "floor_us": [floor.pause_us for floor in self.floors],
            },
        }


QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))


def measure(options: DemoOptions, load: Load, seconds: float, display: Display) -> Measured:
    """Boot, let the load fill its buffer, protect, watch for ``seconds``.

    The standby starts late, so the first synchronisation finds the buffer full.

    :raise TransientError: too few checkpoints, or no floor, in that time.
    :raise KageError: it could not be carried out; the notes of the error hold the tails of all logs.
    """
    options = replace(options, guest_program=load.guest_program)
    with DemoRun(options, display) as run, run.directory.logs_in_errors():
        with display:
            before = _watch(run, load, seconds)
        return _measured(run, before, seconds)


def _watch(run: DemoRun, load: Load, seconds: float) -> int:
    """All phases; returns how many events host A had written before the measurement."""
    run.prepare()
    run.start_primary()
    run.await_guest(READY_LINE, "booting the guest")
    if load.buffer_mb:
        run.await_guest(_PATTERN_RUNS, "the guest fills its memory")
    run.start_standby()
    run.await_protected()
    run.observe(WARM_UP_S, "warming up")
    before = len(run.progress.primary)
    run.observe(seconds, "measuring")
    return before


def _measured(run: DemoRun, before: int, seconds: float) -> Measured:
    every = of_kind(run.progress.primary, EpochCommitted)
    watched = run.progress.primary[before:]
    epochs, floors = of_kind(watched, EpochCommitted), of_kind(watched, FloorMeasured)
    if len(epochs) < 2 or not floors:
        raise TransientError(
            f"{len(epochs)} checkpoints and {len(floors)} floors in {seconds:g} s", operation="measure"
        )
    return Measured(
        epochs=tuple(epochs),
        floors=tuple(floors),
        peak_bytes=run.peak_bytes(),
        largest_bytes=max(epoch.dirty_bytes + epoch.device_bytes for epoch in every),
        synced_bytes=sum(event.sent_bytes for event in of_kind(run.progress.primary, SyncProgress)),
        facts=run.facts(),
        memcpy_s=memcpy_s(median_dirty_bytes(epochs)),
    )
