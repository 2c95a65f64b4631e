"""Bundles as checkpoints: folders that PEFT loads by themselves, and repositories of a Hub that may fail anywhere."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from pathlib import Path

import httpx2
import pytest
import torch
from conftest import HUB
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from models import TINY, attached, batch, bundle_config, every, layers, logits, perturb, quietly_loaded
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_bundles
from peft_bundles.checkpoints import read
from peft_bundles.hub import parse_source
from peft_bundles.layer import BundleLayer


NAMES = ["b_mlp", "b_linear", "b_diag"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, whose user may write, and an empty cache."""
    HUB.reset()
    monkeypatch.setenv("HF_TOKEN", "writes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
    yield HUB
    HUB.reset()


def only(model, name):
    """Logits with one bundle on."""
    with model.alphas({other: 0.0 for other in NAMES if other != name}):
        return logits(model, batch())


def loaded(folder, name="llama"):
    return PeftModel.from_pretrained(TINY[name](), str(folder)).eval()


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


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
    "free": {"projection": "free"},
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
        "peft_bundles.checkpoints.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        peft_bundles.save_bundle(model, "b_mlp", tmp_path)
    assert content(tmp_path) == before


def test_refusals_of_saving(tmp_path):
    model = attached()
    for bundle, summary, message in (
        ("b_x", None, r"no bundle 'b_x'; there are \['b_mlp'"),
        ("b_mlp", {"loss": float("nan")}, "must be a dict that fits into JSON"),
        ("b_mlp", {"loss": torch.ones(1)}, "must be a dict that fits into JSON"),
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


def lora(folder):
    get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}" * 100)


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
    "a LoRA": (lora, "is an adapter of type 'LORA' and no bundle"),
    "a pickle": (pickled, "only adapter_model.bin, a pickle, which is never loaded"),
    "a header of 10 GB": (huge_header, r"claims a header of 10,737,418,240 bytes in a file of 208"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "half-written|only"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter, or is half-written"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "no valid safetensors"),
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
        r"of shape \(1, 2\) and not",
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
    "../../etc",
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
    with pytest.raises(ValueError, match=r"no folder that exists and no repository|must be a list|Repo id"):
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


# ---- the Hub ----


def test_push_and_pull(hub, tmp_path):
    model = attached()
    url = peft_bundles.push_bundle(model, "b_mlp", "me/ml", private=True, summary={"steps": 5})
    assert url == f"{hub.url}/me/ml" and hub.repos["me/ml"].private
    assert set(hub.files("me/ml")) == {".gitattributes", CONFIG, WEIGHTS, "README.md"}
    assert len(hub.repos["me/ml"].commits) == 2  # its making, and one commit for all files
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    copy = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert copy == tmp_path / "copy" and {CONFIG, WEIGHTS, "README.md"} == set(os.listdir(copy))
    assert torch.allclose(logits(loaded(copy), batch()), only(model, "b_mlp"), atol=1e-5)
    from_hub = PeftModel.from_pretrained(TINY["llama"](), "me/ml").eval()  # PEFT by itself
    assert torch.allclose(logits(from_hub, batch()), only(model, "b_mlp"), atol=1e-5)


def test_revisions(hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    first, sha = only(model, "b_mlp"), hub.repos["me/ml"].branches["main"]
    perturb(model, seed=3)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml", revision="v2")
    for source, wanted in (
        ("me/ml", first),
        ("me/ml@v2", only(model, "b_mlp")),
        (f"me/ml@{sha}", first),
        ("me/ml@v2:b_mlp", only(model, "b_mlp")),
    ):
        composed = peft_bundles.compose(TINY["llama"](), [source])
        assert torch.allclose(logits(composed, batch()), wanted, atol=1e-5), source
    with pytest.raises(RevisionNotFoundError):
        peft_bundles.pull_bundle("me/ml@v3")


def test_one_bundle_of_a_whole_adapter(hub, tmp_path):
    model = attached()
    model.save_pretrained(tmp_path / "whole")
    hub.add("you/whole", content(tmp_path / "whole"))
    for source in (f"{tmp_path}/whole:b_linear", "you/whole:b_linear"):
        composed = peft_bundles.compose(TINY["llama"](), [source])
        assert torch.allclose(logits(composed, batch()), only(model, "b_linear"), atol=1e-5)
        peft_bundles.pull_bundle(source, tmp_path / "one")
        assert torch.allclose(logits(loaded(tmp_path / "one"), batch()), only(model, "b_linear"), atol=1e-5)
        with pytest.raises(ValueError, match="one of 3 bundles of a file; give folder="):
            peft_bundles.pull_bundle(source)
        with pytest.raises(ValueError, match=r"has no bundle 'b_x'; it has \['b_mlp'"):
            peft_bundles.pull_bundle(source.replace("b_linear", "b_x"), tmp_path / "none")
    assert torch.allclose(
        logits(peft_bundles.compose(TINY["llama"](), ["you/whole"]), batch()), logits(model, batch()), atol=1e-5
    )


def test_name_clashes_on_the_hub(hub, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    before = hub.files("me/ml")
    with pytest.raises(ValueError, match=r"me/ml holds \['b_mlp'\]; push 'b_diag' to a repository of its own"):
        peft_bundles.push_bundle(model, "b_diag", "me/ml")
    lora(tmp_path / "lora")
    hub.add("me/lora", content(tmp_path / "lora"))
    with pytest.raises(ValueError, match="is an adapter of type 'LORA'"):
        peft_bundles.push_bundle(model, "b_diag", "me/lora")
    assert hub.files("me/ml") == before and hub.files("me/lora") == content(tmp_path / "lora")


def test_rights(hub, monkeypatch, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/private", private=True)
    before = dict(hub.repos["me/private"].commits)
    for token, error, status in (("wrong", HfHubHTTPError, 401), ("reads", HfHubHTTPError, 403)):
        with pytest.raises(error) as caught:
            peft_bundles.push_bundle(model, "b_mlp", "me/private", token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(error):
            peft_bundles.push_bundle(model, "b_mlp", "me/new", token=token)
    assert hub.repos.keys() == {"me/private"} and hub.repos["me/private"].commits == before
    assert peft_bundles.pull_bundle("me/private", tmp_path / "read", token="reads")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        peft_bundles.pull_bundle("me/private")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        peft_bundles.pull_bundle("me/private", token="wrong")
    with pytest.raises(RepositoryNotFoundError):
        peft_bundles.pull_bundle("me/nothing", token="reads")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_hub_is_busy_for_a_moment(status, hub, tmp_path):
    """huggingface_hub tries again; what arrives is whole."""
    model = attached()
    for request in ("preupload", "objects/batch", "PUT", "verify"):
        hub.fail(request, status)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    assert all(times == 0 for *_, times in hub.failures)
    if status == 429:
        hub.fail("GET .*resolve.*safetensors", status)
    folder = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    assert all(times == 0 for *_, times in hub.failures)
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)


FAILING_UPLOADS = [
    ("repos/create", 500),
    ("preupload", 403),
    ("objects/batch", 500),
    ("PUT", 500),
    ("PUT", "cut"),
    ("verify", 404),
    ("commit", 500),
]


@pytest.mark.parametrize(("request_", "how"), FAILING_UPLOADS)
def test_an_upload_that_fails_changes_nothing(request_, how, hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    before = hub.files("me/ml")
    perturb(model, seed=3)
    changed = only(model, "b_mlp")
    hub.fail(request_, how, times=100)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    assert hub.files("me/ml") == before
    assert torch.equal(only(model, "b_mlp"), changed)
    hub.failures.clear()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")  # and then it goes through
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), changed, atol=1e-5)


FAILING_DOWNLOADS = [
    ("api/models", 500),
    ("resolve.*config", 500),
    ("GET .*safetensors", "cut"),
    ("GET .*safetensors", 500),
]


@pytest.mark.parametrize(("request_", "how"), FAILING_DOWNLOADS)
def test_a_download_that_fails_leaves_the_earlier_copy_and_model(request_, how, hub, tmp_path):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    copy = peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    before = content(copy)
    perturb(model, seed=3)
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    composed = peft_bundles.compose(TINY["llama"](), [copy])
    old = logits(composed, batch())
    hub.fail(request_, how, times=1000)
    revision = hub.repos["me/ml"].branches["main"]  # not in the cache, as the branch is
    for action in (
        lambda: peft_bundles.pull_bundle(f"me/ml@{revision}", copy),
        lambda: peft_bundles.load_bundle(composed, f"me/ml@{revision}", replace=True),
        lambda: peft_bundles.compose(TINY["llama"](), [f"me/ml@{revision}"]),
    ):
        with pytest.raises((OSError, httpx2.TransportError)):  # HfHubHTTPError is an OSError
            action()
    assert content(copy) == before
    assert torch.equal(logits(composed, batch()), old)
    hub.failures.clear()
    peft_bundles.pull_bundle(f"me/ml@{revision}", copy)  # the next attempt goes through
    assert torch.allclose(logits(loaded(copy), batch()), only(model, "b_mlp"), atol=1e-5)


def test_a_download_that_is_cut_is_resumed(hub):
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    hub.fail("GET .*safetensors", "cut", times=2)
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    assert sum("GET" in r and "safetensors" in r for r in hub.requests) == 3


def test_content_that_was_changed_on_the_way_is_fetched_again(hub):
    """Of the right length, which is all that huggingface_hub looks at."""
    model = attached()
    peft_bundles.push_bundle(model, "b_mlp", "me/ml")
    hub.fail("GET .*safetensors", "corrupt")
    folder = peft_bundles.pull_bundle("me/ml")
    assert torch.allclose(logits(loaded(folder), batch()), only(model, "b_mlp"), atol=1e-5)
    hub.add("me/other", hub.files("me/ml"))
    hub.fail("GET .*other.*safetensors", "corrupt", times=100)
    with pytest.raises(ValueError, match="not those that were saved"):
        peft_bundles.pull_bundle("me/other")


def test_two_writers_at_once(hub):
    """The one who commits second on the same head is told; no revision has files of both."""
    one, two = attached(), perturb(attached(), seed=5)
    peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    perturb(one, seed=8)
    hub.on["POST /api/models/me/ml/preupload"] = lambda: peft_bundles.push_bundle(two, "b_mlp", "me/ml")
    with pytest.raises(RuntimeError, match="somebody else pushed to me/ml meanwhile"):
        peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), only(two, "b_mlp"), atol=1e-5)
    peft_bundles.push_bundle(one, "b_mlp", "me/ml")
    assert torch.allclose(logits(loaded(peft_bundles.pull_bundle("me/ml")), batch()), only(one, "b_mlp"), atol=1e-5)


def test_many_writers_at_once_leave_whole_revisions(hub):
    models = [perturb(attached(), seed=i) for i in range(4)]
    peft_bundles.push_bundle(models[0], "b_mlp", "me/ml")
    outcomes = []

    def push(model):
        try:
            peft_bundles.push_bundle(model, "b_mlp", "me/ml")
            outcomes.append("pushed")
        except RuntimeError:
            outcomes.append("told")

    threads = [threading.Thread(target=push, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and "pushed" in outcomes
    wanted = [only(model, "b_mlp") for model in models]
    for sha, files in hub.repos["me/ml"].commits.items():
        if WEIGHTS in files:
            found = logits(peft_bundles.compose(TINY["llama"](), [f"me/ml@{sha}"]), batch())
            assert any(torch.allclose(found, w, atol=1e-5) for w in wanted)


def test_files_outside_of_the_folder_are_never_written(hub, tmp_path):
    peft_bundles.push_bundle(attached(), "b_mlp", "me/ml")
    hub.add("me/ml", {"../../evil.png": b"x", "/evil.json": b"x", "code.py": b"raise SystemExit"})
    before = set(tmp_path.parent.rglob("*evil*"))
    try:
        peft_bundles.pull_bundle("me/ml", tmp_path / "copy")
    except (OSError, ValueError) as error:
        assert "evil" in str(error) or ".." in str(error)
    assert set(tmp_path.parent.rglob("*evil*")) == before
    assert not list(tmp_path.rglob("*.py"))


# ---- cards ----


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
        "| `b_mlp` | mlp | 8 | 4 | 12 of 64 |",
        "lm (1)",
        "steps 300",
        "invented sums",
        "![What alpha does](sweep.png)",
        'peft_bundles.compose(base, ["me/ml"])',
        "must not be used for",
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
            r"results\[0\].*must be a dict with 'task'",
        ),
        ({"results": ["x"]}, r"results\[0\]='x' must be a dict"),
        (
            {"results": [{"task": "x", "metric": "y", "value": "high"}]},
            r"values \['high'\] must be finite",
        ),
        ({"results": [{"task": "x", "metric": "y", "values": []}]}, "must be finite numbers"),
        ({"figure": "nowhere.png"}, "figure='nowhere.png' must be a picture"),
        ({"figure": __file__}, "must be a picture"),
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


# ---- a basis by itself ----


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
        (fresh(bundles=bundle, sub_bases={"left": 4}), ValueError, r"has the sub-bases \[\['left', 12\]"),
        (fresh(basis_rank=32), ValueError, "use the basis_rank that it was made with"),
        (fresh(input_norm="none"), ValueError, "input_norm='standard'"),
        (fresh(layers_to_transform=[0]), ValueError, r"has layers \[0, 1\]"),
        (attached(), RuntimeError, "belong to another basis"),
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
    with pytest.raises(ValueError, match="is no basis that save_basis wrote"):
        peft_bundles.load_basis(fresh(), tmp_path / "plain.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or was changed"):
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
