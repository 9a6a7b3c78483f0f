"""A guest's output as its primary has it: held by the gate of its host, or at the switch. As ``agents/output.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kagemusha.model.ids import Epoch, Term
from kagemusha.protocol import switch_host as host
from kagemusha.protocol.simulate.channel import Channel
from kagemusha.protocol.simulate.guest import Frame, Gate, Guest, Mode
from kagemusha.protocol.simulate.switch_client import SwitchClient
from kagemusha.protocol.simulate.wire import Message
from kagemusha.protocol.switch_words import NO_SESSION
from kagemusha.protocol.switch_words import Mode as SwitchMode

if TYPE_CHECKING:
    from kagemusha.protocol.simulate.node import Node

Sealed = Callable[[Epoch, int, list[Frame]], None]
"""Gets the epoch, the session in which the standby may tell of its commit, and what is held here."""


class Output(Protocol):
    """What the primary does with its guest's output.

    :ivar holds: it is held, or is to be.
    """

    @property
    def holds(self) -> bool: ...  # noqa: D102

    def prepare_to_hold(self) -> bool:
        """Whether :meth:`hold` can follow now."""

    def hold(self) -> None:
        """From now on everything waits for a commit."""

    def go_on_holding(self) -> None:
        """It is held already, and may have been closed."""

    def seal(self, epoch: Epoch) -> None:
        """What the guest has sent is this epoch's."""

    def release(self, epoch: Epoch) -> None:
        """The standby has acknowledged this epoch and all before."""

    def pass_all(self) -> None:
        """Let out what is held, and what comes."""

    def set_term(self, term: Term) -> None:
        """The guest runs in this term from now on."""

    def end(self) -> None:
        """The guest is not protected any more."""

    def close(self, *, silently: bool = False) -> None:
        """The worker ends. ``silently``: with all of the host."""


class HostOutput:
    """Held in this host. Under a lease, by the host's clock."""

    def __init__(self, node: Node, sealed: Sealed) -> None:
        self._node = node
        self._sealed = sealed

    @property
    def _gate(self) -> Gate:
        gate = self._node.gate
        assert isinstance(gate, Gate)
        return gate

    @property
    def holds(self) -> bool:
        """As :class:`Output` says."""
        return self._gate.mode is not Mode.PASS

    def prepare_to_hold(self) -> bool:
        """As :class:`Output` says."""
        return True

    def hold(self) -> None:
        """As :class:`Output` says."""
        self._gate.mode = Mode.HOLD
        self._gate.lease(self._node.read_clock() + self._node.world.promise.lease_ns)

    def go_on_holding(self) -> None:
        """As :class:`Output` says."""
        if self._gate.mode is Mode.CLOSED:
            self._gate.mode = Mode.HOLD

    def seal(self, epoch: Epoch) -> None:
        """As :class:`Output` says."""
        self._sealed(epoch, NO_SESSION, self._gate.seal(epoch))
        if self._node.world.weakness.release_at_seal:
            self._gate.release(epoch)

    def release(self, epoch: Epoch) -> None:
        """As :class:`Output` says."""
        self._gate.release(epoch)

    def pass_all(self) -> None:
        """As :class:`Output` says."""
        self._gate.pass_all()

    def set_term(self, term: Term) -> None:
        """Nobody else needs to know."""

    def end(self) -> None:
        """Nobody else needs to know."""

    def close(self, *, silently: bool = False) -> None:
        """There is no connection."""


class SwitchOutput:
    """Held at the switch."""

    def __init__(
        self,
        node: Node,
        guest: Guest,
        first_epoch: Epoch,
        sealed: Sealed,
        superseded: Callable[[int], None],
        *,
        in_doubt: bool,
    ) -> None:
        """:param superseded: is told of the newer term that another holds, apart from any session."""
        self._node = node
        self._sealed = sealed
        self._superseded: Callable[[int], None] | None = superseded
        holder = (node.index, guest.qemu)
        self._client = SwitchClient(node, holder, Term(node.held), first_epoch, sealed=self._on_sealed)
        if not in_doubt:
            self._client.want(SwitchMode.ALONE)
        self._channel = Channel(node.world, node.index, node.worker, self._hear)
        self._client.use(self._channel, opened=False)

    def _hear(self, message: Message) -> None:
        self._client.hear(message)
        if self._client.superseded is not None and self._superseded is not None:
            told, self._superseded = self._superseded, None
            self._node.world.agenda.later(0.0, self._node.worker, told, self._client.superseded)

    @property
    def holds(self) -> bool:
        """As :class:`Output` says."""
        return self._client.data.mode is SwitchMode.HOLDING

    def prepare_to_hold(self) -> bool:
        """As :class:`Output` says."""
        self._client.want(SwitchMode.HOLDING)
        return self._client.holding or self._node.world.weakness.holds_unasked

    def hold(self) -> None:
        """As :class:`Output` says."""
        weak = self._node.world.weakness.holds_unasked
        self._node.must(self._client.holding or weak, "the switch is not known to hold")
        self._node.gate.mode = Mode.HOLD

    def go_on_holding(self) -> None:
        """As :class:`Output` says."""
        self._node.gate.mode = Mode.HOLD

    def seal(self, epoch: Epoch) -> None:
        """As :class:`Output` says."""
        self._client.seal(epoch)

    def _on_sealed(self, epoch: Epoch, session: int) -> None:
        """The worker looks when it waits for it: after what it is doing."""
        self._node.world.agenda.later(0.0, self._node.worker, self._sealed, epoch, session, [])

    def release(self, epoch: Epoch) -> None:
        """As :class:`Output` says."""
        self._client.step(host.CommitLearned(epoch))

    def pass_all(self) -> None:
        """As :class:`Output` says."""
        self._node.gate.mode = Mode.PASS
        self._client.want(SwitchMode.ALONE)

    def set_term(self, term: Term) -> None:
        """As :class:`Output` says."""
        self._client.step(host.TermChanged(term, self._node.world.next_session()))

    def end(self) -> None:
        """As :class:`Output` says."""
        self._client.unregister()

    def close(self, *, silently: bool = False) -> None:
        """As :class:`Output` says."""
        self._channel.close(silently=silently)
