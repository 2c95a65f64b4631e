"""A BUNDLE adapter behaves as PEFT's own tuners do, and as transformers' adapter methods expect."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import (
    BLOCKS,
    EOS,
    HIDDEN,
    LAYERS,
    PAD,
    TINY,
    VOCABULARY,
    batch,
    bundle_config,
    layers,
    logits,
    perturb,
    weights,
)
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.alphas import state_of


FEW = ["llama", "gpt2", "mixtral"]
some = pytest.mark.parametrize("name", FEW)
every = pytest.mark.parametrize("name", list(TINY))


def reference(name):
    """The base model as PEFT leaves it: frozen (Mamba takes another kernel then, which rounds differently)."""
    return TINY[name]().requires_grad_(False)


def attached(name="llama", adapter="default", **fields):
    """A tiny model with an adapter that is not the identity."""
    return perturb(get_peft_model(TINY[name](), bundle_config(**fields), adapter_name=adapter), adapter).eval()


def two_adapters(name="llama"):
    """Adapters "one" (active) and "two", of different shape and weights."""
    model = attached(name, "one")
    model.add_adapter("two", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    return perturb(model, "two", scale=0.5, seed=1).eval()


def generated(model, ids, **kwargs):
    fixed = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(input_ids=ids, **{**fixed, **kwargs})


def snapshot(tensors):
    return {k: v.detach().clone() for k, v in tensors.items()}


def unchanged(before, now):
    return before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before)


# ---- attaching ----


@every
def test_only_adapter_weights_train_and_are_counted(name, capsys):
    base = TINY[name]()
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, bundle_config())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights(model))
    # W is (r, support), down (b, r), up (r, b); a diag has one number a direction.
    per_layer = (8 * 12 + 2 * 4 * 8) + (6 * 20 + 2 * 3 * 6) + (4 * 8 + 4)
    assert model.get_nb_trainable_parameters() == (LAYERS * per_layer, total + LAYERS * per_layer)
    model.print_trainable_parameters()
    assert f"trainable params: {LAYERS * per_layer:,} " in capsys.readouterr().out


@some
def test_adapter_name(name):
    model = attached(name, "my-adapter")
    assert model.active_adapter == "my-adapter"
    assert list(model.peft_config) == ["my-adapter"]
    assert weights(model, "my-adapter")
    assert not weights(model, "default")
    assert not torch.equal(logits(model, batch()), logits(reference(name), batch()))


def test_class_follows_the_task():
    assert type(get_peft_model(TINY["llama"](), bundle_config())).__name__ == "PeftModelForCausalLM"
    assert type(get_peft_model(TINY["llama"](), bundle_config(task_type=None))) is PeftModel


@some
def test_input_embeddings_and_positional_arguments(name):
    model, ids = attached(name), batch()
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model, ids))
        assert torch.equal(model(ids).logits, logits(model, ids))
        assert torch.equal(generated(model, ids), model.generate(ids, max_new_tokens=5, min_new_tokens=5))


def test_bare_model_without_task_type_takes_alphas():
    model, ids = attached(task_type=None), batch()
    zero = dict.fromkeys(model.peft_config["default"].bundles, 0.0)
    assert torch.equal(logits(model, ids, alphas=zero), logits(reference("llama"), ids))


@some
def test_training_preparation_of_peft(name):
    model = get_peft_model(prepare_model_for_kbit_training(TINY[name]()), bundle_config())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights(model))
    assert not model.get_input_embeddings()(batch()).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(batch()).requires_grad


def test_layers_to_transform():
    base = TINY["llama"](num_hidden_layers=3)
    model = get_peft_model(base, bundle_config(layers_to_transform=[0, 2]))
    assert [layer.index for layer in layers(model)] == [0, 2]
    assert [layer.get_base_layer() for layer in layers(model)] == [base.model.layers[0], base.model.layers[2]]
    one = get_peft_model(TINY["llama"](num_hidden_layers=3), bundle_config(layers_to_transform=1))
    assert [layer.index for layer in layers(one)] == [1]
    with pytest.raises(ValueError, match="layers 0 to 1"):
        get_peft_model(TINY["llama"](), bundle_config(layers_to_transform=[0, 2]))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.layers\.1"},
        {"exclude_modules": ["layers.0"]},
        {"exclude_modules": r".*\.layers\.0"},
        {"target_modules": ["layers.0", "layers.1"], "layers_to_transform": [1]},
    ],
)
def test_module_filters(fields, tmp_path):
    base = TINY["llama"]()
    model = perturb(get_peft_model(base, bundle_config(**fields))).eval()
    assert [layer.get_base_layer() for layer in layers(model)] == [base.model.layers[1]]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_target_modules_that_match_nothing():
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(TINY["llama"](), bundle_config(target_modules=["nowhere"]))


def test_low_ranks():
    """One column, one hidden unit: the smallest bundle there can be, in ints and in fractions of the hidden size."""
    for rank in (1, 1.0 / HIDDEN, 1e-6):
        config = bundle_config(sub_bases={"left": rank}, bundles={"b_tiny": {"rank": rank, "sub_bases": ["left"]}})
        model = perturb(get_peft_model(TINY["llama"](), config)).eval()
        assert {tuple(p.shape) for p in weights(model).values()} == {(1, 1)}
        assert not torch.equal(logits(model, batch()), logits(reference("llama"), batch()))
        change = torch.linalg.matrix_rank(logits_of_block(model) - logits_of_block(model, disabled=True), atol=1e-5)
        assert change == 1


def logits_of_block(model, *, disabled=False):
    """Output of the first block, (rows * tokens, d)."""
    seen = []
    handle = layers(model)[0].get_base_layer().register_forward_hook(lambda block, args, output: seen.append(output))
    for layer in layers(model):
        layer.enable_adapters(not disabled)
    logits(model, batch())
    for layer in layers(model):
        layer.enable_adapters(True)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sub_bases": {"left": 40, "right": 30}}, "hidden size is 64"),
        ({"bundles": {"b": {"rank": 9, "sub_bases": ["right"]}}}, "rank=9"),
        ({"basis_rank": 65}, "exceeds the hidden size 64"),
        ({"basis_rank": 19}, "basis_rank=19"),
    ],
)
def test_ranks_that_do_not_fit_leave_the_model_as_it_was(fields, message):
    base = TINY["llama"]()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, bundle_config(**fields))
    assert not layers(base)
    model = two_adapters()
    before = logits(model, batch())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("three", bundle_config(**fields))
    assert list(model.peft_config) == ["one", "two"]
    assert torch.equal(logits(model, batch()), before)
    model.add_adapter("three", bundle_config())
    assert weights(model, "three")


# ---- saving and loading ----


def quietly_loaded(base, folder, **kwargs):
    """PEFT warns of tensors that a checkpoint lacks; a good one must not give that warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, folder, **kwargs)


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


