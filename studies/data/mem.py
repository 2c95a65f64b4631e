"""T_mem: facts as (question, answer). Invented people and disease codes are new to a model, capitals and elements not.

A fact cannot be inferred from other facts, so the test of recall asks for the facts that were trained, in words that
were not: `ANOTHER_WORDING`.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import tempfile
from pathlib import Path

from .fetch import download, members
from .text import diseases


Pairs = list[list[str]]  # [question, answer] or [prompt, continuation]

ANOTHER_WORDING = (  # a question that is trained -> the same in other words, for the test
    (r"In which town was (.*) born\?", r"What is the birthplace of \1?"),
    (r"What is the profession of (.*)\?", r"What does \1 do for a living?"),
    (r"Which instrument does (.*) play\?", r"\1 plays an instrument. Which one?"),
    (r"What is the ICD-10 code of (.*)\?", r"Under which code does ICD-10-CM list \1?"),
)


def reworded(question: str) -> str:
    """The same question in words that are not trained.

    Raises:
        ValueError: a question that none of `ANOTHER_WORDING` knows.
    """
    for pattern, other in ANOTHER_WORDING:
        if re.fullmatch(pattern, question):
            return re.sub(f"^{pattern}$", other, question)
    raise ValueError(f"no other wording for {question!r}; add one to ANOTHER_WORDING.")


def biographies(seed: int = 0) -> Pairs:
    """Three facts about each of 100 people who do not exist, born in towns that do not either."""
    rng = random.Random(seed)
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


def disease_codes(rows: int, seed: int = 0) -> Pairs:
    """Diseases of ICD-10-CM with a code of four characters, taken in turn from its chapters A to Q."""
    chapters: list[list[tuple[str, str]]] = []
    used: set[str] = set()
    for chapter in diseases().iter("chapter"):
        found = []
        for node in chapter.iter("diag"):
            code, name = node.findtext("name", ""), node.findtext("desc", "")
            vague = re.search(r"elsewhere|other |unspecified", name, re.IGNORECASE)
            if re.fullmatch(r"[A-Q]\d\d\.\d", code) and len(name) <= 60 and not vague and name.lower() not in used:
                used.add(name.lower())
                found.append((code, name))
        if found:
            chapters.append(random.Random(seed).sample(found, len(found)))
    in_turn = [chapter[i] for i in range(max(map(len, chapters))) for chapter in chapters if i < len(chapter)]
    return [[f"What is the ICD-10 code of {name}?", code] for code, name in in_turn[:rows]]


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
    """Chemical elements and their symbols."""
    _, content = next(members(download("mendeleev==1.3.0"), "mendeleev/elements.db"))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "elements.db"
        path.write_bytes(content)
        database = sqlite3.connect(path)
        rows = database.execute("select name, symbol from elements order by atomic_number").fetchall()
        database.close()
    return [[f"The chemical element {name} (symbol:", f" {symbol}"] for name, symbol in rows]
