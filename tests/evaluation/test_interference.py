"""orthogonality and conflicts: directions in common against linear algebra, conflicts against the plain losses."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, TINY, attached, layers, perturb
from training import tokenizer

import peft_bundles


# ---- directions ----


def test_orthogonality():
    found = peft_bundles.orthogonality(attached())
    names = ["b_mlp", "b_linear", "b_diag"]
    assert found.names == names
    for matrix in (found.reads, found.writes):
        assert torch.allclose(matrix, matrix.T, atol=1e-9)
        assert torch.allclose(matrix.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-6)
        assert matrix[0, 2] < 1e-8  # orthogonal sub-bases
        assert 0.0 < matrix[0, 1] < 1.0
    assert found.chance[0, 2] == pytest.approx(8 / HIDDEN)
    assert "directions in common, writes" in str(found)


def test_orthogonality_between_bases_is_what_chance_gives(tmp_path):
    """Two bundles that write the same directions are found in different bases too."""
    own = {"bundles": {"b": {"rank": 8, "sub_bases": ["left"]}}, "bottleneck": 4, "basis_init": "random"}
    folders = [
        peft_bundles.save_bundle(perturb(attached(basis_seed=seed, **own), seed=seed), "b", tmp_path / f"in{seed}")
        for seed in range(8)
    ]
    with pytest.warns(UserWarning, match="8 bases"):
        model = peft_bundles.compose(TINY["llama"](), folders, rename=True)
    found = peft_bundles.orthogonality(model)
    apart = ~torch.eye(8, dtype=torch.bool)
    assert found.writes[apart].mean() == pytest.approx(float(found.chance[apart].mean()), rel=0.3)
    for layer in layers(model):
        for what in ("bundle_basis", "bundle_up", "bundle_down"):
            table = getattr(layer, what)
            source, target = ("composed_0", "composed_1")
            if what == "bundle_basis":
                table[target] = table[source]
            else:
                table[target]["b_2"].data = table[source]["b"].data.clone()
    assert peft_bundles.orthogonality(model).writes[0, 1] == pytest.approx(1.0, abs=1e-6)


# ---- conflicts ----


def loss(model, texts):
    total = tokens = 0.0
    for text in texts:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return total / tokens


@torch.no_grad()
def test_conflicts_are_the_losses_of_each_setting():
    model, texts = attached(), ["some words", "", "x", "and other words"]
    with pytest.warns(UserWarning) as told:
        found = peft_bundles.conflicts(model, texts, tokenizer(), tolerance=-1e9)
    assert len(told) == len(found.warnings) == 3
    off = dict.fromkeys(found.names, 0.0)
    with model.alphas(off):
        assert found.base == pytest.approx(loss(model, texts), abs=1e-5)
    for i, a in enumerate(found.names):
        with model.alphas({**off, a: 1.0}):
            assert float(found.alone[i]) == pytest.approx(loss(model, texts) - found.base, abs=1e-5)
        for j, b in enumerate(found.names[:i]):
            with model.alphas({**off, a: 1.0, b: 1.0}):
                both = loss(model, texts) - found.base
            wanted = both - float(found.alone[i]) - float(found.alone[j])
            assert float(found.interaction[i, j]) == pytest.approx(wanted, abs=1e-5)
    assert "alone they change the loss by" in str(found)


def test_a_silent_bundle_is_in_conflict_with_nobody():
    model = attached()
    for layer in layers(model):
        layer.bundle_up["default"]["b_diag"].data.zero_()
    with pytest.warns(UserWarning):
        found = peft_bundles.conflicts(model, ["some words to read"], tokenizer(), tolerance=-10.0)
    assert found.interaction[0, 2] == pytest.approx(0.0, abs=1e-5)
    assert found.alone[2] == pytest.approx(0.0, abs=1e-6)


def test_refusals_of_conflicts():
    model = attached()
    for texts, message in (
        ("words", "texts is one string"),
        ([], "texts has no text with at least two tokens"),
        (["x"], "no text with at least two tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_bundles.conflicts(model, texts, tokenizer())
    single = attached(bundles={"b": {"rank": 8, "sub_bases": ["left"]}})
    with pytest.raises(ValueError, match=r"has the bundle\(s\) \['b'\]; give a model with at least two"):
        peft_bundles.conflicts(single, ["words"], tokenizer())
