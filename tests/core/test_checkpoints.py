"""Checkpoints give back the very model, whichever of PEFT's ways they were saved and loaded."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from models import (
    TINY,
    attached,
    batch,
    bundle_config,
    every,
    generated,
    layers,
    logits,
    perturb,
    quietly_loaded,
    snapshot,
    some,
    two_adapters,
    unchanged,
    weights,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import PeftType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.core.basis import draw_basis


# ---- saving and loading ----
@every
def test_round_trip(name, tmp_path):
    model = attached(name)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(os.listdir(tmp_path))
    again = quietly_loaded(TINY[name](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert unchanged(snapshot(model.state_dict()), again.state_dict())
    assert not any(p.requires_grad for p in again.parameters())
    assert again.peft_config["default"].inference_mode


@some
def test_low_cpu_memory(name, tmp_path):
    model = attached(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY[name](), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {t.device.type for t in (*again.parameters(), *again.buffers())} == {"cpu"}
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    again.set_adapter("other")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_low_cpu_memory_without_stored_basis(tmp_path):
    model = attached(basis_init="random", save_basis=False)
    model.save_pretrained(tmp_path)
    again = quietly_loaded(TINY["llama"](), tmp_path, low_cpu_mem_usage=True)
    assert {t.device.type for t in (*again.parameters(), *again.buffers())} == {"cpu"}
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_dtype_of_adapter_on_a_bfloat16_base(autocast, low_cpu_mem_usage, tmp_path):
    def base():
        return TINY["llama"]().to(torch.bfloat16)

    wanted = torch.float32 if autocast else torch.bfloat16
    model = get_peft_model(base(), bundle_config(), autocast_adapter_dtype=autocast).eval()
    model.add_adapter("added", bundle_config(), autocast_adapter_dtype=autocast)
    assert {p.dtype for a in ("default", "added") for p in weights(model, a).values()} == {wanted}
    perturb(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        base(), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
    )
    again.load_adapter(tmp_path, "other", autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage)
    for adapter in ("default", "other"):
        again.set_adapter(adapter)
        assert {p.dtype for p in weights(again, adapter).values()} == {wanted}
        assert logits(again, batch()).dtype == torch.bfloat16
        assert torch.equal(logits(again, batch()), logits(model, batch()))
        for layer in layers(again):
            assert layer.bundle_basis[adapter].dtype == torch.float32


def test_loaded_for_training(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(weights(again))
    assert not again.peft_config["default"].inference_mode
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_config_round_trip(tmp_path):
    config = bundle_config(layers_to_transform=[1], dropout=0.25, basis_seed=3)
    model = get_peft_model(TINY["llama"](), config)
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is BundleConfig
    assert loaded.peft_type == PeftType.BUNDLE == "BUNDLE"
    assert loaded.inference_mode
    loaded.inference_mode = config.inference_mode
    assert loaded == model.peft_config["default"]
    assert list(loaded.bundles) == list(config.bundles)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path, config=config)
    assert again.peft_config["default"] is config
    assert config.inference_mode


def test_auto_model(tmp_path):
    TINY["llama"]().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = perturb(get_peft_model(base, bundle_config())).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch()), logits(model, batch()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers finds the adapter by itself
    assert torch.allclose(logits(again.eval(), batch()), logits(model, batch()), atol=1e-6)


def test_selected_adapters(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path / "all")
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"one", "two", "README.md"}
    model.save_pretrained(tmp_path / "two", selected_adapters=["two"])
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"two", "README.md"}
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "all" / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two" / "two", "two")
    assert unchanged(snapshot(model.state_dict()), again.state_dict())
    with pytest.raises(ValueError, match="three"):
        model.save_pretrained(tmp_path / "three", selected_adapters=["three"])


def test_adapters_whose_names_contain_each_other(tmp_path):
    """Also: one config object for several adapters, as PEFT's own test-suite has it."""
    model, config = attached(), bundle_config()
    for other in ("default2", "other_default", "fooefaultbar", "efaul"):
        model.add_adapter(other, config)
        perturb(model, other, seed=len(other))
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == get_peft_model_state_dict(model).keys()
    assert len(found) == len(get_peft_model_state_dict(attached()))
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    for other in ("default2", "other_default", "fooefaultbar", "efaul"):
        again.load_adapter(tmp_path / other, other)
        again.set_adapter(other)
        model.set_adapter(other)
        assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_same_checkpoint_under_two_names(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    result = again.load_adapter(tmp_path, "other")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    again.set_adapter("other")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@some
def test_state_dict_functions(name):
    model = attached(name)
    found = get_peft_model_state_dict(model)
    assert not any("default" in key for key in found)
    assert all(".bundles.bundle_" in key for key in found)
    other = get_peft_model(TINY[name](), bundle_config(basis_seed=0)).eval()
    result = set_peft_model_state_dict(other, found)
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "bundle_" in key]
    assert torch.equal(logits(other, batch()), logits(model, batch()))


def test_base_state_dict_functions():
    base = TINY["llama"]()
    original = snapshot(base.state_dict())
    model = attached()
    assert unchanged(original, get_base_model_state_dict(model))
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if n not in weights(model):
                parameter.add_(1.0)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits(model, batch()), logits(attached(), batch()))


