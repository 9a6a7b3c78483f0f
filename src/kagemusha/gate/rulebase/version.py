"""A version of a VM's rule set: what was in force, from when, by whom.

Invariant: a ``RuleVersion`` that exists is consistent. Each rule has an origin; rules stand in their author's zone
and have its prefix (``authors``); a rule has a time to lapse exactly if it has a ttl; ``text`` is the canonical text
of ``rule_set``, and small enough to be read again.

Times are wall time, in microseconds since 1970: they have to survive restarts and mean something on another host.
How long a rule with a ttl stays is counted by a monotonic clock where it is in force (``rulebook``), never longer than
its ttl, so a clock that jumps cannot keep a rule alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kagemusha.errors import ConfigError
from kagemusha.gate.rulebase.authors import Author, owns_name
from kagemusha.gate.rules.language import MAX_FILE_BYTES, serialise
from kagemusha.model.rules import MAX_COMMENT_CHARS, RuleSet

MAX_NUMBER = (1 << 63) - 1
MAX_TIME_US = 1 << 62


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a rule comes from.

    :param lapses_us: when it lapses; None: never.
    """

    author: Author
    lapses_us: int | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that has no number yet.

    :param origins: one for each rule, in order.
    :param author: who asks for it.
    """

    rule_set: RuleSet
    origins: tuple[Origin, ...]
    author: Author
    comment: str = ""


@dataclass(frozen=True, slots=True)
class RuleVersion:
    """One version of a VM's rule set.

    :param number: from 1, ascending; gaps are versions that this host never had or no longer keeps.
    :param origins: one for each rule, in order.
    :param author: who made this version.
    :param created_us: wall time.
    :param parent: the version that was in force before.
    :ivar text: canonical (``language.serialise``).
    :raise ConfigError: something is inconsistent or too large.
    """

    number: int
    rule_set: RuleSet
    origins: tuple[Origin, ...]
    author: Author
    created_us: int
    comment: str = ""
    parent: int | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.number <= MAX_NUMBER:
            raise ConfigError(f"version: {self.number} is not a number from 1")
        if self.parent is not None and not 1 <= self.parent < self.number:
            raise ConfigError(f"version {self.number}: cannot come after version {self.parent}")
        if not 0 <= self.created_us <= MAX_TIME_US:
            raise ConfigError(f"version {self.number}: {self.created_us} is not a time")
        if len(self.comment) > MAX_COMMENT_CHARS or not self.comment.isprintable():
            raise ConfigError(
                "comment: has control characters, or is too long", hint=f"{MAX_COMMENT_CHARS} characters at most"
            )
        self._check_origins()
        text = serialise(self.rule_set)
        if len(text.encode()) > MAX_FILE_BYTES:
            raise ConfigError(f"the rules are longer than {MAX_FILE_BYTES} bytes of text", hint="remove some")
        object.__setattr__(self, "text", text)

    def _check_origins(self) -> None:
        rules = self.rule_set.rules
        if len(rules) != len(self.origins):
            raise ConfigError(f"version {self.number}: {len(rules)} rules, {len(self.origins)} origins")
        zone = 0
        for rule, origin in zip(rules, self.origins, strict=True):
            kind = origin.author.kind
            if kind.zone < zone:
                raise ConfigError(f"rule {rule.name!r}: a {kind.value}'s rule stands behind another kind's")
            zone = kind.zone
            if not owns_name(kind, rule.name):
                whose = f"begins with {kind.prefix!r}" if kind.prefix else "is reserved for guests and detectors"
                raise ConfigError(f"rule {rule.name!r}: the name of a {kind.value}'s rule {whose}")
            if (rule.ttl_s is None) != (origin.lapses_us is None):
                raise ConfigError(f"rule {rule.name!r}: a time to lapse and a ttl go together")
            if origin.lapses_us is not None and not 0 <= origin.lapses_us <= MAX_TIME_US:
                raise ConfigError(f"rule {rule.name!r}: {origin.lapses_us} is not a time")

    @staticmethod
    def of(draft: Draft, number: int, created_us: int, parent: int | None) -> RuleVersion:
        """The draft as a version.

        :raise ConfigError: the draft is inconsistent or too large.
        """
        return RuleVersion(number, draft.rule_set, draft.origins, draft.author, created_us, draft.comment, parent)

    def same_rules(self, draft: Draft) -> bool:
        """Whether the draft would change nothing: same rules by the same authors, lapsing at the same time."""
        return self.rule_set == draft.rule_set and self.origins == draft.origins
