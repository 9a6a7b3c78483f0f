"""Run after run on one cluster: protected, loaded, struck, judged, repaired.

The faults come in random order, each once before any comes again. A single fault has to leave the service running
without any help: the client is answered again over the connection it has, before a node is started again. Two faults at
once may stop it; they must not corrupt anything.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from kagemusha.chaos import exchanges
from kagemusha.chaos.cluster import GUEST_HOST, HOSTS, Cluster
from kagemusha.chaos.exchanges import Account
from kagemusha.chaos.faults import AnyFault
from kagemusha.chaos.form import Form
from kagemusha.chaos.history import Operation
from kagemusha.chaos.judge import CLIENT, Course, Verdict, gate_name, judge, port_name
from kagemusha.chaos.linearizability import check
from kagemusha.chaos.load import Load
from kagemusha.chaos.node_process import NodeProcess
from kagemusha.chaos.recorder import Recorder
from kagemusha.chaos.requests import reached_standby
from kagemusha.chaos.strike import Struck, strike
from kagemusha.demo.scope import Scope
from kagemusha.errors import KageError, TransientError
from kagemusha.gate.devices import VM
from kagemusha.model.config import NetworkTable
from kagemusha.model.events import StateChanged, TakenOver

DOUBLE_SHARE = 0.2
BEFORE_S = (0.3, 1.5)
APART_S = 0.3
SERVICE_LIMIT_S = 30.0
ANSWERS_AFTER = 20
CLIENT_PORT = "port-client"
MAC: str = NetworkTable.model_fields["mac"].default


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run.

    :ivar single: one thing has failed, and the service has to go on.
    :ivar operations: of the clients whose history is checked; ``history``: why it is not linearizable, empty if it is.
    :ivar memory: what the guest's memory witness has answered.
    :ivar ended_connections: of those clients; a single fault must end none. None: they failed themselves.
    :ivar stopped: the client's connection was not answered any more; allowed after two faults only.
    :ivar outage_ms: the longest time without an answer around the faults; None where the service stopped.
    :ivar reached_standby: the request that waited through that time had reached the standby, so nobody had to send it
        again; None: it cannot be told, or the service stopped.
    :ivar takeover_ms: from the decision to QEMU's RESUME; None: nobody took over.
    :ivar failure: why the cluster did not come to rest afterwards; empty: it did.
    """

    number: int
    faults: tuple[str, ...]
    single: bool
    reached: bool
    acknowledged: int
    lost: int
    verdict: Verdict
    operations: int
    history: str
    memory: Account
    ended_connections: int | None
    stopped: bool
    broken: str
    outage_ms: float | None
    reached_standby: bool | None
    takeover_ms: float | None
    replayed_frames: int
    resent_frames: int
    failure: str

    @property
    def ok(self) -> bool:
        """Nothing that must not happen has happened."""
        clean = not (self.lost or self.verdict.leaked or self.verdict.double_active or self.damaged or self.history)
        heard = self.verdict.frames > 0 and self.ended_connections is not None
        judged = heard and (self.stopped or self.memory.answered_after > 0)
        kept = not self.single or not (self.stopped or self.ended_connections)
        return clean and judged and kept and not self.failure

    @property
    def damaged(self) -> bool:
        """The guest's memory, by its console or its witness, or the guest went back behind what was let out."""
        return bool(self.verdict.damaged or self.memory.damage or self.memory.went_back)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "ok": self.ok}


def explained(history: Sequence[Operation]) -> str:
    """Why a history is not what it has to be, or cannot be decided; empty: it is linearizable."""
    if not any(each.returned_ns is not None for each in history):
        return "not decided: no operation was answered"
    verdict = check(history)
    if verdict.violated is not None:
        return f"{verdict.violated} is not linearizable: {verdict.explanation}"
    return f"not decided: {', '.join(verdict.undecided)}" if verdict.undecided else ""


