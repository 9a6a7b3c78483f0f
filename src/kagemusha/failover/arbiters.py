"""The arbiter that a configuration asks for."""

from __future__ import annotations

from kagemusha.errors import ConfigError
from kagemusha.failover.arbiter import Arbiter
from kagemusha.failover.file_arbiter import FileArbiter
from kagemusha.failover.switch_arbiter import SwitchArbiter
from kagemusha.model.config import ArbiterTable, SwitchTable, TlsTable


def make_arbiter(
    table: ArbiterTable, *, switch: SwitchTable | None = None, tls: TlsTable | None = None, node: str = ""
) -> Arbiter | None:
    """None if there is to be none.

    :param switch, tls, node: for an arbiter that is the switch.
    :raise ConfigError: a file or folder that it names cannot be used.
    """
    match table.kind:
        case "none":
            return None
        case "file":
            assert table.directory is not None
            return FileArbiter(table.directory)
        case "switch":
            if switch is None or tls is None:
                raise ConfigError("[switch] is missing", operation="open the arbiter")
            return SwitchArbiter(switch.address, tls, node=node, timeout_s=table.timeout_ms / 1000)
        case "etcd":
            # What HTTP needs takes long to load, and nobody else needs it.
            from kagemusha.failover.etcd_arbiter import EtcdArbiter

            return EtcdArbiter(table)
