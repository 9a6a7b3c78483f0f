"""One real etcd server as the arbiter: Debian's own program, unpacked into the cache and not installed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kagemusha.chaos.arbiter_process import ArbiterProcess
from kagemusha.demo.unpacked import unpacked

START_S = 0.3


class EtcdServer(ArbiterProcess):
    """A cluster of one member."""

    def __init__(self, folder: Path, address: str, prefix: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(folder, prefix, environment)
        self.url = f"http://{address}:2379"
        self._peer = f"http://{address}:2380"

    def command(self) -> list[str]:
        """As :class:`ArbiterProcess` says."""
        return [
            str(unpacked("etcd-server") / "usr/bin/etcd"),
            *("--name", "arbiter", "--data-dir", str(self.folder / "data"), "--log-level", "error"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer),
            *("--initial-cluster", f"arbiter={self._peer}"),
        ]

    def wait_serving(self) -> None:
        """A moment; who asks before it answers asks again."""
        time.sleep(START_S)
