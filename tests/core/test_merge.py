"""Bundles of kind "lora" are merged into the linear layers and taken off again, as PEFT's LoRA is."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from models import TINY, batch, logits, perturb
from peft import LoraConfig, get_peft_model

from peft_bundles import BundleConfig, alphas, load_bundle, remove_bundle, save_bundle, set_alphas, set_norm_budget
from peft_bundles.core.layer import BundleLayer
from peft_bundles.core.merge import add_to_weight


BUNDLES = {
    "b_one": {"rank": 3, "place": "all-linear", "signals": {"lm": 1.0}},
    "b_two": {"rank": 5, "place": "attention", "use_rslora": True, "signals": {"policy": 1.0}},
}


def bundled(name="llama", bundles=BUNDLES, **fields):
    config = BundleConfig(bundles=bundles, task_type="CAUSAL_LM", quiet=0.0, **fields)
    base = TINY[name]().double()
    return perturb(get_peft_model(base, config, autocast_adapter_dtype=False), scale=0.1).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_merged_model_computes_the_same_and_can_be_undone(name):
    model, ids = bundled(name), batch()
    model.set_alphas(b_two=[0.5, -1.0], per="layer")
    wanted, base = logits(model, ids), logits(TINY[name]().double(), ids)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=1e-10)
    assert model.state_dict().keys() == before.keys()  # as TRL's trainers need when they hand weights to vLLM
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=1e-10)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-12)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), base, rtol=0, atol=1e-10)


def test_alphas_of_a_merge():
    model, ids = bundled(), batch()
    wanted = logits(model, ids, alphas={"b_one": 0.0, "b_two": 0.5})
    present = logits(model, ids)
    model.merge_adapter(alphas={"b_one": 0.0, "b_two": 0.5})
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=1e-10)
    for dial in (lambda: set_alphas(model, b_one=1.0), lambda: model(ids, alphas={"b_one": 1.0})):
        with pytest.raises(ValueError, match=r"merged into the base model at fixed alphas; call unmerge_adapter\(\)"):
            dial()
    with pytest.raises(ValueError, match="merged"), alphas(model, b_one=0.5):
        pass
    with pytest.raises(ValueError, match="merged"), model.route("lm"):
        pass
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), present, rtol=0, atol=1e-10)


def test_what_would_go_past_merged_weights_is_refused(tmp_path):
    """Each would compute something else than it says, or leave other weights in the base model than it had."""
    model, ids = bundled(), batch()
    saved = save_bundle(model, "b_one", tmp_path / "saved")
    model.merge_adapter()
    wanted, layers = logits(model, ids), [m for m in model.modules() if isinstance(m, BundleLayer)]
    refused = (
        lambda: model(ids, adapter_names=["__base__"] * len(ids)),
        lambda: set_norm_budget(model, 0.1),
        lambda: model.train()(ids),
        lambda: load_bundle(model, saved, "b_one", replace=True),
        lambda: load_bundle(model, saved, "b_new"),
        lambda: remove_bundle(model, "b_one"),
        lambda: save_bundle(model, "b_one", tmp_path / "new"),  # it would note the merged weights as its base
        lambda: copy.deepcopy(model).set_alphas(b_one=0.5),
    )
    for attempt in refused:
        with pytest.raises(ValueError, match=r"merged .* call unmerge_adapter\(\)"):
            attempt()
        model.eval()
    assert list(model.peft_config) == ["default"] and not (tmp_path / "new").exists()
    assert torch.equal(logits(model, ids), wanted) and all(m.active_adapters == ["default"] for m in layers)
    model.unmerge_adapter()
    assert load_bundle(model, saved, "b_one", replace=True) == "b_one"


def test_merge_and_unload():
    model, ids = bundled(), batch()
    wanted = logits(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), wanted, rtol=0, atol=1e-10)
    assert merged.state_dict().keys() == TINY["llama"]().state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_a_merged_adapter_is_undone_when_it_is_disabled():
    model, ids = bundled(), batch()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerging"), model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(TINY["llama"]().double(), ids), rtol=0, atol=1e-10)


REFUSED = {
    "behind blocks": (
        {**BUNDLES, "b_old": {"rank": 4, "sub_bases": ["a"]}},
        "b_old.* cannot be merged.* behind blocks",
    ),
    "another kind": ({**BUNDLES, "b_mlp": {"rank": 4, "place": "mlp", "kind": "mlp"}}, "b_mlp.* is of kind 'mlp'"),
}


@pytest.mark.parametrize(("bundles", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_no_weight_could_hold_is_refused_before_anything_changes(bundles, message):
    model = bundled(bundles=bundles, sub_bases={"a": 8})
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    wanted = logits(model, batch(), alphas={"b_old": 0.0} if "b_old" in bundles else {"b_mlp": 0.0})
    model.merge_adapter(alphas={"b_old": 0.0} if "b_old" in bundles else {"b_mlp": 0.0})  # what is off may be anything
    torch.testing.assert_close(logits(model, batch()), wanted, rtol=0, atol=1e-10)


def test_alphas_by_row_and_a_norm_budget_are_refused():
    model = bundled()
    with pytest.raises(ValueError, match=r"b_one.* differs between rows or tokens"):
        model.merge_adapter(alphas={"b_one": torch.tensor([0.0, 1.0])})
    model.base_model._state.budget = 0.1
    with pytest.raises(ValueError, match="norm budget"):
        model.merge_adapter()


def test_safe_merge_finds_a_broken_adapter():
    model = bundled()
    [p for n, p in model.named_parameters() if ".bundle_up." in n][-1].data.fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    base = {key: tensor for key, tensor in model.state_dict().items() if ".bundle_" not in key}
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.items())  # of the layers before it, too


def test_a_merge_equals_that_of_lora():
    """The same maps, as a bundle and as PEFT's LoRA."""
    model = bundled(bundles={"b": {"rank": 4, "lora_alpha": 6, "place": "mlp"}})
    targets = ["gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(
        TINY["llama"]().double(), LoraConfig(r=4, lora_alpha=6, target_modules=targets), autocast_adapter_dtype=False
    )
    ours = {n.removesuffix(".bundles"): m for n, m in model.named_modules() if n.endswith("_proj.bundles")}
    with torch.no_grad():
        for name, layer in lora.named_modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A["default"].weight.copy_(ours[name].bundle_down["default"]["b"])
                layer.lora_B["default"].weight.copy_(ours[name].bundle_up["default"]["b"].T)
    ids = batch()
    torch.testing.assert_close(logits(model, ids), logits(lora.eval(), ids), rtol=0, atol=1e-12)
    merged, peers = model.merge_and_unload().state_dict(), lora.merge_and_unload().state_dict()
    for key, tensor in peers.items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_is_quantised_anew(bits):
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    if bits == 8:
        linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    linear.requires_grad_(False).to("cpu")
    assert linear.weight.dtype in (torch.uint8, torch.int8)
    x, update = torch.randn(3, 64), 0.5 * torch.randn(64, 64) / 8
    wanted = linear(x) + x @ update.T
    with pytest.warns(UserWarning, match="rounded with it"):
        add_to_weight(linear, update, True, "default")
    assert linear.weight.dtype in (torch.uint8, torch.int8)
    assert (linear(x) - wanted).norm() < 0.15 * wanted.norm()
