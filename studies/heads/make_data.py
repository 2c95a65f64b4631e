"""The rows of the heads' study. Training and held-out rows never share a question, a sequence or a document."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from studies.data import gsm8k_solutions, judgements
from studies.data.split import long_lines, pieces
from studies.data.text import docstrings, plays
from studies.measures.answers import same_answer


NAMES = "Anna Ben Carla David Emma Frank Greta Hugo Iris Jonas Kira Leo Mona Nils Olga Paul Rita Sam Tina Udo"
THINGS = "apples books coins dolls eggs flags guitars hats jars keys lamps mugs nuts pens rings shoes toys"
NUMBER = re.compile(r"-?\d+")
FAMILIES: dict[str, Callable[[random.Random], tuple[str, int]]] = {
    "sums": lambda rng: _sum(rng.randint(2, 60), rng.randint(2, 60)),
    "differences": lambda rng: _sum(rng.randint(30, 99), -rng.randint(2, 29)),
    "products": lambda rng: (f"{(a := rng.randint(2, 30))} * {(b := rng.randint(2, 12))} =", a * b),
}
EXAMPLES = 4  # worked ones before a question
Rows = list[dict[str, Any]]
Sampler = Callable[[list[str], int, bool], list[list[str]]]  # prompts, answers each, greedily or not


# ---- what needs a network or packages, made once ----


def prepare(path: Path, gsm8k: Path | None) -> None:
    """Write documents, calibration text and, of a folder of GSM8K's files, marked solutions of models."""
    documents: dict[str, list[str]] = {}
    for texts in (docstrings(), plays()):
        for name in sorted(texts):
            found = list(itertools.islice(pieces(texts[name], 120), 60))
            if len(found) >= 10:
                documents[name] = found
    content = {
        "documents": documents,
        "calibration": list(topics.values()),  # Python's language reference: neither documents nor questions
        "solutions": [] if gsm8k is None else gsm8k_solutions(gsm8k),
    }
    with gzip.open(path, "wt") as file:
        json.dump(content, file)


