"""Checkpoints give back the very model; a damaged one, or a save that fails, is told and does no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_bundles
from peft_bundles import BundleConfig


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


# ---- checkpoints that are not what they should be ----


def tampered(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def _drop(part):
    return lambda tensors: tensors.pop(first(tensors, part))


def _spoil(part, value):
    def change(tensors):
        tensors[first(tensors, part)].view(-1)[0] = value

    return change


def _add(name):
    return lambda tensors: tensors.update({name: torch.zeros(2)})


def _narrow(tensors):
    key = first(tensors, "bundle_down")
    tensors[key] = tensors[key][:, :-1].contiguous()


def _rotate(tensors):
    for key in [key for key in tensors if "bundle_basis" in key]:
        tensors[key] = tensors[key].flip(0).contiguous()  # orthonormal still, but another basis


def _exchange_layers(tensors):
    a, b = sorted(key for key in tensors if "bundle_basis" in key)
    tensors[a], tensors[b] = tensors[b], tensors[a]


LAYER = "base_model.model.model.layers"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("bundle_down"), "lacks 1 tensors .*bundle_down"),
        (_drop("bundle_up"), "lacks 1 tensors .*bundle_up"),
        (_drop("bundle_basis"), "lacks 1 tensors .*bundle_basis"),
        (_drop("bundle_mean"), "lacks 1 tensors .*bundle_mean"),
        (_add(f"{LAYER}.0.bundles.bundle_up.b_unknown"), "has 1 tensors .*b_unknown"),
        (_add(f"{LAYER}.7.bundles.bundle_up.b_mlp"), "has 1 tensors .*layers.7"),
        (_add(f"{LAYER}.0.mlp.gate_proj.lora_A.weight"), "has 1 tensors .*lora_A"),
        (_narrow, "has shape .*another"),
        (_spoil("bundle_down", float("nan")), "NaN"),
        (_spoil("bundle_up", float("inf")), "NaN or infinity"),
        (_spoil("bundle_basis", float("nan")), "NaN"),
        (_spoil("bundle_scale", float("-inf")), "NaN or infinity"),
        (_rotate, "not the one it was trained in"),
        (_exchange_layers, "not the one it was trained in"),
    ],
)
def test_spoilt_tensors(change, message, low_cpu_mem_usage, tmp_path):
    attached().save_pretrained(tmp_path)
    tampered(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(share, tmp_path):
    attached().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, SafetensorError)):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '"bundles"', '{"peft_type": "BUND'])
def test_config_that_is_no_object(content, tmp_path):
    attached().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json .*damaged"):
        BundleConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        ({"hidden_size": 32}, r"\(32, 2\)"),
        ({"num_hidden_layers": 3}, r"\(64, 3\)"),
        ({"num_hidden_layers": 1}, "64, 1"),
    ],
)
def test_other_base_model(other, shape, tmp_path):
    attached().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\(64, 2\).*{shape}"):
        PeftModel.from_pretrained(TINY["llama"](**other), tmp_path)


def test_other_seed(tmp_path):
    attached(basis_init="random", save_basis=False, basis_seed=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "basis_seed": 6}))
    with pytest.raises(ValueError, match=r"not the one it was trained in .*seed"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


def test_failed_load_leaves_the_model_usable(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path / "good")
    model.save_pretrained(tmp_path / "bad")
    tampered(tmp_path / "bad", _spoil("bundle_up", float("nan")))
    before = logits(model, batch())
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path / "bad", "other")
    assert torch.equal(logits(model, batch()), before)
    model.load_adapter(tmp_path / "good", "other")
    model.set_adapter("other")
    assert torch.equal(logits(model, batch()), before)


FAILING_SAVE = """
import resource, signal, sys
from peft import PeftModel
from models import TINY, perturb
limit, folder = int(sys.argv[1]), sys.argv[2]
model = perturb(PeftModel.from_pretrained(TINY["llama"](), folder), seed=9)
model.peft_config["default"].revision = "second"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    model.save_pretrained(folder)
except Exception as error:
    print("failed:", type(error).__name__)
"""


@pytest.mark.parametrize("limit", [1_000, 12_000])
def test_failed_save_leaves_the_earlier_checkpoint(limit, tmp_path):
    """The disk is full somewhere on the way: at the model card, or in the middle of the tensors."""
    model = attached()
    model.save_pretrained(tmp_path)
    names = set(os.listdir(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > limit
    run = subprocess.run(
        [sys.executable, "-c", FAILING_SAVE, str(limit), str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "failed:" in run.stdout
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert again.peft_config["default"].revision == model.peft_config["default"].revision
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == names  # nothing half-written stays behind


def test_a_read_only_folder_is_named_and_keeps_its_checkpoint():
    model = attached()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        os.chmod(folder, 0o555)
        for path in Path(folder).iterdir():
            os.chmod(path, 0o444)
        perturb(model, seed=9)
        if root := os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(OSError, match=f"Permission denied.*{folder}"):
                model.save_pretrained(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


@pytest.mark.parametrize("save", ["peft", "transformers"])
def test_one_changed_bit_in_a_tensor_is_noticed(save, tmp_path):
    if save == "peft":
        model = attached()
    else:
        model = TINY["llama"]()
        model.add_adapter(bundle_config())
        perturb(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, batch())
    assert torch.equal(logits(PeftModel.from_pretrained(TINY["llama"](), tmp_path), batch()), expected)
    TINY["llama"]().load_adapter(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or was changed.*weights_digest"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_digest": None}))
    PeftModel.from_pretrained(TINY["llama"](), tmp_path)  # the user says that it was on purpose


def test_tensors_of_two_layers_cannot_change_places(tmp_path):
    attached().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    one, two = sorted(k for k in tensors if "bundle_up.b_mlp" in k)[:2]
    save_file({**tensors, one: tensors[two], two: tensors[one]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged or was changed"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


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


def test_a_scale_of_zero_is_refused(tmp_path):
    model = get_peft_model(TINY["llama"](), bundle_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "bundle_scale" in k)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file)
    with pytest.raises(ValueError, match="deviations that are not positive"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path)


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
