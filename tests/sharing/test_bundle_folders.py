"""A bundle by itself is a PEFT adapter folder; what a stranger gives instead of one is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from folders import CONFIG, NAMES, WEIGHTS, content, huge_header, loaded, lora, only, pickled
from models import TINY, attached, batch, bundle_config, every, logits, perturb, quietly_loaded
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_bundles
from peft_bundles.core.checkpoints import read
from peft_bundles.core.layer import BundleLayer
from peft_bundles.sharing.hub import parse_source


# ---- folders ----


@every
def test_a_bundle_by_itself_is_a_peft_adapter(name, tmp_path):
    model = attached(name)
    for bundle in NAMES:
        folder = peft_bundles.save_bundle(model, bundle, tmp_path / bundle)
        assert {CONFIG, WEIGHTS, "README.md"} == set(os.listdir(folder))
        again = quietly_loaded(TINY[name](), folder).eval()
        assert list(again.peft_config["default"].bundles) == [bundle]
        assert torch.allclose(logits(again, batch()), only(model, bundle), atol=1e-5)
    assert not torch.allclose(only(model, "b_mlp"), only(model, "b_linear"), atol=1e-3)


SHAPES = {
    "tied": {"projection": "tied"},
    "overlap": {
        "sub_bases": {"common": 6, "left": 0.2, "right": 8},
        "bundles": {
            "b_mlp": {"rank": 0.2, "sub_bases": ["left"], "overlap": 0.2},
            "b_linear": {"rank": 4, "sub_bases": ["right"], "overlap": 0.33, "adapter": "linear"},
            "b_diag": {"rank": 3, "sub_bases": ["common", "right"], "adapter": "diag"},
        },
    },
    "full": {
        "bundles": {
            "b_mlp": {"rank": 4, "adapter": "full", "bottleneck": 5},
            "b_linear": {"rank": 6, "sub_bases": ["right"], "adapter": "linear", "alpha": 0.5},
            "b_diag": {"rank": 4, "sub_bases": ["right"], "adapter": "diag"},
        }
    },
    "some layers": {"layers_to_transform": [1]},
    "seeded": {"basis_init": "random", "save_basis": False, "basis_seed": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_and_joined_it_is_the_same_model(shape, tmp_path):
    """Every kind of bundle, of support and of basis."""
    model = attached(**SHAPES[shape])
    for bundle in NAMES:
        peft_bundles.save_bundle(model, bundle, tmp_path / bundle)
        assert torch.allclose(logits(loaded(tmp_path / bundle), batch()), only(model, bundle), atol=1e-5)
    composed = peft_bundles.compose(TINY["llama"](), [tmp_path / bundle for bundle in NAMES])
    assert composed.active_adapters == ["composed_0"]
    assert torch.allclose(logits(composed, batch()), logits(model, batch()), atol=1e-5)
    peft_bundles.save_bundle(composed, "b_linear", tmp_path / "again")
    assert read(tmp_path / "again").config == read(tmp_path / "b_linear").config
    assert torch.allclose(logits(loaded(tmp_path / "again"), batch()), only(model, "b_linear"), atol=1e-5)


def test_a_calibrated_bundle(tmp_path):
    model = get_peft_model(TINY["llama"](), bundle_config())
    peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    perturb(model).eval()
    for bundle in NAMES:
        peft_bundles.save_bundle(model, bundle, tmp_path / bundle, {"steps": 3})
        assert torch.allclose(logits(loaded(tmp_path / bundle), batch()), only(model, bundle), atol=1e-5)
    config = read(tmp_path / "b_mlp").config
    assert config.calibration == model.peft_config["default"].calibration
    assert config.provenance["summaries"] == {"b_mlp": {"steps": 3}}
    assert "calibration: 2" in (tmp_path / "b_mlp" / "README.md").read_text()


def test_the_file_has_the_bundles_columns_only(tmp_path):
    peft_bundles.save_bundle(attached(), "b_diag", tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    assert {t.shape[1] for k, t in found.items() if "bundle_basis" in k} == {8}  # of 24
    assert all("b_mlp" not in key for key in found)


def test_saving_again_replaces_and_keeps_other_files(tmp_path):
    model = attached()
    peft_bundles.save_bundle(model, "b_mlp", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine too")
    perturb(model, seed=7)
    peft_bundles.save_bundle(model, "b_mlp", tmp_path)
    assert torch.allclose(logits(loaded(tmp_path), batch()), only(model, "b_mlp"), atol=1e-5)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "mine too"


def test_a_failed_save_leaves_the_earlier_bundle(tmp_path, monkeypatch):
    model = attached()
    peft_bundles.save_bundle(model, "b_mlp", tmp_path)
    before = content(tmp_path)
    perturb(model, seed=7)
    monkeypatch.setattr(
        "peft_bundles.core.checkpoints.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        peft_bundles.save_bundle(model, "b_mlp", tmp_path)
    assert content(tmp_path) == before


def test_refusals_of_saving(tmp_path):
    model = attached()
    for bundle, summary, message in (
        ("b_x", None, r"no bundle 'b_x'.*'b_mlp'"),
        ("b_mlp", {"loss": float("nan")}, "does not fit into JSON .*; give a dict"),
        ("b_mlp", {"loss": torch.ones(1)}, "does not fit into JSON .*; give a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_bundles.save_bundle(model, bundle, tmp_path / "x", summary)
    with pytest.raises(ValueError, match="no bundle adapter 'other'"):
        peft_bundles.save_bundle(model, "b_mlp", tmp_path / "x", adapter="other")
    with pytest.raises(ValueError, match=r"also trains .*lm_head.*save_pretrained"):
        peft_bundles.save_bundle(attached(modules_to_save=["lm_head"]), "b_mlp", tmp_path / "x")
    with pytest.raises(ValueError, match="has no bundles"):
        peft_bundles.save_bundle(TINY["llama"](), "b_mlp", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        peft_bundles.save_bundle(model, "b_mlp", tmp_path / "file")


# ---- what a stranger may give ----


def edit(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def tampered(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit(folder, weights_digest=None)


def first(tensors, part):
    return next(k for k in sorted(tensors) if part in k)


BAD = {
    "a LoRA": (lora, "is an adapter of type 'LORA', not a bundle"),
    "a pickle": (pickled, "only adapter_model.bin, a pickle, which is never loaded"),
    "a header of 10 GB": (huge_header, r"claims a header of 10,737,418,240 bytes in a file of 208"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "half-written|only"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter, or is half-written"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a valid safetensors"),
    "a few bytes": (lambda f: (f / WEIGHTS).write_bytes(b"abc"), "claims a header"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "not valid JSON"),
    "no object": (lambda f: (f / CONFIG).write_text("[]"), "holds a list"),
    "another shape": (lambda f: edit(f, base_shape=[0, 2]), "must be .hidden size, layers."),
    "no shape": (lambda f: edit(f, base_shape=None), "must be .hidden size, layers."),
    "a provenance of text": (lambda f: edit(f, provenance="x"), "provenance .* damaged"),
    "a field of text": (lambda f: edit(f, dropout="high"), "dropout='high' must be a number"),
    "layers that are not there": (lambda f: edit(f, basis_fingerprint={"0": 1.0}), "tensors of 2 layers"),
    "another basis": (lambda f: edit(f, basis_fingerprint={"0": 1.0, "1": 2.0}), "another basis than"),
    "weights of another config": (lambda f: edit(f, weights_digest="0" * 64), "not those that were saved"),
    "NaN": (lambda f: tampered(f, lambda t: t[first(t, "up")].view(-1)[:1].fill_(float("nan"))), "NaN"),
    "a tensor too few": (lambda f: tampered(f, lambda t: t.pop(first(t, "down"))), "lacks tensor 'bundle_down.b_mlp'"),
    "a tensor too many": (
        lambda f: tampered(f, lambda t: t.update({first(t, "down") + "x": torch.ones(1)})),
        "unknown tensor",
    ),
    "a trained head": (lambda f: tampered(f, lambda t: t.update({"lm_head": torch.ones(1)})), "more than bundles"),
    "another size": (
        lambda f: tampered(f, lambda t: t.update({first(t, "down"): torch.ones(1, 2)})),
        r"of shape \(1, 2\), not",
    ),
    "a scale of zero": (lambda f: tampered(f, lambda t: t[first(t, "scale")].zero_()), "not positive"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A bundle folder; and a model and a base model that no refused source may change."""
    folder = peft_bundles.save_bundle(attached(), "b_mlp", tmp_path_factory.mktemp("good") / "bundle")
    return folder, peft_bundles.compose(TINY["llama"](), [folder]), TINY["llama"]()


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused(what, good, tmp_path, hub):
    """From disk and from the Hub alike, by pull, compose and load, before anything is changed."""
    spoil, message = BAD[what]
    folder, model, base = good
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    if what == "a LoRA":
        for path in bad.iterdir():
            path.unlink()
    spoil(bad)
    hub.add("you/bad", content(bad))
    before, adapters = logits(model, batch()), list(model.peft_config)
    for source in (str(bad), "you/bad"):
        with pytest.raises(ValueError, match=message):
            peft_bundles.pull_bundle(source, tmp_path / "copy")
        with pytest.raises(ValueError, match=message):
            peft_bundles.load_bundle(model, source, "b_new")
    with pytest.raises(ValueError, match=message):
        peft_bundles.compose(base, [folder, bad])
    assert not any(isinstance(m, BundleLayer) for m in base.modules())
    assert torch.equal(logits(model, batch()), before)
    assert list(model.peft_config) == adapters
    assert not (tmp_path / "copy").exists()
    assert not any("pickle" in r or r.endswith(".bin") for r in hub.requests)


