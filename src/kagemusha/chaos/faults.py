"""The faults that can be drawn, and in which form each makes sense. ``strike.py`` applies them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Self

from kagemusha.chaos.fault_points import POINT_FAULTS, PointFault
from kagemusha.chaos.form import Form


class ChaosFault(enum.StrEnum):
    """What can happen besides. The first word after the verb says where: the node that runs the VM, its standby, the
    arbiter, or the switch that holds. A switch's agent is the arbiter, too.
    """

    explanation: str
    doubled: bool
    form: Form | None

    def __new__(cls, value: str, explanation: str, doubled: bool = False, form: Form | None = None) -> Self:
        """:param doubled: two things fail: the service may stop, nothing may be corrupted.
        :param form: the only one in which it makes sense; None: in both.
        """
        fault = str.__new__(cls, value)
        fault._value_ = value
        fault.explanation, fault.doubled, fault.form = explanation, doubled, form
        return fault

    KILL_PRIMARY_HOST = "kill primary host", "all processes on the host that runs the VM"
    KILL_PRIMARY_QEMU = "kill primary qemu", "the VM itself"
    KILL_PRIMARY_WORKER = "kill primary worker", "the epoch loop, QEMU's parent"
    KILL_PRIMARY_GATE = "kill primary gate", "the process that holds output", False, Form.HOST
    KILL_PRIMARY_SHIP = "kill primary ship", "the process that sends checkpoints and heartbeats"
    KILL_PRIMARY_RULES = "kill primary rules", "the process of the rule base"
    KILL_PRIMARY_CLAIMS = "kill primary claims", "the process that asks the arbiter"
    KILL_PRIMARY_INBOUND = "kill primary inbound", "the process that copies frames to the guest", False, Form.HOST
    FREEZE_PRIMARY_HOST = "freeze primary host", "all its processes stand still for a while, then go on"
    FREEZE_PRIMARY_QEMU = "freeze primary qemu", "the VM stands still for a while"
    FREEZE_PRIMARY_WORKER = "freeze primary worker", "the epoch loop stands still for a while"
    FREEZE_PRIMARY_GATE = "freeze primary gate", "held output stands still for a while", False, Form.HOST
    FREEZE_PRIMARY_SHIP = "freeze primary ship", "checkpoints and heartbeats stand still for a while"
    FREEZE_PRIMARY_RULES = "freeze primary rules", "the rule base stands still for a while"
    FREEZE_PRIMARY_CLAIMS = "freeze primary claims", "the claims process stands still for a while"
    FREEZE_PRIMARY_INBOUND = (
        "freeze primary inbound",
        "the copying of frames stands still for a while",
        False,
        Form.HOST,
    )
    KILL_STANDBY_HOST = "kill standby host", "all processes on the host that protects the VM"
    KILL_STANDBY_QEMU = "kill standby qemu", "the QEMU that waits"
    KILL_STANDBY_WORKER = "kill standby worker", "the process that receives and applies"
    KILL_STANDBY_CLAIMS = "kill standby claims", "the process that would ask the arbiter"
    FREEZE_STANDBY_HOST = "freeze standby host", "all its processes stand still for a while"
    FREEZE_STANDBY_QEMU = "freeze standby qemu", "the QEMU that waits stands still for a while"
    FREEZE_STANDBY_WORKER = "freeze standby worker", "receiving and applying stand still for a while"
    KILL_SWITCH_GATE = "kill switch gate", "the process that holds the VM's output", False, Form.SWITCH
    KILL_SWITCH_RULES = "kill switch rules", "the process that puts rules into force", False, Form.SWITCH
    KILL_SWITCH_KEEPER = "kill switch keeper", "the process that keeps what is sent to the VM", False, Form.SWITCH
    FREEZE_SWITCH_HOST = "freeze switch host", "agent and processes stand still for a while", False, Form.SWITCH
    FREEZE_SWITCH_GATE = "freeze switch gate", "held output stands still for a while", False, Form.SWITCH
    FREEZE_SWITCH_RULES = "freeze switch rules", "the rules stay as they are for a while", False, Form.SWITCH
    FREEZE_SWITCH_KEEPER = "freeze switch keeper", "what is sent to the VM is not kept for a while", False, Form.SWITCH
    CUT_BETWEEN = "cut between primary and standby", "no frame between the two gets through, both ways"
    CUT_TO_STANDBY = "cut to standby, one way", "what the primary sends to its standby is lost"
    CUT_TO_PRIMARY = "cut to primary, one way", "what the standby sends to its primary is lost"
    CUT_PRIMARY_OFF = "cut primary off, arbiter too", "what the primary sends to anybody is lost, but for its clients"
    CUT_STANDBY_OFF = "cut standby off, arbiter too", "what the standby sends to anybody is lost"
    LOSS = "loss between all", "one frame in five between hosts and arbiter is lost"
    DELAY = "delay between all", "each frame between hosts and arbiter takes up to 250 ms longer"
    CUT_PRIMARY_FROM_ARBITER = "cut primary from arbiter", "what the primary sends to the arbiter is lost"
    CUT_ARBITER_FROM_PRIMARY = "cut arbiter from primary", "what the arbiter sends to the primary is lost"
    CUT_BETWEEN_PRIMARY_AND_ARBITER = "cut between primary and arbiter", "no frame between the two gets through"
    CUT_STANDBY_FROM_ARBITER = "cut standby from arbiter", "what the standby sends to the arbiter is lost"
    CUT_ARBITER_FROM_STANDBY = "cut arbiter from standby", "what the arbiter sends to the standby is lost"
    CUT_BETWEEN_STANDBY_AND_ARBITER = "cut between standby and arbiter", "no frame between the two gets through"
    FREEZE_ARBITER = "freeze arbiter", "it answers nobody for a while"
    KILL_ARBITER = "kill arbiter", "it comes back after a while, with its data"
    SLOW_ARBITER = "slow arbiter", "it runs a tenth of the time"
    FILL_PRIMARY_DISK = "fill primary disk", "nothing can be written in its state folder for a while"
    FILL_STANDBY_DISK = "fill standby disk", "nothing can be written in its state folder for a while"
    FILL_DISK_LOSE_STANDBY = "fill primary disk, kill standby host", "the primary cannot record what it claims", True
    FILL_DISK_LOSE_PRIMARY = "fill standby disk, kill primary host", "the standby cannot record what it claims", True
    SLOW_ARBITER_LOSE_PRIMARY = "slow arbiter, kill primary host", "the standby's claim takes its time", True
    KILL_ARBITER_LOSE_PRIMARY = "kill arbiter, kill primary host", "there is nobody to claim from for a while", True
    DELAY_LOSE_PRIMARY = "delay between all, kill primary host", "heartbeats and the claim take their time", True


AnyFault = ChaosFault | PointFault
ALL_FAULTS: tuple[AnyFault, ...] = (*ChaosFault, *POINT_FAULTS)


def faults_with(words: Sequence[str], form: Form) -> tuple[AnyFault, ...]:
    """Those of a form whose name has one of these in it; a whole name means that one alone."""
    here = [fault for fault in ALL_FAULTS if fault.form in (None, form)]
    names = {str(fault) for fault in here}
    whole, parts = names & {*words}, {*words} - names
    return tuple(f for f in here if str(f) in whole or any(part in str(f) for part in parts))
