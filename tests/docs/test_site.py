"""The site: it builds without a warning, its reference has every public name, and the code of its guides runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
from pages import ROOT
from session import session, tiny_folder  # noqa: F401 - fixtures

import peft_bundles
from peft_bundles import evaluation, objectives, trainer
from peft_bundles.routers import topic_sources, topics


MODULES = (peft_bundles, objectives, trainer, evaluation)
ROUTERS = {f"{topics.__name__}.TopicRouting", f"{topic_sources.__name__}.fit_topics"}
GUIDES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("guides", "development")
    for path in (ROOT / "docs" / folder).glob("*.md")
    if pages.blocks(str(path.relative_to(ROOT)), "python")
)


def public_names() -> set[str]:
    """By the name that a user writes: what `peft_bundles` itself has goes by that name alone."""
    names = set(ROUTERS)
    for module in MODULES:
        for name in module.__all__:
            top = getattr(peft_bundles, name, None) is getattr(module, name)
            names.add(f"{'peft_bundles' if top else module.__name__}.{name}")
    return names


def test_the_reference_has_every_public_name() -> None:
    said = [
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert public_names() - set(said) == set()
    assert len(set(said)) == len(said)


def test_start_runs(session: dict[str, Any]) -> None:  # noqa: F811
    for code in pages.blocks("docs/start.md", "python")[1:]:  # the first is README's, which the session has run
        exec(compile(code, "docs/start.md", "exec"), session)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_the_code_of_a_guide_runs(page: str, session: dict[str, Any]) -> None:  # noqa: F811
    pages.run(page, session)


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    html = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("index.html"))
    assert {name for name in public_names() if f'id="{name}"' not in html} == set()


def test_commands_name_files_that_exist() -> None:
    texts = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
    words = {word for page in texts for code in pages.blocks(str(page), "bash") for word in code.split()}
    files = {word for word in words if re.fullmatch(r"(recipes|examples|studies|benchmarks)/\S+", word)}
    assert len(files) > 3
    assert {file for file in files if not (ROOT / file).exists()} == set()
