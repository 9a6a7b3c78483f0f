"""The one error tree. A class names what the handler can do about it.

::

    KageError                    anything of ours; never raised itself
    ├── ConfigError              the operator's input is wrong: fix the named key and start again
    ├── UnsupportedError         this VM, host or kernel cannot be protected as it is; says why
    ├── TransientError           may go away by itself: retry (connection refused, peer restarting)
    ├── PeerError                the other side sent something wrong or broke off: drop the session
    │   └── WireError            bytes that are not a valid message: nothing of them was used
    ├── GuestError               QEMU refused or failed an operation
    │   └── GuestGoneError       the QEMU process is no longer there
    ├── FencedError              another instance holds a newer term: this one must fall silent
    ├── RefusedError             what was asked for cannot be done now; nothing has changed
    └── BugError                 a rule of ours was broken; state is unchanged, report it
        └── ProtocolError        an event that the machine's state has no transition for

Every error carries the operation it interrupted, the epoch if there was one, and a hint that tells
the operator what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class KageError(Exception):
    """Base of all our errors.

    :param message: what went wrong, naming the object (key, device, peer) and the cause.
    :param operation: what was being done, as a short verb phrase.
    :param epoch: the epoch concerned, if any.
    :param hint: what the operator can do.
    :cvar exit_code: of a command that ends with it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        operation: str | None = None,
        epoch: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.epoch = epoch
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.message]
        if self.operation:
            parts.insert(0, f"{self.operation}:")
        if self.epoch is not None:
            parts.append(f"(epoch {self.epoch})")
        if self.hint:
            parts.append(f"— {self.hint}")
        return " ".join(parts)


class ConfigError(KageError):
    """The operator's configuration or command line is wrong."""

    exit_code = 2


class UnsupportedError(KageError):
    """The VM, host or kernel lacks something that protection needs."""

    exit_code = 3


class TransientError(KageError):
    """The operation may succeed when tried again."""

    exit_code = 6


class PeerError(KageError):
    """The other side misbehaved or broke off."""

    exit_code = 6


class WireError(PeerError):
    """Received bytes are corrupt, truncated, foreign or of another version."""


class GuestError(KageError):
    """QEMU refused or failed an operation."""

    exit_code = 5


class GuestGoneError(GuestError):
    """The QEMU process is gone."""


class FencedError(KageError):
    """A newer term exists: this instance must not go on."""

    exit_code = 4


class RefusedError(KageError):
    """A worker or a switch does not do, in its present state, what an operator asks for."""

    exit_code = 7


class BugError(KageError):
    """A rule of our own was broken."""


class ProtocolError(BugError):
    """A machine got an event its state has no transition for. The state is unchanged."""
