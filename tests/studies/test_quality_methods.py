"""The methods of the learning study on a tiny model: their penalties, how they start, and that they train."""

import copy

import pytest
import torch
from models import LAYERS, tiny
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from peft_bundles.calibration import OUTLIER
from peft_bundles.core import quiet
from studies.quality import local, methods
from studies.quality.run import KINDS, prompt_rows, train
from studies.rows import rows_of, stack
from studies.training import final_states


pytestmark = pytest.mark.studies
TOKENS = 16


@pytest.fixture(scope="module")
def base():
    return tiny("llama")


@pytest.fixture(scope="module")
def calibration():
    torch.manual_seed(0)
    return {name: torch.randint(4, 100, (40, TOKENS)) for name in ("both", "own", "mixture", "chat")}


def built(method, base, calibration):
    return methods.build(method, base, calibration, Letters(), 0, KINDS)


class Letters:
    """Characters to ids and back, exactly: all that is asked of a tokenizer here."""

    pad_token_id = eos_token_id = 0

    def __call__(self, texts, **options):
        several = [texts] if isinstance(texts, str) else texts
        ids = [[ord(letter) for letter in text] for text in several]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def batch_decode(self, rows):
        return ["".join(map(chr, row)) for row in rows.tolist()]


def by_hand(model, rows, weight):
    """The penalty by a loop over linear layers and over all inputs that are no outliers, in float64."""
    inputs = {}

    def note(name):
        return lambda module, args, output: inputs.setdefault(name, []).append((args[0][0], output[0]))

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    handles = [layer.base_layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            final_states(model.get_base_model(), row[None])
    for handle in handles:
        handle.remove()
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in layers.items():
        A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        median = torch.cat([v for v, _ in inputs[name]]).norm(dim=-1).median()
        pairs = [pair for sequences in inputs[name] for pair in zip(*sequences) if pair[0].norm() <= OUTLIER * median]
        added = sum((s * B @ (A @ v.bfloat16().double())).square().sum() for v, _ in pairs) / len(pairs)
        total = total + weight * added / (sum(there.square().sum() for _, there in pairs) / len(pairs))
    return total


@pytest.fixture
def lora(base):
    """A LoRA in float64 that adds something, with other ranks and scales at other layers."""
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"down_proj": 3}, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(copy.deepcopy(base).double(), config)


