"""Which node reaches each fault point, and what has to happen for it: chaos strikes at all of them.

A point that is on the way of every epoch needs nothing. One that lies in a takeover, or in the search for another
standby, needs a death first: two things fail then, and the service may stop.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from kagemusha.chaos.form import Form
from kagemusha.model.faults import WRITING, Fault, FaultAction

FREQUENT_TIMES = 20
"""A point of the cycle strikes at one of so many times that it is reached, for the epochs are not all alike."""


class Side(enum.StrEnum):
    """The node that is armed."""

    PRIMARY = "primary"  # runs the VM
    STANDBY = "standby"  # protects it
    THIRD = "third"  # the host that protects it next
    SWITCH = "switch"  # no node: the agent that holds its output


class Trigger(enum.Enum):
    """What is done after a point was armed, so that it is reached."""

    NOTHING = "nothing"  # the epochs come by there
    PRIMARY_DIES = "the primary host dies"  # the standby takes over
    STANDBY_DIES = "the standby host dies"  # the primary claims, and looks for another
    SWITCHOVER = "a switchover is asked for"


@dataclass(frozen=True, slots=True)
class PointFault:
    """A process ends or stands still at one of its fault points.

    :ivar form: the only one in which it is reached there; None: both.
    """

    fault: Fault
    action: FaultAction
    side: Side
    trigger: Trigger
    form: Form | None

    def __str__(self) -> str:
        return f"{self.action.value} {self.side.value} at {self.fault.value}"

    @property
    def explanation(self) -> str:
        """For people."""
        after = "" if self.trigger is Trigger.NOTHING else f"; before, {self.trigger.value}"
        return f"{self.fault.explanation}{after}"

    @property
    def doubled(self) -> bool:
        """Two things fail. A node that was about to become the standby is none whose end may stop the service."""
        return self.trigger in (Trigger.PRIMARY_DIES, Trigger.STANDBY_DIES) and self.side is not Side.THIRD

    @property
    def times(self) -> int:
        """The most often that the point may have to be reached."""
        return FREQUENT_TIMES if self.trigger is Trigger.NOTHING else 1


CYCLE_OF_PRIMARY = (
    *(Fault.PRIMARY_STOPPED, Fault.PRIMARY_SEALING, Fault.PRIMARY_SAVED, Fault.PRIMARY_CAPTURED, Fault.PRIMARY_RESUMED),
    *(Fault.PRIMARY_COMMITTED, Fault.PRIMARY_RELEASED),
    *(Fault.SHIP_BEGUN, Fault.SHIP_ALL_BUT_END, Fault.SHIP_SENT, Fault.SHIP_ACKNOWLEDGED),
)
CYCLE_OF_GATE = (Fault.GATE_SEALING, Fault.GATE_RELEASING)
CYCLE_OF_SWITCH = (Fault.SWITCH_SEALING, Fault.SWITCH_SEALED, Fault.SWITCH_RELEASED)
CYCLE_OF_STANDBY = (
    *(Fault.STANDBY_BEGUN, Fault.STANDBY_PART, Fault.STANDBY_WHOLE, Fault.STANDBY_ACKNOWLEDGED),
    *(Fault.STANDBY_APPLYING, Fault.STANDBY_APPLIED),
)
CLAIM = (Fault.CLAIMS_ASKING, Fault.CLAIMS_ANSWERED, Fault.TERM_RECORDING, Fault.TERM_WRITTEN, Fault.TERM_RECORDED)
TAKEOVER = (
    *(Fault.STANDBY_DECIDED, Fault.STANDBY_CLAIM_SENT, Fault.STANDBY_CLAIM_WON, Fault.STANDBY_REPLAYED),
    *(Fault.STANDBY_LOADED, Fault.STANDBY_ACTIVATED, Fault.STANDBY_OPENED, Fault.NODE_SUCCEEDS, *CLAIM),
)
TAKEOVER_OF_SWITCH = (
    *(Fault.SWITCH_RECORDING, Fault.SWITCH_RECORDED, Fault.SWITCH_FENCED),
    *(Fault.SWITCH_CLAIM_ANSWERED, Fault.SWITCH_REGISTERED),
)
LOSS = (
    *(Fault.PRIMARY_CLAIM_SENT, Fault.PRIMARY_CLAIM_WON, *CLAIM),
    *(Fault.PRIMARY_CONNECTED, Fault.SHIP_SYNC_SENT, Fault.PRIMARY_HOLDING),
)
PLACES: tuple[tuple[Form | None, Side, Trigger, tuple[Fault, ...]], ...] = (
    (None, Side.PRIMARY, Trigger.NOTHING, CYCLE_OF_PRIMARY),
    (Form.HOST, Side.PRIMARY, Trigger.NOTHING, CYCLE_OF_GATE),
    (Form.SWITCH, Side.SWITCH, Trigger.NOTHING, (*CYCLE_OF_GATE, *CYCLE_OF_SWITCH)),
    (None, Side.STANDBY, Trigger.NOTHING, CYCLE_OF_STANDBY),
    (Form.SWITCH, Side.STANDBY, Trigger.NOTHING, (Fault.STANDBY_SWITCH_TOLD,)),
    (None, Side.STANDBY, Trigger.PRIMARY_DIES, TAKEOVER),
    (Form.SWITCH, Side.STANDBY, Trigger.PRIMARY_DIES, (Fault.STANDBY_REGISTERED,)),
    (Form.SWITCH, Side.SWITCH, Trigger.PRIMARY_DIES, TAKEOVER_OF_SWITCH),
    (None, Side.PRIMARY, Trigger.STANDBY_DIES, LOSS),
    (None, Side.THIRD, Trigger.STANDBY_DIES, (Fault.STANDBY_EMPTIED, Fault.STANDBY_SYNCING)),
    (
        None,
        Side.PRIMARY,
        Trigger.SWITCHOVER,
        (Fault.PRIMARY_GUEST_KILLED, Fault.PRIMARY_HANDING_OVER, Fault.SHIP_HAND_OVER_SENT),
    ),
)


def _enumerate() -> Iterator[PointFault]:
    for form, side, trigger, faults in PLACES:
        for fault in faults:
            for action in FaultAction:
                if action is not FaultAction.FULL or fault in WRITING:
                    yield PointFault(fault, action, side, trigger, form)


POINT_FAULTS = tuple(_enumerate())