@pytest.mark.parametrize("calibrated", [False, True])
def test_unsaved_basis_is_drawn_again(calibrated, tmp_path):
    model = get_peft_model(TINY["llama"](), bundle_config(basis_init="random", save_basis=False, basis_seed=5))
    if calibrated:
        peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    perturb(model).eval().save_pretrained(tmp_path)
    assert not any("bundle_basis" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = quietly_loaded(TINY["llama"](), tmp_path)
    for layer, other in zip(layers(model), layers(again)):
        assert torch.equal(layer.bundle_basis["default"], other.bundle_basis["default"])
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@pytest.mark.parametrize("basis_init", ["random", "null", "pca"])
def test_calibrated_round_trip(basis_init, tmp_path):
    model = get_peft_model(TINY["llama"](), bundle_config(basis_init=basis_init))
    peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    perturb(model).eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert again.peft_config["default"].calibration == model.peft_config["default"].calibration


def test_device_map(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert torch.equal(generated(again, batch()), generated(model, batch()))


def test_a_loaded_adapter_takes_any_state_dict_later(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    averaged = {k: (v + 1) / 2 for k, v in get_peft_model_state_dict(again).items() if "bundle_basis" not in k}
    averaged.update({k: v for k, v in get_peft_model_state_dict(again).items() if "bundle_basis" in k})
    set_peft_model_state_dict(again, averaged)
    assert not torch.equal(logits(again, batch()), logits(model, batch()))
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(TINY["llama"](), tmp_path), batch()), logits(again, batch()))


def test_the_basis_comes_back_from_float64_to_float32():
    model = get_peft_model(TINY["llama"](), bundle_config())
    before = layers(model)[0].bundle_basis["default"].clone()
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        basis = layers(model.to(dtype))[0].bundle_basis["default"]
        assert basis.dtype == expected and torch.equal(basis.float(), before)


def test_layers_keep_their_numbers_when_they_are_named(tmp_path):
    fields = {"basis_init": "random", "save_basis": False}
    model = get_peft_model(TINY["llama"](), bundle_config(target_modules=r".*layers\.1", **fields))
    assert [layer.index for layer in layers(model)] == [1]
    every = get_peft_model(TINY["llama"](), bundle_config(**fields))
    assert torch.equal(layers(model)[0].bundle_basis["default"], layers(every)[1].bundle_basis["default"])
    model.add_adapter("all", bundle_config(**fields))
    assert [layer.index for layer in layers(model)] == [0, 1]
    perturb(model, "all")
    model.set_adapter("all")
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "all")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


# ---- U is drawn when it is looked at, and not where a checkpoint brings its own ----
@pytest.fixture
def drawn(monkeypatch):
    """(hidden size, rank, seed, layer) of every U that was drawn."""
    seen = []

    def noted(*how):
        seen.append(how)
        return draw_basis(*how)

    monkeypatch.setattr(peft_bundles.core.bases, "draw_basis", noted)
    return seen


def test_loading_draws_no_basis(drawn, tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    expected = logits(model, batch())
    assert drawn, "a new adapter has its U drawn"
    drawn.clear()
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    again.load_adapter(tmp_path, "other")
    again.load_adapter(tmp_path, "third", is_trainable=True)
    for adapter in again.peft_config:
        again.set_adapter(adapter)
        assert torch.equal(logits(again, batch()), expected)
    assert not drawn


def test_a_config_from_a_file_without_its_tensors_has_the_basis_of_its_seed(drawn, tmp_path):
    attached(basis_init="random").save_pretrained(tmp_path)
    drawn.clear()
    model = get_peft_model(TINY["llama"](), PeftConfig.from_pretrained(tmp_path))
    assert not drawn
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not drawn
    with torch.inference_mode():
        found = logits(model, batch())
    assert torch.equal(found, logits(TINY["llama"](), batch())), "its second map is zero"
    assert [how[-1] for how in drawn] == [layer.index for layer in layers(model)]
    for layer, how in zip(layers(model), drawn):
        for each in (model, *copies):
            mine = layers(each)[layer.index].bundle_basis["default"]
            assert torch.equal(mine, draw_basis(*how)) and not mine.is_inference()
    assert len(drawn) == 3 * len(layers(model)), "once a copy"


@pytest.mark.parametrize("look", ["repr", "state_dict", "double", "load_state_dict"])
def test_whoever_looks_at_all_tensors_sees_the_basis(look, tmp_path):
    fresh = attached(basis_init="random")
    fresh.save_pretrained(tmp_path)
    model = get_peft_model(TINY["llama"](), PeftConfig.from_pretrained(tmp_path))
    given = (fresh.state_dict(),) if look == "load_state_dict" else ()
    repr(model) if look == "repr" else getattr(model, look)(*given)
    found = {k: t for k, t in model.named_buffers() if ".bundle_basis." in k}  # as they lie there: none is drawn for it
    assert len(found) == len(layers(model))
    assert all(torch.equal(fresh.state_dict()[key], U.float()) for key, U in found.items())


def test_a_refused_file_leaves_the_basis_to_be_drawn(tmp_path):
    attached(basis_init="random").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    broken = {key: t.clone().fill_(torch.nan) if "bundle_up" in key else t for key, t in tensors.items()}
    model = get_peft_model(TINY["llama"](), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="NaN or infinity"):
        set_peft_model_state_dict(model, broken)
    for layer in layers(model):
        U = layer.bundle_basis["default"]
        assert torch.allclose(U.T @ U, torch.eye(U.shape[1]), atol=1e-5)
