"""A basis as a file of its own, in which people train bundles that share it."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from models import TINY, attached, batch, bundle_config, layers, logits, perturb
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_bundles
from peft_bundles import compose, save_basis, save_bundle
from peft_bundles.core.checkpoints import SHARED, read


def calibrated(**fields):
    model = get_peft_model(TINY["llama"](), bundle_config(**fields))
    peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    return model


@pytest.mark.parametrize("from_hub", [False, True])
def test_bundles_trained_apart_in_one_basis_share_it(from_hub, hub, tmp_path):
    origin = calibrated()
    path = peft_bundles.save_basis(origin, tmp_path)
    assert path.name == "basis.safetensors"
    if from_hub:
        peft_bundles.push_basis(origin, "me/basis")
        assert ModelCard(hub.files("me/basis")["README.md"].decode()).data.tags == ["peft_bundles", "basis"]
    one = {"b_mine": {"rank": 8, "sub_bases": ["left"]}}
    two = {"b_yours": {"rank": 5, "sub_bases": ["right"]}}
    models = []
    for number, bundles in enumerate((one, two)):
        model = get_peft_model(TINY["llama"](), bundle_config(bundles=bundles, basis_seed=number))
        found = peft_bundles.load_basis(model, "me/basis" if from_hub else path)
        for layer, theirs in zip(layers(model), layers(origin)):
            for what in ("bundle_basis", "bundle_mean", "bundle_scale"):
                assert torch.equal(getattr(layer, what)["default"], getattr(theirs, what)["default"])
        perturb(model, seed=number).eval()
        (name,) = bundles
        peft_bundles.save_bundle(model, name, tmp_path / name)
        assert read(tmp_path / name).config.provenance["basis"]["digest"] == found["digest"]
        models.append(model)
    composed = peft_bundles.compose(TINY["llama"](), [tmp_path / "b_mine", tmp_path / "b_yours"])
    assert composed.active_adapters == ["composed_0"]
    for name, other, model in (("b_mine", "b_yours", models[0]), ("b_yours", "b_mine", models[1])):
        with composed.alphas({other: 0.0}):
            assert torch.allclose(logits(composed, batch()), logits(model, batch()), atol=1e-5), name


def test_refusals_of_a_basis(tmp_path):
    path = peft_bundles.save_basis(calibrated(), tmp_path / "basis")
    fresh = lambda **fields: get_peft_model(TINY["llama"](), bundle_config(**fields))  # noqa: E731
    bundle = {"b": {"rank": 2, "sub_bases": ["left"]}}
    for model, error, message in (
        (
            fresh(bundles=bundle, sub_bases={"left": 4}),
            ValueError,
            r"has the sub-bases \[\['left', 12\].*attach an adapter with sub_bases=",
        ),
        (fresh(basis_rank=32), ValueError, "use the basis_rank that the file was made with"),
        (fresh(input_norm="none"), ValueError, "input_norm='standard'"),
        (fresh(layers_to_transform=[0]), ValueError, r"has layers \[0, 1\]"),
        (attached(), RuntimeError, "its weights belong to its own basis"),
        (get_peft_model(TINY["llama"](seed=1), bundle_config()), ValueError, "another revision"),
    ):
        with pytest.raises(error, match=message):
            peft_bundles.load_basis(model, path)
    with pytest.raises(ValueError, match="names a bundle"):
        peft_bundles.load_basis(fresh(), f"{tmp_path}/basis:b_x")
    with pytest.raises(ValueError, match=r"has no basis\.safetensors"):
        peft_bundles.load_basis(fresh(), tmp_path)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is not a basis file; give one that save_basis wrote"):
        peft_bundles.load_basis(fresh(), tmp_path / "plain.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="do not match the digest in the file"):
        peft_bundles.load_basis(fresh(), path)
    peft_bundles.save_bundle(attached(), "b_diag", tmp_path / "part")
    composed = peft_bundles.compose(TINY["llama"](), [tmp_path / "part"])
    with pytest.raises(ValueError, match="only the columns of its basis"):
        peft_bundles.save_basis(composed, tmp_path / "other")


def test_calibrating_again_is_another_basis(tmp_path):
    model = calibrated()
    peft_bundles.load_basis(model, peft_bundles.save_basis(model, tmp_path))
    named = model.peft_config["default"].provenance["basis"]["digest"]
    peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False, seed=5)
    peft_bundles.save_bundle(model, "b_mlp", tmp_path / "b")
    assert read(tmp_path / "b").config.provenance["basis"]["digest"] != named


def test_adapters_of_one_basis_store_it_once(tmp_path):
    """U, mu and sigma are in one file, read when an adapter is loaded; the adapters' files have weights alone."""
    model = attached()
    whole = model.save_pretrained(tmp_path / "whole") or tmp_path / "whole"
    source = save_basis(model, tmp_path / "basis")
    model.peft_config["default"].basis_source = str(tmp_path / "basis")
    model.save_pretrained(tmp_path / "small")
    kept = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert not any(what in key for key in kept for what in SHARED) and kept
    ids = batch()
    wanted = logits(model, ids)
    for load in (
        lambda: PeftModel.from_pretrained(TINY["llama"](), tmp_path / "small"),
        lambda: compose(TINY["llama"](), [tmp_path / "small"]),
        lambda: PeftModel.from_pretrained(TINY["llama"](), whole),
    ):
        assert torch.equal(logits(load().eval(), ids), wanted)
    one = compose(TINY["llama"](), [save_bundle(model, "b_mlp", tmp_path / "one")])  # has its columns of U itself
    others = dict.fromkeys(set(model.peft_config["default"].bundles) - {"b_mlp"}, 0.0)
    torch.testing.assert_close(logits(one, ids), logits(model, ids, alphas=others))
    other = attached(basis_seed=7)
    other.peft_config["default"].basis_source = str(tmp_path / "basis")
    with pytest.raises(ValueError, match="is not the basis of adapter 'default'"):
        other.save_pretrained(tmp_path / "other")
    source.write_bytes(source.read_bytes()[:-7] + b"changed")
    for load in (PeftModel.from_pretrained, lambda base, folder: compose(base, [folder])):
        with pytest.raises(ValueError, match="do not match the digest"):
            load(TINY["llama"](), tmp_path / "small")
    source.unlink()
    with pytest.raises(ValueError, match=r"has no basis\.safetensors"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path / "small")
