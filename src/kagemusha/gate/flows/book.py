"""Flow information and the rules that stand for it: which to add, which to delete.

Invariants: a rule is there only for a flow that ``Guard`` has nothing against, whose class the VM's rules have, and
that has not ended or lapsed; at most ``max_flows`` at once. A flow over that number is held, and gets a rule when there
is room. Each rule has a ttl: if nobody says anything any more, the rule base itself removes it. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kagemusha.gate.flows.guard import Guard
from kagemusha.model.flow_policy import FlowsTable
from kagemusha.model.flows import FlowEnd, FlowEvent, FlowInformation
from kagemusha.model.rules import Action

MAX_KEPT = 8192
_CLOCKS_APART_S = 1.0  # the rule base counts the ttl by itself
REFRESH_SHARE = 0.5  # of its ttl that a rule has left when it is made anew


@dataclass(frozen=True, slots=True)
class RuleChanges:
    """What has to be done with the rules.

    :param add: flows whose rules are to be added, or made anew.
    :param delete: flows' names.
    """

    add: tuple[FlowInformation, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


@dataclass(frozen=True, slots=True)
class BookStatistics:
    """Totals of a book. ``refused``: flows that the guard had something against; ``crowded``: no room for them."""

    flows: int
    rules: int
    refused: int
    crowded: int


@dataclass(slots=True)
class _Rule:
    flow: FlowInformation
    until_s: float


class FlowBook:
    """The flows of a VM.

    :ivar actions: of the classes that the VM's rules have now.
    """

    def __init__(self, table: FlowsTable, guard: Guard) -> None:
        self._table = table
        self._guard = guard
        self.actions: Mapping[str, Action] = {}
        self._flows: dict[str, tuple[FlowInformation, float]] = {}
        self._rules: dict[str, _Rule] = {}
        self._strangers: set[str] = set()
        self._denied: set[str] = set()
        self._refused = self._crowded = 0

    def found(self, rules: Iterable[tuple[FlowInformation, float]], strangers: Iterable[str], now_s: float) -> None:
        """These rules of ours are in force, and no others. What is not known as a flow will be deleted.

        One that the operator has deleted does not come again for as long as its flow lasts.

        :param rules: each with the time until which it is, on the book's clock.
        :param strangers: names of rules of ours that no flow information can have made.
        """
        there = {flow.name: _Rule(flow, until_s) for flow, until_s in rules}
        for name, rule in self._rules.items():
            if name not in there and rule.until_s > now_s + _CLOCKS_APART_S and name in self._flows:
                self.deny(name)
        self._rules = there
        self._strangers = set(strangers)

    def deny(self, name: str) -> None:
        """This flow is not to have a rule for as long as it lasts."""
        self._denied.add(name)

    def take(self, events: Iterable[FlowEvent], now_s: float) -> None:
        """Note what detectors say."""
        for event in events:
            if isinstance(event, FlowEnd):
                self._flows.pop(event.name, None)
                self._denied.discard(event.name)
            elif event.name in self._flows or len(self._flows) < MAX_KEPT:
                self._flows[event.name] = event, now_s + event.ttl_s
            else:
                self._crowded += 1

    def changes(self, now_s: float) -> RuleChanges:
        """What has to be done so that the rules are what they should be."""
        for name in [name for name, (_, until_s) in self._flows.items() if until_s <= now_s]:
            del self._flows[name]
            self._denied.discard(name)
        wanted = self._wanted()
        delete = tuple(name for name in (*self._rules, *self._strangers) if name not in wanted)
        add = []
        for name, flow in wanted.items():
            rule = self._rules.get(name)
            if rule is None or rule.flow != flow or self._is_old(rule, self._flows[name][1], now_s):
                add.append(flow)
        return RuleChanges(tuple(add), delete)

    def _wanted(self) -> dict[str, FlowInformation]:
        wanted: dict[str, FlowInformation] = {}
        self._refused = self._crowded = 0
        # those that have a rule first: a flow that came later pushes none out
        for name in sorted(self._flows, key=lambda name: name not in self._rules):
            flow, _ = self._flows[name]
            if name in self._denied or flow.class_name is None or flow.class_name not in self.actions:
                continue
            if self._guard.refusal(flow, transmits=self.actions[flow.class_name] is Action.TRANSMIT) is not None:
                self._refused += 1
            elif len(wanted) < self._table.max_flows:
                wanted[name] = flow
            else:
                self._crowded += 1
        return wanted

    def _is_old(self, rule: _Rule, flow_until_s: float, now_s: float) -> bool:
        return rule.until_s - now_s < REFRESH_SHARE * rule.flow.ttl_s and flow_until_s > rule.until_s

    def made(self, changes: RuleChanges, now_s: float) -> None:
        """The changes have come into force."""
        for name in changes.delete:
            self._rules.pop(name, None)
            self._strangers.discard(name)
        for flow in changes.add:
            self._rules[flow.name] = _Rule(flow, now_s + flow.ttl_s)

    def statistics(self) -> BookStatistics:
        """Totals now."""
        return BookStatistics(len(self._flows), len(self._rules), self._refused, self._crowded)
