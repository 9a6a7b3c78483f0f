"""One switch, two hosts, and everything between them that can be late, lost, cut or repeated: a model for tests.

The machines are the product's; what is here is what surrounds them: connections that deliver in order, and that may be
found dead late or with words still in them; a gate whose answers take time; claims that outlive the switch. It judges:

* I2: no frame is taken of a guest but of the holder of the newest term that was answered;
* I1: a frame that was sent under protection leaves only when its epoch is committed, or its guest has won the right to
  go on alone; and none leaves after another holder's claim was answered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kagemusha.model.ids import NO_EPOCH, NO_TERM, Epoch, Term
from kagemusha.protocol import gate, switch
from kagemusha.protocol import switch_host as host
from kagemusha.protocol import switch_words as words
from kagemusha.protocol.switch_words import Mode

BOUND = 1 << 20


@dataclass
class Guest:
    """A running guest. ``holder``: its name in claims. ``committed``: what its standby has, in truth."""

    holder: str
    node: str
    epoch: Epoch
    protected: bool = False
    may_be_alone: bool = True
    committed: Epoch = NO_EPOCH


@dataclass(frozen=True)
class Frame:
    """What a guest sent. ``protected``: it must not leave before its epoch's commit."""

    guest: Guest = field(hash=False)
    epoch: Epoch
    protected: bool


@dataclass(eq=False)
class Connection:
    """``up``: said by the host and not heard by the switch yet. ``open``: as the host sees it."""

    node: str
    up: deque[words.Event] = field(default_factory=deque)
    down: deque[host.Event | words.AnswerClaim] = field(default_factory=deque)
    open: bool = True
    session: int = words.NO_SESSION
    dead: bool = False


class Gate:
    """The frames at the switch: taken from one node, held, let go. Orders are done when it works."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.owner: str | None = None
        self.taken = True
        self.lose()

    def lose(self) -> None:
        self._data = gate.initial(BOUND)
        self._frames: deque[Frame] = deque()
        self._orders: deque[gate.Event] = deque()
        self.reports: deque[words.SealReported] = deque()

    def arrive(self, frame: Frame) -> None:
        if frame.guest.node != self.owner or not self.taken:
            return
        assert frame.guest.holder == self._world.answered[1], "a frame of a guest that another has superseded"
        self._frames.append(frame)
        self._step(gate.FramesArrived((1,)))

    def order(self, event: gate.Event) -> None:
        self._orders.append(event)

    def work(self, orders: int = 1 << 30) -> None:
        while self._orders and orders:
            orders -= 1
            self._step(self._orders.popleft())

    def at_once(self, event: gate.Event) -> None:
        self.work()
        self._step(event)

    @property
    def busy(self) -> bool:
        return bool(self._orders)

    @property
    def held(self) -> int:
        return len(self._frames)

    def _step(self, event: gate.Event) -> None:
        self._data, effects = gate.advance(self._data, event)
        for effect in effects:
            match effect:
                case gate.Release(frames) | gate.Forward(frames):
                    for _ in range(frames):
                        self._world.leaves(self._frames.popleft())
                    self._data, _ = gate.advance(self._data, gate.FramesWritten(frames, 0, frames))
                case gate.Discard(frames):
                    for _ in range(frames):
                        self._frames.pop()
                case gate.ReportSealed(_, frames, size, dropped):
                    self.reports.append(words.SealReported(frames, size, dropped))


@dataclass
class Host:
    """A node: its guest, if one runs here, and its worker's machine; or a standby's knowledge of the other's guest."""

    name: str
    guest: Guest | None = None
    machine: host.Data | None = None
    worker: Connection | None = None
    side: Connection | None = None
    standing: bool = False
    claiming: Term = NO_TERM
    life: int = 0