def test_modules_to_save(tmp_path):
    model = attached(modules_to_save=["lm_head"])
    head = {n for n, p in model.named_parameters() if "lm_head.modules_to_save.default" in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == head | set(weights(model))
    before = snapshot(dict(model.named_parameters()))
    train(model, steps=2)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == head | set(weights(model))
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["llama"](), tmp_path)
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), logits(reference("llama"), batch()))


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


@pytest.mark.parametrize(
    ("auto", "task_type", "head"),
    [
        (AutoModelForSequenceClassification, "SEQ_CLS", "score"),
        (AutoModelForTokenClassification, "TOKEN_CLS", "score"),
        (AutoModel, "FEATURE_EXTRACTION", None),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_heads(name, auto, task_type, head, tmp_path):
    """Reward models, for one, are sequence classifiers; PEFT trains and saves their head by itself."""
    if (name, task_type) == ("gpt2", "TOKEN_CLS"):
        head = "classifier"

    def base():
        torch.manual_seed(0)
        return auto.from_config(TINY[name]().config).eval()

    def output(model, **kwargs):
        with torch.no_grad():
            return model(input_ids=batch(), **kwargs)[0]

    expected = output(base().requires_grad_(False))
    model = get_peft_model(base(), bundle_config(task_type=task_type)).eval()
    assert torch.equal(output(model), expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in trainable if head is not None and f"{head}.modules_to_save.default" in n}
    assert trainable == set(weights(model)) | heads
    assert bool(heads) == (head is not None)
    perturb(model)
    assert not torch.equal(output(model), expected)
    zero = dict.fromkeys(model.peft_config["default"].bundles, 0.0)
    assert torch.equal(output(model, alphas=zero), expected)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            parameter += n in heads
    model.save_pretrained(tmp_path)
    again = quietly_loaded(base(), tmp_path).eval()
    assert torch.equal(output(again), output(model))


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
    key = first(tensors, "bundle_weight")
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
        (_drop("bundle_weight"), "lacks 1 tensors .*bundle_weight"),
        (_drop("bundle_up"), "lacks 1 tensors .*bundle_up"),
        (_drop("bundle_basis"), "lacks 1 tensors .*bundle_basis"),
        (_drop("bundle_mean"), "lacks 1 tensors .*bundle_mean"),
        (_add(f"{LAYER}.0.bundles.bundle_up.b_unknown"), "has 1 tensors .*b_unknown"),
        (_add(f"{LAYER}.7.bundles.bundle_up.b_mlp"), "has 1 tensors .*layers.7"),
        (_add(f"{LAYER}.0.mlp.gate_proj.lora_A.weight"), "has 1 tensors .*lora_A"),
        (_narrow, "has shape .*another"),
        (_spoil("bundle_weight", float("nan")), "NaN"),
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


# ---- several adapters ----


@some
def test_adding_an_adapter_disturbs_no_other(name):
    model = attached(name, "one").train(False)
    before = logits(model, batch())
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    values = snapshot(weights(model, "one"))
    model.add_adapter("two", bundle_config())
    assert model.active_adapters == ["one"]
    assert torch.equal(logits(model, batch()), before)
    assert unchanged(values, weights(model, "one"))
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in grads} == grads
    assert not any(p.requires_grad for p in weights(model, "two").values())


@some
def test_switching_adapters(name):
    model, ids = two_adapters(name), batch()
    alone = attached(name, "one")
    assert torch.equal(logits(model, ids), logits(alone, ids))
    model.set_adapter("two")
    assert model.active_adapters == ["two"]
    assert all(p.requires_grad for p in weights(model, "two").values())
    assert not any(p.requires_grad for p in weights(model, "one").values())
    assert not torch.equal(logits(model, ids), logits(alone, ids))
    model.set_adapter("one")
    assert torch.equal(logits(model, ids), logits(alone, ids))


@some
def test_several_active_adapters_add_up(name):
    """One layer, so that the sum can be taken by hand: both read the block's own output."""
    only_last = {"layers_to_transform": [LAYERS - 1]}
    model = perturb(get_peft_model(TINY[name](), bundle_config(**only_last), adapter_name="one"), "one").eval()
    model.add_adapter("two", bundle_config(**only_last))
    perturb(model, "two", seed=1)
    layer, hidden = layers(model)[0], torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    parts = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        parts.append(layer(hidden) - hidden)
    model.base_model.set_adapter(["one", "two"])
    assert model.base_model.active_adapters == ["one", "two"]
    assert torch.allclose(layer(hidden), hidden + parts[0] + parts[1], atol=1e-5)
    assert all(p.requires_grad for a in ("one", "two") for p in weights(model, a).values())
    model.base_model.set_adapter(["one", "two"], inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_of_several_active_adapters():
    model, ids = two_adapters(), batch()
    model.base_model.set_adapter(["one", "two"])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for a in ("one", "two") for p in weights(model, a).values())


@some
def test_delete_active_adapter(name):
    model, ids = two_adapters(name), batch()
    alone = logits(model, ids)
    model.set_adapter("two")
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    assert model.active_adapters == ["one"]
    assert not any(".two." in key or key.endswith(".two") for key in model.state_dict())
    assert torch.equal(logits(model, ids), alone)
    model.add_adapter("two", bundle_config(bundles={"b_third": {"rank": 3, "sub_bases": ["left"]}}))
    perturb(model, "two")
    model.set_adapter("two")
    assert not torch.equal(logits(model, ids), alone)
    model.delete_adapter("two")
    model.delete_adapter("one")
    assert model.active_adapters == []
    with torch.no_grad():
        assert torch.equal(model.base_model(input_ids=ids).logits, logits(reference(name), ids))


@some
def test_delete_inactive_adapter(name):
    model, ids = two_adapters(name), batch()
    before = logits(model, ids)
    grads = {n: p.requires_grad for n, p in model.named_parameters() if ".two." not in n}
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert torch.equal(logits(model, ids), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert model.peft_config["one"].bundles.keys() == set(state_of(model).bundle_names())
    model.add_adapter("two", bundle_config())
    model.set_adapter("two")
    assert torch.equal(logits(model, ids), logits(reference(name), ids))


def test_delete_unknown_adapter():
    with pytest.raises(ValueError, match="nobody does not exist"):
        attached().delete_adapter("nobody")


def test_adapter_named_like_a_bundle_is_refused(tmp_path):
    base = TINY["llama"]()
    with pytest.raises(ValueError, match="b_mlp"):
        get_peft_model(base, bundle_config(), adapter_name="b_mlp")
    assert not layers(base)
    model = attached()
    before = logits(model, batch())
    with pytest.raises(ValueError, match="b_mlp"):
        model.add_adapter("b_mlp", bundle_config(bundles={"b_new": {"rank": 2, "sub_bases": ["left"]}}))
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("new", bundle_config(bundles={"default": {"rank": 2, "sub_bases": ["left"]}}))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="b_mlp"):
        model.load_adapter(tmp_path, "b_mlp")
    with pytest.raises(ValueError, match="b_mlp"):
        PeftModel.from_pretrained(TINY["llama"](), tmp_path, adapter_name="b_mlp")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, batch()), before)