NO_SOURCES = [
    "../../no-such-folder",
    "no/such/folder",
    "/no",
    "a/b:../c",
    "a/b@../x",
    "a/b@x:y:z",
    "-x/y",
    "./x",
    "",
    "a b/c",
    "x/y:1",
]


@pytest.mark.parametrize("source", NO_SOURCES)
def test_sources_that_are_none(source):
    with pytest.raises(
        ValueError, match=r"neither an existing folder nor the name of a repository|is not a list|Repo id"
    ):
        peft_bundles.pull_bundle(source)


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "x").mkdir(parents=True)
    assert parse_source("me/x").folder == "me/x"
    assert parse_source("me/x:b_a").folder == "me/x" and parse_source("me/x:b_a").bundle == "b_a"
    found = parse_source("you/x@refs/pr/1:b_a")
    assert (found.repo, found.revision, found.bundle, found.folder) == ("you/x", "refs/pr/1", "b_a", None)
    assert parse_source("you/x").bundle is parse_source("you/x").revision is None


def test_another_base_model_or_revision(tmp_path):
    peft_bundles.save_bundle(attached(), "b_mlp", tmp_path)
    for base, message in (
        (TINY["llama"](hidden_size=32), r"\(64, 2\), but LlamaForCausalLM has \(32, 2\)"),
        (TINY["llama"](seed=1), r"another base model or another revision of it: \d+ of 19 tensors .* other weights"),
        (TINY["gpt2"](), r"another base model .* other weights|recorded"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_bundles.compose(base, [tmp_path])
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, str(tmp_path))


def test_a_few_steps_of_training_make_another_revision(tmp_path):
    peft_bundles.save_bundle(attached(), "b_mlp", tmp_path)
    base = TINY["llama"]()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    for _ in range(5):
        base(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
    with pytest.raises(ValueError, match="another revision"):
        peft_bundles.compose(base, [tmp_path])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same(dtype, tmp_path):
    peft_bundles.save_bundle(attached(), "b_mlp", tmp_path)
    assert peft_bundles.compose(TINY["llama"]().to(dtype), [tmp_path])
    larger = TINY["llama"]()
    larger.resize_token_embeddings(120)
    assert peft_bundles.compose(larger, [tmp_path])
