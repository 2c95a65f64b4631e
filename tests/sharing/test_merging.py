"""A merge is the weighted sum, TIES or DARE that its method names; what cannot merge is refused."""

from __future__ import annotations

import pytest
import torch
from models import TINY, attached, batch, bundle_config, logits, perturb, reference
from peft import get_peft_model

import peft_bundles
from peft_bundles.core.checkpoints import read


KINDS = ["mlp", "linear", "diag", "full"]


def config(kind="mlp", **fields):
    bundle = {"rank": 8, "sub_bases": [] if kind == "full" else ["left"], "adapter": kind}
    return bundle_config(bundles={"b": bundle}, bottleneck=4, **fields)


def one(tmp_path, name, *, seed=0, kind="mlp", start=None, **fields):
    """A bundle folder. Hidden units of bundles with one `start` correspond."""
    model = get_peft_model(TINY["llama"](), config(kind, **fields)).eval()
    if start is not None:
        perturb(model, seed=start)
    return peft_bundles.save_bundle(
        perturb(model, scale=0.02 if start is not None else 0.3, seed=seed), "b", tmp_path / name
    )


def pair(tmp_path, kind="mlp"):
    return [one(tmp_path, f"in{seed}", seed=seed, kind=kind, start=9) for seed in (1, 2)]


def output(*folders, **alphas):
    model = peft_bundles.compose(TINY["llama"](), list(folders), rename=True)
    with model.alphas(alphas):
        return logits(model, batch())


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_is_the_exact_weighted_sum(kind, tmp_path):
    """Also of bundles that started from different weights."""
    folders = [one(tmp_path, f"in{seed}", seed=seed, kind=kind) for seed in (1, 2)]
    merged = peft_bundles.merge_bundles(folders, [0.7, -0.4], tmp_path / "out", name="b_sum")
    assert close(output(merged), output(*folders, b=0.7, b_2=-0.4))
    assert read(merged).names == ["b_sum"]


def test_negation_takes_a_bundle_out_again(tmp_path):
    folder = one(tmp_path, "in")
    negative = peft_bundles.merge_bundles([folder], [-1.0], tmp_path / "out")
    assert close(output(folder, negative), logits(reference("llama"), batch()))
    assert close(output(negative), output(folder, b=-1.0))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_a_merge_with_nothing_else_is_the_bundle(method, tmp_path):
    folder = one(tmp_path, "in")
    merged = peft_bundles.merge_bundles([folder], [1.0], tmp_path / "out", method=method, density=1.0)
    assert close(output(merged), output(folder))
    twice = peft_bundles.merge_bundles([folder, folder], [0.5, 0.5], tmp_path / "two", method="linear")
    assert close(output(twice), output(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_merges_number_by_number(method, kind, tmp_path):
    folders = pair(tmp_path, kind)
    merged = peft_bundles.merge_bundles(folders, [0.75, 0.25], tmp_path / "out", method=method, density=0.5, seed=3)
    a, b, c = (read(folder) for folder in (*folders, merged))
    for number in c.layers:
        up = [x.layers[number][k] for x in (a, b, c) for k in x.layers[number] if "bundle_up" in k]
        if method == "linear":
            assert torch.allclose(up[2], 0.75 * up[0] + 0.25 * up[1], atol=1e-6)
        if method == "dare_linear":  # what is kept is scaled by 1 / density, the rest is dropped
            options = [0.0 * up[0], 1.5 * up[0], 0.5 * up[1], 1.5 * up[0] + 0.5 * up[1]]
            assert torch.stack([torch.isclose(up[2], o, atol=1e-6) for o in options]).any(0).all()
            assert not torch.allclose(up[2], options[3], atol=1e-6)
        if method == "ties":  # no number has a sign that none of the two has
            same = torch.sign(up[0]) == torch.sign(up[1])
            assert (torch.sign(up[2])[same] * torch.sign(up[0])[same] >= 0).all()
            assert int((up[2] == 0).sum()) > 0
        down = [x.layers[number][k] for x in (a, b, c) for k in x.layers[number] if "bundle_down" in k]
        assert not down or torch.allclose(down[2], 0.75 * down[0] + 0.25 * down[1], atol=1e-6)
    again = peft_bundles.merge_bundles(folders, [0.75, 0.25], tmp_path / "again", method=method, density=0.5, seed=3)
    assert torch.equal(output(merged), output(again))


def test_merges_that_make_no_sense(tmp_path):
    folders = [one(tmp_path, f"in{seed}", seed=seed) for seed in (1, 2)]
    other = one(tmp_path, "kind", kind="linear")
    elsewhere = one(tmp_path, "elsewhere", basis_seed=5)
    tied = one(tmp_path, "tied", projection="tied")
    whole = attached()
    whole.save_pretrained(tmp_path / "whole")
    support = get_peft_model(TINY["llama"](), bundle_config(bundles={"b": {"rank": 2, "sub_bases": ["right"]}}))
    peft_bundles.save_bundle(support, "b", tmp_path / "support")
    merge = peft_bundles.merge_bundles
    for call, message in (
        (lambda: merge(folders, [1, 1], tmp_path / "x", method="linear"), r"do not correspond \(mean cosine .*\"cat\""),
        (
            lambda: merge(folders, [1, 1], tmp_path / "x", method="average"),
            "method='average' is unknown; choose one of cat",
        ),
        (
            lambda: merge(folders, [1.0], tmp_path / "x"),
            r"weights=\[1.0\]; give one finite number for each of the 2 sources",
        ),
        (lambda: merge(folders, [1, float("nan")], tmp_path / "x"), "one finite number for each"),
        (lambda: merge([], [], tmp_path / "x"), "one finite number for each of the 0"),
        (
            lambda: merge(folders, [1, 1], tmp_path / "x", method="ties", density=0.0),
            r"density=0.0 must be in \(0, 1\]",
        ),
        (
            lambda: merge([folders[0], other], [1, 1], tmp_path / "x"),
            "kind 'linear' .* kind 'mlp' .* bundles of one kind",
        ),
        (
            lambda: merge([folders[0], elsewhere], [1, 1], tmp_path / "x"),
            "have different bases, projections or scalings",
        ),
        (
            lambda: merge([folders[0], tmp_path / "support"], [1, 1], tmp_path / "x"),
            r"different supports, \['right'\].*; .*side by side with compose",
        ),
        (lambda: merge([tied, tied], [1, 1], tmp_path / "x"), "has projection='tied', a trained projector per bundle"),
        (lambda: merge([tmp_path / "whole"], [1], tmp_path / "x"), "holds the bundles .*name one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert not (tmp_path / "x").exists()
