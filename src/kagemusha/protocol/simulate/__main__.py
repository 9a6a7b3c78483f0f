"""``python -m kagemusha.protocol.simulate``: scenarios by chance, until so many steps are done, or one breaks a rule.

Exit code 0: nothing was broken. 1: something was; the smallest scenario found that shows it is printed, and
``--replay`` runs it again, step by step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from kagemusha.protocol.simulate.judge import Violation
from kagemusha.protocol.simulate.report import Totals
from kagemusha.protocol.simulate.scenario import FORMS, Scenario, draw, shrink
from kagemusha.protocol.simulate.weaken import SOUND, WEAKNESSES, Weakness
from kagemusha.protocol.simulate.weaken_switch import SWITCH_WEAKNESSES
from kagemusha.protocol.simulate.world import World

PROGRESS_S = 10.0
ALL_WEAKNESSES = WEAKNESSES | SWITCH_WEAKNESSES


def run(scenario: Scenario, weakness: Weakness, totals: Totals) -> str | None:
    """What was broken, or None."""
    world = World(scenario, random.Random(scenario.seed), weakness=weakness, coverage=totals.coverage)
    try:
        outcome = world.run()
    except Violation as violation:
        totals.add(None, world.agenda.steps)
        return str(violation)
    totals.add(outcome, outcome.steps)
    return None


def search(steps: int, seed: int, weakness: Weakness, totals: Totals, *, progress: bool) -> tuple[Scenario, str] | None:
    """Run scenarios of the totals' form until so many steps are done; the first that breaks something, and what."""
    chance = random.Random(seed)
    told_t = began_t = time.monotonic()
    while totals.steps < steps:
        scenario = draw(chance, totals.form)
        broken = run(scenario, weakness, totals)
        if broken is not None:
            return scenario, broken
        now = time.monotonic()
        if progress and now - told_t > PROGRESS_S:
            told_t = now
            print(f"{totals}, {totals.steps / (now - began_t):,.0f} steps/s", flush=True)
    return None


def kind(broken: str | None) -> str:
    """Which rule was broken, whoever broke it."""
    return "" if broken is None else "".join(letter for letter in broken if not letter.isdigit())[:40]


def replay(scenario: Scenario, weakness: Weakness) -> int:
    """Run one scenario and print every step."""
    world = World(scenario, random.Random(scenario.seed), weakness=weakness)
    world.agenda.trace = print
    try:
        print(world.run())
    except Violation as violation:
        print(f"VIOLATION {violation}")
        return 1
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kagemusha.protocol.simulate", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000, help="events to deliver")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default="host", help="where frames are held")
    parser.add_argument("--weaken", choices=sorted(ALL_WEAKNESSES), help="take one guard away")
    parser.add_argument("--replay", metavar="SCENARIO", help="run this one and print every step")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to F")
    options = parser.parse_args()
    weakness = ALL_WEAKNESSES[options.weaken] if options.weaken else SOUND
    if options.replay is not None:
        return replay(Scenario.parse(options.replay), weakness)
    totals = Totals(weakness.form if options.weaken else options.form)
    began_t = time.monotonic()
    found = search(options.steps, options.seed, weakness, totals, progress=True)
    seconds = time.monotonic() - began_t
    print(f"{totals}, in {seconds:.1f} s")
    if options.json is not None:
        figures = totals.figures(seed=options.seed, seconds=seconds, violation=found and found[1])
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if found is None:
        return 0
    scenario, broken = found
    print(f"VIOLATION {broken}")
    smallest = shrink(scenario, lambda candidate: kind(run(candidate, weakness, Totals())) == kind(broken))
    weaken = f" --weaken {options.weaken}" if options.weaken else ""
    print(f"VIOLATION of the smallest: {run(smallest, weakness, Totals())}")
    print(f"python -m kagemusha.protocol.simulate{weaken} --replay '{smallest}'")
    return 1


if __name__ == "__main__":
    sys.exit(main())
