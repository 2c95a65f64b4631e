"""Golden checkpoints: adapters written by version 0.1.0 (`golden/make.py`) load bit for bit and give the same logits.

The base models are not in the files: they come from a seed. If `test_bases_are_those_of_the_files` fails, torch or
transformers draws other numbers than on the day the files were written, and the logits here say nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import TINY, logits, quietly_loaded
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import peft_bundles
from peft_bundles import PRESETS, BundleConfig
from peft_bundles.config import FORMAT_VERSION


GOLDEN = Path(__file__).parent / "golden"
CONFIG = "adapter_config.json"
WEIGHTS, EXPECTED, BASIS = "adapter_model.safetensors", "expected.safetensors", "basis.safetensors"
KEYS_OF_BASIS = ("bundle_basis", "bundle_mean", "bundle_scale")
FOLDERS = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob(EXPECTED))
REFUSED = [name for name in FOLDERS if name.startswith("refused_")]
KEPT = [name for name in FOLDERS if name not in REFUSED]

# Small, so that the files are; 32 is too small for the preset "all_overlap".
SIZES = {
    "llama": {"hidden_size": 40, "intermediate_size": 32},
    "gpt2": {"n_embd": 40, "n_inner": 32},
}


def base(name: str) -> PreTrainedModel:
    """The base model of that type, from its seed."""
    return TINY[name](**SIZES[name])


def base_sample(model: nn.Module) -> Tensor:
    """The last number of every parameter, which tells base models apart."""
    return torch.stack([p.detach().flatten()[-1] for _, p in sorted(model.named_parameters())])


def outputs(model: PeftModel, ids: Tensor, alphas: dict[str, float]) -> dict[str, Tensor]:
    """Logits (rows, tokens, vocabulary) at the alphas of the config, and at others where the adapter has bundles."""
    at_default = {"logits": logits(model, ids)}
    if not alphas:
        return at_default
    with model.alphas(alphas):
        return {**at_default, "logits_at_alphas": logits(model, ids)}


def expected(name: str) -> tuple[dict[str, Tensor], str, dict[str, float]]:
    """The expected tensors of a folder, the type of its base model, and its second setting of alphas."""
    path = GOLDEN / name / EXPECTED
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    return load_file(path), about["base"], about["alphas"]


def loaded(name: str) -> PeftModel:
    return quietly_loaded(base(expected(name)[1]), GOLDEN / name).eval()


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def config_fields(folder: Path) -> dict[str, object]:
    """The fields of a config, without what depends on the version of PEFT and on the tensors' names."""
    fields = BundleConfig.from_pretrained(str(folder)).to_dict()
    return {key: value for key, value in fields.items() if key not in ("peft_version", "weights_digest")}