class World:
    """All of it. Its methods are what can happen; a test chooses when."""

    def __init__(self) -> None:
        self.claims: dict[Term, str] = {}
        self.answered: tuple[Term, str] = (NO_TERM, "")
        self.switch = switch.initial()
        self.registered = False
        self.connections: list[Connection] = []
        self.gate = Gate(self)
        self.hosts = {name: Host(name) for name in "ab"}
        self.on_the_way: dict[str, deque[Frame]] = {name: deque() for name in "ab"}
        self.shipped: deque[tuple[Guest, Epoch, int]] = deque()
        self.acks: deque[tuple[Guest, Epoch]] = deque()
        self.left: list[Frame] = []
        self._sessions = 0
        self.crash_after: int | None = None

    def leaves(self, frame: Frame) -> None:
        assert frame.guest.holder == self.answered[1], "a frame leaves after another was given the VM"
        if frame.protected and not frame.guest.may_be_alone:
            assert frame.epoch <= frame.guest.committed, "a frame leaves before its commit"
        self.left.append(frame)

    # --- hosts --------------------------------------------------------------------------------------------------------

    def boot(self, name: str, term: Term, first_epoch: Epoch) -> None:
        """A guest runs there from now on, alone."""
        node = self.hosts[name]
        node.guest = Guest(f"{name}/{node.life}", name, first_epoch)
        node.machine = host.initial(term, first_epoch)
        node.standing = False
        self.on_the_way[name].clear()  # of a guest that died long before
        self.tell(node, host.ModeWanted(Mode.ALONE))

    def tell(self, node: Host, event: host.Event) -> None:
        assert node.machine is not None
        node.machine, effects = host.advance(node.machine, event)
        for effect in effects:
            self._do_at_host(node, effect)

    def _do_at_host(self, node: Host, effect: host.Effect) -> None:
        up = node.worker.up if node.worker is not None else deque[words.Event]()
        guest = node.guest
        assert guest is not None
        match effect:
            case host.SendRegister(session, term, first):
                up.append(words.RegisterAsked(term, guest.holder, session, first, node.name))
            case host.SendSeal(session, epoch):
                up.append(words.SealAsked(session, epoch))
            case host.SendRelease(session, epoch):
                up.append(words.CommitTold(session, epoch))
            case host.SendMode(session, mode):
                up.append(words.ModeAsked(session, mode))
            case host.GoOn(epoch, session):
                node.standing = False
                guest.epoch = Epoch(epoch + 1)
                if guest.protected:
                    self.shipped.append((guest, epoch, session))
            case host.ModeInForce(mode):
                if mode is Mode.HOLDING and node.machine is not None and node.machine.mode is Mode.HOLDING:
                    guest.protected, guest.may_be_alone = True, False
            case host.DropConnection():
                self._forget_connection(node)
            case host.ReportSuperseded():
                self._guest_ends(node)

    def _guest_ends(self, node: Host) -> None:
        node.guest, node.machine, node.standing, node.claiming = None, None, False, NO_TERM
        node.life += 1

    def _forget_connection(self, node: Host) -> None:
        if node.worker is not None:
            node.worker.open = False
            node.worker.down.clear()
            node.worker = None

    def connect(self, name: str, which: str) -> None:
        """A connection comes about, if there is none."""
        node = self.hosts[name]
        if getattr(node, which) is not None or (which == "worker" and node.machine is None):
            return
        connection = Connection(name)
        self.connections.append(connection)
        setattr(node, which, connection)
        if which == "worker":
            self.tell(node, host.Connected(self._fresh()))

    def cut(self, name: str, which: str) -> None:
        """The host's end is gone; what it has said may still be heard, and the switch finds out later."""
        node = self.hosts[name]
        connection: Connection | None = getattr(node, which)
        if connection is None:
            return
        connection.open = False
        connection.down.clear()
        setattr(node, which, None)
        if which == "worker" and node.machine is not None and node.machine.state in host.LIVE:
            self.tell(node, host.ConnectionLost())

    def _fresh(self) -> int:
        self._sessions += 1
        return self._sessions

    def hear_at_host(self, name: str, which: str) -> None:
        """The oldest word of the switch is heard."""
        node = self.hosts[name]
        connection: Connection | None = getattr(node, which)
        if connection is None or not connection.down:
            return
        said = connection.down.popleft()
        if isinstance(said, words.AnswerClaim):
            self._claim_answered(node, said)
        elif node.machine is not None and connection is node.worker:
            self.tell(node, said)

    def _claim_answered(self, node: Host, answer: words.AnswerClaim) -> None:
        if answer.term != node.claiming:
            return
        node.claiming = NO_TERM
        if answer.holder != f"{node.name}/{node.life}":
            if node.guest is not None:
                self.tell(node, host.SupersededTold(answer.term))
        elif node.guest is None:
            other = self._other(node).guest
            self.boot(node.name, answer.term, Epoch(1 if other is None else other.committed + 1))
        else:  # its standby is lost
            node.guest.may_be_alone, node.guest.protected = True, False
            self.tell(node, host.ModeWanted(Mode.ALONE))

    def _other(self, node: Host) -> Host:
        return self.hosts["b" if node.name == "a" else "a"]

    def claim(self, name: str) -> None:
        """It takes the other for dead: a standby, a primary that waits for its standby, or a node without a guest."""
        node = self.hosts[name]
        if node.side is None or (node.guest is not None and not node.guest.protected):
            return
        other = self._other(node).guest
        if node.guest is None and other is not None and not (other.protected and other.committed):
            return
        if node.standing:
            return
        if node.claiming == NO_TERM:
            node.claiming = Term(max(self.claims, default=NO_TERM) + 1)
        if node.guest is None:  # from now on it acknowledges nothing
            self.shipped.clear()
        node.side.up.append(words.ClaimAsked(node.claiming, f"{name}/{node.life}", None))

    def protect(self, name: str) -> None:
        """A guest that runs alone gets a standby: its frames have to be held before."""
        node = self.hosts[name]
        if node.guest is None or node.guest.protected or node.machine is None or self._other(node).guest is not None:
            return
        if node.machine.state is host.State.REGISTERED and node.machine.mode is Mode.ALONE:
            self.tell(node, host.ModeWanted(Mode.HOLDING))

    def seal(self, name: str) -> None:
        """The guest stands."""
        node = self.hosts[name]
        if node.guest is None or node.machine is None or node.standing or node.claiming:
            return
        node.standing = True
        self.tell(node, host.SealWanted(node.guest.epoch))

    def overdue(self, name: str) -> None:
        node = self.hosts[name]
        if node.machine is not None and node.machine.state is host.State.SEALING:
            self.tell(node, host.SealOverdue())

    def send(self, name: str) -> None:
        """The guest sends a frame, unless it stands."""
        node = self.hosts[name]
        if node.guest is not None and not node.standing:
            self.on_the_way[name].append(Frame(node.guest, node.guest.epoch, node.guest.protected))

    def standby_commits(self) -> None:
        """The oldest checkpoint on its way is whole: the standby says so to the primary and to the switch."""
        if not self.shipped:
            return
        guest, epoch, session = self.shipped.popleft()
        guest.committed = max(guest.committed, epoch)
        self.acks.append((guest, epoch))
        side = self.hosts["b" if guest.node == "a" else "a"].side
        if session and side is not None:
            side.up.append(words.CommitTold(session, epoch))

    def ack_arrives(self, lost: bool) -> None:
        if self.acks:
            guest, epoch = self.acks.popleft()
            node = self.hosts[guest.node]
            if not lost and node.guest is guest and node.machine is not None:
                self.tell(node, host.CommitLearned(epoch))

    def guest_dies(self, name: str) -> None:
        """Its host has died and comes back; what it had said may still arrive."""
        node = self.hosts[name]
        if node.guest is not None:
            self.cut(name, "worker")
            self._guest_ends(node)
            self.shipped.clear()

    # --- the switch ---------------------------------------------------------------------------------------------------

    def frame_arrives(self, name: str) -> None:
        if self.on_the_way[name]:
            self.gate.arrive(self.on_the_way[name].popleft())

    def hear_at_switch(self, index: int) -> None:
        """The next word of one of the connections is heard, or that it is dead."""
        living = [each for each in self.connections if not each.dead and (each.up or not each.open)]
        if not living:
            return
        connection = living[index % len(living)]
        if connection.up:
            self._serve(connection.up.popleft(), connection)
        else:
            connection.dead = True
            if connection.session != words.NO_SESSION:
                self._serve(words.ConnectionLost(connection.session), connection)

    def lose_words(self, index: int) -> None:
        """A connection that is cut loses what it had not delivered."""
        cut = [each for each in self.connections if not each.open and each.up]
        if cut:
            cut[index % len(cut)].up.clear()

    def gate_reports(self) -> None:
        if self.gate.reports:
            self._serve(self.gate.reports.popleft(), None)

    def lose_gate(self) -> None:
        if self.switch.state is not words.State.UNREGISTERED:
            self.gate.lose()
            self._serve(words.GateLost(), None)

    def _serve(self, event: words.Event, connection: Connection | None) -> None:
        if isinstance(event, words.ClaimAsked):
            event = words.ClaimAsked(event.term, event.claimant, self.claims.get(event.term))
        if isinstance(event, (words.SealAsked, words.ModeAsked)) and (
            connection is None or connection.session != event.session
        ):
            return  # the server asks for the connection that has registered
        self.switch, effects = switch.advance(self.switch, event)
        for effect in effects:
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after < 0:
                    self.restart()
                    return
            self._do_at_switch(effect, connection)

    def restart(self) -> None:
        """The switch has died and comes back: frames, sessions and connections are gone, claims stay."""
        self.crash_after = None
        self.gate.lose()
        self.gate.owner = None
        newest = max(self.claims, default=NO_TERM)
        self.switch = switch.initial(newest, self.claims.get(newest, ""), registered=self.registered)
        for connection in self.connections:
            connection.dead, connection.up = True, deque()
        self.connections.clear()
        for name in "ab":
            self.cut(name, "worker")
            self.cut(name, "side")

    def _do_at_switch(self, effect: words.Effect, connection: Connection | None) -> None:
        match effect:
            case words.RecordClaim(term, holder):
                assert term not in self.claims, "a term is given twice"
                self.claims[term] = holder
            case words.Fence():
                self.gate.owner = None
            case words.DiscardHeld():
                self.gate.at_once(gate.DiscardRequested())
            case words.HoldOutput():
                self.gate.taken = True
                self.gate.at_once(gate.HoldRequested())
            case words.PassOutput():
                self.gate.taken = True
                self.gate.at_once(gate.PassRequested())
            case words.CloseOutput():
                self.gate.taken = False
            case words.SealOutput(epoch):
                self.gate.order(gate.SealEpoch(epoch))
            case words.ReleaseOutput(epoch):
                self.gate.order(gate.EpochCommitted(epoch))
            case words.AnswerClaim(term, holder):
                self._answer(term, holder)
                if connection is not None:
                    connection.down.append(effect)
            case words.SetOwner(port):
                self.gate.owner = port
            case _:
                self._tell(effect, connection)

    def _answer(self, term: Term, holder: str) -> None:
        assert self.claims.get(term) == holder, "an answer that a restart would forget"
        if term > self.answered[0]:
            self.answered = (term, holder)

    def _tell(self, effect: words.Effect, connection: Connection | None) -> None:
        match effect:
            case words.TellRegistered(session, _):
                assert connection is not None
                self.registered = True
                connection.session = session
                self._answer(self.switch.newest, self.switch.holder)
                connection.down.append(host.RegisteredTold(session))
            case words.TellSealed(session, epoch):
                self._down(session, host.SealedTold(session, epoch))
            case words.TellMode(session, mode):
                self._down(session, host.ModeTold(session, mode))
            case words.EndSession(session, term, superseded):
                if superseded:
                    self._down(session, host.SupersededTold(term))
                self._break(session)
            case words.Refuse(code, _, _, term) if connection is not None and code is words.Refusal.TERM:
                connection.down.append(host.SupersededTold(term))

    def _down(self, session: int, event: host.Event) -> None:
        for connection in self.connections:
            if connection.session == session and connection.open:
                connection.down.append(event)

    def _break(self, session: int) -> None:
        """The session's host has to register anew; it hears of that when it has heard what came before."""
        for connection in self.connections:
            if connection.session == session:
                connection.session = words.NO_SESSION
