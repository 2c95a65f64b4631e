"""The rows of meta_heads.py. Training and held-out rows never share a question, a sequence or a document."""

from __future__ import annotations

import random
import re
from typing import Any

import _data

from peft_bundles.data import judgements, logic
from peft_bundles.objectives import Forward


SYSTEM = {"role": "system", "content": "Answer briefly."}
NAMES = "Anna Ben Carla David Emma Frank Greta Hugo Iris Jonas Kira Leo Mona Nils Olga Paul Rita Sam Tina Udo"
THINGS = "apples books coins dolls eggs flags guitars hats jars keys lamps mugs nuts pens rings shoes toys"


def ask(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


# ---- data: training and held-out rows never share a question, a sequence or a document ----


def judged(forward: Forward, tokenizer: Any, train: int, test: int) -> tuple[list[dict], list[dict]]:
    """T_meta rows of two kinds of sums: right answers, corrupted ones, and the model's own (greedy)."""

    def sample(questions: list[str]) -> list[str]:
        found = []
        for start in range(0, len(questions), 50):
            prompts = [ask(q) for q in questions[start : start + 50]]
            texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
            given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            ids = forward.generate(
                "all", given["input_ids"], given["attention_mask"], max_new_tokens=12, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            # what follows the number is another matter; an answer without number stays as it is
            cut = [re.search(r"-?\d+(?:\.\d+)?(?!.*=)", text) for text in new]
            found += [m[0] if m else text.strip() or "?" for m, text in zip(cut, new)]
        return found

    found = []
    for part in (0, 1):
        rows: list[dict] = []
        for family in ("products", "number_sequence"):
            rows += logic(family, train, test)[part]
        found.append(
            [
                {"item": r["item"], "prompt": ask(r["question"]), "completion": [say(r["answer"])],
                 "correct": r["correct"], "origin": r["origin"]}
                for r in judgements(rows, sample=sample)
            ]
        )  # fmt: skip
    return found[0], found[1]


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def derivations(train: int, test: int) -> tuple[list[dict], list[dict]]:
    """Sums worked out step by step, and the same with one wrong step that the later steps carry on."""
    rng, rows, seen = random.Random(0), [], set()
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


def people(count: int, length: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        things = rng.sample(THINGS.split(), length)
        found.append([f"{n} has {rng.randint(2, 60)} {t}." for n, t in zip(rng.sample(NAMES.split(), length), things)])
    return found


def documents() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Pieces of torch's docstrings and of plays by document, training and held out."""
    train, test = {}, {}
    for texts in (_data.docstrings(), _data.plays()):
        for number, name in enumerate(sorted(texts)):
            pieces = list(_data.pieces(texts[name], 120))
            if len(pieces) >= 10:
                (test if number % 3 == 2 else train)[name] = pieces
    return train, test
