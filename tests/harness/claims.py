"""Arbiters and claimants as tests use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from tests.harness.commands import wait
from tests.harness.etcd import Etcd

from kagemusha.failover.arbiter import Arbiter
from kagemusha.failover.arbiters import make_arbiter
from kagemusha.failover.claimant import Claimant, Lost, Unanswered, Won
from kagemusha.model.config import Address, ArbiterTable, SwitchTable, TlsTable

VM = "vm1"
PATIENT_MS = 4000  # a busy machine is not an outage
AnswerT = TypeVar("AnswerT", Won, Lost, Unanswered)


def etcd_table(etcd: Etcd, **more: object) -> ArbiterTable:
    """The configuration for this cluster."""
    return ArbiterTable.model_validate({"kind": "etcd", "endpoints": etcd.endpoints, "timeout_ms": PATIENT_MS} | more)


@dataclass(frozen=True)
class SwitchClaims:
    """The configuration of hosts whose arbiter is the switch there."""

    kind: ClassVar[str] = "switch"
    address: Address


def opened(of: ArbiterTable | SwitchClaims) -> Arbiter:
    """The arbiter that it asks for."""
    if isinstance(of, SwitchClaims):
        table = ArbiterTable(kind="switch", timeout_ms=PATIENT_MS)
        arbiter = make_arbiter(table, switch=SwitchTable(address=of.address), tls=TlsTable(insecure=True), node="test")
    else:
        arbiter = make_arbiter(of)
    assert arbiter is not None
    return arbiter


def next_answer(claimant: Claimant, kind: type[AnswerT]) -> AnswerT:
    """Take answers until there is one of this kind."""
    found: list[AnswerT] = []

    def answered() -> bool:
        while not found and (answer := claimant.take()) is not None:
            if isinstance(answer, kind):
                found.append(answer)
        return bool(found)

    wait(answered, kind.__name__)
    return found[0]
