"""The checker, on histories that are known to be good or bad, and against all orders tried one by one."""

from __future__ import annotations

import random
import tracemalloc
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagemusha.chaos.history import Action, Operation, from_lines, to_line
from kagemusha.chaos.linearizability import after, check
from kagemusha.errors import WireError

W, R, A, L, N, C = Action.WRITE, Action.READ, Action.APPEND, Action.LIST, Action.INCREMENT, Action.COUNT
START: dict[Action, Any] = {W: None, R: None, A: (), L: (), N: 0, C: 0}


def op(action: Action, begin: int, end: int | None, result: Any = None, argument: str | None = None) -> Operation:
    return Operation(begin, "k", action, argument, result, begin, end)


GOOD = {
    "one after the other": [op(W, 0, 1, argument="a"), op(R, 2, 3, "a"), op(W, 4, 5, argument="b"), op(R, 6, 7, "b")],
    "read during a write sees either": [op(W, 0, 10, argument="a"), op(R, 1, 2), op(R, 3, 4, "a")],
    "nothing written yet": [op(R, 0, 1)],
    "an unanswered write happened": [op(W, 0, None, argument="a"), op(R, 5, 6, "a")],
    "an unanswered write never happened": [op(W, 0, None, argument="a"), op(R, 5, 6)],
    "appends in flight": [op(A, 0, 9, 2, "a"), op(A, 0, 9, 1, "b"), op(L, 10, 11, ["b", "a"])],
    "unanswered increment counted late": [op(N, 0, None), op(C, 1, 2, 0), op(C, 3, 4, 1), op(N, 5, 6, 2)],
}
BAD = {
    "stale read": [op(W, 0, 1, argument="a"), op(W, 2, 3, argument="b"), op(R, 4, 5, "a")],
    "an acknowledged write was lost by a failover": [op(W, 0, 1, argument="a"), op(R, 4, 5)],
    "read goes back": [op(W, 0, 20, argument="a"), op(R, 1, 2, "a"), op(R, 3, 4)],
    "never written": [op(W, 0, 1, argument="a"), op(R, 2, 3, "z")],
    "lost append": [op(A, 0, 1, 1, "a"), op(A, 2, 3, 2, "b"), op(L, 4, 5, ["b"])],
    "reordered appends": [op(A, 0, 1, 1, "a"), op(A, 2, 3, 2, "b"), op(L, 4, 5, ["b", "a"])],
    "lost increment": [op(N, 0, 1, 1), op(N, 2, 3, 1)],
    "duplicate increment": [op(N, 0, 1, 1), op(C, 2, 3, 2)],
    "unanswered increment counted twice": [op(N, 0, None), op(C, 1, 2, 2)],
}


@pytest.mark.parametrize("name", GOOD)
def test_good(name: str) -> None:
    assert check(GOOD[name]).linearizable


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str) -> None:
    verdict = check(BAD[name])
    assert not verdict.linearizable
    assert verdict.violated == "k"
    assert "but not" in verdict.explanation


def test_keys_are_independent_and_the_bad_one_is_named() -> None:
    other = [Operation(9, "other", R, None, "z", 0, 1)]
    assert check([*GOOD["one after the other"], *other]).violated == "other"


def test_beyond_the_budget_nothing_is_claimed() -> None:
    history = [op(W, 0, 100, argument=str(number)) for number in range(12)] + [op(R, 200, 201, "x")]
    verdict = check(history, budget=50)
    assert (verdict.linearizable, verdict.violated, verdict.undecided) == (False, None, ("k",))


def test_a_long_wrong_history_is_decided_in_little_memory() -> None:
    """Three operations in doubt make eight times the states; each has to be small."""
    history = [op(W, 10 * number, 10 * number + 15, argument=str(number)) for number in range(800)]
    history += [op(W, 5 + number, None, argument=f"doubt {number}") for number in range(3)]
    tracemalloc.start()
    try:
        assert check([*history, op(R, 9000, 9001, "z")]).violated == "k"
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40_000_000


def explained(history: list[Operation]) -> bool:
    """All orders of all subsets that leave out unanswered operations only."""
    needed = [each for each in history if each.returned_ns is not None]
    loose = [each for each in history if each.returned_ns is None]
    for chosen in range(1 << len(loose)):
        some = needed + [each for place, each in enumerate(loose) if chosen >> place & 1]
        if any(_runs(order) for order in permutations(some)):
            return True
    return False


def _runs(order: tuple[Operation, ...]) -> bool:
    state = START[order[0].action] if order else None
    for place, each in enumerate(order):
        if any(later.returned_ns is not None and later.returned_ns < each.invoked_ns for later in order[place + 1 :]):
            return False
        fits, state = after(state, each)
        if not fits:
            return False
    return True


def test_it_agrees_with_trying_all_orders() -> None:
    chance = random.Random(1)
    good = 0
    for _ in range(3000):
        kinds = chance.choice([(W, R), (A, L), (N, C)])
        history = []
        for _ in range(chance.randint(1, 5)):
            action = chance.choice(kinds)
            begin = chance.randint(0, 12)
            end = None if chance.random() < 0.15 else begin + chance.randint(1, 8)
            results: dict[Action, Any] = {
                W: None,
                R: chance.choice([None, "a", "b"]),
                A: chance.randint(1, 3),
                L: chance.choice([[], ["a"], ["a", "b"], ["b", "a"]]),
                N: chance.randint(1, 3),
                C: chance.randint(0, 3),
            }
            argument = chance.choice("ab") if action in (W, A) else None
            history.append(op(action, begin, end, results[action], argument))
        expected = explained(history)
        good += expected
        assert check(history).linearizable == expected, history
    assert 300 < good < 2700


@given(st.integers(0, 2**32))
def test_what_really_happened_is_linearizable(seed: int) -> None:
    """Operations take effect at a moment between invocation and return; some of the answers are lost."""
    chance = random.Random(seed)
    kinds = chance.choice([(W, R), (A, L), (N, C)])
    state = START[kinds[0]]
    history = []
    for moment in range(1, 60):
        action = chance.choice(kinds)
        argument = str(moment) if action in (W, A) else None
        probe = op(action, 0, None, argument=argument)
        _, then = after(state, probe)
        result = {W: None, R: state, A: len(then) if isinstance(then, tuple) else 0, N: then, C: state}.get(
            action, list(state) if action is L else None
        )
        state = then
        begin = moment * 10 - chance.randint(0, 25)
        end = None if chance.random() < 0.1 else moment * 10 + chance.randint(1, 25)
        history.append(Operation(moment, "k", action, argument, result, begin, end))
    assert check(history).violated is None


def test_lines() -> None:
    history = [*GOOD["one after the other"], *GOOD["appends in flight"], *BAD["unanswered increment counted twice"]]
    lines = [to_line(each) for each in history]
    assert list(from_lines(lines)) == history
    assert list(from_lines([*lines, '{"client":1'])) == history
    for bad in ("nonsense\n", "{}\n", "[]\n", lines[0].replace("write", "paint")):
        with pytest.raises(WireError):
            list(from_lines([bad]))
