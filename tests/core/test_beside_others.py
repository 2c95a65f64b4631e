"""Bundles beside other trained weights (heads, LoRA), and inside models that PEFT does not own."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from models import (
    TINY,
    attached,
    batch,
    bundle_config,
    layers,
    logits,
    perturb,
    quietly_loaded,
    reference,
    snapshot,
    some,
    train,
    unchanged,
    weights,
)
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from peft_bundles.core.walking import state_of


# ---- beside weights that PEFT trains by itself ----


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
        torch.manual_seed(0)
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
    return torch.stack([layer.bundle_basis["default"] for layer in layers(model) if "default" in layer.bundle_basis])


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


def test_transformers_holds_bundles_and_lora():
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