def assert_expected(model: PeftModel, name: str) -> None:
    """The model gives the logits of the folder, to the rounding that differs between CPUs."""
    tensors, _, alphas = expected(name)
    results = outputs(model, tensors["input_ids"], alphas)
    assert results.keys() == tensors.keys() - {"input_ids", "base_sample"}
    for key, values in results.items():
        torch.testing.assert_close(values, tensors[key], atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bases_are_those_of_the_files(name):
    sample = base_sample(base(name))
    folders = [folder for folder in FOLDERS if expected(folder)[1] == name]
    assert folders
    for folder in folders:
        assert torch.allclose(sample, expected(folder)[0]["base_sample"], atol=1e-6), (
            f"the seeded base model {name!r} has other weights than when {folder} was written: torch or transformers "
            "draws other numbers, so the logits of the golden files cannot be compared."
        )


def test_files_cover_presets_and_kinds():
    """Ten presets, calibrated and not, but for "baseline": it has no bundles, so `calibrate` refuses it."""
    configs = {name: BundleConfig.from_pretrained(str(GOLDEN / name)) for name in KEPT}
    presets = {(c.preset, c.calibration is not None) for name, c in configs.items() if name.startswith("preset_")}
    assert len(FOLDERS) == 58 and len(PRESETS) == 10
    assert presets == {(preset, on) for preset in PRESETS for on in (False, True)} - {("baseline", True)}
    assert sum(name.startswith("preset_") for name in KEPT) == 19
    with pytest.raises(ValueError, match="no bundles"):
        peft_bundles.calibrate(get_peft_model(base("llama"), BundleConfig(preset="baseline")), progress=False)
    kinds = {(c.kind, c.projection, c.calibration is not None) for n, c in configs.items() if n.startswith("kind_")}
    assert kinds == {
        (kind, projection, on)
        for kind in ("mlp", "linear", "diag", "full")
        for projection in ("none", "tied")
        for on in (False, True)
    }
    for name, config in configs.items():
        assert name.endswith("_calibrated") == (config.calibration is not None), name


@pytest.mark.parametrize("name", KEPT)
def test_loads_bit_for_bit(name):
    model = loaded(name)
    assert same_tensors(get_peft_model_state_dict(model), load_file(GOLDEN / name / WEIGHTS))
    assert_expected(model, name)


@pytest.mark.parametrize("name", KEPT)
def test_adapter_is_not_the_identity(name):
    """Else the logits would show nothing of the adapter."""
    tensors, kind, alphas = expected(name)
    assert (tensors["logits"] - logits(base(kind), tensors["input_ids"])).abs().max() > 1e-3
    if alphas:
        assert (tensors["logits"] - tensors["logits_at_alphas"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", KEPT)
def test_saved_again_it_is_the_same(name, tmp_path):
    """The same tensors and config; and two loads, of the golden folder and of the new one, give the same bits."""
    tensors, kind, alphas = expected(name)
    model = loaded(name)
    model.save_pretrained(tmp_path)
    assert same_tensors(load_file(tmp_path / WEIGHTS), load_file(GOLDEN / name / WEIGHTS))
    assert config_fields(tmp_path) == config_fields(GOLDEN / name)
    again = quietly_loaded(base(kind), tmp_path).eval()
    assert same_tensors(outputs(model, tensors["input_ids"], alphas), outputs(again, tensors["input_ids"], alphas))


@pytest.mark.parametrize("name", ["refused_free", "refused_identity"])
def test_free_projector_and_identity_kind_are_refused(name):
    with pytest.raises(ValueError, match=r"no longer supported as of version 0\.2; use .*, or use peft-bundles 0\.1"):
        loaded(name)
    with pytest.raises(ValueError, match=r"no longer supported as of version 0\.2"):
        peft_bundles.compose(base("llama"), [GOLDEN / name])


def test_refused_folders_are_among_the_files():
    assert REFUSED == ["refused_free", "refused_identity"]


def test_a_file_without_a_format_version_has_version_1_and_a_newer_one_is_refused(tmp_path):
    folder = tmp_path / "newer"
    shutil.copytree(GOLDEN / "kind_mlp_none", folder)
    values = json.loads((folder / CONFIG).read_text())
    assert "format_version" not in values
    assert BundleConfig.from_pretrained(str(folder)).format_version == 1
    (folder / CONFIG).write_text(json.dumps({**values, "format_version": FORMAT_VERSION + 1}))
    for load in (lambda: quietly_loaded(base("llama"), folder), lambda: peft_bundles.compose(base("llama"), [folder])):
        with pytest.raises(ValueError, match=r"newer version of peft-bundles.*pip install --upgrade"):
            load()


def test_several_adapters(tmp_path):
    """The folder of the default adapter has the second one's inside."""
    names = {"default": "several_adapters", "second": "several_adapters/second"}
    model = loaded(names["default"])
    model.load_adapter(GOLDEN / names["second"], "second")
    for adapter, name in names.items():
        model.set_adapter(adapter)
        assert_expected(model.eval(), name)
    model.save_pretrained(tmp_path)
    assert same_tensors(load_file(tmp_path / WEIGHTS), load_file(GOLDEN / names["default"] / WEIGHTS))
    assert same_tensors(load_file(tmp_path / "second" / WEIGHTS), load_file(GOLDEN / names["second"] / WEIGHTS))


def test_one_bundle_as_save_bundle_writes_it(tmp_path):
    name = "one_bundle_calibrated"
    config = BundleConfig.from_pretrained(str(GOLDEN / name))
    assert config.provenance.keys() >= {"basis", "base", "summaries"}
    (bundle,) = config.bundles
    for model in (peft_bundles.compose(base("llama"), [GOLDEN / name]).eval(), loaded(name)):
        assert_expected(model, name)
        peft_bundles.save_bundle(model, bundle, tmp_path)
        assert same_tensors(load_file(tmp_path / WEIGHTS), load_file(GOLDEN / name / WEIGHTS))
        assert config_fields(tmp_path)["provenance"] == config.provenance


def test_shared_basis_file(tmp_path):
    """A fresh adapter in the basis has its tensors, which are those of the adapter beside it."""
    folder = GOLDEN / "shared_basis_calibrated"
    file = load_file(folder / BASIS)
    with safe_open(folder / BASIS, framework="pt") as opened:
        about = json.loads(opened.metadata()["peft_bundles"])
    bundles = {"b_new": {"rank": 4, "sub_bases": [about["sub_bases"][0][0]]}}
    model = get_peft_model(base("llama"), BundleConfig(sub_bases=dict(about["sub_bases"]), bundles=bundles))
    assert peft_bundles.load_basis(model, folder) == {key: about[key] for key in ("digest", "sub_bases")}
    shared = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if key.split(".")[-1] in KEYS_OF_BASIS}
    assert len(shared) == len(file) == 6
    fresh = get_peft_model_state_dict(model)
    for key, tensor in shared.items():
        layer, what = next(part for part in key.split(".") if part.isdigit()), key.split(".")[-1]
        assert torch.equal(tensor, file[f"{layer}.{what}"]) and torch.equal(tensor, fresh[key])
    assert model.peft_config["default"].calibration == about["calibration"]
    assert same_tensors(load_file(peft_bundles.save_basis(model, tmp_path)), file)
