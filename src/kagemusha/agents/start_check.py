"""What the operator learns when a worker starts, and not when its guest has nobody else.

A standby needs some of what its configuration names only when it has taken over. A look at the start does not make that
certain: files change, and disks fill. What is missing then does not end the guest (``primary_parts``, ``vm_rules``).
"""

from __future__ import annotations

from kagemusha.errors import ConfigError, UnsupportedError
from kagemusha.gate.classification import try_out
from kagemusha.gate.rulebase.configured import configured_rules, source_key
from kagemusha.model.config import Config
from kagemusha.transport import tls


def check(config: Config) -> None:
    """Read the certificates for both roles, and the rules; have libpcap and the kernel try these.

    :raise ConfigError: something is missing or wrong; names the key.
    :raise UnsupportedError: the kernel refuses the rules.
    """
    tls.context(config.tls, "server")
    tls.context(config.tls, "client")
    rules = configured_rules(config.rules)
    try:
        try_out(rules, config.rules.addresses(config.network.mac))
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{source_key(config.rules)}: {error}", operation="try the configured rules") from error
