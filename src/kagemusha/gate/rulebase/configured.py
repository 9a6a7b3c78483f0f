"""The rules that the configuration asks for."""

from __future__ import annotations

from kagemusha.errors import ConfigError
from kagemusha.gate.rules.language import load
from kagemusha.gate.rules.profiles import load_profile
from kagemusha.model.rule_policy import DEFAULT_PROFILE, RulesTable
from kagemusha.model.rules import RuleSet


def source_key(table: RulesTable) -> str:
    """The key that says where the set is."""
    return "rules.profile" if table.file is None else "rules.file"


def configured_rules(table: RulesTable) -> RuleSet:
    """The set of ``[rules]``: its file's, its profile's, or ``strict``.

    :raise ConfigError: the file or profile is not there, or something in it is wrong; names the key.
    """
    try:
        return load_profile(table.profile or DEFAULT_PROFILE) if table.file is None else load(table.file)
    except ConfigError as error:
        raise ConfigError(f"{source_key(table)}: {error}", operation="read the configured rules") from error
