"""The rules in force at one gate: rule set in, program in the slot, counts out.

Invariant (I1): a rule set comes into force as a whole, with one atomic exchange, or not at all. Does not know where
rule sets come from (see ``rulebase``), nor what becomes of held frames (see ``loop``).
"""

from __future__ import annotations

import os
from typing import Protocol

from kagemusha.gate.rules.classifier import ClassifierRule, Ending, assemble, load, reporting
from kagemusha.gate.rules.counters import CounterReading, RuleCounters
from kagemusha.gate.rules.matcher import bind
from kagemusha.kernel.bpf_slot import ProgramSlot
from kagemusha.model.rules import MAX_RULES, RuleSet, VmAddresses


class ClassifiedPath(Protocol):
    """The way of a VM's frames: ``GateNetwork`` on a host, ``switched.vm.VmPort`` on a switch."""

    @property
    def slot(self) -> ProgramSlot:
        """Of the program that says which frames are held."""

    def ending(self) -> Ending:
        """What becomes of a frame that the rules have judged."""


class Classification:
    """What a gate's frames are classified by. To be used by one process; it may be a fork of the network's."""

    def __init__(self, path: ClassifiedPath, addresses: VmAddresses) -> None:
        self._path = path
        self._addresses = addresses
        self._counters = RuleCounters(MAX_RULES)
        self._names: tuple[str, ...] = ()

    @property
    def descriptor(self) -> int:
        """Of the counters: a process that is to install rules needs it."""
        return self._counters.fd

    def install(self, rule_set: RuleSet) -> None:
        """Put a rule set into force; returns when every further frame is classified by it.

        :raise ConfigError: an expression is wrong, or all together are too much; nothing has changed.
        :raise UnsupportedError: the kernel refused the program; nothing has changed.
        """
        bound = bind(rule_set, self._addresses)
        names = tuple(rule.name for rule in rule_set.rules)
        entries = self._counters.prepare(names)
        try:
            rules = [
                ClassifierRule(None if program is None else program.instructions, rule_set.action_of(rule), entry)
                for rule, program, entry in zip(rule_set.rules, bound.programs, entries, strict=True)
            ]
            program = load(assemble(rules, rule_set.default_action, self._counters.fd, self._path.ending()))
            try:
                self._path.slot.put(program)
            finally:
                os.close(program)
        except BaseException:
            self._counters.settle(self._names)
            raise
        self._names = names
        self._counters.settle(names)

    def counts(self) -> CounterReading:
        """Frames and bytes each rule has matched since it is in force."""
        return self._counters.read()

    def close(self) -> None:
        """Give the counters back. The program stays in the slot."""
        self._counters.close()


class _NoPath:
    """Frames come by nowhere."""

    def __init__(self) -> None:
        self.slot = ProgramSlot()

    def ending(self) -> Ending:
        return reporting


def try_out(rule_set: RuleSet, addresses: VmAddresses) -> None:
    """Find out whether the rule set can come into force on this host; no frame is classified by it.

    :raise ConfigError, UnsupportedError: as :meth:`Classification.install`.
    """
    path = _NoPath()
    classification = Classification(path, addresses)
    try:
        classification.install(rule_set)
    finally:
        classification.close()
        path.slot.close()
