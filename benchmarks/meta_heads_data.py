"""The rows of meta_heads.py. Training and held-out rows never share a question, a sequence or a document."""

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

import _data

from peft_bundles.data import gsm8k_solutions, judgements, logic
from peft_bundles.data.split import long_lines, pieces
from peft_bundles.evaluation.answers import same_answer


SYSTEM = {"role": "system", "content": "Answer briefly."}
NAMES = "Anna Ben Carla David Emma Frank Greta Hugo Iris Jonas Kira Leo Mona Nils Olga Paul Rita Sam Tina Udo"
THINGS = "apples books coins dolls eggs flags guitars hats jars keys lamps mugs nuts pens rings shoes toys"
FAMILIES = ("products", "number_sequence", "chain_sum")  # that the model answers right often enough, and not always
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
Rows = list[dict[str, Any]]
Sampler = Callable[[list[str], int, bool], list[list[str]]]  # questions, answers each, greedily or not


# ---- what needs a network or packages, made once ----


def prepare(path: Path, questions: int, gsm8k: Path | None) -> None:
    """Write questions, documents, calibration text and, of a folder of GSM8K's files, marked solutions of models."""
    documents: dict[str, list[str]] = {}
    for texts in (_data.docstrings(), _data.plays()):
        for name in sorted(texts):
            found = list(itertools.islice(pieces(texts[name], 120), 60))
            if len(found) >= 10:
                documents[name] = found
    content = {
        "questions": {family: logic(family, questions, 0)[0] for family in FAMILIES},
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


# ---- answers to questions ----


def ask(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answer_of(text: str) -> str:
    """The last number before the text goes on about something else; an answer without number stays as it is."""
    found = re.search(r"-?\d+(?:\.\d+)?(?!.*=)", text)
    return found[0] if found else text.strip() or "?"


def judged(questions: dict[str, Rows], sample: Sampler, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """T_meta rows of two kinds of sums: right answers, corrupted ones, and the model's own (greedy)."""
    parts: tuple[Rows, Rows] = ([], [])
    for family in ("products", "number_sequence"):
        for into, rows in zip(parts, parted(questions[family], train, test, seed)):
            into += [{**row, "family": family} for row in rows]
    own = lambda asked: [answer_of(answers[0]) for answers in sample(asked, 1, True)]  # noqa: E731
    return tuple(  # type: ignore[return-value]
        [
            {"item": r["item"], "prompt": ask(r["question"]), "completion": [say(r["answer"])],
             "correct": r["correct"], "origin": r["origin"], "family": r["family"]}
            for r in judgements(rows, sample=own, seed=seed)
        ]
        for rows in parts
    )  # fmt: skip


def own_pairs(questions: dict[str, Rows], sample: Sampler, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """A right and a wrong answer to one question, both the model's own samples: same source, same question."""
    parts: tuple[Rows, Rows] = ([], [])
    rng = random.Random(seed)
    for family in FAMILIES:
        for into, rows in zip(parts, parted(questions[family], train, test, seed)):
            for row, answers in zip(rows, sample([r["question"] for r in rows], 8, False)):
                marked = [(answer_of(a), same_answer(answer_of(a), row["answer"])) for a in answers]
                right, wrong = (
                    [a for a, mark in marked if mark is kind and NUMBER.search(a)] for kind in (True, False)
                )
                if right and wrong:
                    sides = {"chosen": [say(rng.choice(right))], "rejected": [say(rng.choice(wrong))]}
                    into.append({"item": f"{family} {row['question']}", "prompt": ask(row["question"]), **sides})
    for part in parts:
        rng.shuffle(part)
    return parts


def solution_pairs(solutions: Rows, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """A right and a wrong solution of one question of GSM8K, by two of four models; calculator marks removed."""
    by: dict[str, Rows] = {}
    for row in solutions:
        by.setdefault(row["question"], []).append(row)
    rng, found = random.Random(seed), []
    for question in sorted(by):
        right, wrong = ([r for r in by[question] if r["correct"] is kind] for kind in (True, False))
        if right and wrong:
            sides = [rng.choice(right), rng.choice(wrong)]
            texts = [" " + re.sub(r"<<.*?>>", "", side["answer"]).strip() for side in sides]
            if texts[0] != texts[1]:
                found.append({"item": question, "prompt": question, "chosen": texts[0], "rejected": texts[1],
                              "models": [side["model"] for side in sides]})  # fmt: skip
    return parted(found, train, test, seed)


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


def rewarded(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number at the end, else up to 0.5 for a near one; 0.2 for saying one number and no other."""
    found = []
    for completion, wanted in zip(completions, answer):
        numbers = NUMBER.findall(completion[0]["content"])
        off = abs(float(numbers[-1]) - float(wanted)) / max(abs(float(wanted)), 1.0) if numbers else 1.0
        found.append((1.0 if off == 0 else 0.5 * max(0.0, 1.0 - off)) + 0.2 * (len(numbers) == 1))
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