@pytest.mark.parametrize("adapters", [("one", "two"), ("two", "one")])
def test_adapters_on_different_layers(adapters, tmp_path):
    """An adapter has nothing to say in the layers of the other."""
    model, ids = TINY["llama"](), batch()
    fields = {"one": {"layers_to_transform": [0]}, "two": {"layers_to_transform": [1]}}
    alone = {a: perturb(get_peft_model(TINY["llama"](), bundle_config(**fields[a]), a), a).eval() for a in fields}
    model = perturb(get_peft_model(model, bundle_config(**fields[adapters[0]]), adapters[0]), adapters[0])
    model.add_adapter(adapters[1], bundle_config(**fields[adapters[1]]))
    perturb(model, adapters[1]).eval()
    for adapter in adapters:
        model.set_adapter(adapter)
        assert torch.equal(logits(model, ids), logits(alone[adapter], ids))
    mixed = logits(model, ids, adapter_names=MIX)
    assert torch.allclose(mixed[0], logits(alone["one"], ids)[0], atol=1e-5)
    assert torch.allclose(mixed[1], logits(reference("llama"), ids)[1], atol=1e-5)
    assert torch.allclose(mixed[2], logits(alone["two"], ids)[2], atol=1e-5)
    model.save_pretrained(tmp_path)
    for adapter in adapters:
        again = quietly_loaded(TINY["llama"](), tmp_path / adapter, adapter_name=adapter)
        assert torch.equal(logits(again, ids), logits(alone[adapter], ids))
    model.set_adapter("one")
    assert "'one': 3 bundles in 1 layers" in str(model.bundle_report())
    model.delete_adapter("one")
    model.set_adapter("two")  # PEFT takes the next active adapter from the first layer, which has none left
    assert torch.equal(logits(model, ids), logits(alone["two"], ids))


