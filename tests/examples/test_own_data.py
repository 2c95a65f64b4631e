"""examples/own_data.py on a tiny model, without a network."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import torch
from models import TINY, batch, logits
from peft import PeftModel
from training import tokenizer


SCRIPT = Path(__file__).parents[2] / "examples" / "own_data.py"


def test_each_bundle_learns_its_own_texts(tmp_path, monkeypatch, capsys):
    TINY["llama"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "model")
    texts = runpy.run_path(str(SCRIPT))["TEXTS"]

    shown = capsys.readouterr().out.replace(" ", "").splitlines()[-3:]  # this tokenizer puts spaces between letters
    assert len(shown) == 3 and all("Withten" in line for line in shown)
    model = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "out" / "adapter").eval()
    off = {f"b_{kind}": 0.0 for kind in texts}
    assert torch.equal(logits(model, batch(), alphas=off), logits(TINY["llama"](), batch()))
    losses = {}
    for kind, rows in texts.items():
        ids = tokenizer()(rows[0], return_tensors="pt")["input_ids"]
        for on in (None, *texts):
            with torch.no_grad(), model.alphas({**off, **({f"b_{on}": 1.0} if on else {})}):
                losses[kind, on] = model(input_ids=ids, labels=ids).loss.item()
    for kind, other in (("cooking", "sailing"), ("sailing", "cooking")):
        assert losses[kind, kind] < min(losses[kind, None], losses[kind, other])


def test_it_has_20_lines():
    body = ast.parse(SCRIPT.read_text(encoding="utf-8")).body[1:]  # after its docstring
    code = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert sum(node.end_lineno - node.lineno + 1 for node in code) <= 20
