"""The cards of bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import content, loaded, only
from huggingface_hub import ModelCard
from models import TINY, attached, batch, bundle_config, logits
from peft import get_peft_model
from safetensors.torch import load_file

import peft_bundles
from peft_bundles.sharing.cards import _row
from studies.rl_separate.cards import rows


def test_card(hub, tmp_path):
    model = attached()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    figure = tmp_path / "sweep.png"
    figure.write_bytes(b"\x89PNG")
    results = [
        {"task": "sums", "metric": "accuracy", "values": [0.5, 0.6, 0.7], "seeds": [0, 1, 2], "base": 0.1},
        {"task": "facts", "metric": "loss", "value": 2.5, "dataset": "someone/facts"},
    ]
    peft_bundles.push_bundle(
        model, "b_mlp", "me/ml", results=results, figure=str(figure), data="invented sums", summary={"steps": 300}
    )
    files = hub.files("me/ml")
    assert files["sweep.png"] == figure.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.base_model == "someone/base"
    assert {"peft_bundles", "bundle"} <= set(card.data.tags)
    index = card.data.to_dict()["model-index"][0]
    assert index["name"] == "b_mlp"
    assert [r["metrics"][0]["value"] for r in index["results"]] == [pytest.approx(0.6), 2.5]
    assert [r["dataset"]["name"] for r in index["results"]] == ["sums", "someone/facts"]
    for text in (
        "| sums | accuracy | 0.6 ± 0.1 | 0, 1, 2 | 0.1 |",
        f"| `b_mlp` | mlp | 8 | 4 | 12 of 64 | {sum(p.numel() for p in model.bundle_parameters('b_mlp')):,} |",
        "lm (1)",
        "steps 300",
        "invented sums",
        "![Scores at different values of alpha](sweep.png)",
        'peft_bundles.compose(base, ["me/ml"])',
        "Do not use it",
    ):
        assert text in card.text, text
    pulled = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert (pulled / "sweep.png").is_file()


def test_a_card_without_metadata_is_no_obstacle(hub, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    hub.add("me/ml", {"README.md": b"just words"})
    folder = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert (folder / "README.md").read_text() == "just words"
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    assert ModelCard.load(peft_bundles.write_card(folder)).data.library_name == "peft"
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    assert b"library_name: peft" in hub.files("me/ml")["README.md"]


@pytest.mark.parametrize("name", ["b_rl_policy", "b_preference", "b_ssl_main"])
def test_the_recipes_cards_say_what_is_recorded_beside_them(name):
    folder = Path(__file__).parents[2] / "model_cards" / name
    found = [_row(i, row) for i, row in enumerate(rows(json.loads((folder / "results.json").read_text())))]
    card = ModelCard.load(folder / "README.md")
    lines = [line for line in card.text.split("## Results")[1].splitlines() if line.startswith("| ")]
    assert lines[1:] == [f"| {r['task']} | {r['metric']} | {r['text']} | {r['seeds']} | {r['base']} |" for r in found]
    told = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert told == {(row["dataset"], row["metric"]): row["mean"] for row in found}
    assert "![Scores at different values of alpha](sweep.png)" in card.text
    assert (folder / "sweep.png").stat().st_size < 200_000


def test_a_card_to_push_is_all_there_is_to_say(hub, tmp_path):
    for given, message in (
        ({}, "has no README.md; give a folder with one"),
        ({"data": "sums"}, "was given with results, figure or data, which write a card"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_bundles.push_bundle(attached(), "b_mlp", "me/ml", card=tmp_path, **given)
        (tmp_path / "README.md").write_text("a card")
    assert not hub.requests


def test_a_local_base_model_is_not_told(tmp_path):
    TINY["llama"]().save_pretrained(tmp_path / "secret" / "base")
    model = get_peft_model(TINY["llama"]().from_pretrained(tmp_path / "secret" / "base"), bundle_config())
    card = ModelCard.load(peft_bundles.save_bundle(model, "b_mlp", tmp_path / "out") / "README.md")
    assert card.data.base_model is None and "secret" not in str(card) and "for base:" in card.text


def test_a_card_of_several_bundles_has_their_overlap(tmp_path):
    attached().save_pretrained(tmp_path)
    text = peft_bundles.write_card(tmp_path).read_text()
    assert "- `b_mlp` and `b_linear`: 1.00" in text and "`b_mlp` and `b_diag`" not in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"results": [{"task": "x", "metric": "y"}]},
            r"results\[0\].*lacks a field; give a dict with 'task'",
        ),
        ({"results": ["x"]}, r"results\[0\]='x' lacks a field"),
        (
            {"results": [{"task": "x", "metric": "y", "value": "high"}]},
            r"values \['high'\]; give finite numbers",
        ),
        ({"results": [{"task": "x", "metric": "y", "values": []}]}, "give finite numbers"),
        ({"figure": "nowhere.png"}, "figure='nowhere.png' is not a picture; give an existing file"),
        ({"figure": __file__}, "is not a picture"),
    ],
)
def test_bad_cards(given, message, tmp_path):
    peft_bundles.save_bundle(attached(), "b_mlp", tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        peft_bundles.write_card(tmp_path, **given)
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="holds no adapter"):
        peft_bundles.write_card(tmp_path / "nowhere")


@pytest.mark.parametrize("fields", [{}, {"basis_init": "random", "save_basis": False}])
def test_the_size_is_said(fields, tmp_path, caplog):
    """Of the file, and of U in it, in both kinds of card and in the log; also when the folder is saved to again."""
    model = attached(**fields)
    caplog.set_level("INFO", "peft_bundles")
    for folder in (tmp_path / "all", tmp_path / "all", tmp_path / "one"):
        if folder.name == "all":
            model.save_pretrained(folder)
        else:
            peft_bundles.save_bundle(model, "b_mlp", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        U = sum(t.nbytes for key, t in tensors.items() if key.endswith(".bundle_basis"))
        assert (U == 0) == (bool(fields) and folder.name == "all")
        said = f"{sum(t.nbytes for t in tensors.values()) / 1e6:.2f} MB, of which U takes {U / 1e6:.2f} MB"
        assert (folder / "README.md").read_text().count(said) == 1
        assert caplog.messages[-1].endswith(said)
    assert len(caplog.messages) == 3