def test_requires_grad_can_be_set_by_adapter():
    model = two_adapters()
    model.set_requires_grad("two")
    assert all(p.requires_grad for a in ("one", "two") for p in weights(model, a).values())
    model.set_requires_grad("one", requires_grad=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights(model, "two"))
    assert model.active_adapters == ["one"]


# ---- taking off ----


@every
def test_unload(name):
    base, ids = TINY[name](), batch()
    keys = snapshot(base.state_dict())
    modules = [n for n, _ in base.named_modules()]
    model = perturb(get_peft_model(base, bundle_config())).eval()
    assert not torch.equal(logits(model, ids), logits(reference(name), ids))
    bare = model.unload()
    assert bare is base
    assert unchanged(keys, bare.state_dict())
    assert [n for n, _ in bare.named_modules()] == modules
    assert not any(isinstance(m, BaseTunerLayer) for m in bare.modules())
    assert not any(m._forward_hooks for m in bare.modules())
    assert not hasattr(bare, "peft_config")
    assert torch.equal(logits(bare, ids), logits(reference(name), ids))
    again = perturb(get_peft_model(bare, bundle_config())).eval()
    assert torch.equal(logits(again, ids), logits(attached(name), ids))


def test_merging_is_refused():
    model = attached()
    before = snapshot(model.state_dict())
    for method in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            method()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    for layer in layers(model):
        for method in (layer.merge, layer.unmerge):
            with pytest.raises(ValueError, match="cannot be merged"):
                method()
    assert unchanged(before, model.state_dict())
    assert not model.base_model.supports_lora_conversion()


@every
def test_disable_adapter(name):
    model, ids = attached(name), batch()
    before = logits(model, ids)
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(reference(name), ids))
    assert torch.equal(logits(model, ids), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads


def test_disable_adapter_nested_while_training():
    model, ids = attached(dropout=0.5).train(), batch()
    expected = logits(reference("llama"), ids)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), expected)
            loss = model(input_ids=ids, labels=ids).loss
            assert not loss.requires_grad
    assert not torch.equal(logits(model, ids), expected)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in weights(model).values())
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert not torch.equal(logits(model, ids), expected)


def test_disabled_while_generating():
    model, ids = attached(), batch()
    with model.disable_adapter():
        assert torch.equal(generated(model, ids), generated(reference("llama"), ids))


# ---- status ----


@some
def test_status(name):
    model = two_adapters(name)
    blocks = [f"model.{BLOCKS[name]}.{i}.bundles" for i in range(LAYERS)]
    status = get_layer_status(model)
    assert [entry.name for entry in status] == blocks
    for entry in status:
        assert entry.module_type == "BundleLayer"
        assert entry.enabled
        assert entry.active_adapters == ["one"]
        assert entry.merged_adapters == []
        assert entry.available_adapters == ["one", "two"]
        assert entry.requires_grad == {"one": True, "two": False}
        assert set(entry.devices) == {"one", "two"}
        assert {device for devices in entry.devices.values() for device in devices} == {"cpu"}
    whole = get_model_status(model)
    assert whole.adapter_model_type == "BundleModel"
    assert whole.peft_types == {"one": "BUNDLE", "two": "BUNDLE"}
    assert whole.num_adapter_layers == LAYERS
    assert whole.trainable_params == sum(p.numel() for p in weights(model, "one").values())
    assert whole.active_adapters == ["one"]
    assert whole.merged_adapters == []
    assert whole.requires_grad == {"one": True, "two": False}
    with model.disable_adapter():
        assert not get_model_status(model).enabled


# ---- mixed batches ----

MIX = ["one", "__base__", "two"]


