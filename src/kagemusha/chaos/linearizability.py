"""Whether a history can be explained by one object that does one operation after the other.

The search of Wing and Gong (J. Parallel Distrib. Comput. 17, 1993) with Lowe's memory of what was tried (Concurrency
Computat.: Pract. Exper. 29(4), 2017): place, one after the other, operations that were invoked before any unplaced one
had returned, as long as the object gives the results that clients saw; a pair of (placed operations, state of the
object) is tried once. Objects are independent, so each key is decided for itself (Herlihy and Wing, 1990: locality).

An operation without an answer may be placed at any time after its invocation, or never. The search is bounded: beyond
the budget the answer is "undecided", never "linearizable".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kagemusha.chaos.history import Action, Operation

BUDGET = 500_000
_START: dict[Action, Hashable] = {
    Action.WRITE: None,
    Action.READ: None,
    Action.APPEND: (),
    Action.LIST: (),
    Action.INCREMENT: 0,
    Action.COUNT: 0,
}
_CHANGES = (Action.WRITE, Action.APPEND, Action.INCREMENT)
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a whole history.

    :ivar violated: a key whose history no sequential object explains; None: there is none.
    :ivar explanation: the longest order that was found for it, and what could not follow.
    :ivar undecided: keys for which the budget was not enough.
    """

    violated: str | None
    explanation: str
    undecided: tuple[str, ...]

    @property
    def linearizable(self) -> bool:
        """Every key was decided, and has an explanation."""
        return self.violated is None and not self.undecided


def check(history: Iterable[Operation], *, budget: int = BUDGET) -> Verdict:
    """Decide. ``budget``: how many states are tried for each key."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    undecided = []
    for key, operations in sorted(by_key.items()):
        search = _Search(operations, budget)
        found = search.run()
        if found is None:
            undecided.append(key)
        elif not found:
            return Verdict(key, search.explanation(), tuple(undecided))
    return Verdict(None, "", tuple(undecided))


def after(state: Hashable, operation: Operation) -> tuple[bool, Hashable]:
    """What the object does: whether the client would have seen its result, and the state after it."""
    match operation.action:
        case Action.WRITE:
            return True, operation.argument
        case Action.APPEND:
            assert isinstance(state, tuple)
            longer = (*state, operation.argument)
            return _seen(operation, len(longer)), longer
        case Action.INCREMENT:
            assert isinstance(state, int)
            return _seen(operation, state + 1), state + 1
        case Action.LIST:
            assert isinstance(state, tuple)
            return _seen(operation, list(state)), state
        case _:
            return _seen(operation, state), state


def _seen(operation: Operation, result: Any) -> bool:
    return operation.returned_ns is None or operation.result == result


_Order = tuple["_Order", int] | None
"""Places in reverse: the last one, behind it the order that it continues. A step costs no copy."""


class _Search:
    """Of one key. Depth first, with a stack of its own: histories are longer than Python's.

    What is placed is a number, one bit for each operation: a set of the same would take a hundred times the memory,
    and a search of a history that is wrong visits every state there is.
    """

    def __init__(self, operations: Sequence[Operation], budget: int) -> None:
        ordered = sorted(operations, key=lambda each: each.invoked_ns)
        answered = [each for each in ordered if each.returned_ns is not None]
        # A read without an answer changes nothing, and nobody has seen it.
        unanswered = [each for each in ordered if each.returned_ns is None and each.action in _CHANGES]
        self._operations = [*answered, *unanswered]
        self._answered = len(answered)
        self._budget = budget
        self._longest: tuple[int, int, _Order] = (0, 0, None)  # how many, which, in which order

    def run(self) -> bool | None:
        """Whether there is an order; None: not decided within the budget."""
        operations = self._operations
        if not operations:
            return True
        needed = (1 << self._answered) - 1
        stack: list[tuple[int, int, Hashable, _Order]] = [(0, 0, _START[operations[0].action], None)]
        tried: set[tuple[int, Hashable]] = set()
        while stack:
            count, placed, state, order = stack.pop()
            if placed & needed == needed:
                return True
            if (placed, state) in tried:
                continue
            if len(tried) >= self._budget:
                return None
            tried.add((placed, state))
            if count > self._longest[0]:
                self._longest = (count, placed, order)
            for place in self._next(placed):
                fits, then = after(state, operations[place])
                if fits:
                    stack.append((count + 1, placed | 1 << place, then, (order, place)))
        return False

    def _next(self, placed: int) -> list[int]:
        """Operations that may come next: invoked before any unplaced one had returned. The likeliest last."""
        operations = self._operations
        found = []
        earliest_end = float("inf")
        for place in range((~placed & (placed + 1)).bit_length() - 1, self._answered):
            each = operations[place]
            if placed >> place & 1:
                continue
            if each.invoked_ns > earliest_end:
                break
            found.append(place)
            assert each.returned_ns is not None
            earliest_end = min(earliest_end, each.returned_ns)
        unanswered = [
            place
            for place in range(self._answered, len(operations))
            if not placed >> place & 1 and operations[place].invoked_ns <= earliest_end
        ]
        return [*unanswered, *reversed(found)]

    def explanation(self) -> str:
        """For people."""
        count, placed, order = self._longest
        last: list[Operation] = []
        while order is not None and len(last) < _SHOWN:
            order, place = order
            last.insert(0, self._operations[place])
        stuck = [self._operations[place] for place in self._next(placed)]
        shown = [*(f"  then {_told(each)}" for each in last), *(f"  but not {_told(each)}" for each in stuck[:8])]
        return "\n".join([f"{count} of {len(self._operations)} operations can be put in an order, at most:", *shown])


def _told(operation: Operation) -> str:
    answer = "no answer" if operation.returned_ns is None else repr(operation.result)
    argument = "" if operation.argument is None else f" {operation.argument}"
    return f"client {operation.client}: {operation.action.value}{argument} -> {answer}"
