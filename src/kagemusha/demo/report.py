"""From what was observed to the figures of the report. Pure arithmetic: no process, file or clock is touched.

How each figure is taken:

- ``epochs``, ``pause_ms``, ``dirty_mb``, ``commit_ms``: of the checkpoints under load, from the client's first
  request to the kill. Boot and first synchronisation are in ``details``.
- ``epochs_per_s``: intervals between the first and the last committed checkpoint, by their STOPs, per second.
- ``pause_floor_ms.p50``: the median bare stop, device save, cont of the same guest under the same load (of the
  whole run if there are fewer than five), plus one memcpy of the median dirty bytes, timed on this machine.
- ``detect_ms``: from the kill to the standby's decision; ``takeover_ms``: from there to QEMU's RESUME.
- ``held_frames``: of the whole run up to the kill.
- ``client_outage_ms``: the longest time between two consecutive acknowledgements that ends after the kill and
  begins no later than a second after the RESUME; it contains TCP's retransmission.
- ``peak_rss_mb``: the largest sum of PSS of our processes on a side, QEMU left out (see `processes`).

Percentiles are nearest-rank. Figures that do not exist in a run (no takeover, say) are None.
MB are 10^6 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

from kagemusha.demo.observations import RunRecord, committed_before_kill, committed_under_load, of_kind, takeover_of
from kagemusha.demo.records import Acknowledged, LoadEnd
from kagemusha.model.events import (
    CheckpointApplied,
    EpochCommitted,
    FloorMeasured,
    SyncProgress,
    TakenOver,
)

OUTAGE_WINDOW_S = 1.0
MB = 1e6
FLOOR_SAMPLES_MIN = 5


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile: the smallest value that ``share`` of all do not exceed; None if empty."""
    if not values:
        return None
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


@dataclass(frozen=True, slots=True)
class PauseQuantiles:
    """The guest's full pauses, milliseconds."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class CommitQuantiles:
    """From STOP to the acknowledgement, milliseconds."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class DirtyQuantiles:
    """Page bytes written in an epoch, MB."""

    p50: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Median:
    """A median alone, milliseconds."""

    p50: float | None


@dataclass(frozen=True, slots=True)
class SideMemory:
    """Peak memory of our processes by side, MB."""

    primary: float
    standby: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The figures of one run, named as in the report's JSON, and the observations they come from.

    :ivar details: what explains the figures: options, seed, machine, floor, client, synchronisation.
    """

    acknowledged_writes: int
    lost_writes: int
    connection_resets: int
    epochs: int
    epochs_per_s: float | None
    pause_ms: PauseQuantiles
    pause_floor_ms: Median
    dirty_mb: DirtyQuantiles
    commit_ms: CommitQuantiles
    held_frames: int
    detect_ms: float | None
    takeover_ms: float | None
    client_outage_ms: float | None
    peak_rss_mb: SideMemory
    accel: str
    qemu_version: str
    kernel: str
    details: dict[str, Any]
    record: RunRecord

    @property
    def passed(self) -> bool:
        """True if B took over and the client lost neither a write nor its connection."""
        return (
            self.lost_writes == 0
            and self.connection_resets == 0
            and self.takeover_ms is not None
            and self.acknowledged_writes > 0
        )

    @property
    def pause_ratio(self) -> float | None:
        """Median pause over its floor."""
        if self.pause_ms.p50 is None or not self.pause_floor_ms.p50:
            return None
        return self.pause_ms.p50 / self.pause_floor_ms.p50

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, without the observations."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "record"}
        return {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in content.items()
        }


def outage_s(acknowledged: Sequence[Acknowledged], kill_t: float, resumed_t: float | None) -> float | None:
    """The client's longest wait around the kill, seconds; None if no answer came after it."""
    return longest_gap_s([each.acked_t for each in acknowledged], kill_t, resumed_t)


def longest_gap_s(times: Sequence[float], kill_t: float, resumed_t: float | None) -> float | None:
    """The longest time between two of these moments around the kill, seconds; None if none came after it."""
    latest_begin = math.inf if resumed_t is None else resumed_t + OUTAGE_WINDOW_S
    gaps = [after - before for before, after in pairwise(times) if after > kill_t and before <= latest_begin]
    return max(gaps, default=None)


def floors_under_load(record: RunRecord) -> list[FloorMeasured]:
    """The floor samples taken under load; all of the run's if those are too few for a median."""
    everything = of_kind(record.primary, FloorMeasured)
    begin_t = record.acknowledged[0].sent_t if record.acknowledged else record.kill_t
    under_load = [event for event in everything if begin_t <= event.t <= record.kill_t]
    return under_load if len(under_load) >= FLOOR_SAMPLES_MIN else everything


def median_dirty_bytes(epochs: Sequence[EpochCommitted]) -> int:
    """The median of the dirty bytes of these checkpoints; 0 if there are none."""
    return int(percentile([event.dirty_bytes for event in epochs], 0.5) or 0)