def rows_alone(model, run):
    """What `run` gives for each of MIX when it is the only one."""
    model.set_adapter("one")
    one = run()
    model.set_adapter("two")
    two = run()
    with model.disable_adapter():
        base = run()
    model.set_adapter("one")
    assert not torch.equal(one, two)
    assert not torch.equal(one, base)
    assert not torch.equal(two, base)
    return one, base, two


@every
def test_mixed_batch(name):
    model, ids = two_adapters(name), batch()
    mixed = logits(model, ids, adapter_names=MIX)
    for row, alone in enumerate(rows_alone(model, lambda: logits(model, ids))):
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
        assert all(not torch.allclose(mixed[other], alone[other], atol=1e-4) for other in range(3) if other != row)
    assert torch.equal(logits(model, ids), logits(attached(name, "one"), ids))  # nothing of the call stays


@pytest.mark.parametrize("beams", [1, 3])
@some
def test_mixed_batch_generates(name, beams):
    model, ids = two_adapters(name), batch(3, 6)

    def scores(**kwargs):
        out = generated(model, ids, num_beams=beams, output_scores=True, return_dict_in_generate=True, **kwargs)
        return out.scores[0].view(3, beams, -1)

    mixed, sequences = scores(adapter_names=MIX), generated(model, ids, num_beams=beams, adapter_names=MIX)
    for row, alone in enumerate(rows_alone(model, scores)):
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
    for row, adapter in enumerate(MIX):
        alone = generated(model, ids, num_beams=beams, adapter_names=[adapter] * 3)
        assert torch.equal(sequences[row], alone[row])


def test_mixed_batch_returns_several_sequences():
    model, ids = two_adapters(), batch(3, 6)
    kwargs = {"num_beams": 4, "num_return_sequences": 2}
    mixed = generated(model, ids, adapter_names=MIX, **kwargs).view(3, 2, -1)
    for row, alone in enumerate(rows_alone(model, lambda: generated(model, ids, **kwargs).view(3, 2, -1))):
        assert torch.equal(mixed[row], alone[row])


def test_mixed_batch_errors():
    model, ids = two_adapters(), batch()
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=ids, adapter_names=["one", "nobody", "two"])
    with pytest.raises(ValueError, match="nobody"):
        generated(model, ids, adapter_names=["one", "nobody", "two"])
    with pytest.raises(ValueError, match=r"2 .*3"):
        model(input_ids=ids, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match=r"2 .*3"):
        generated(model, ids, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match="training"):
        model.train()(input_ids=ids, adapter_names=MIX)
    model.eval()
    assert torch.equal(logits(model, ids), logits(attached("llama", "one"), ids))


# ---- injection, and transformers' own methods ----


@some
def test_injection(name):
    base, ids = TINY[name](), batch()
    inject_adapter_in_model(bundle_config(), base, "mine")
    perturb(base, "mine")
    found = get_peft_model_state_dict(base, adapter_name="mine")
    assert found
    again = inject_adapter_in_model(bundle_config(), TINY[name](), "other")
    result = set_peft_model_state_dict(again, found, adapter_name="other")
    assert result.unexpected_keys == []
    assert torch.equal(logits(again, ids), logits(base, ids))
    assert not torch.equal(logits(base, ids), logits(reference(name), ids))


@some
def test_injection_where_a_state_dict_says(name):
    """The state dict decides which blocks get bundles, not the config."""
    source = get_peft_model(TINY[name](), bundle_config(layers_to_transform=[1]))
    perturb(source).eval()
    found = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: the config alone would have targeted more
        model = inject_adapter_in_model(bundle_config(), TINY[name](), state_dict=found).eval()
    assert [layer.index for layer in layers(model)] == [1]
    set_peft_model_state_dict(model, found)
    assert torch.equal(logits(model, batch()), logits(source, batch()))


def test_injection_on_meta():
    model = inject_adapter_in_model(bundle_config(), TINY["llama"](), low_cpu_mem_usage=True)
    assert {p.device.type for p in weights(model).values()} == {"meta"}
    source = attached()
    found = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    set_peft_model_state_dict(model, found, low_cpu_mem_usage=True)
    assert torch.equal(logits(model, batch()), logits(source, batch()))


