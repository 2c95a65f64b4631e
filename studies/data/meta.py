"""T_meta: right and wrong answers to judge, from tasks that can be checked and never from a stronger model.

Right ones are the tasks' own. Wrong ones come from a corrupter, or from the very model that is to learn to judge itself
(`sample`), whose answers the task's checker marks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from ..measures.answers import same_answer
from .split import Row


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def judgements(
    rows: Sequence[Row],
    *,
    sample: Callable[[list[str]], list[str]] | None = None,
    same: Callable[[str, str], bool] = same_answer,
    seed: int = 0,
) -> list[Row]:
    """Rows to judge, {"item", "question", "answer", "correct", "reference", "origin"}, shuffled.

    Every question comes once with its right answer and once with a corrupted one, so neither the question nor the
    share of right ones tells which is which. With `sample`, also with the model's own answer, marked by `same`.

    Args:
        rows: with "question" and "answer"; further columns (task, topic, source) are kept.
        sample: questions -> one answer each, as the model gives them.
        same: whether an answer (first) is the reference (second); the default compares numbers as numbers.
        seed: of the corrupter and of the order.

    Raises:
        ValueError: fewer than two different answers to borrow from; a sampler that does not answer every question.
    """
    pool = [str(row["answer"]) for row in rows]  # with repetitions: a common answer is as often wrong as right
    if len(set(pool)) < 2:
        raise ValueError(f"rows have {len(set(pool))} different answers; the corrupter needs at least two to mix up.")
    rng = random.Random(seed)
    found = []
    for item, row in enumerate(rows):
        right = str(row["answer"])
        made = [(right, True, "task"), (corrupt(right, pool, rng, same), False, "corrupter")]
        found += [_judged(row, item, *one) for one in made]
    if sample is not None:
        answers = sample([str(row["question"]) for row in rows])
        if len(answers) != len(rows):
            raise ValueError(f"sample gave {len(answers)} answers to {len(rows)} questions; give one each.")
        for item, (row, answer) in enumerate(zip(rows, answers)):
            found.append(_judged(row, item, answer, same(answer, str(row["answer"])), "model"))
    rng.shuffle(found)
    return found


def _judged(row: Row, item: int, answer: str, correct: bool, origin: str) -> Row:
    own = {"item": item, "answer": answer, "correct": correct, "reference": str(row["answer"]), "origin": origin}
    return {**row, **own, "task": "meta"}


def corrupt(right: str, pool: Sequence[str], rng: random.Random, same: Callable[[str, str], bool] = same_answer) -> str:
    """A wrong answer that looks like the right one: a number in it is changed, or it is another question's answer.

    Raises:
        ValueError: nothing in the pool is wrong.
    """
    numbers = list(NUMBER.finditer(right))
    for _ in range(20 if numbers else 0):
        wrong = _changed(right, numbers[-1], rng)  # the last one: the result, where there is a derivation
        if not same(wrong, right):
            return wrong
    wrong_ones = [answer for answer in pool if not same(answer, right)]
    if not wrong_ones:
        raise ValueError(f"every answer of the pool counts as {right!r}; the corrupter has nothing wrong to offer.")
    return rng.choice(wrong_ones)


def _changed(text: str, number: re.Match[str], rng: random.Random) -> str:
    """The text with one number off by a little, by a digit, or by its sign, and of the same length where it can be."""
    digits = number[0]
    kinds = ["near", "digit"] + (["swap"] if len(digits.strip("-")) > 1 else [])
    kind = rng.choice(kinds)
    if kind == "near" and "." not in digits:
        new = str(int(digits) + rng.choice([-3, -2, -1, 1, 2, 3, 10, -10]))
    else:
        places = [i for i, c in enumerate(digits) if c.isdigit()]
        chars = list(digits)
        if kind == "swap":
            i = rng.randrange(len(places) - 1)
            a, b = places[i], places[i + 1]
            chars[a], chars[b] = chars[b], chars[a]
        else:
            i = rng.choice(places)
            chars[i] = rng.choice([c for c in "0123456789" if c != chars[i]])
        new = "".join(chars)
        if re.match(r"-?0\d", new):  # "07" gives itself away
            return text
    return text[: number.start()] + new + text[number.end() :]