def make_report(record: RunRecord) -> DemoReport:
    """All figures of a run."""
    epochs = committed_under_load(record)
    pauses = [event.pause_us / 1e3 for event in epochs]
    commits = [event.commit_us / 1e3 for event in epochs]
    dirty = [event.dirty_bytes / MB for event in epochs]
    floors = floors_under_load(record)
    bare = percentile([event.pause_us / 1e3 for event in floors], 0.5)
    takeover = takeover_of(record)
    outage = outage_s(record.acknowledged, record.kill_t, takeover.resumed_t if takeover else None)
    return DemoReport(
        acknowledged_writes=len(record.acknowledged),
        lost_writes=len(record.verification.lost),
        connection_resets=int(record.outcome.end is not LoadEnd.FINISHED),
        epochs=len(epochs),
        epochs_per_s=_rate_per_s(epochs),
        pause_ms=PauseQuantiles(*(_rounded(percentile(pauses, share)) for share in (0.5, 0.95, 0.99, 1.0))),
        pause_floor_ms=Median(None if bare is None else _rounded(bare + record.memcpy_s * 1e3)),
        dirty_mb=DirtyQuantiles(*(_rounded(percentile(dirty, share)) for share in (0.5, 1.0))),
        commit_ms=CommitQuantiles(*(_rounded(percentile(commits, share)) for share in (0.5, 0.99))),
        held_frames=sum(event.held_frames for event in committed_before_kill(record)),
        detect_ms=_rounded((takeover.decided_t - record.kill_t) * 1e3) if takeover else None,
        takeover_ms=_rounded((takeover.resumed_t - takeover.decided_t) * 1e3) if takeover else None,
        client_outage_ms=None if outage is None else _rounded(outage * 1e3),
        peak_rss_mb=SideMemory(*(round(record.peak_bytes[role] / MB, 1) for role in ("primary", "standby"))),
        accel=record.facts.accel,
        qemu_version=record.facts.qemu_version,
        kernel=record.facts.kernel,
        details=_details(record, epochs, floors, takeover),
        record=record,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _rate_per_s(epochs: Sequence[EpochCommitted]) -> float | None:
    if len(epochs) < 2:
        return None
    return _rounded((len(epochs) - 1) / (epochs[-1].stop_t - epochs[0].stop_t))


def _details(
    record: RunRecord,
    epochs: Sequence[EpochCommitted],
    floors: Sequence[FloorMeasured],
    takeover: TakenOver | None,
) -> dict[str, Any]:
    facts = asdict(record.facts)
    options = {name: getattr(record.options, name) for name in _REPORTED_OPTIONS}
    applies = [event.apply_us / 1e3 for event in of_kind(record.standby, CheckpointApplied)]
    first = record.acknowledged[0].sent_t if record.acknowledged else record.kill_t
    return {
        "options": options,
        "seed": record.seed,
        "machine": {**facts, "guest_packages": dict(record.facts.guest_packages)},
        "kill": {"after_s": round(record.kill_t - first, 3), "killed": list(record.killed)},
        "pause_floor_ms": {
            "bare": _rounded(percentile([event.pause_us / 1e3 for event in floors], 0.5)),
            "memcpy": _rounded(record.memcpy_s * 1e3),
            "memcpy_bytes": record.memcpy_bytes,
            "samples": len(floors),
        },
        "pause_wall_ms": {"p50": _rounded(percentile([event.pause_wall_us / 1e3 for event in epochs], 0.5))},
        "before_load": _before_load(record, len(epochs)),
        "stream_mb": round(sum(event.wire_bytes for event in epochs) / MB, 3),
        "device_kb": _rounded(percentile([event.device_bytes / 1e3 for event in epochs], 0.5)),
        "first_sync": _first_sync(record),
        "standby_apply_ms": {"p50": _rounded(percentile(applies, 0.5))},
        "takeover": None if takeover is None else {name: getattr(takeover, name) for name in _REPORTED_TAKEOVER},
        "client": _client(record),
        "memory_measure": "sum of PSS of a side's processes without QEMU, largest of samples 250 ms apart",
    }


_REPORTED_OPTIONS = (
    *("epoch_ms", "ram_mb", "vcpus", "seconds", "kill", "compression", "profile"),
    *("pipeline", "value_bytes", "lease_ms", "qemu_arguments"),
)
_REPORTED_TAKEOVER = ("reason", "epoch", "term", "dropped_partial")


def _first_sync(record: RunRecord) -> dict[str, Any]:
    rounds = of_kind(record.primary, SyncProgress)
    return {
        "rounds": len(rounds),
        "page_mb": round(sum(entry.sent_bytes for entry in rounds) / MB, 3),
        "stream_mb": round(sum(entry.wire_bytes for entry in rounds) / MB, 3),
    }


def _before_load(record: RunRecord, under_load: int) -> dict[str, Any]:
    """The checkpoints while the guest booted and before the client came."""
    everything = committed_before_kill(record)
    earlier = everything[: len(everything) - under_load]
    dirty = [event.dirty_bytes / MB for event in earlier]
    pauses = [event.pause_us / 1e3 for event in earlier]
    return {
        "epochs": len(earlier),
        "dirty_mb": {"max": _rounded(percentile(dirty, 1.0))},
        "pause_ms": {"p50": _rounded(percentile(pauses, 0.5)), "max": _rounded(percentile(pauses, 1.0))},
    }


def _client(record: RunRecord) -> dict[str, Any]:
    latencies = [entry.latency_s * 1e3 for entry in record.acknowledged]
    span = record.acknowledged[-1].acked_t - record.acknowledged[0].sent_t if record.acknowledged else 0.0
    return {
        "end": record.outcome.end,
        "detail": record.outcome.detail,
        "connections": record.outcome.connections,
        "writes_per_s": round(len(latencies) / span, 1) if span else None,
        "latency_ms": {name: _rounded(percentile(latencies, share)) for name, share in _LATENCY_SHARES},
        "lost_keys": list(record.verification.lost[:20]),
        "after_takeover": sum(entry.sent_t > record.kill_t for entry in record.acknowledged),
    }


_LATENCY_SHARES = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
