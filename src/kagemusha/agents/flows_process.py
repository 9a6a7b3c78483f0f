"""The flows process: watches the VM's signalling and changes its detectors' rules (``gate.flows.monitor``).

A process of its own, and nobody waits for it: what comes over the network is read there and nowhere else. It dies
with the worker; when it dies alone, its rules stay until they lapse, and the next one takes them up.
"""

from __future__ import annotations

import socket

from kagemusha.errors import KageError
from kagemusha.gate.flows.monitor import FlowMonitor, FlowSources
from kagemusha.gate.namespace import GateNetwork
from kagemusha.gate.rulebase.sockets import socket_path
from kagemusha.kernel import netns
from kagemusha.kernel.forked import ForkedProcess, fork_process
from kagemusha.model.config import Config

RESTART_S = 1.0
END_TIMEOUT_S = 2.0


class FlowsProcess:
    """The process as the worker sees it. Does nothing if no detector is wanted."""

    def __init__(self, config: Config, network: GateNetwork) -> None:
        self._config = config
        self._network = network
        self._control: socket.socket | None = None
        self._process: ForkedProcess | None = None
        self._start_t = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return None if self._process is None else self._process.pid

    def tend(self, now: float) -> None:
        """Start it if it is to run and does not; often and by the worker's main thread, whose end is its end.

        :param now: of a monotonic clock, seconds.
        """
        if not self._config.flows.detectors:
            return
        if self._process is not None and self._process.gone:
            self._end()
            self._start_t = now + RESTART_S
        if self._process is None and now >= self._start_t:
            self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config, network = self._config, self._network

        self._process = fork_process(
            lambda: _watch(config, network.namespace_fd, theirs),
            name="kage-flows",
            keep={theirs.fileno(), network.namespace_fd},
        )
        theirs.close()

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.end(patience_s=END_TIMEOUT_S)
            self._process = None

    def close(self) -> None:
        """End it. Its rules stay until they lapse."""
        self._end()


def _watch(config: Config, namespace: int, control: socket.socket) -> int:
    """The process; its exit code."""
    try:
        with netns.entered(namespace):
            sources = FlowSources(config.flows)
        addresses = config.rules.addresses(config.network.mac)
        rules = socket_path(config.runtime_dir, config.vm.name)
        FlowMonitor(config.flows, addresses, sources, rules).run(control)
    except KageError as error:
        return error.exit_code
    except OSError:  # the tap is gone; with it the guest, or it comes again
        return KageError.exit_code
    return 0