@some
def test_methods_of_transformers(name, tmp_path):
    ids, expected = batch(), logits(reference(name), batch())
    model = TINY[name]()
    model.add_adapter(bundle_config(), "one")
    assert torch.equal(logits(model, ids), expected)
    assert model.active_adapters() == ["one"]
    perturb(model, "one")
    one = logits(model, ids)
    assert torch.equal(one, logits(attached(name, "one"), ids))
    model.save_pretrained(tmp_path / "one")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "one"))
    assert not (tmp_path / "one" / "model.safetensors").exists()

    again = TINY[name]()
    again.load_adapter(tmp_path / "one", "one")
    assert unchanged(snapshot(model.state_dict()), again.state_dict())
    loaded = logits(again, ids)  # transformers assigns views of the file: unaligned, so products round otherwise
    assert torch.allclose(loaded, one, atol=1e-6)
    peft_model = PeftModel.from_pretrained(TINY[name](), tmp_path / "one")
    assert torch.equal(logits(peft_model, ids), one)

    again.add_adapter(bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["left"]}}), "two")
    perturb(again, "two")
    again.set_adapter("two")
    assert again.active_adapters() == ["two"]
    two = logits(again, ids)
    assert not torch.equal(two, one)
    again.set_adapter(["one", "two"])
    assert not torch.equal(logits(again, ids), two)
    again.disable_adapters()
    assert torch.equal(logits(again, ids), expected)
    again.enable_adapters()
    again.set_adapter("one")
    assert torch.equal(logits(again, ids), loaded)
    again.delete_adapter("two")
    assert torch.equal(logits(again, ids), loaded)
    assert not weights(again, "two")
    assert state_of(again).bundle_names() == list(bundle_config().bundles)
    again.add_adapter(bundle_config(), "two")
    again.set_adapter("two")
    assert torch.equal(logits(again, ids), expected)


def test_functions_work_without_a_peft_model():
    model, ids = TINY["llama"](), batch()
    model.add_adapter(bundle_config(), "one")
    perturb(model, "one")
    one, expected = logits(model, ids), logits(reference("llama"), ids)
    zero = dict.fromkeys(bundle_config().bundles, 0.0)
    with peft_bundles.alphas(model, zero):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), one)
    with peft_bundles.route(model, "policy"):
        model(input_ids=ids, labels=ids).loss.backward()
    peft_bundles.finalize_grads(model)
    assert {n for n, p in weights(model, "one").items() if p.grad is not None} == {
        n for n in weights(model, "one") if n.endswith(".b_linear")
    }
    assert "b_diag" in str(peft_bundles.report(model, "one"))


# ---- training ----


def train(model, *, steps=4, ids=None):
    ids = batch() if ids is None else ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@every
def test_training_moves_only_the_adapter(name):
    model = attached(name)
    frozen = snapshot({k: v for k, v in model.state_dict().items() if k not in weights(model)})
    before = snapshot(weights(model))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[k]) for k, p in weights(model).items())
    assert unchanged(frozen, {k: v for k, v in model.state_dict().items() if k in frozen})


@pytest.mark.parametrize("use_reentrant", [False, True])
@every
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    def gradients(model):
        model.zero_grad()
        torch.manual_seed(0)  # of the bundles' dropout, which the second forward has to repeat
        model(input_ids=batch(), labels=batch()).loss.backward()
        return {n: p.grad.clone() for n, p in weights(model).items()}

    model = attached(name, dropout=0.5).train()
    plain = gradients(model)
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for n, gradient in gradients(model).items():
        assert torch.allclose(gradient, plain[n], rtol=1e-4, atol=1e-6), n


def test_gradient_checkpointing_under_a_route():
    """The second forward of a checkpointed block runs in backward, after the route's block has ended."""

    def gradients(checkpointing, rows):
        model = attached().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with model.route(rows):
            loss = model(input_ids=batch(2), labels=batch(2)).loss
        loss.backward()
        model.finalize_grads()
        return {n: p.grad for n, p in weights(model).items()}

    for rows in ("lm", ["lm", "policy"]):
        plain, other = gradients(False, rows), gradients(True, rows)
        assert any(g is not None for g in plain.values())
        for n, gradient in plain.items():
            assert (gradient is None) == (other[n] is None), n
            assert gradient is None or torch.allclose(gradient, other[n], rtol=1e-4, atol=1e-6), n


def test_gradient_checkpointing_under_alphas():
    def gradients(checkpointing):
        model = attached().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with model.alphas(b_mlp=0.0, b_linear=torch.tensor([0.5, 2.0])):
            loss = model(input_ids=batch(2), labels=batch(2)).loss
        loss.backward()
        return {n: p.grad for n, p in weights(model).items()}

    plain, other = gradients(False), gradients(True)
    for n, gradient in plain.items():
        if gradient is None:
            assert other[n] is None or not bool(other[n].any()), n
        else:
            assert torch.allclose(gradient, other[n], rtol=1e-4, atol=1e-6), n


