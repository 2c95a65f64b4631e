"""The texts of the quickstart: split by document without a leak, cached whole or not at all."""

from __future__ import annotations

import random

import pytest

from studies.data import corpora
from studies.data.fetch import staged
from studies.data.split import long_lines, pieces, split_by_document


pytestmark = pytest.mark.studies


LINE = "thou art more lovely and temperate rough winds do shake the darling buds of may but not for long"
WORDS = LINE.split()


def verse(number: int) -> str:
    """A play of its own for every number."""
    rng = random.Random(number)
    return "\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(300))


def test_train_and_held_out_share_no_document_and_no_line():
    documents = {f"play {n}": verse(n) for n in range(10)}
    documents["play 4"] = verse(0) + verse(4)  # held out, and half of it copied from a training document
    train, held_out = split_by_document(documents, seed=0)
    assert train and held_out
    for piece in train:
        assert all(line not in verse(4) and line not in verse(9) for line in piece.splitlines())
    for piece in held_out:
        assert any(piece in documents[name] for name in ("play 4", "play 9"))
    lines = [{line for piece in part for line in long_lines(piece)} for part in (train, held_out)]
    assert lines[0].isdisjoint(lines[1])
    assert split_by_document(documents, seed=0) == (train, held_out)
    assert split_by_document(documents, seed=1) != (train, held_out)


def test_installed_texts_are_enough_for_the_quickstart(monkeypatch):
    monkeypatch.setattr(corpora, "plays", lambda: {f"play {n}": verse(n) for n in range(10)})
    texts = corpora.load_texts(seed=0)
    assert len(texts["docs"][0]) > 500 and len(texts["docs"][1]) > 50
    assert len(texts["manual"][0]) > 500 and len(texts["manual"][1]) > 20


def test_pieces_are_whole_lines_of_the_text():
    found = list(pieces(verse(1), 400))
    assert all(piece in verse(1) and len(piece) >= 400 for piece in found)
    assert len("".join(found)) > 0.95 * len(verse(1)) - 400


def test_an_interrupted_download_leaves_no_cache(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "cache" / "model") as new:
        (new / "half").write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "cache").iterdir()) == []
    for text in ("first", "second"):  # the second run finds the first one's folder, and keeps it
        with staged(tmp_path / "cache" / "model") as new:
            (new / "whole").write_text(text)
    assert (tmp_path / "cache" / "model" / "whole").read_text() == "first"
