"""A hook of mkdocs: a link from a page to a file elsewhere in the repository leads to a copy of it on the site.

On a page the link stays relative (`../../studies/heads/results/meta_heads.jsonl`), so that it also works where the
repository is browsed. A link to a folder becomes plain text on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return match[0]  # a page, or a mistake, which mkdocs reports
        if (ROOT / target).is_dir():
            return match[1]
        copy = f"repository/{target}" + (".txt" if target.endswith(".md") else "")
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
        return f"[{match[1]}]({posixpath.relpath(copy, posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(led, markdown)
