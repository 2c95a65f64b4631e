"""The three task families of continual.py, in one file, and as padded rows of tokens.

memory: facts about people who do not exist, and disease codes. logic: questions of reasoning-gym. meta: is this answer
right? A question, a proposed answer, "Yes" or "No". Beside them texts of domains that nobody trains on, texts for the
bundles' calibration, and the task that a classifier reads off every test prompt.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoTokenizer

from studies.data.logic import TEST_OFFSET, questions
from studies.data.mem import biographies, capitals, disease_codes, elements
from studies.data.meta import judgements
from studies.data.smollm import model_folder
from studies.data.split import pieces
from studies.data.text import docstrings, milton, news, plays
from studies.quality import make_data as quality_data
from studies.rows import Draws, Encoded, Rows, rows_of, tokens_of


TASKS = ("memory", "logic", "meta")
SEED = 0
PEOPLE = 80  # of whom facts are trained
JUDGED = 20  # of them: their facts are proposed answers of meta's training rows, and never asked in memory's tests
CODES = 120
LOGIC: dict[str, dict[str, Any]] = {  # family of reasoning-gym 0.1.25 -> options
    "family_relationships": {"max_family_size": 6},
    "number_sequence": {"min_terms": 5, "max_terms": 8, "max_complexity": 2},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 4},
}
JUDGED_LOGIC = ("chain_sum", "number_sequence", "letter_counting")
SIZES = {"train": 1000, "validation": 25, "test": 50}  # questions of a family of logic
PAIRS = {
    "train": 400,
    "validation": 10,
    "test": 20,
}  # questions of a family of meta, each with a right and a wrong answer
AGAIN = 4  # times that a fact is judged in training, each with another wrong answer
JUDGE = "Question: {}\nProposed answer: {}\nIs the proposed answer right?"
DOMAIN_ROWS, TEXT_TOKENS, CALIBRATION_ROWS = 32, 128, 160

Item = list[str]  # [question, answer, family]


# ---- the file ----


def prepare(path: Path, length: int = 72) -> None:
    """Write the file that `load` reads. Needs a network once, and reasoning-gym and scikit-learn.

    Items that have more than `length` tokens with their prompt are left out, in training and in tests.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    rng = random.Random(SEED)

    def fits(question: str, answer: str) -> bool:
        return len(encode(tokenizer, [question, answer, ""])[0]) <= length

    facts = biographies(SEED)[: 3 * PEOPLE]
    people = [[q, a, "biographies"] for q, a in facts]
    asked = people[3 * JUDGED :] + [[q, a, "codes"] for q, a in disease_codes(CODES) if fits(q, a)]
    rng.shuffle(asked)
    third = len(asked) // 3
    memory = {"train": people[: 3 * JUDGED] + asked, "validation": asked[:third], "test": asked[third:]}

    seen: set[str] = set()
    logic: dict[str, list[Item]] = {split: [] for split in SIZES}
    judged: dict[str, dict[str, list[Item]]] = {split: {} for split in PAIRS}
    for family, options in LOGIC.items():
        for number, (split, rows) in enumerate(SIZES.items()):
            found = questions(family, options, rows, SEED + number * TEST_OFFSET, fits, seen)
            logic[split] += [[q, a, family] for q, a in found]
    for family in JUDGED_LOGIC:
        for number, (split, rows) in enumerate(PAIRS.items()):
            keep = lambda q, a: fits(JUDGE.format(q, a + " 0"), "Yes")  # noqa: E731
            found = questions(family, LOGIC[family], rows, SEED + (3 + number) * TEST_OFFSET, keep, seen)
            judged[split][family] = [[q, a, family] for q, a in found]
    for family, found in {"capitals": capital_questions(), "elements": element_questions()}.items():
        rng.shuffle(found)
        validation, test = PAIRS["validation"], PAIRS["test"]
        judged["validation"][family] = found[:validation]
        judged["test"][family] = found[validation : validation + test]
        judged["train"][family] = found[validation + test :][:100]
    judged["train"]["biographies"] = people[: 3 * JUDGED]
    for split in ("validation", "test"):
        known = [item for item in memory[split] if item[2] == "biographies"]
        judged[split]["biographies"] = known[: PAIRS[split]]
    meta = {split: judge(families, fits, AGAIN if split == "train" else 1) for split, families in judged.items()}

    taken: set[str] = set()
    tokens = (tokenizer, TEXT_TOKENS, taken)
    domains = {
        name: quality_data.choose(texts, DOMAIN_ROWS, *tokens)
        for name, texts in {
            "wiki": quality_data.wiki(),
            "news": (item[:800] for item in news()),
            "manual": quality_data.shuffled(p[:800] for text in topics.values() for p in pieces(text, 600)),
            "code": quality_data.library_code(),
            "plays": quality_data.shuffled(p for text in plays().values() for p in pieces(text, 600))[:2000],
        }.items()
    }
    kinds = (docstrings().values(), milton())
    calibration = [
        quality_data.choose(
            filter(quality_data.harmless, quality_data.shuffled(p for text in texts for p in pieces(text, 600))),
            CALIBRATION_ROWS // 2,
            *tokens,
        )
        for texts in kinds
    ]
    data = {split: {"memory": memory[split], "logic": logic[split], "meta": meta[split]} for split in SIZES}
    data |= {"domains": domains, "calibration": [text for pair in zip(*calibration) for text in pair]}
    data["tags"] = predicted_tags(data["train"], data["test"])
    check(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(data, ensure_ascii=False, sort_keys=True, indent=0).encode(), mtime=0))


