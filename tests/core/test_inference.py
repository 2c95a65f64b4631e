"""One forward without gradients: whichever way its plan is made and kept, it computes what training computes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import TINY, batch, bundle_config, layers, logits, perturb, some
from peft import get_peft_model

import peft_bundles
from peft_bundles.core.functional import bundle_forward
from peft_bundles.core.inference import Part, Plan, for_compiler, for_reuse, run_plan


ROWS = torch.tensor([0.5, 2.0, 0.0])
CALLS = [
    {},
    {"alphas": {"b_mlp": 0.3, "b_linear": 0.0}},
    {"alphas": {"b_mlp": ROWS, "b_diag": -1.0}},
    {"alphas": {"b_mlp": torch.linspace(0.1, 2.0, 27).view(3, 9), "b_linear": ROWS}},
    {"alphas": dict.fromkeys(("b_mlp", "b_linear", "b_diag"), 0.0)},
    {"adapter_names": ["default", "__base__", "other"]},
    {"adapter_names": ["other", "default", "other"], "alphas": {"b_linear": ROWS}},
]


@pytest.fixture
def reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrated(name):
    """A model with two calibrated adapters."""
    model = get_peft_model(TINY[name](), bundle_config())
    peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    model.add_adapter("other", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    return perturb(perturb(model), "other").eval()


@some
def test_all_ways_to_run_bundles_agree(name, reset):
    """Training's operation, a fresh plan and a kept one to the bit; a plan for the compiler to its rounding."""
    model, ids = calibrated(name), batch(3, 9)

    def runs():
        for setting in (nullcontext(), model.alphas({"b_mlp": [1.0, 0.2]}, per="layer")):
            with setting:
                yield from (logits(model, ids, use_cache=False, **call) for call in CALLS)
        peft_bundles.set_norm_budget(model, 0.05)
        yield from (logits(model, ids, use_cache=False, **call) for call in CALLS)
        peft_bundles.set_norm_budget(model, None)

    trained = [model(input_ids=ids, use_cache=False, **call).logits.detach() for call in CALLS]
    fresh = list(runs())
    with model.folded():
        kept, again = list(runs()), list(runs())
    for layer in layers(model):
        layer.get_base_layer().compile(backend="eager")
    compiled = list(runs())
    assert all(torch.equal(a, b) for a, b in zip(fresh, trained))
    assert all(torch.equal(a, b) for a, b in zip(fresh, kept)) and all(torch.equal(a, b) for a, b in zip(fresh, again))
    for a, b in zip(fresh, compiled):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    base = logits(TINY[name](), ids)
    differ = [not torch.allclose(out, base, atol=1e-4) for out in fresh[: len(CALLS)]]
    assert differ == [call.get("alphas") != CALLS[4]["alphas"] for call in CALLS]


@pytest.mark.parametrize("nonlinear", [0, 5, 12])
def test_a_plan_is_the_training_operation_on_tensors(nonlinear):
    B, T, d, H = 3, 4, 10, 12
    hidden, D, E = torch.randn(B, T, d), torch.randn(d, H), torch.randn(H, d)
    mean, other = torch.randn(d), (torch.randn(d, 3), torch.randn(3, d))
    for alpha in (None, torch.rand(1, 1, H), torch.rand(B, 1, H), torch.rand(B, T, H), torch.rand(B, 1, 1)):
        first = bundle_forward(hidden, D, E, nonlinear=nonlinear, mean=mean, alpha=alpha)
        out = bundle_forward(hidden, *other, nonlinear=1, residual=first)
        part, second = Part(D, E, mean, nonlinear, alpha), Part(*other, None, 1, None)
        plan = Plan((part, second), None, False)
        assert torch.equal(run_plan(plan, hidden), out)
        assert torch.equal(run_plan(for_reuse(plan, hidden), hidden), out)
        by = alpha is not None and alpha.shape[0] > 1, alpha is not None and alpha.shape[1] > 1
        ahead = Plan((for_compiler(part, by), for_compiler(second, (False, False))), None, False)
        torch.testing.assert_close(run_plan(ahead, hidden), out)
        if by[0]:
            with pytest.raises(ValueError, match=r"for 3 rows .* but the batch has 2"):
                run_plan(ahead, hidden[:2])
            generating = ahead._replace(generating=True)  # two beams for each prompt, one token at a time
            beams = hidden.repeat_interleave(2, 0)[:, -1:]
            wanted = out.repeat_interleave(2, 0)[:, -1:]
            torch.testing.assert_close(run_plan(generating, beams), wanted)


def test_a_kept_plan_is_used_again_until_something_changes():
    model, hidden = calibrated("llama"), torch.randn(2, 1, 64)
    layer, plans = layers(model)[0], []
    with torch.no_grad(), model.folded():
        for _ in range(2):
            layer(hidden)
            plans.append(layer.state.call.folds[layer][1])
        with model.alphas(b_mlp=0.5):
            layer(hidden)
            plans.append(layer.state.call.folds[layer][1])
        layer(hidden)
        plans.append(layer.state.call.folds[layer][1])
        model.set_alphas({"b_mlp": 2.0})
        layer(hidden)
        plans.append(layer.state.call.folds[layer][1])
    assert plans[0] is plans[1] and len({id(plan) for plan in plans}) == 4
    assert plans[3].parts[0].D_dH is plans[0].parts[0].D_dH  # folded once
    assert layer.state.call.folds is None
