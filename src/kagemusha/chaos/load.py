"""The client's load of one run: writes over one connection, each acknowledgement recorded, and what is left of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kagemusha.chaos import exchanges
from kagemusha.chaos.exchanges import Exchange
from kagemusha.chaos.history import Operation, from_lines
from kagemusha.chaos.history_load import CONNECT_LIMIT_S, Totals, completed
from kagemusha.demo.image import REDIS_PORT, WITNESS_PORT
from kagemusha.demo.records import Acknowledged, RecordReader, Verification
from kagemusha.demo.redis_client import RedisClient, start_client

LOAD_S = 3600
VERIFY_LIMIT_S = 60.0
END_LIMIT_S = CONNECT_LIMIT_S + 3.0


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest time without an acknowledgement. CLOCK_MONOTONIC seconds. ``key``: whose came at its end."""

    begin_t: float
    end_t: float
    key: int

    @property
    def ms(self) -> float:
        """How long it was."""
        return (self.end_t - self.begin_t) * 1000


class Load:
    """From its making until :meth:`end`."""

    def __init__(self, folder: Path, namespace: str, host: str, seed: int, environment: Mapping[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._redis = RedisClient(folder, namespace=namespace, host=host, seed=seed, environment=environment)
        self._reader = RecordReader(self._redis.records)
        self.acknowledged: list[Acknowledged] = []
        self._process = self._redis.start("write", "--seconds", str(LOAD_S))
        self._historian = start_client(
            [
                *(sys.executable, "-m", "kagemusha.chaos.history_load", "--host", host, "--port", str(REDIS_PORT)),
                *("--seed", str(seed), "--file", str(folder / "history.jsonl")),
                *("--witness", str(WITNESS_PORT), str(folder / "exchanges.jsonl")),
            ],
            namespace=namespace,
            environment=environment,
            log=folder / "history.log",
        )

    def poll(self) -> int:
        """How many writes have been acknowledged."""
        self.acknowledged += self._reader.poll()
        return len(self.acknowledged)

    @property
    def broken(self) -> str:
        """How its connection ended; empty while it lives."""
        if self._process.poll() is None:
            return ""
        outcome = self._redis.outcome_file("write")
        return str(json.loads(outcome.read_text())["end"]) if outcome.exists() else "the client died"

    def end(self) -> None:
        """End the connections."""
        self._process.kill()
        self._process.wait()
        self._historian.terminate()
        try:
            self._historian.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:  # then there are no totals, and its record is all the same whole
            self._historian.kill()
            self._historian.wait()
        self.poll()
        self._reader.close()

    def lost(self) -> int | None:
        """How many acknowledged writes the guest does not have (any more); None: it does not answer."""
        reader = self._redis.start("verify")
        try:
            if reader.wait(VERIFY_LIMIT_S) != 0:
                return None
        except subprocess.TimeoutExpired:
            reader.kill()
            reader.wait()
            return None
        return len(Verification.from_json(self._redis.outcome_file("verify").read_text()).lost)

    def history(self) -> list[Operation]:
        """What the other clients did, each operation once."""
        path = self._folder / "history.jsonl"
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as lines:
            return completed(list(from_lines(lines)))

    def exchanges(self) -> list[Exchange]:
        """What the guest's memory witness was asked, and its answers."""
        path = self._folder / "exchanges.jsonl"
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as lines:
            return exchanges.from_lines(lines)

    def totals(self) -> Totals | None:
        """After :meth:`end`: what the other clients did. None: they ended by an error, which their log has."""
        if self._historian.returncode != 0:
            return None
        lines = (self._folder / "history.log").read_text().splitlines()
        return Totals(**json.loads(lines[-1])) if lines else None

    def longest_gap(self, since_t: float) -> Gap | None:
        """Of the times between two acknowledgements that were not over at ``since_t``."""
        pairs = pairwise(self.acknowledged)
        gaps = [Gap(one.acked_t, other.acked_t, other.key) for one, other in pairs if other.acked_t >= since_t]
        return max(gaps, key=lambda gap: gap.ms, default=None)

    def request(self, key: int) -> bytes:
        """With which a key was written."""
        return self._redis.request(key)
