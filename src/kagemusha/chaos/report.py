"""Many runs summed up."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kagemusha.chaos.runner import RunResult


def summary(results: Sequence[RunResult]) -> dict[str, Any]:
    """The keys that a reader wants first; ``runs_detail`` has every run."""
    singles = [result for result in results if result.single]
    doubles = [result for result in results if not result.single]
    by_fault: dict[str, list[RunResult]] = defaultdict(list)
    for result in results:
        if len(result.faults) == 1:
            by_fault[result.faults[0]].append(result)
    taken = [result for result in singles if result.takeover_ms is not None and result.outage_ms is not None]
    return {
        "runs": len(results),
        "frames": sum(result.verdict.frames for result in results),
        "ok": sum(result.ok for result in results),
        "lost": sum(result.lost for result in results),
        "leaked": sum(result.verdict.leaked for result in results),
        "double_active": sum(result.verdict.double_active for result in results),
        "damaged": sum(result.damaged for result in results),
        "not_linearizable": sum(bool(result.history) for result in results),
        "ended_connections": sum(result.ended_connections or 0 for result in results),
        "datagrams": {
            "asked": sum(result.memory.asked for result in results),
            "in_flight_answered": sum(result.memory.in_flight_answered for result in taken),
            "in_flight_lost": sum(result.memory.in_flight_lost for result in taken),
            "doubled": sum(result.memory.doubled for result in results),
            "went_back": sum(result.memory.went_back for result in results),
            "outage_ms": _spread([result.memory.gap_ms for result in taken if result.memory.gap_ms is not None]),
        },
        "operations": sum(result.operations for result in results),
        "acknowledged": sum(result.acknowledged for result in results),
        "single_faults_that_stopped_the_service": sum(result.stopped for result in singles),
        "double_faults": len(doubles),
        "double_faults_that_stopped_the_service": sum(result.stopped for result in doubles),
        "not_at_rest": sum(bool(result.failure) for result in results),
        "outage_ms": _spread([result.outage_ms for result in taken if result.outage_ms is not None]),
        **_outages_apart(taken),
        "takeover_ms": _spread([result.takeover_ms for result in taken if result.takeover_ms is not None]),
        "by_fault": {
            fault: {
                "runs": len(found),
                "ok": sum(result.ok for result in found),
                "reached": sum(result.reached for result in found),
                "stopped": sum(result.stopped for result in found),
                "takeovers": sum(result.takeover_ms is not None for result in found),
                "outage_ms": _spread([result.outage_ms for result in found if result.outage_ms is not None]),
                **_outages_apart(found),
            }
            for fault, found in sorted(by_fault.items())
        },
    }


def _outages_apart(results: Sequence[RunResult]) -> dict[str, dict[str, float] | None]:
    """Of requests that had reached the standby, and of those that their client had to send again."""
    return {
        name: _spread([r.outage_ms for r in results if r.outage_ms is not None and r.reached_standby is reached])
        for name, reached in (("outage_reached_ms", True), ("outage_retransmitted_ms", False))
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {
        "n": len(values),
        "p50": round(statistics.median(ordered), 1),
        "p95": round(p95, 1),
        "max": round(ordered[-1], 1),
    }
