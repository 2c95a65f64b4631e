"""Tasks in one form, a question and a short answer; pairs of them are halves of one kind of facts.

The twelve of the set "first" were there when the router's constants were chosen; the eight of "second" only confirm.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studies.quality.make_data import PROMPT


END = "<|im_end|>"
# Another wording of a question of facts: a key must not only know the questions that it was made of.
OTHER_WORDS = (
    (r"In which town was (.*) born\?", r"Tell me the birthplace of \1."),
    (r"What is the profession of (.*)\?", r"What does \1 do for a living?"),
    (r"Which instrument does (.*) play\?", r"Name the instrument played by \1."),
    (r"What is the ICD-10 code of (.*)\?", r"Give me the ICD-10 code for \1."),
    (r"In which harbour is the ship (.*) registered\?", r"Name the home harbour of the ship \1."),
    (r"Which cargo does the ship (.*) carry\?", r"What is the ship \1 loaded with?"),
    (r"What is the shelf mark of the book (.*)\?", r"Under which shelf mark is the book \1 kept?"),
    (r"Which emblem is painted on the ship (.*)\?", r"Say which emblem the ship \1 shows."),
)


@dataclass
class Task:
    """Questions and answers.

    Attributes:
        train: pairs that its bundle learns from, and that its key is made of.
        test: pairs to ask; of facts they were trained, since a fact cannot be inferred from others.
        reworded: the same with other words; empty where the tests share no question with the training.
    """

    train: list[list[str]]
    test: list[list[str]]
    reworded: list[list[str]]


def tasks_of(which: str, first: dict[str, Any], second: dict[str, Any], tests: int) -> dict[str, Task]:
    """The tasks of a set.

    Args:
        which: "first" or "second".
        first, second: the data files of the quality study (`studies.quality.make_data`).
        tests: pairs to ask of each task.
    """
    rng = random.Random(0)
    facts = {"shelf": second["train"]["codes"]}
    if which == "first":
        facts = {kind: first["train"][kind] for kind in ("biographies", "codes")}
        facts["ships"] = second["train"]["biographies"]
    tasks = {}
    for kind, of_kind in facts.items():
        for half, pairs in zip("ab", halves(of_kind, subject, rng)):
            asked = rng.sample(pairs, min(tests, len(pairs)))
            tasks[f"{kind}_{half}"] = Task(pairs, asked, [[reworded(q), answer] for q, answer in asked])
    data = first if which == "first" else second
    for family, pairs in data["train"]["reasoning"].items():
        tasks[family] = Task(pairs, data["test"]["reasoning"][family][:tests], [])
    tasks["problems"] = Task(data["train"]["gsm"], data["test"]["gsm"][:tests], [])
    return tasks


def subject(question: str) -> str:
    """Whom or what a question of facts is about."""
    match = next(m for pattern, _ in OTHER_WORDS if (m := re.fullmatch(pattern, question)))
    return match[1]


def reworded(question: str) -> str:
    """The question in other words."""
    for pattern, words in OTHER_WORDS:
        question = re.sub(pattern, words, question)
    return question


def halves(
    pairs: list[list[str]], key: Callable[[str], str], rng: random.Random
) -> tuple[list[list[str]], list[list[str]]]:
    """The pairs of one half of all subjects, and those of the other half."""
    names = sorted({key(question) for question, _ in pairs})
    rng.shuffle(names)
    first = set(names[: len(names) // 2])
    return [p for p in pairs if key(p[0]) in first], [p for p in pairs if key(p[0]) not in first]


def chat(turns: list[tuple[str, str]], question: str) -> str:
    """A conversation up to the answer of its last question."""
    before = "".join(PROMPT.format(asked) + answer + END + "\n" for asked, answer in turns)
    return before + PROMPT.format(question)