def test_dropout_only_while_training():
    model, ids = attached(dropout=0.5), batch()
    assert torch.equal(logits(model, ids), logits(model, ids))
    assert torch.equal(logits(model, ids), logits(attached(), ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


# ---- beside LoRA ----

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def lora_weights(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def set_lora(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(
            lora_weights(model).items(), key=lambda item: item[0].replace("base_model.model.", "")
        ):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def stacked(order):
    """A PeftModel with bundles on the blocks and LoRA on the linears inside, attached in that order."""
    base = TINY["llama"]()
    if order == "lora first":
        inject_adapter_in_model(LoraConfig(**LORA), base, "lora")
        model = get_peft_model(base, bundle_config())
    else:
        model = get_peft_model(base, bundle_config())
        inject_adapter_in_model(LoraConfig(**LORA), model.get_base_model(), "lora")
    set_lora(model)
    return perturb(model).eval()


def test_lora_and_bundles_do_not_depend_on_the_order():
    ids = batch()
    first, second = stacked("lora first"), stacked("bundles first")
    assert lora_weights(first).keys() == lora_weights(second).keys() != set()
    assert torch.equal(logits(first, ids), logits(second, ids))
    for model in (first, second):
        with torch.no_grad():
            saved = snapshot(lora_weights(model))
            for parameter in lora_weights(model).values():
                parameter.zero_()
            assert torch.allclose(logits(model, ids), logits(attached(), ids), atol=1e-6)
            for n, parameter in lora_weights(model).items():
                parameter.copy_(saved[n])
    assert not torch.allclose(logits(first, ids), logits(attached(), ids), atol=1e-3)


@pytest.mark.parametrize("order", ["lora first", "bundles first"])
def test_lora_and_bundles_train_and_reload_separately(order, tmp_path):
    model = stacked(order)
    for parameter in lora_weights(model).values():
        parameter.requires_grad_(True)
    before = snapshot(dict(model.named_parameters()))
    losses = train(model)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(weights(model)) | set(lora_weights(model))
    model.eval().save_pretrained(tmp_path / "bundles")
    assert not any("lora" in key for key in load_file(tmp_path / "bundles" / "adapter_model.safetensors"))

    again = stacked(order)
    with torch.no_grad():
        for n, parameter in lora_weights(again).items():
            parameter.copy_(lora_weights(model)[n])
    again.load_adapter(tmp_path / "bundles", "default")
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    bare = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "bundles")
    assert torch.equal(get_basis(bare), get_basis(model))
    assert not torch.equal(logits(bare, batch()), logits(model, batch()))


def get_basis(model):
    return torch.stack([layer.bundle_basis["default"] for layer in layers(model)])


def test_lora_peft_model_over_injected_bundles(tmp_path):
    """The other way round: LoRA owns the PeftModel, bundles are inside."""
    base = inject_adapter_in_model(bundle_config(), TINY["llama"](), "mine")
    bundles = get_peft_model_state_dict(perturb(base, "mine"), adapter_name="mine")
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    set_lora(model)
    assert torch.equal(logits(model, batch()), logits(stacked("lora first"), batch()))
    model.save_pretrained(tmp_path)
    assert not any("bundle_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    other = inject_adapter_in_model(bundle_config(), TINY["llama"](), "mine")
    set_peft_model_state_dict(other, bundles, adapter_name="mine")
    again = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@pytest.mark.parametrize("order", ["lora first", "bundles first"])
def test_unload_takes_lora_off_too(order):
    """As PEFT has it: what is left is the base model, whatever tuners it had."""
    bare = stacked(order).unload()
    assert unchanged(snapshot(TINY["llama"]().state_dict()), bare.state_dict())
    assert not any(isinstance(m, BaseTunerLayer) for m in bare.modules())
    assert torch.equal(logits(bare, batch()), logits(reference("llama"), batch()))


def test_transformers_holds_bundles_and_lora(tmp_path):
    model, ids = TINY["llama"](), batch()
    model.add_adapter(bundle_config(), "bundles")
    model.add_adapter(LoraConfig(**LORA), "lora")
    set_lora(model)
    perturb(model, "bundles")
    model.set_adapter(["bundles", "lora"])
    assert torch.equal(logits(model, ids), logits(stacked("lora first"), ids))
    model.set_adapter("bundles")
    assert torch.allclose(logits(model, ids), logits(attached(), ids), atol=1e-6)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), logits(reference("llama"), ids))


# ---- copies and dtypes ----


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@some
def test_copies_are_independent(name, make):
    model, ids = attached(name), batch()
    before, expected = logits(model, ids), logits(reference(name), ids)
    other = make(model)
    assert torch.equal(logits(other, ids), before)
    zero = dict.fromkeys(model.peft_config["default"].bundles, 0.0)
    other.set_alphas(zero)
    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(model, ids), before)
    with model.alphas(zero):
        assert torch.equal(logits(model, ids), expected)
        third = make(model)
    assert torch.equal(logits(third, ids), before)  # a copy starts with no call in progress
    perturb(third, seed=5)
    assert not torch.equal(logits(third, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(third.unload(), ids), expected)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_can_be_calibrated_by_itself(make, tmp_path):
    model, ids = get_peft_model(TINY["llama"](), bundle_config()).eval(), batch()
    other = make(model)
    peft_bundles.calibrate(other, tokens=200, max_length=16, progress=False)
    assert model.peft_config["default"].calibration is None
    assert other.peft_config["default"].calibration is not None
    assert torch.equal(logits(perturb(model), ids), logits(attached(), ids))
    perturb(other).eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(TINY["llama"](), tmp_path), ids), logits(other, ids))