def read(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def parted(items: Sequence[Any], train: int, test: int, seed: int) -> tuple[list[Any], list[Any]]:
    """So many items to train on and others held out, in an order of the seed; where there are fewer, three to two."""
    items = random.Random(seed).sample(items, len(items))
    train, test = (min(n, int(len(items) * n / (train + test))) for n in (train, test))
    return items[:train], items[train : train + test]


# ---- questions, and answers to them ----


def _sum(a: int, b: int) -> tuple[str, int]:
    return f"{a} {'+' if b > 0 else '-'} {abs(b)} =", a + b


def questions(family: str, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """Rows {"question", "answer", "prompt", "family"}, none twice; the prompt has worked examples before the question.

    As plain text: this model answers in a chat with prose that ends before it says a number, or with a wrong one; so it
    is right often enough, and not always, for its own answers to be told apart and rewarded.
    """
    rng, found = random.Random(f"{family} {seed}"), dict[str, str]()
    for _ in range(100 * (train + test)):
        question, answer = FAMILIES[family](rng)
        found.setdefault(question, str(answer))
        if len(found) == EXAMPLES + train + test:
            break
    items = list(found.items())
    before = "".join(f"{question} {answer}\n" for question, answer in items[:EXAMPLES])
    rows = [
        {"question": question, "answer": answer, "prompt": before + question, "family": family}
        for question, answer in items[EXAMPLES:]
    ]
    test = len(rows) * test // (train + test)  # where the family has fewer questions
    return rows[test:], rows[:test]


def answer_of(text: str) -> str:
    """The first line of what the model wrote."""
    return text.strip().split("\n")[0].strip() or "?"


def judged(sample: Sampler, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """T_meta rows: right answers, corrupted ones, and the model's own (greedy)."""
    parts: tuple[Rows, Rows] = ([], [])
    for family in FAMILIES:
        for into, rows in zip(parts, questions(family, train, test, seed)):
            into += rows
    found = []
    for rows in parts:
        prompts = {row["question"]: row["prompt"] for row in rows}
        own = lambda asked, of=prompts: [answer_of(a[0]) for a in sample([of[q] for q in asked], 1, True)]  # noqa: E731
        found.append(
            [
                {"item": r["item"], "prompt": r["prompt"], "completion": " " + r["answer"],
                 "correct": r["correct"], "origin": r["origin"], "family": r["family"]}
                for r in judgements(rows, sample=own, seed=seed)
            ]
        )  # fmt: skip
    return found[0], found[1]


def own_pairs(sample: Sampler, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """A right and a wrong number for one question, both the model's own samples: same source, same question."""
    parts: tuple[Rows, Rows] = ([], [])
    rng = random.Random(seed)
    for family in FAMILIES:
        for into, rows in zip(parts, questions(family, train, test, seed)):
            for row, answers in zip(rows, sample([r["prompt"] for r in rows], 8, False)):
                numbers = [a for a in map(answer_of, answers) if NUMBER.fullmatch(a)]
                right, wrong = ([a for a in numbers if same_answer(a, row["answer"]) is kind] for kind in (True, False))
                if right and wrong:
                    sides = {"chosen": " " + rng.choice(right), "rejected": " " + rng.choice(wrong)}
                    into.append({"item": row["prompt"], "prompt": row["prompt"], **sides})
    for part in parts:
        rng.shuffle(part)
    return parts


def solution_pairs(solutions: Rows, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """A right and a wrong solution of one question of GSM8K, by two of four models; calculator marks removed.

    Of two models the one is as often right as the other, so which model wrote a solution tells nothing.
    """
    by: dict[str, Rows] = {}
    for row in solutions:
        by.setdefault(row["question"], []).append(row)
    rng = random.Random(seed)
    found: dict[tuple[str, str], Rows] = {}
    for question in rng.sample(sorted(by), len(by)):
        marked = [{**r, "text": " " + re.sub(r"<<.*?>>", "", r["answer"]).strip()} for r in by[question]]
        pairs = [(r, w) for r in marked if r["correct"] for w in marked if not w["correct"] and r["text"] != w["text"]]
        if not pairs:
            continue
        lead = [
            len(found.get((r["model"], w["model"]), ())) - len(found.get((w["model"], r["model"]), ()))
            for r, w in pairs
        ]  # fmt: skip
        right, wrong = pairs[min(range(len(pairs)), key=lead.__getitem__)]
        row = {"item": question, "prompt": question, "chosen": right["text"], "rejected": wrong["text"]}
        found.setdefault((right["model"], wrong["model"]), []).append(row)
    even = [found[a, b][: len(found.get((b, a), ()))] for a, b in sorted(found)]
    return parted([row for rows in even for row in rows], train, test, seed)


def derivations(train: int, test: int, seed: int = 0) -> tuple[Rows, Rows]:
    """Sums worked out step by step, and the same with one wrong step that the later steps carry on."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < train + test:
        terms = tuple(rng.randint(2, 99) for _ in range(4))
        if terms in seen:
            continue
        seen.add(terms)
        sides = []
        for wrong in (None, rng.randint(1, 3)):
            total, steps = terms[0], []
            for i, term in enumerate(terms[1:], 1):
                new = total + term + (rng.choice([-10, -2, -1, 1, 2, 10]) if i == wrong else 0)
                steps.append(f"{total} + {term} = {new}.")
                total = new
            sides.append(" " + " ".join([*steps, f"The answer is {total}."]))
        question = f"What is {' + '.join(map(str, terms))}?"
        rows.append({"item": len(rows), "prompt": question, "chosen": sides[0], "rejected": sides[1]})
    return rows[test:], rows[:test]


def rewarded(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number, else up to 0.5 for a near one; 0.2 for a number and nothing else."""
    found = []
    for text, wanted in zip(map(answer_of, completions), answer):
        number = NUMBER.match(text)
        off = abs(int(number[0]) - int(wanted)) / max(abs(int(wanted)), 1) if number else 1.0
        found.append((1.0 if off == 0 else 0.5 * max(0.0, 1.0 - off)) + 0.2 * bool(NUMBER.fullmatch(text)))
    return found


# ---- statements and documents ----


def people(count: int, length: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        things = rng.sample(THINGS.split(), length)
        found.append([f"{n} has {rng.randint(2, 60)} {t}." for n, t in zip(rng.sample(NAMES.split(), length), things)])
    return found


def documents(given: dict[str, list[str]], seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Pieces by document; a third of the documents held out, without pieces that share a line with training text."""
    names = random.Random(seed).sample(sorted(given), len(given))
    train, test = (
        {name: given[name] for name in part} for part in (names[len(names) // 3 :], names[: len(names) // 3])
    )
    seen = {line for part in train.values() for piece in part for line in long_lines(piece)}
    test = {name: [p for p in part if seen.isdisjoint(long_lines(p))] for name, part in test.items()}
    return train, {name: part for name, part in test.items() if len(part) >= 10}