class Runner(Scope):
    """Use as a context manager, then call :meth:`run` again and again."""

    def __init__(
        self,
        seed: int,
        faults: tuple[AnyFault, ...],
        *,
        keep: bool,
        progress: Callable[[str], None],
        form: Form = Form.HOST,
        lease_ms: int | None = None,
    ) -> None:
        self.cluster = Cluster(keep=keep, progress=progress, form=form, lease_ms=lease_ms)
        self._faults = faults
        self._deck: list[AnyFault] = []
        self._chance = random.Random(seed)
        self._recorded: set[tuple[str, int]] = set()

    def _enter(self, stack: ExitStack) -> None:
        stack.enter_context(self.cluster)
        self._recorder = stack.enter_context(Recorder(MAC))
        self._client = stack.enter_context(Recorder())
        self._client.add(CLIENT_PORT, self.cluster.topology.switch, CLIENT_PORT)
        for host in HOSTS:
            self._recorder.add(port_name(host), self.cluster.topology.switch, f"port-{host}")
        self._recorder.add(CLIENT, self.cluster.topology.client, "eth0")
        self.cluster.begin()

    def _draw(self) -> tuple[AnyFault, ...]:
        if not self._deck:
            self._deck = self._chance.sample(self._faults, len(self._faults))
        fault = self._deck.pop()
        double = self._chance.random() < DOUBLE_SHARE
        return (fault, self._chance.choice(self._faults)) if double else (fault,)

    def run(self, number: int, chosen: tuple[AnyFault, ...] = ()) -> RunResult:
        """The next run.

        :param chosen: one or two faults; empty: those whose turn it is.
        :raise TransientError: the cluster is not protected to begin with.
        """
        cluster = self.cluster
        cluster.wait(cluster.guest_answers, "the guest answers the client")
        faults = chosen or self._draw()
        attempts = itertools.count()
        while (begun := self._begin(f"load-{number}-{next(attempts)}")) is None:
            pass
        active, standby, begin_t, load = begun
        before = cluster.nodes[active], cluster.nodes[standby]
        struck = self._strike_all(faults, active, standby)
        service = self._await_service(load, max(each.heal_t for each in struck))
        load.end()
        failure = self._come_to_rest()
        history = load.history()
        totals = load.totals()
        lost = load.lost() if service else 0
        nodes = [*cluster.nodes.values(), *cluster.ended]
        takeovers = [event for each in nodes for event in each.of(TakenOver) if event.t > begin_t]
        gap = load.longest_gap(struck[0].t) if service else None
        result = RunResult(
            number=number,
            faults=tuple(str(fault) for fault in faults),
            single=len(faults) == 1 and not faults[0].doubled,
            reached=any(each.reached for each in struck),
            acknowledged=len(load.acknowledged),
            lost=len(load.acknowledged) if lost is None else lost,
            operations=len(history),
            history=explained(history),
            memory=exchanges.account(load.exchanges(), int(struck[0].t * 1e9)),
            ended_connections=totals.resets + totals.timeouts + totals.refusals if totals else None,
            verdict=judge(self._recorder, Course(cluster.form, *before, nodes, begin_t)),
            stopped=not service,
            broken=load.broken if not service else "",
            outage_ms=round(gap.ms, 1) if gap is not None else None,
            reached_standby=self._reached_standby(load, gap.key) if gap is not None else None,
            takeover_ms=round((takeovers[0].resumed_t - takeovers[0].decided_t) * 1000, 1) if takeovers else None,
            replayed_frames=sum(event.replayed_frames for event in takeovers),
            resent_frames=sum(event.resent_frames for event in takeovers),
            failure=failure,
        )
        cluster.forget_ended()
        return result

    def _begin(self, folder: str) -> tuple[str, str, float, Load] | None:
        """Load a protected guest for a while. Who is protected by whom, since when that is known, and the load.

        None: the protection did not last so long (a machine that stands still for a moment is enough); what is to be
        judged has to begin with one.
        """
        cluster = self.cluster
        active, standby = cluster.wait_protected()
        begin_t = time.monotonic()
        self._recorder.forget()
        self._client.forget()
        self._record_gate(active)
        load = Load(
            cluster.directory.path / folder,
            cluster.topology.client,
            GUEST_HOST,
            self._chance.getrandbits(31),
            cluster.directory.environment,
        )
        cluster.wait(lambda: load.poll() > ANSWERS_AFTER, "the client is answered")
        time.sleep(self._chance.uniform(*BEFORE_S))
        changes = [event for event in cluster.nodes[active].of(StateChanged) if event.t > begin_t]
        if cluster.pair == (active, standby) and not changes:
            return active, standby, begin_t, load
        load.end()
        return None

    def _reached_standby(self, load: Load, key: int) -> bool | None:
        answers = [frame for host in HOSTS for frame in self._recorder.frames(port_name(host))]
        return reached_standby(load.request(key), self._client.frames(CLIENT_PORT), answers)

    def _record_gate(self, host: str) -> None:
        with self.cluster.nodes[host].guest_network() as fd:
            place = (host, os.fstat(fd).st_ino)
            if place not in self._recorded:  # and what is recorded stays: its number is no other's
                self._recorded.add(place)
                self._recorder.add_in(gate_name(host), fd, VM)

    def _strike_all(self, faults: tuple[AnyFault, ...], active: str, standby: str) -> list[Struck]:
        """Strike, and undo in time what does not last."""
        struck = []
        for place, fault in enumerate(faults):
            if place:
                time.sleep(self._chance.uniform(0, APART_S))
            struck.append(strike(self.cluster, fault, active, standby, self._chance))
        for each in sorted(struck, key=lambda each: each.heal_t):
            time.sleep(max(0.0, each.heal_t - time.monotonic()))
            each.heal()
        return struck

    def _await_service(self, load: Load, healed_t: float) -> bool:
        """Whether the client is answered again over its connection, with nobody's help."""
        before = load.poll()
        deadline = healed_t + SERVICE_LIMIT_S
        while load.poll() < before + ANSWERS_AFTER:
            if load.broken or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _come_to_rest(self) -> str:
        """Start what has ended, until one node is protected by another and the guest can be reached; why that did not
        come about.
        """
        try:
            deadline = time.monotonic() + 60
            while self.cluster.pair is None and time.monotonic() < deadline:
                self.cluster.repair()
                time.sleep(0.2)
            self.cluster.repair()
            self.cluster.wait_protected()
            self.cluster.wait(self.cluster.guest_answers, "the guest answers the client")
        except TransientError as error:
            return str(error)
        return ""

    def start_anew(self) -> None:
        """After a run that did not come to rest: kill all nodes and the arbiter, and let them begin again.

        :raise KageError: not even that helps.
        """
        self.cluster.arbiter.kill()
        self.cluster.arbiter.start()
        for host in HOSTS:
            node: NodeProcess = self.cluster.nodes[host]
            self.cluster.strike(host, "host", signal.SIGKILL)
            node.close()
        self.cluster.repair()
        try:
            self.cluster.wait_protected()
        except TransientError as error:
            raise KageError(str(error), operation="chaos") from error
