"""The two forms in which a chaos cluster protects its VM."""

from __future__ import annotations

import enum

from kagemusha.demo.topology import ARBITER, SWITCH


class Form(enum.StrEnum):
    """Where the VM's frames are held, and who gives terms."""

    HOST = "host"  # each host holds; an etcd
    SWITCH = "switch"  # the switch does both

    @property
    def arbiter_end(self) -> str:
        """The arbiter's place on the management network."""
        return ARBITER if self is Form.HOST else SWITCH
