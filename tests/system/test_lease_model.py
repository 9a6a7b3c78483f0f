"""The lease and claim protocol, model checked: the bounded model keeps I1 and I2, and needs each of its guards."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from kagemusha.demo.unpacked import unpacked

MODEL = Path(__file__).parents[2] / "models" / "lease.pml"
TERMS = ("BREAKS=2", "MAXEPOCH=2")
"""Four terms and two broken links: claims upon claims."""
EPOCHS = ("BREAKS=2", "MAXEPOCH=3", "MAXTERM=3", "CRASHES=0")
"""A checkpoint in flight behind a committed one: output of an epoch that is sealed and not committed."""
NAMED = ("ACK_EARLY", "RELEASE_AT_SEAL", "NO_WAIT", "IGNORE_TERM", "RENEW_AT_RECEIPT")
GUARDS = (
    "NO_DRIFT",
    "OBEY_OLD_CLAIM",
    "ACCEPT_WHILE_CLAIMING",
    "RECORD_BEFORE_KILL",
    "HAND_OVER_BEFORE_CLOSE",
    "HAND_OVER_UNRECORDED",
    "BOOT_UNASKED",
    "BOOT_BEYOND_TRIED",
    "BOOT_AT_ONCE",
)
LONGEST_S = 120


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checker says. ``violated``: the assertion that failed first, if any."""

    violated: str | None
    states: int
    complete: bool


@cache
def spin() -> Path:
    """Debian's spin."""
    return unpacked("spin") / "usr/bin/spin"


def checked(folder: Path, *macros: str, optimise: str = "-O0") -> Verdict:
    """Explore the model with these macros until the first violation, or to the end."""
    defined = [f"-D{macro}" for macro in macros]
    subprocess.run([spin(), *defined, "-a", MODEL], cwd=folder, check=True, capture_output=True)
    gcc = ["gcc", optimise, "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=900", "-o", "pan", "pan.c"]
    subprocess.run(gcc, cwd=folder, check=True)
    told = subprocess.run(
        ["./pan", "-m100000", "-n", "-w22"], cwd=folder, capture_output=True, text=True, timeout=LONGEST_S, check=False
    ).stdout
    violated = re.search(r"assertion violated (.*) \(at depth", told)
    states = re.search(r"(\d+) states, stored", told)
    assert states, told
    unfinished = re.search(r"max search depth too small|Search not completed|reached -DMEMLIM|out of memory", told)
    return Verdict(violated[1].strip() if violated else None, int(states[1]), not unfinished)


@pytest.mark.parametrize("bounds", [TERMS, pytest.param(EPOCHS, marks=pytest.mark.long)])
def test_bounded_model_is_safe(bounds: tuple[str, ...], tmp_path: Path) -> None:
    verdict = checked(tmp_path, *bounds, optimise="-O1")
    assert verdict.violated is None
    assert verdict.complete
    assert verdict.states > 100_000


def test_model_takes_over_and_protects_again(tmp_path: Path) -> None:
    """Else the model could be safe because nothing ever happens in it."""
    verdict = checked(tmp_path, "REACH", *TERMS)
    assert verdict.violated is not None
    assert "taken_over" in verdict.violated


@pytest.mark.parametrize("guard", [*NAMED, *(pytest.param(guard, marks=pytest.mark.long) for guard in GUARDS)])
def test_every_guard_is_needed(guard: str, tmp_path: Path) -> None:
    """Within bounds in which the whole protocol is safe."""
    bounds = EPOCHS if guard == "RELEASE_AT_SEAL" else TERMS
    assert checked(tmp_path, guard, *bounds).violated is not None
