"""A BUNDLE adapter is attached, switched, disabled, taken off and trained as PEFT's own tuners are."""

from __future__ import annotations

import pytest
import torch
from models import (
    BLOCKS,
    HIDDEN,
    LAYERS,
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
    reference,
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
    get_layer_status,
    get_model_status,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_bundles import BundleConfig
from peft_bundles.core.walking import state_of


# ---- attaching ----


@every
def test_only_adapter_weights_train_and_are_counted(name, capsys):
    base = TINY[name]()
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, bundle_config())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights(model))
    # down is (b, support), up (support, b); a diag has one number a direction.
    per_layer = 2 * 4 * 12 + 2 * 3 * 20 + 8
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
    with pytest.raises(ValueError, match=r"the layers are \[0, 1\]"):
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nowhere"]}, r"\['nowhere'\] fits no module of Llama\w+\. Leave it out"),
        ({"target_modules": []}, r"\[\] fits no module of Llama\w+\. Leave it out"),
        ({"target_modules": ["layers"]}, r"names model\.layers, a list of modules; .*r'\.\*\\\.layers\\\.\\d\+'"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] .* leave no decoder block of 2 and no linear layer"),
        ({"exclude_modules": ".*"}, r"exclude_modules='\.\*' leave no decoder block of 2 and no linear layer"),
    ],
)
def test_modules_that_leave_no_decoder_block(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(TINY["llama"](), bundle_config(**fields))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.o_proj", "all-linear"])
def test_target_modules_of_lora_mean_the_same_linear_layers(targets):
    lora = get_peft_model(TINY["llama"](), LoraConfig(target_modules=targets))
    model = get_peft_model(TINY["llama"](), BundleConfig(bundles={"b_one": {"rank": 8}}, target_modules=targets))
    wanted = {n.removesuffix(".lora_A.default") for n, _ in lora.named_modules() if n.endswith(".lora_A.default")}
    assert {
        n.removesuffix(".bundles") for n, m in model.named_modules() if n.endswith(".bundles") and m.holds("default")
    } == wanted
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


def test_target_modules_that_are_linear_layers_outside_the_blocks():
    config = BundleConfig(bundles={"b_one": {"rank": 8}}, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"names lm_head, which is not inside a decoder block"):
        get_peft_model(TINY["llama"](), config)


def test_low_ranks():
    """One column, one hidden unit: the smallest bundle there can be, in ints and in fractions of the hidden size."""
    for rank in (1, 1.0 / HIDDEN, 1e-6):
        config = bundle_config(sub_bases={"left": rank}, bundles={"b_tiny": {"rank": rank, "sub_bases": ["left"]}})
        model = perturb(get_peft_model(TINY["llama"](), config)).eval()
        assert {tuple(p.shape) for p in weights(model).values()} == {(1, 1)}
        assert not torch.equal(logits(model, batch()), logits(reference("llama"), batch()))
        hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0))
        assert torch.linalg.matrix_rank(layers(model)[0](hidden) - hidden, atol=1e-5) == 1


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
    fields = {"one": {"layers_to_transform": [0]}, "two": {"layers_to_transform": [1]}}
    alone = {a: perturb(get_peft_model(TINY["llama"](), bundle_config(**fields[a]), a), a).eval() for a in fields}
    model, ids = TINY["llama"](), batch()
    model = perturb(get_peft_model(model, bundle_config(**fields[adapters[0]]), adapters[0]), adapters[0])
    torch.manual_seed(0)  # as before the adapters that stand alone
    model.add_adapter(adapters[1], bundle_config(**fields[adapters[1]]))
    perturb(model, adapters[1]).eval()
    for adapter in adapters:
        model.set_adapter(adapter)
        assert torch.equal(logits(model, ids), logits(alone[adapter], ids))
    mixed = logits(model, ids, adapter_names=["one", "__base__", "two"])
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
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            method()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    for layer in layers(model):
        with pytest.raises(ValueError, match="cannot be merged"):
            layer.merge()
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


# ---- training ----


@every
def test_training_moves_only_the_adapter(name):
    model = attached(name)
    frozen = snapshot({k: v for k, v in model.state_dict().items() if k not in weights(model)})
    before = snapshot(weights(model))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[k]) for k, p in weights(model).items())
    assert unchanged(frozen, {k: v for k, v in model.state_dict().items() if k in frozen})


def test_dropout_only_while_training():
    model, ids = attached(dropout=0.5), batch()
    assert torch.equal(logits(model, ids), logits(model, ids))
    assert torch.equal(logits(model, ids), logits(attached(), ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))
