"""A tiny model and tokenizer in a folder, and a reader's session: the script of README.md, run with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pages
import pytest
from models import TINY
from training import tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    TINY["llama"](max_position_embeddings=512).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def session(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the script of README.md leaves behind, `model` and `tokenizer` among them."""
    monkeypatch.setenv("MODEL", str(tiny_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return pages.run("README.md", {"__name__": "readme"})