@every
def test_bfloat16(name):
    model = attached(name)
    bases = [layer.bundle_basis["default"].clone() for layer in layers(model)]
    full = logits(model, batch())
    model.to(torch.bfloat16)
    assert {p.dtype for p in weights(model).values()} == {torch.bfloat16}
    for layer, before in zip(layers(model), bases):
        after = layer.bundle_basis["default"]
        assert after.dtype == torch.float32
        assert torch.equal(after, before)
    half = logits(model, batch())
    assert half.dtype == logits(reference(name).to(torch.bfloat16), batch()).dtype
    assert (half.float() - full).norm() < 0.1 * full.norm()
    assert generated(model, batch()).shape == (3, 9 + 5)
    model.train()(input_ids=batch(), labels=batch()).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and bool(p.grad.any()) for p in weights(model).values())


def test_half_and_back_keeps_the_basis():
    model = attached()
    bases = [layer.bundle_basis["default"].clone() for layer in layers(model)]
    model.half().float()
    assert all(torch.equal(layer.bundle_basis["default"], b) for layer, b in zip(layers(model), bases))


@some
def test_autocast(name):
    model, ids = attached(name), batch()
    full = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, ids)
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert not torch.equal(mixed.float(), full)
    assert (mixed.float() - full).norm() < 0.1 * full.norm()
    autocast = snapshot({n: p.grad for n, p in weights(model).items()})
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for n, p in weights(model).items():
        assert autocast[n].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(autocast[n].flatten(), p.grad.flatten(), 0) > 0.9, n


# ---- generation, padding, hidden states ----


@every
def test_cache_changes_nothing(name):
    model, ids = attached(name), batch()
    kwargs = {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (generated(model, ids, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits):
        assert torch.allclose(a, b, atol=1e-4)
    assert not torch.equal(generated(reference(name), ids, **kwargs).logits[0], cached.logits[0])


@pytest.mark.parametrize("name", [n for n in TINY if n != "mamba"])
def test_left_padding_does_not_change_a_row(name):
    model, short, pads = attached(name), batch(1, 6), 4
    ids = torch.cat([torch.full((1, pads), PAD), short], 1)
    ids = torch.cat([ids, batch(1, 6 + pads, seed=1)])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[0, pads:], logits(model, short)[0], atol=1e-5)
    out = generated(model, ids, attention_mask=mask)
    assert torch.equal(out[:1, pads:], generated(model, short))


@every
def test_hidden_states_are_those_after_the_bundles(name):
    model, ids = attached(name), batch()
    blocks = [layer.get_base_layer() for layer in layers(model)]
    entered = []
    handles = [
        b.register_forward_pre_hook(lambda m, args, kwargs: entered.append(args[0]), with_kwargs=True) for b in blocks
    ]
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert len(out.hidden_states) == LAYERS + 1
    start = 0 if name == "mamba" else 1  # others show the embeddings first
    for state, into in zip(out.hidden_states[start:], entered[1:]):
        assert torch.equal(state, into)  # what a block gets is what the one before shows
    head = model.get_output_embeddings()(out.hidden_states[-1])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        head = torch.tanh(head / cap) * cap
    assert torch.allclose(head, out.logits, atol=1e-6)
    with torch.no_grad():
        base = reference(name)(input_ids=ids, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:start], base.hidden_states[:start]))
    for state, before in zip(out.hidden_states[start:], base.hidden_states[start:]):
        assert (state - before).abs().max() > 1e-3


@pytest.mark.parametrize("attach_first", [False, True])
@some
def test_a_users_hook_sees_the_block_after_its_bundles(name, attach_first):
    """Also a hook that was there before the bundles, and transformers' own capture of hidden states."""
    base, ids, seen = TINY[name](), batch(), []
    if attach_first:
        get_peft_model(base, bundle_config())
    block = base.get_submodule(f"{BLOCKS[name]}.{LAYERS - 1}")
    handle = block.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        base(input_ids=ids, output_hidden_states=True)
    if not attach_first:
        get_peft_model(base, bundle_config())
    perturb(base)
    seen.clear()
    with torch.no_grad():
        out = base(input_ids=ids, output_hidden_states=True)
    handle.remove()
    norm = next(m for n, m in base.named_modules() if n.endswith((".norm", ".ln_f")))
    assert torch.allclose(norm(seen[0]), out.hidden_states[-1], atol=1e-6)
    assert torch.allclose(base.get_output_embeddings()(norm(seen[0])), out.logits, atol=1e-6)


def test_vocabulary_of_the_tests():
    """The inputs hold no padding or end token, on which the padding tests rely."""
    ids = batch(50, 50)
    assert int(ids.min()) > EOS > PAD
    assert int(ids.max()) < VOCABULARY
