"""examples/own_data.py on a tiny model, without a network."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import torch
from models import TINY, batch, logits
from peft import PeftModel
from training import tokenizer


SCRIPT = Path(__file__).parents[2] / "examples" / "own_data.py"


def test_each_source_has_a_bundle_that_learnt_it(tmp_path, monkeypatch, capsys):
    TINY["llama"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    texts = {"letters": "the cats sit on the mat", "sums": "1 + 1 = 2; 2 + 2 = 4;"}
    rows = [{"source": source, "text": f"{text} {i}"} for source, text in texts.items() for i in range(50)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "model")
    monkeypatch.setenv("DATA", "texts.jsonl")
    runpy.run_path(str(SCRIPT))

    shown = capsys.readouterr().out.replace(" ", "")  # this tokenizer puts spaces between its letters
    assert all(f"on:{name}\nthecatssit" in shown for name in ("none", "b_letters", "b_sums"))
    model = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "outputs" / "own_data").eval()
    off = {"b_letters": 0.0, "b_sums": 0.0}
    assert torch.equal(logits(model, batch(), alphas=off), logits(TINY["llama"](), batch()))
    losses = {}
    for source, text in texts.items():
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        for on in (None, *texts):
            with torch.no_grad(), model.alphas({**off, **({f"b_{on}": 1.0} if on else {})}):
                losses[source, on] = model(input_ids=ids, labels=ids).loss.item()
    for source, other in (("letters", "sums"), ("sums", "letters")):
        assert losses[source, source] < losses[source, None]  # it learnt its own source
        assert losses[source, source] < losses[source, other]  # and the other one did not


def test_it_has_at_most_20_lines():
    lines = SCRIPT.read_text(encoding="utf-8").split('"""')[2].splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("#", "import ", "from "))]
    assert len(code) <= 20