def load(path: Path) -> dict[str, Any]:
    """{"train", "validation", "test"}: task -> items [question, answer, family]; "domains": name -> texts;
    "calibration": texts; "tags": task -> the task that each test prompt was taken for."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def capital_questions() -> list[Item]:
    return [[f"What is the capital of {q[15:-25]}?", a.strip(), "capitals"] for q, a in capitals()]


def element_questions() -> list[Item]:
    return [[f"What is the chemical symbol of {q[21:-9]}?", a.strip(), "elements"] for q, a in elements()]


def judge(families: dict[str, list[Item]], fits: Any, again: int) -> list[Item]:
    """Every question with its right and with a wrong answer: [question, "Yes" or "No", family], shuffled.

    Wrong answers come from questions of the same kind: a town for a profession would give itself away. Facts are judged
    `again` times, with other wrong answers.
    """
    found: list[Item] = []
    for family, items in families.items():
        kinds: dict[str, list[Item]] = {}
        for item in items:
            kinds.setdefault(re.sub(r"[A-Z]\w* [A-Z]\w*", "", item[0]) if family == "biographies" else "", []).append(
                item
            )
        times = 1 if family in LOGIC else again
        for seed in range(times):
            for number, kind in enumerate(kinds.values()):
                rows = judgements([{"question": q, "answer": a} for q, a, _ in kind], seed=1000 * seed + number)
                for row in rows:
                    if row["answer"].startswith("-") and not row["reference"].startswith("-"):
                        row["answer"] = row["answer"][1:]  # a sign would give it away
                        row["correct"] = row["answer"] == row["reference"]
                    text = JUDGE.format(row["question"].strip(), row["answer"])
                    answer = "Yes" if row["correct"] else "No"
                    if fits(text, answer):
                        found.append([text, answer, family])
    random.Random(SEED).shuffle(found)
    return found


def predicted_tags(train: dict[str, list[Item]], test: dict[str, list[Item]]) -> dict[str, list[str]]:
    """The task that TF-IDF of words and logistic regression, fitted on the training prompts, reads off test prompts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    prompts = [(item[0], task) for task in TASKS for item in train[task]]
    classifier.fit([p for p, _ in prompts], [task for _, task in prompts])
    return {task: classifier.predict([item[0] for item in test[task]]).tolist() for task in TASKS}


def check(data: dict[str, Any]) -> None:
    """Raise ValueError where a test question of logic or meta is trained, or a task's answers are all alike."""
    for task in ("logic", "meta"):
        trained = {item[0] for item in data["train"][task]}
        for split in ("validation", "test"):
            if shared := trained & {item[0] for item in data[split][task]}:
                raise ValueError(f"{split} question of {task} is trained on: {min(shared)!r}")
    if shared := {tuple(i) for i in data["validation"]["memory"]} & {tuple(i) for i in data["test"]["memory"]}:
        raise ValueError(f"fact is asked in validation and in test: {min(shared)!r}")
    for task in TASKS:
        if len({item[1] for item in data["test"][task]}) < 2:
            raise ValueError(f"the test items of {task} have one answer; there is nothing to learn.")


def majority(items: Sequence[Item]) -> dict[str, float]:
    """Accuracy of each family's own most common answer, and over "all" items of answering so."""
    families: dict[str, Counter[str]] = {}
    for _, answer, family in items:
        families.setdefault(family, Counter())[answer] += 1
    best = {family: answers.most_common(1)[0][1] for family, answers in families.items()}
    shares = {family: n / families[family].total() for family, n in best.items()}
    return {"all": sum(best.values()) / len(items), **shares}


# ---- rows ----


def encode(tokenizer: Any, item: Sequence[str]) -> Encoded:
    """A question in chat format with its answer: its tokens, and the first that counts."""
    return tokens_of(tokenizer, (quality_data.PROMPT.format(item[0]), item[1] + "<|im_end|>"))


def plan(schedule: str, routing: str, tasks: Sequence[str], phase: int, rows: int) -> list[tuple[str, str]]:
    """(task of the data, tag) of every row of a step, rows of one tag together.

    Args:
        routing: "tags" (tag and task agree), "random" (every tag gets rows of every task of the phase), "wrong"
            (of ten rows of a tag, two are of other tasks; in sequence: of ten rows, two have another task's tag), or
            "replay" (one row in ten of a later phase is of an earlier task).
    """
    share = rows // len(TASKS)
    tenth = round(rows / 10)
    if schedule == "mixture":
        tags = [tag for tag in TASKS for _ in range(share)]
        if routing == "random":
            return [(TASKS[n % len(TASKS)], tag) for n, tag in enumerate(tags)]
        if routing == "wrong":
            wrong = max(1, round(share / 10))
            others = {tag: [t for t in TASKS if t != tag] for tag in TASKS}
            group = lambda tag: [tag] * (share - 2 * wrong) + others[tag] * wrong  # noqa: E731
            return [(task, tag) for tag in TASKS for task in group(tag)]
        return [(tag, tag) for tag in tags]
    task = tasks[phase]
    others = [t for t in TASKS if t != task]
    if routing == "random":
        return [(task, tag) for tag in TASKS for _ in range(share)]
    if routing == "wrong":
        return [(task, task)] * (rows - 2 * tenth) + [(task, other) for other in others for _ in range(tenth)]
    if routing == "replay" and phase:
        earlier = [(tasks[n % phase],) * 2 for n in range(tenth)]
        return [(task, task)] * (rows - tenth) + earlier
    return [(task, task)] * rows


def draws(items: dict[str, list[Encoded]], seed: int) -> Draws:
    """Draws the training rows of every task in an order of the seed's own, whatever the other tasks' rows are."""
    return Draws(items, {task: random.Random(f"{seed} {task}") for task in items})


def chunks(examples: list[Encoded], length: int, rows: int = 256) -> list[Rows]:
    """Test rows, so many at a time."""
    return [rows_of(examples[n : n + rows], length) for n in range(0, len(examples), rows)]
