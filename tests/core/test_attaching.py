"""Where an adapter's basis, weights and base model come from, and what attaching refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from models import (
    LINEAR,
    TINY,
    attached,
    batch,
    bundle_config,
    generated,
    layers,
    logits,
    perturb,
    quietly_loaded,
    snapshot,
    some,
    train,
    two_adapters,
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
from torch import nn
from training import pairs, tokenizer
from trl import DPOConfig, DPOTrainer

import peft_bundles
from peft_bundles import BundleConfig


def calibrated(name="llama", *, tokens=256, **fields):
    model = get_peft_model(TINY[name](), bundle_config(**fields))
    peft_bundles.calibrate(model, tokens=tokens, max_length=32, progress=False)
    return perturb(model, scale=0.1).eval()


def copied(model, source="default", target="ref"):
    """As TRL makes its reference: a second adapter of the same config, with the parameters of the first."""
    for name, parameter in model.named_parameters():
        if f".{source}." in name:
            model.get_parameter(name.replace(f".{source}.", f".{target}.")).data.copy_(parameter.data)


def basis(model, adapter="default"):
    return {
        f"{layer.index}.{what}": getattr(layer, what)[adapter]
        for layer in layers(model)
        for what in ("bundle_basis", "bundle_mean", "bundle_scale")
    }


# ---- a second adapter of a config ----


@pytest.mark.parametrize("copy_config", [False, True])
@pytest.mark.parametrize("fields", [{}, {"basis_init": "random"}, {"basis_init": "pca"}, {"input_norm": "none"}])
def test_a_second_adapter_of_a_calibrated_config_has_its_basis(fields, copy_config, tmp_path):
    model, ids = calibrated(**fields), batch()
    expected, config = logits(model, ids), model.peft_config["default"]
    model.add_adapter("ref", copy.deepcopy(config) if copy_config else config)
    copied(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), ids), expected)
    model.save_pretrained(tmp_path, selected_adapters=["ref"])
    again = quietly_loaded(TINY["llama"](), tmp_path / "ref").eval()
    assert torch.equal(logits(again, ids), expected)


def test_a_second_adapter_has_the_states_of_the_quiet_penalty():
    model = calibrated()
    model.add_adapter("second", model.peft_config["default"])
    copied(model, target="second")

    def penalty(adapter):
        model.set_adapter(adapter)
        model.train()(input_ids=batch(), labels=batch()).loss.backward()
        value = float(model.quiet_loss())
        model.finalize_grads()
        return value

    assert penalty("second") == penalty("default") > 0


def test_a_basis_that_comes_from_elsewhere_without_calibration(tmp_path):
    """Of an uncalibrated adapter too: after `load_basis` its U is not the one of its seed."""
    peft_bundles.save_basis(get_peft_model(TINY["llama"](), bundle_config(basis_seed=3)), tmp_path)
    model = get_peft_model(TINY["llama"](), bundle_config())
    peft_bundles.load_basis(model, tmp_path)
    expected = logits(perturb(model).eval(), batch())
    model.add_adapter("ref", model.peft_config["default"])
    copied(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), batch()), expected)


def test_the_reference_of_trl_is_the_policy(tmp_path):
    model = calibrated()
    args = DPOConfig(tmp_path, use_cpu=True, report_to="none", bf16=False, max_length=32, disable_tqdm=True)
    DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer())
    assert sorted(model.peft_config) == ["default", "ref"]
    expected = logits(model.eval(), batch())
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), batch()), expected)


def test_calibrating_one_adapter_leaves_the_others_of_its_config():
    config = bundle_config()
    first, second = (perturb(get_peft_model(TINY["llama"](), config)).eval() for _ in range(2))
    expected = logits(second, batch())
    fresh = get_peft_model(TINY["llama"](), config)
    peft_bundles.calibrate(fresh, tokens=256, max_length=32, progress=False)
    assert fresh.peft_config["default"].calibration is not None and config.calibration is None
    assert torch.equal(logits(first, batch()), expected) and torch.equal(logits(second, batch()), expected)
    two = get_peft_model(TINY["llama"](), config)
    two.add_adapter("other", config)
    peft_bundles.calibrate(two, adapter="other", tokens=256, max_length=32, progress=False)
    assert two.peft_config["default"].calibration is None


MISSING = "names the basis of an adapter that was calibrated or loaded elsewhere"


@pytest.mark.parametrize("fields", [{}, {"basis_init": "random"}])
def test_a_basis_that_nothing_brings_is_refused(fields, tmp_path):
    source = calibrated(**fields)
    source.save_pretrained(tmp_path)
    for config in (source.peft_config["default"], BundleConfig.from_pretrained(str(tmp_path))):
        model = get_peft_model(TINY["llama"](), copy.deepcopy(config))
        for use in (lambda m: logits(m, batch()), lambda m: m.save_pretrained(tmp_path / "new")):
            with pytest.raises(ValueError, match=MISSING):
                use(model)
        set_peft_model_state_dict(model, get_peft_model_state_dict(source))
        assert torch.equal(logits(model.eval(), batch()), logits(source, batch()))


def test_two_calibrations_with_equal_records_are_not_mixed_up():
    """Nothing in such a config says which of the two it is, so its adapter takes neither."""
    model = calibrated(basis_init="random")
    model.add_adapter("other", model.peft_config["default"])
    for layer in layers(model):
        layer.bundle_mean["other"] = layer.bundle_mean["other"] + 1
    model.add_adapter("third", model.peft_config["other"])
    assert unchanged(basis(model, "other"), basis(model, "third"))
    model.add_adapter("fourth", copy.deepcopy(model.peft_config["other"]))
    model.set_adapter("fourth")
    with pytest.raises(ValueError, match=MISSING):
        logits(model, batch())


# ---- the first weights ----


def test_weights_start_from_the_generator_of_torch_and_u_from_the_seed():
    def start(seed, **fields):
        base = TINY["llama"]()
        torch.manual_seed(seed)
        model = get_peft_model(base, bundle_config(init_weights=False, **fields))
        return snapshot(weights(model)), snapshot(basis(model))

    first, same, other, moved = start(1), start(1), start(2), start(1, basis_seed=5)
    assert unchanged(first[0], same[0]) and unchanged(first[0], moved[0])
    assert not any(torch.equal(first[0][key], other[0][key]) for key in first[0])
    assert unchanged(first[1], other[1]) and not unchanged(first[1], moved[1])


def test_no_two_layers_bundles_or_adapters_start_equal():
    model = get_peft_model(TINY["llama"](), bundle_config(init_weights=False), adapter_name="one")
    model.add_adapter("two", bundle_config(init_weights=False))
    starts = [p for adapter in ("one", "two") for p in weights(model, adapter).values()]
    for i, start in enumerate(starts):
        assert not any(torch.equal(start, other) for other in starts[:i])
        assert float(start.abs().max()) <= 1 / start.shape[-1] ** 0.5


# ---- the base model ----


@some
def test_an_adapter_is_refused_on_another_base_of_the_same_shape(name, tmp_path):
    model = attached(name)
    model.save_pretrained(tmp_path)
    quietly_loaded(TINY[name](), tmp_path)
    quietly_loaded(TINY[name]().to(torch.bfloat16), tmp_path)
    other = TINY[name](seed=1)
    with pytest.raises(ValueError, match="trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="trained on another base model"):
        TINY[name](seed=1).load_adapter(tmp_path)
    with pytest.raises(ValueError, match="trained on another base model"):
        peft_bundles.compose(TINY[name](seed=1), [f"{tmp_path}:b_mlp"])
    path = tmp_path / "adapter_config.json"  # files of earlier versions lack it
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "base_fingerprint"}))
    quietly_loaded(TINY[name](seed=1), tmp_path)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head", "input_layernorm"])
def test_modules_that_are_saved_are_not_taken_for_the_base(saved, tmp_path):
    model = attached(modules_to_save=[saved])
    for name, parameter in model.named_parameters():
        parameter.data += "modules_to_save" in name
    model.add_adapter("second", bundle_config(modules_to_save=[saved]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    expected = logits(model.eval(), batch())
    assert torch.equal(logits(quietly_loaded(TINY["llama"](), tmp_path).eval(), batch()), expected)
    model.load_adapter(tmp_path, "third")


def test_a_base_that_was_trained_too_is_not_recorded(tmp_path):
    model = attached()
    for parameter in model.get_base_model().model.layers[0].mlp.parameters():
        parameter.data += 1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] is None


# ---- what is refused ----


def test_a_model_that_is_wrapped_already_is_refused():
    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

    lora = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"]))
    for inner in (attached(), lora, Holder(attached())):
        before = snapshot(inner.state_dict())
        with pytest.raises(ValueError, match="PeftModel already"):
            get_peft_model(inner, bundle_config())
        assert unchanged(before, inner.state_dict())


def test_wrapped_once_is_loaded_on_a_wrapped_model_never(tmp_path):
    attached().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PeftModel already"):
        PeftModel.from_pretrained(attached(), tmp_path)


@pytest.mark.parametrize("targets", [r".*layers\.\d+(\.mlp)?", ["layers.0", "layers.0.mlp"]])
def test_a_place_inside_a_block_that_has_bundles_is_refused(targets):
    with pytest.raises(ValueError, match=r"bundles would sit on model.layers.0 and on model.layers.0.mlp inside it"):
        get_peft_model(TINY["llama"](), bundle_config(target_modules=targets))
    model = two_adapters()
    before = logits(model, batch())
    with pytest.raises(ValueError, match="inside it"):
        model.add_adapter("three", bundle_config(target_modules=r".*layers\.\d+\.mlp"))
    assert torch.equal(logits(model, batch()), before)


def test_a_state_dict_of_other_blocks_is_refused():
    tensors = {k.replace("layers.0", "stages.0"): v for k, v in get_peft_model_state_dict(attached()).items()}
    tensors |= {k.replace("layers.0", "layers.0.mlp"): v for k, v in get_peft_model_state_dict(attached()).items()}
    tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"the state dict has bundles at 'model.layers.0.mlp'"):
        inject_adapter_in_model(bundle_config(), TINY["llama"](), state_dict=tensors)


# ---- accelerate's offloading ----

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_after_attaching(name, buffers, tmp_path):
    model, plain, ids = attached(name), attached(name), batch()
    cpu_offload(model, execution_device=CPU, offload_buffers=buffers)
    assert all(p.is_meta for p in weights(model).values())
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(generated(model, ids), generated(plain, ids))
    with model.alphas(b_mlp=0.0), plain.alphas(b_mlp=0.0):
        assert torch.equal(logits(model, ids), logits(plain, ids))
    assert all(p.is_meta for p in weights(model).values())
    with pytest.raises(ValueError, match="Save it before offloading it"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("bundles", [LINEAR, {"b_linear": LINEAR["b_linear"]}])
def test_offloaded_bundles_at_linear_layers(bundles):
    model, plain, ids = attached(bundles=bundles), attached(bundles=bundles), batch()
    cpu_offload(model, execution_device=CPU)
    wanted = plain(input_ids=ids).logits
    assert all(p.is_meta for p in weights(model).values())
    assert torch.equal(model(input_ids=ids).logits, wanted) and torch.equal(logits(model, ids), wanted)
    assert torch.equal(generated(model, ids), generated(plain, ids))


@pytest.mark.parametrize("place", ["block", "mlp"])
def test_offloaded_bundles_are_not_trained(place):
    """Every forward gets new copies of them, so a gradient would reach no parameter."""
    bundles = {"b_one": {"rank": 4, "place": place, "sub_bases": ["left"], "signals": {"lm": 1.0}}}
    model, ids = attached(bundles=bundles), batch()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(RuntimeError, match=r"offloaded the weights of the bundles at 0.*attach bundles after that"):
        model.train()(input_ids=ids, labels=ids)
    with torch.no_grad():
        model(input_ids=ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bundles_on_an_offloaded_base_are_trained_as_on_any(checkpointing, tmp_path):
    both, losses = {**LINEAR, **bundle_config().bundles}, []
    for offloaded in (False, True):
        base = TINY["llama"]()
        if offloaded:
            disk_offload(base, tmp_path, execution_device=CPU)
        torch.manual_seed(0)
        model = perturb(get_peft_model(base, bundle_config(bundles=both)))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(train(model))
        assert base.model.layers[0].mlp.up_proj.weight.is_meta == offloaded
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attached_to_an_offloaded_base(name, tmp_path):
    base, ids = TINY[name](), batch()
    disk_offload(base, tmp_path / "offloaded", execution_device=CPU)
    torch.manual_seed(0)
    model, plain = get_peft_model(base, bundle_config()), attached(name)
    peft_bundles.calibrate(model, tokens=256, max_length=32, progress=False)
    again = get_peft_model(TINY[name](), bundle_config())
    peft_bundles.calibrate(again, tokens=256, max_length=32, progress=False)
    assert unchanged(basis(again), basis(model))
    plain.save_pretrained(tmp_path / "adapter")
    base = TINY[name]()
    cpu_offload(base, execution_device=CPU)
    model = quietly_loaded(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(generated(model, ids), generated(plain, ids))
