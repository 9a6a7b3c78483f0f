"""A rule version as a switch needs it: addresses in place of macros, which it does not know, and flows by themselves.

Who made the version, when and why is the host's business: two versions with the same rules are the same here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from kagemusha.errors import ConfigError
from kagemusha.gate.rulebase.authors import CONFIGURATION, US, AuthorKind
from kagemusha.gate.rulebase.version import Origin, RuleVersion
from kagemusha.gate.rules.macros import Unknown, expand
from kagemusha.gate.rules.tokens import ScanError
from kagemusha.model.flows import TimedFlow, flow_of_rule
from kagemusha.model.rules import Rule, VmAddresses


@dataclass(frozen=True, slots=True)
class Expanded:
    """:ivar version: all rules but those of ``flows``, which are by their names."""

    version: RuleVersion
    flows: dict[str, TimedFlow]


def expanded(version: RuleVersion, addresses: VmAddresses) -> Expanded:
    """The same for whoever knows no macro. A rule that is idle (see ``rules.matcher``) is left out.

    :param version: one that ``rules.matcher.bind`` takes, so a rule that is idle transmits.
    :raise ConfigError: a rule cannot be expanded, or is too long then.
    """
    rules, origins, flows = [], [], {}
    for rule, origin in zip(version.rule_set.rules, version.origins, strict=True):
        flow = _flow(rule, origin)
        if flow is not None:
            flows[flow.flow.name] = flow
            continue
        try:
            text = expand(rule.match, addresses)
        except ScanError as error:
            raise ConfigError(f"rule {rule.name!r}: match: {error.fault.cause}", hint=error.fault.remedy) from error
        if not isinstance(text, Unknown):
            rules.append(replace(rule, match=text))
            origins.append(origin)
    rule_set = replace(version.rule_set, rules=tuple(rules))
    return Expanded(RuleVersion(1, rule_set, tuple(origins), CONFIGURATION, 0), flows)


def _flow(rule: Rule, origin: Origin) -> TimedFlow | None:
    """The flow that a detector has made this rule of; None: it is another."""
    if origin.author.kind is not AuthorKind.DETECTOR or rule.ttl_s is None or origin.lapses_us is None:
        return None
    name = rule.name.removeprefix(AuthorKind.DETECTOR.prefix)
    flow = flow_of_rule(name, rule.match, rule.class_name, rule.ttl_s, rule.comment)
    if flow is None:
        return None
    left_s = min(max(0.0, origin.lapses_us / US - time.time()), rule.ttl_s)
    return TimedFlow(flow, origin.lapses_us, time.monotonic() + left_s)