def randomise(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_the_local_penalty_of_lora_is_a_plain_loop(lora, calibration, monkeypatch):
    rows = calibration["both"][:4]
    monkeypatch.setattr(local, "DRAW", 10**6)  # all inputs, at every call
    penalty = local.LocalPenalty(lora, lambda ids: final_states(lora.get_base_model(), ids), rows, 10.0)
    assert penalty() == 0.0  # B is zero at the start
    randomise(lora)
    expected = by_hand(lora, rows, 10.0)
    assert expected > 0.1
    torch.testing.assert_close(penalty(), expected, rtol=1e-9, atol=0.0)
    parameters = [p for n, p in lora.named_parameters() if "lora_" in n]
    for one, other in zip(torch.autograd.grad(penalty(), parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_inputs_are_drawn_anew_and_on_average_all(lora, calibration, monkeypatch):
    rows = calibration["both"]
    monkeypatch.setattr(local, "DRAW", 64)
    penalty = local.LocalPenalty(lora, lambda ids: final_states(lora.get_base_model(), ids), rows, 1.0)
    randomise(lora)
    with torch.no_grad():
        drawn = torch.stack([penalty() for _ in range(50)])
        monkeypatch.setattr(local, "DRAW", 10**6)
        assert drawn.unique().numel() == 50
        assert abs(drawn.mean() / penalty() - 1) < 0.02


def test_outliers_are_left_out(base, calibration):
    kept = local._Kept(1.0)
    inputs = torch.ones(1, 20, 8)
    inputs[0, 0] = 100.0
    kept(base, (inputs,), 2 * inputs)
    assert kept.count == 19 and len(torch.cat(kept.sample)) == 19 and kept.energy == 19 * 4 * 8


def test_methods_without_plain_lora_have_no_local_penalty(base, calibration):
    with pytest.raises(ValueError, match="plain LoRA"):
        built("dora_r16_local10", base, calibration)


def test_bundles_at_linears_have_the_penalty_of_the_control(base, calibration, monkeypatch):
    """Two implementations: the same value, and the same gradient once a step, for the same maps."""
    monkeypatch.setattr(local, "DRAW", 10**6)
    monkeypatch.setattr(quiet, "DRAW_INPUTS", 10**6)
    rows = {"both": calibration["both"][:5]}
    one, other = (
        methods.build(method, base, rows, Letters(), 0, KINDS)
        for method in (
            f"bundles:place=mlp,r=3,quiet=10,tokens={4 * 128}",  # takes a row of 128 tokens more
            f"lora:targets=gate_proj+up_proj+down_proj,r=3,local=10,tokens={5 * TOKENS}",
        )
    )
    torch.manual_seed(2)
    theirs, pairs = dict(other.model.named_parameters()), []
    for name, weight in one.model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
            where, _, which = name.partition(".bundles.")
            control = theirs[where + (".lora_A" if "bundle_down" in which else ".lora_B") + ".default.weight"]
            control.data.copy_(weight if weight.shape == control.shape else weight.T)
            pairs.append((weight, control))
    assert len(pairs) == 2 * 3 * LAYERS
    ids = torch.randint(4, 100, (2, TOKENS))
    for method in (one, other):
        loss = method.trunk(ids).sum() * 0.0 + method.extra()
        assert loss > 0.1
        loss.backward()
    for weight, control in pairs:
        gradient = weight.grad if weight.shape == control.shape else weight.grad.T
        torch.testing.assert_close(gradient, control.grad, rtol=1e-3, atol=1e-4 * control.grad.abs().max().item())


def test_corda_starts_as_the_base(base, calibration):
    method = built("corda_r16", base, calibration)
    again = built("corda_r16", base, calibration)  # what the first has taken out of W is not taken twice
    ids = torch.randint(4, 100, (3, TOKENS))
    expected = final_states(base, ids)
    for one in (method, again):
        torch.testing.assert_close(one.trunk(ids), expected, rtol=1e-4, atol=1e-4)
    layer = next(m for m in method.model.modules() if isinstance(m, LoraLayer))
    assert layer.lora_B["default"].weight.abs().max() > 1e-3  # and yet its update is not zero
    assert not torch.equal(layer.base_layer.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_ranks_of_places_have_the_parameters_of_lora_r16_everywhere():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        vocab_size=8,
    )
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    places = {"all-linear": 16, "mlp": 26, "attention": 42, "o_proj+down_proj": 50, "down_proj": 77}
    assert {place: methods.equal_rank(shape, place.split("+")) for place in places} == places


def test_options_are_data():
    assert methods.lora_options("lora_r16") == ("lora_r16", methods.LORA_OPTIONS)
    assert methods.lora_options("lora_r16_local10")[1]["local"] == "10"
    name, options = methods.lora_options("lora_r16_kl.3_local30")
    assert (name, options["kl"], options["local"]) == ("lora_r16", ".3", "30")
    name, options = methods.lora_options("lora:targets=gate_proj+up_proj,r=26,local=10,kl=1,source=chat")
    assert name == "lora" and options == {
        **methods.LORA_OPTIONS,
        "targets": "gate_proj+up_proj",
        "r": "26",
        "local": "10",
        "kl": "1",
        "source": "chat",
    }
    for wrong in ("lora_r17", "lora:rank=3", "lora:r", "lora_r16_local"):
        with pytest.raises(ValueError):
            methods.lora_options(wrong)
    with pytest.raises(ValueError, match="no option"):
        methods.build("bundles:loudness=3", None, {}, None, 0, KINDS)


NEW = (
    "lora_r16_local10",
    "lora_r16_kl1_local10",
    "lora:targets=gate_proj+up_proj+down_proj,r=5,local=10,kl=.3,source=chat",
    "lora:targets=o_proj+down_proj,r=5,local=3,source=mixture",
    "corda_r16",
    "bundles:place=mlp,quiet=10,source=own",
    "bundles:place=mlp,kind=mlp,quiet=10,r=4",
    "bundles:place=o_proj+down_proj,quiet=10,kl=1",
    "bundles:place=all-linear,quiet=10,owners=1",
    "bundles:place=attention,quiet=10,bundles=3,source=chat",
)


@pytest.mark.parametrize("method", NEW)
def test_two_steps(method, base, calibration):
    made = built(method, base, calibration)
    assert sum(p.numel() for p in made.parameters) > 0
    before = [p.detach().clone() for p in made.parameters]
    rows = rows_of([(list(range(4, 4 + TOKENS)), 1)] * len(KINDS), TOKENS)
    made.tag = None
    with made.context:
        record = train(made, base, stack([rows, rows]), 1e-2, 2, {"learn/codes": rows})
    assert record["seconds"] > 0 and "2" in record and "diverged" not in record
    assert any(not torch.equal(a, b) for a, b in zip(before, made.parameters))


def test_prompts_have_no_answers():
    pairs = [[f"what is {i}?", f"Z{i}"] for i in range(80)]
    data = {"train": {"biographies": pairs, "codes": pairs, "gsm": pairs, "reasoning": {"a": pairs}}}
    rows = prompt_rows(data, Letters())
    text = "".join(Letters().batch_decode(rows)).replace(" ", "")
    assert "whatis" in text and "Z" not in text
