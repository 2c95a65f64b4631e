"""The code blocks of README.md and of the pages under docs/, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r'^--8<-- "([^":]+):(\w+)"$', re.MULTILINE)


def text_of(page: str) -> str:
    """The page, with the sections of other pages that it includes."""

    def section(match: re.Match[str]) -> str:
        source, name = text_of(match[1]), re.escape(match[2])
        found = re.search(rf"\[start:{name}\] -->\n(.*?)<!-- --8<-- \[end:{name}\]", source, re.DOTALL)
        assert found, f"{page} includes section {match[2]!r} of {match[1]}, which has none"
        return found[1]

    return INCLUDE.sub(section, (ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(text_of(page)) if name == language]


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks in their order, as one session that starts with `names`."""
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names
