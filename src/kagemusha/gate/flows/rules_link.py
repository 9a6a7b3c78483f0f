"""The monitor's connection to the rules service: it reads what is in force, and changes the detectors' own rules.

A detector's author is ``AUTHOR``, its rules' names are the flows' behind the zone's prefix. Blocks for an answer, at
most ``ANSWER_S``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kagemusha.errors import PeerError
from kagemusha.gate.rulebase.authors import AuthorKind
from kagemusha.gate.rulebase.client import RulesClient
from kagemusha.model.flows import FlowInformation, flow_of_rule
from kagemusha.model.rules import Action

AUTHOR = "flows"
ANSWER_S = 10.0
_OWN = f"{AuthorKind.DETECTOR.value}:{AUTHOR}"
_PREFIX = AuthorKind.DETECTOR.prefix
_US = 1_000_000


class RefusedError(PeerError):
    """The rules service does not make a change; nothing has changed."""


@dataclass(frozen=True, slots=True)
class RulesInForce:
    """What the rule base says.

    :param actions: of each class.
    :param flows: that our rules were made from, each with the seconds until it lapses.
    :param strangers: names of rules of ours, without the prefix, that no flow was made from.
    """

    version: int
    actions: dict[str, Action]
    flows: tuple[tuple[FlowInformation, float], ...]
    strangers: tuple[str, ...]


class RulesLink(RulesClient):
    """A connection to a VM's rules service.

    :raise TransientError: nobody serves it.
    :raise PeerError: from every method: it broke off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, timeout_s=ANSWER_S)
        try:
            self.request({"op": "subscribe"})
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """For poll: readable when there is another version."""
        return self._socket.fileno()

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """An answer that is ok.

        :raise RefusedError: it is not.
        """
        answer = self.ask(request)
        if not answer["ok"]:
            raise RefusedError(str(answer["error"]["message"]), operation=f"{request['op']} rules")
        return answer

    def in_force(self) -> RulesInForce:
        """What is in force."""
        answer = self.request({"op": "list"})
        flows, strangers = [], []
        for each in answer["rules"]:
            if each["author"] != _OWN:
                continue
            name = each["name"].removeprefix(_PREFIX)
            left_s = 0.0 if each["lapses_us"] is None else each["lapses_us"] / _US - time.time()
            flow = None
            if each["ttl_s"] is not None:
                flow = flow_of_rule(name, each["match"], each["class"], each["ttl_s"], each["comment"])
            if flow is None:
                strangers.append(name)
            else:
                flows.append((flow, min(max(left_s, 0.0), flow.ttl_s)))
        actions = {each["name"]: Action(each["action"]) for each in answer["classes"]}
        return RulesInForce(int(answer["version"]), actions, tuple(flows), tuple(strangers))

    def add(self, flows: Sequence[FlowInformation]) -> int:
        """Add rules for flows, or make them anew; the version's number.

        :raise RefusedError: one of them, or all together.
        """
        rules = [
            {"name": _PREFIX + f.name, "match": f.expression, "class": f.class_name, "ttl": f.ttl_s, "comment": f.why}
            for f in flows
        ]
        return int(self.request({"op": "add", "detector": AUTHOR, "rules": rules, "replace": True})["version"])

    def delete(self, names: Sequence[str]) -> int:
        """Delete the rules of flows; the version's number.

        :raise RefusedError: one of them is not there any more.
        """
        wanted = [_PREFIX + name for name in names]
        return int(self.request({"op": "del", "detector": AUTHOR, "names": wanted})["version"])

    def counts(self) -> tuple[int | None, dict[str, int]]:
        """The version in force, and frames that each flow's rule has matched; None: the service has no counters."""
        try:
            answer = self.request({"op": "counters"})
        except RefusedError:
            return None, {}
        counted = {each["rule"]: each["frames"] for each in answer["counters"] if each["rule"] is not None}
        own = {name.removeprefix(_PREFIX): frames for name, frames in counted.items() if name.startswith(_PREFIX)}
        return int(answer["version"]), own
