"""Sequences of statements of which one contradicts another, made from consistent ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .split import Row


WHOLE = re.compile(r"\d+")
VERB = re.compile(r"\b(is|are|was|were|can|could|will|would|must|does|did|has|have|had)( not)?\b")


def breaks(sequences: Sequence[Sequence[str]], seed: int = 0) -> list[Row]:
    """Two rows a sequence, {"item", "statements", "contradicts"} as `objectives.Consistency` takes them, shuffled.

    One statement is said again later: word for word in one row, and changed in the other, which is the break. So
    neither the place nor the repetition tells them apart. A number becomes another of the same text collection; without
    one, "is" becomes "is not" and "is not" becomes "is". Split the sequences first, not the rows: both rows of an item
    have the same statements.

    Raises:
        ValueError: a sequence without any statement that can be changed; numbers that are all the same.
    """
    rng = random.Random(seed)
    numbers = sorted({n for statements in sequences for s in statements for n in WHOLE.findall(s)})
    rows = []
    for item, statements in enumerate(sequences):
        able = [i for i, s in enumerate(statements) if WHOLE.search(s) or VERB.search(s)]
        if not able:
            raise ValueError(
                f"sequence {item} has no statement with a number or a verb like 'is' to change: {statements}."
            )
        chosen = rng.choice(able)
        place = rng.randint(chosen + 1, len(statements))
        for broken in (False, True):
            again = changed(statements[chosen], numbers, rng) if broken else statements[chosen]
            marks = [False] * len(statements)
            rows.append(
                {
                    "item": item,
                    "statements": [*statements[:place], again, *statements[place:]],
                    "contradicts": [*marks[:place], broken, *marks[place:]],
                }
            )
    rng.shuffle(rows)
    return rows


def changed(statement: str, numbers: Sequence[str], rng: random.Random) -> str:
    """The statement with its last number another one of `numbers`, or its first verb negated (or no longer)."""
    if found := list(WHOLE.finditer(statement)):
        others = [n for n in numbers if int(n) != int(found[-1][0])]
        if not others:
            raise ValueError(f"{statement!r}: numbers={list(numbers)} has no other number; give more sequences.")
        return statement[: found[-1].start()] + rng.choice(others) + statement[found[-1].end() :]
    return VERB.sub(lambda m: m[1] if m[2] else f"{m[1]} not", statement, count=1)
