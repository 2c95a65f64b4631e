"""README.md: the script runs, commands and links exist, table and numbers are those of the code and the records."""

from __future__ import annotations

import abc
import re
from statistics import fmean
from typing import Any

import torch
from claims import missing, one_line, uncovered
from pages import ROOT, blocks
from session import session, tiny_folder  # noqa: F401 - fixtures

import run as setup
from peft_bundles import objectives
from peft_bundles.taxonomy import PRESETS
from studies.page_numbers import continual, disturbance_ratio


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 120


def test_the_script_is_the_example() -> None:  # which tests/examples/test_own_data.py runs
    example = (ROOT / "examples/own_data.py").read_text(encoding="utf-8")
    docstring, script = example.rsplit('"""\n\n', 1)
    assert docstring.count('"""') == 1
    assert blocks("README.md", "python") == [script]


def test_one_batch_shows_the_base_model_and_both_bundles(session: dict[str, Any]) -> None:  # noqa: F811
    model, tokenizer = session["model"], session["tokenizer"]
    ids = tokenizer(["With ten"] * 3, return_tensors="pt").input_ids
    with torch.no_grad():
        rows = model(input_ids=ids, alphas=session["alphas"]).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert torch.equal(rows[0], base[0])
    assert not torch.allclose(rows[1], base[1]) and not torch.allclose(rows[1], rows[2])


def test_the_commands_exist() -> None:
    commands = [line.split("#")[0].split() for code in blocks("README.md", "bash") for line in code.splitlines()]
    tasks = [words[2] for words in commands if words[:2] == ["python3", "run.py"]]
    assert tasks == ["demo", "test"] and set(tasks) <= setup.EXTRAS.keys()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r"\.\[(\w+)\]", TEXT)) <= set(extras)
    assert sum(words[0] in ("pip", "python3") for words in commands) == len(commands)


def test_the_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_owners_is_the_preset() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    said = {signal: owners.split(", ") for *_, signals, owners in rows for signal in signals.split(", ")}
    bundles = PRESETS["taxonomy"]["bundles"]
    signals = {s for spec in bundles.values() for s in spec["signals"]} - {"logic"}  # LM under another name
    owners = {s: {b for b, spec in bundles.items() if spec["signals"].get(s) == 1.0} for s in signals}
    assert {signal: set(names) for signal, names in said.items()} == owners
    named = {name for cell, *_ in rows for name in re.findall(r"`(\w+)`", cell)}
    trained = {name for name in objectives.__all__ if isinstance(getattr(objectives, name), abc.ABCMeta)}
    assert named == trained - {"Anchor", "Objective"}  # Anchor is a penalty, on any signal


def test_numbers_are_those_of_the_records() -> None:
    text = one_line(TEXT)
    claims = [
        ("unrelated text {:.2f} times", disturbance_ratio("bundles:quiet=20", 0.002)),
        ("penalty disturbs less ({:.2f})", disturbance_ratio("lora_r16_kl1.0", 0.002)),
        ("told the task answer {:.2f} of the questions", fmean(continual("bundles", 0.002, "tag", schedule="mixture"))),
        ("one LoRA {:.2f}.", fmean(continual("lora", 0.002, "all", schedule="mixture"))),
    ]
    assert missing(text, claims) == []
    assert uncovered(text, claims, ["Python 3.10", "Apache-2.0"]) == []
