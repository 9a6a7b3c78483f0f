"""What a host has to know of a VM after a restart, on disk: the newest term held, the newest claimed, and a doubt.

A side writes the term it goes on with before its guest is heard in it, so that after a restart it still refuses the
old primary; and the term it claims before it claims it, so that it never takes an old answer for a new one. The file
is replaced by rename and synced with its folder: after a crash it holds the old numbers or the new ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kagemusha.errors import ConfigError, TransientError
from kagemusha.kernel.fault_point import reach
from kagemusha.model.faults import Fault
from kagemusha.model.ids import FIRST_TERM, NO_TERM, Term


@dataclass(frozen=True, slots=True)
class Terms:
    """What the file says.

    :ivar held: the newest term in which a guest is known to have run.
    :ivar tried: the newest that this host has claimed or agreed to, with or without success; at least ``held``.
    :ivar agreed: the newest that it agreed to as a standby; 0: none.
    :ivar own: in ``held`` the guest ran here.
    :ivar doubt: a standby of the guest that ran here may have taken over (``protocol.primary.Data.doubtful``).
    :ivar known: something was ever recorded here.
    """

    held: Term = FIRST_TERM
    tried: Term = FIRST_TERM
    agreed: Term = NO_TERM
    own: bool = False
    doubt: bool = False
    known: bool = False


class TermFile:
    """``<state_dir>/<vm>.term``: held, tried and agreed, decimal, and 1 or 0 for ``own`` and ``doubt``.

    :ivar path: of the file.
    """

    def __init__(self, state_dir: Path, vm: str) -> None:
        """:raise ConfigError: the folder cannot be made, or the file is there but does not hold terms."""
        self.path = state_dir / f"{vm}.term"
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"state_dir {state_dir}: {error.strerror}", operation="prepare the state folder"
            ) from error
        self.terms = self._read()

    def _read(self) -> Terms:
        try:
            held, tried, agreed, own, doubt = (int(word) for word in self.path.read_text(encoding="ascii").split())
        except FileNotFoundError:
            return Terms()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.path} does not hold terms: {error}",
                operation="read the terms",
                hint="restore it, or remove it if this VM never failed over",
            ) from error
        held_term = Term(max(FIRST_TERM, held))
        return Terms(held_term, Term(max(held_term, tried)), Term(agreed), own == 1, doubt == 1, known=True)

    def record(self, term: Term, *, own: bool) -> None:
        """Make durable that a guest runs in ``term``, here or elsewhere.

        :raise TransientError: the disk refuses.
        """
        doubt = self.terms.doubt and own
        self._write(replace(self.terms, held=term, tried=max(term, self.terms.tried), own=own, doubt=doubt, known=True))

    def record_agreed(self, term: Term) -> None:
        """Make durable that ``term`` was agreed to with a primary.

        :raise TransientError: the disk refuses.
        """
        self._write(replace(self.terms, tried=max(term, self.terms.tried), agreed=term, known=True))

    def record_tried(self, term: Term) -> None:
        """Make durable that ``term`` is being claimed.

        :raise TransientError: the disk refuses.
        """
        self._write(replace(self.terms, tried=max(term, self.terms.tried), known=True))

    def record_doubt(self, doubt: bool) -> None:
        """Make durable whether a standby may take over from the guest that runs here.

        :raise TransientError: the disk refuses.
        """
        if doubt != self.terms.doubt:
            self._write(replace(self.terms, own=True, doubt=doubt, known=True))

    def _write(self, terms: Terms) -> None:
        try:
            self._replace(f"{terms.held} {terms.tried} {terms.agreed} {int(terms.own)} {int(terms.doubt)}\n")
        except OSError as error:
            raise TransientError(
                f"{self.path} cannot be written: {error.strerror}",
                operation="record the term",
                hint="make room for it",
            ) from error
        self.terms = terms
        reach(Fault.TERM_RECORDED)

    def _replace(self, text: str) -> None:
        reach(Fault.TERM_RECORDING)
        temporary = self.path.with_suffix(".term.new")
        with open(temporary, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        reach(Fault.TERM_WRITTEN)
        os.replace(temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
