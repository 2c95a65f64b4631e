"""The six topics of the taxonomy as real text: what is learnt, and texts of other sources to try a classifier on.

The field label that a dictionary gives ("(Zool.)") decides the topic and is taken out of the text.
"""

from __future__ import annotations

import html
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from peft_bundles.taxonomy import TOPICS

from .fetch import debian
from .text import (
    dictionary,
    diseases,
    docstrings,
    docstrings_under,
    licences,
    news,
    plays,
    raw_dictionary,
    wordnet_nouns,
)


FIELDS = {  # topic -> field labels of gcide
    "animals": "Zool",
    "finance": "Com|Finance|Banking|Stock Exchange|Stock Market|Stockbroking|Insurance|Bookkeeping|Accounting",
    "law": "Law|Eng. Law|Scots Law|O. Eng. Law|Roman Law|Civil Law|Parl|Politics",
    "medical": "Med|Surg|Physiol|Pharm|Anat",
}
ML_PACKAGES = {  # installed packages -> folders with their modules
    "sklearn": ("", "cluster", "decomposition", "ensemble", "linear_model", "manifold", "metrics"),
    "transformers": ("", "generation", "utils"),
    "peft": ("", "tuners", "utils"),
    "trl": ("", "trainer"),
    "torch": ("nn/modules", "optim"),
}
STANDARD_LIBRARY = ("", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging")
OTHERS = {  # topic -> WordNet: its own files of nouns, or the subjects that synsets are marked with
    "animals": ("05", ()),
    "programming": ("", ("computer_science", "computing", "program", "programming")),
    "finance": ("21", ("finance", "commerce", "accounting", "banking", "investment", "stock_exchange")),
    "law": ("", ("law", "jurisprudence")),
    "medical": ("", ("medicine", "surgery", "pathology", "pharmacology", "physiology", "psychiatry")),
}


def topic_documents(topic: str) -> dict[str, str]:
    """{document: text} of one topic. A document is a file, a page, a licence's family, a chapter, or a few letters of
    a dictionary: what is split as a whole.

    Raises:
        ValueError: a topic that is none of `taxonomy.TOPICS`.
    """
    found: dict[str, str] = {}
    if topic not in TOPICS:
        raise ValueError(f"topic={topic!r} has no texts; choose one of {', '.join(TOPICS)}.")
    if topic in FIELDS:
        for headword, definition in labelled(raw_dictionary("gcide"), FIELDS[topic]):
            _append(found, f"gcide {headword[:2].lower()}", f"{headword}: {definition}")
    if topic == "ml":
        for package, parts in ML_PACKAGES.items():
            if importlib.util.find_spec(package) is not None:
                found |= {f"{package} {name}": text for name, text in docstrings(package, parts).items()}
    if topic == "programming":
        modules = docstrings_under(Path(sysconfig.get_paths()["stdlib"]), STANDARD_LIBRARY)
        found |= {f"python {name}": text for name, text in modules.items()}
        for headword, definition in foldoc():
            _append(found, f"foldoc {headword[:2].lower()}", f"{headword}: {definition}")
    if topic == "finance":
        found |= gnucash_guide()
    if topic == "law":
        for key, text in licences().items():
            _append(found, f"licence {key.split('-')[0]}", text[:4000])  # the longest would fill the topic
    if topic == "medical":
        for section in diseases().iter("section"):
            found[f"icd {section.get('id')}"] = "\n".join(_disease_lines(section))
    return found


def other_texts() -> dict[str, list[str]]:
    """Topic -> short texts of sources that `topic_documents` does not have: WordNet's glosses by subject.

    "none": plays and news. The news are of no field, but some are about business, courts or illness: a classifier
    that sees a topic in them is not always wrong. There is none for "ml".
    """
    lines = [line for line in wordnet_nouns().splitlines() if re.match(r"\d{8} ", line)]
    word = {line[:8]: line.split()[4] for line in lines}
    found: dict[str, list[str]] = {topic: [] for topic in OTHERS}
    for line in lines:
        head, _, gloss = line.partition(" | ")
        subjects = {word[offset] for offset in re.findall(r";c (\d{8}) n", head)}
        for topic, (file, marks) in OTHERS.items():
            if head.split()[1] == file or subjects & set(marks):
                meaning = re.sub(r"^\([^)]*\) *", "", gloss.strip())  # "(law)"
                found[topic].append(f"{head.split()[4].replace('_', ' ')}: {meaning}")
    found["none"] = [text[:800] for text in news()]
    for text in plays().values():
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        found["none"] += [p for p in paragraphs if len(p) > 150][20:40]
    return found


def labelled(text: str, labels: str) -> Iterator[tuple[str, str]]:
    """(headword, definition) of gcide's senses that one of the field labels marks, without label and markup."""
    mark = re.compile(rf"\((?:{labels})\.?\)")
    headword = ""
    for paragraph in text.split("\n\n"):
        if found := re.match(r"(\S[^\\\n]*?) \\", paragraph):
            headword = found[1]
        if headword and (found := mark.search(paragraph)):
            definition = re.sub(r"\[[^\]]*\]|[{}]|\\[^\\]*\\", "", paragraph[found.end() :])
            definition = " ".join(definition.split()).lstrip(" ,;:.")
            if len(definition) >= 30:
                yield headword, definition


def foldoc() -> Iterator[tuple[str, str]]:
    """(headword, definition) of the Free On-line Dictionary of Computing."""
    for entry in re.split(r"\n(?=\S)", dictionary("foldoc")):
        headword, _, rest = entry.partition("\n")
        definition = " ".join(re.sub(r"<[^>]*>|[{}]|\(\d{4}-\d\d-\d\d\)", "", rest).split())
        if len(definition) >= 60:
            yield headword.strip(), definition


def gnucash_guide() -> dict[str, str]:
    """The pages of GnuCash's guide to keeping accounts, as paragraphs."""
    found = {}
    for path in sorted((debian("gnucash-docs") / "usr/share/doc/gnucash-docs/gnucash-guide-en").glob("*.html")):
        paragraphs = re.findall(r"<p\b[^>]*>(.*?)</p>", path.read_text(encoding="utf-8"), re.DOTALL)
        texts = [" ".join(html.unescape(re.sub(r"<[^>]+>", "", p)).split()) for p in paragraphs]
        found[f"gnucash {path.stem}"] = "\n".join(text for text in texts if len(text) >= 40)
    return found


def _disease_lines(section: ElementTree.Element) -> Iterator[str]:
    """A line a disease: its name, what it includes and what it excludes."""
    for node in section.iter("diag"):
        parts = [node.findtext("desc", "")]
        for kind, said in (("inclusionTerm", "also"), ("includes", "includes"), ("excludes1", "not")):
            notes = [note.text.strip() for child in node.findall(kind) for note in child.findall("note") if note.text]
            parts += [f"{said} {'; '.join(notes)}"] if notes else []
        if len(parts) > 1:
            yield ", ".join(parts) + "."


def _append(documents: dict[str, str], name: str, text: str) -> None:
    documents[name] = f"{documents[name]}\n{text}" if name in documents else text
