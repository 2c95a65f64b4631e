"""Is the operation right on a GPU? One JSON record. (What it costs: `benchmarks/speed.py`.)

    python benchmarks/gpu_check.py --output benchmarks/results/gpu_check.json

The stacked form against the float64 reference in float32 and bf16, alpha 0 against the base bit for bit, routed
gradients against each loss's own, the compiled layer against eager.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bundles import BundleConfig, BundleLayer
from peft_bundles.core.functional import activate, activate_backward, bundle_reference
from peft_bundles.core.kernels import centred, fits, units_backward
from studies.records import made_by, write


SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(shape: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def correctness() -> dict[str, Any]:
    found: dict[str, Any] = {}
    ids = torch.randint(0, 1000, (4, 32), device="cuda")
    base = llama(SMALL, torch.float32).eval()
    base.requires_grad_(False)
    expected = base(ids).logits
    model = get_peft_model(base, BundleConfig(preset="full_modular", task_type="CAUSAL_LM")).eval()
    names = list(model.peft_config["default"].bundles)
    found["fresh_equals_base"] = torch.equal(model(ids).logits, expected)
    perturb(model)
    found["perturbed_differs"] = not torch.equal(model(ids).logits, expected)
    found["alpha_0_equals_base"] = torch.equal(model(ids, alphas=dict.fromkeys(names, 0.0)).logits, expected)
    found["alpha_0_rows_equal_base"] = torch.equal(model(ids, alphas=torch.zeros(4, 15)).logits, expected)

    layer = next(m for m in model.modules() if isinstance(m, BundleLayer))
    hidden = torch.randn(4, 32, 256, device="cuda")
    weights = layer.bundle_weights("default")
    for b in weights:
        for field in ("weight", "down", "up"):
            if getattr(b, field) is not None:  # no projector
                setattr(b, field, getattr(b, field).detach().double())
    basis, mean, scale = (getattr(layer, f"bundle_{n}")["default"].double() for n in ("basis", "mean", "scale"))
    exact = bundle_reference(hidden.double(), weights, basis, mean, scale, torch.ones(15, device="cuda").double())
    change = (exact - hidden.double()).norm()
    for dtype in (torch.float32, torch.bfloat16):
        got = layer(hidden.to(dtype)).detach().double() - hidden.to(dtype).double()
        found[f"relative_error_{str(dtype)[6:]}"] = float((got - (exact - hidden.double())).norm() / change)

    rows = ["lm", "logic", "policy", "calibration"]
    with model.route(rows):
        (model(ids).logits ** 2).mean((1, 2)).sum().backward()
    model.finalize_grads()
    routed = {n: [p.grad for p in model.bundle_parameters(n)] for n in names}
    model.zero_grad()
    worst, none_right = 0.0, True
    own: dict[str, list[Any]] = {n: [0.0] * len(routed[n]) for n in names}
    for i, signal in enumerate(rows):
        (model(ids).logits[i] ** 2).mean().backward()
        for n, w in model.peft_config["default"].column(signal).items():
            own[n] = [o + w * p.grad for o, p in zip(own[n], model.bundle_parameters(n))]
        model.zero_grad()
    for n in names:
        for a, b in zip(routed[n], own[n]):
            none_right &= (a is None) == (not b.any())
            worst = max(worst, 0.0 if a is None else float((a - b).norm() / b.norm()))
    found["routed_gradient_worst_relative_error"], found["off_owners_have_none"] = worst, bool(none_right)
    return found


def compiled() -> dict[str, Any]:
    """A layer through `torch.compile` in one graph, with routed gradients, against the same layer without."""
    model = get_peft_model(llama(SMALL, torch.float32), BundleConfig(preset="full_modular", task_type="CAUSAL_LM"))
    perturb(model)
    layer = next(m for m in model.modules() if isinstance(m, BundleLayer))
    hidden = torch.randn(4, 32, 256, device="cuda")
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        h = hidden.clone().requires_grad_()
        with model.route(["lm", "logic", "policy", "calibration"]):
            out = run(h)
        out.square().sum().backward()
        results.append((out.detach(), h.grad, layer.bundle_up["default"]["b_policy"].grad.clone()))
        model.zero_grad()
    return {"worst_relative_error": max(float((a - b).norm() / a.norm()) for a, b in zip(*results))}


@torch.no_grad()
def decoding() -> dict[str, Any]:
    """The kernels of `kernels.py`: a few tokens (and many, "plain") against float64, and replayed as a CUDA graph."""
    model = get_peft_model(
        llama(SMALL, torch.bfloat16),
        BundleConfig(preset="full_modular", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    ).eval()
    perturb(model)
    model.peft_config["default"].calibration = {"tokens": 0, "source": "made up", "outliers": 0.0}
    layer = next(m for m in model.modules() if isinstance(m, BundleLayer))
    mean = layer.bundle_mean["default"].normal_(0, 3).bfloat16()
    states = torch.randn(4, 300, 256, device="cuda", dtype=torch.bfloat16)
    x, copy = centred(states, layer.bundle_mean["default"])
    units, above, gate = (
        states[..., :72].contiguous(),
        torch.randn_like(states[..., :72]),
        torch.rand_like(x[:, :1, :72]),
    )
    down = activate_backward(above.double().flatten(0, 1), units.double().flatten(0, 1), 40).view(units.shape)
    wanted = activate(units.double(), 40) * gate.double(), down, down * gate.double()
    pairs = [pair for _ in "ab" for pair in zip(units_backward(units, above, gate, 40), wanted)]  # built, then as built
    found: dict[str, Any] = {
        "centred_is_exact": torch.equal(x, states - mean) and torch.equal(copy, states),
        "units_backward_worst_relative_error": max(float((a.double() - b).norm() / b.norm()) for a, b in pairs),
    }
    for rows, alphas in ((1, {}), (8, {}), (8, {"b_policy": torch.linspace(0, 1, 8)})):
        hidden = torch.randn(rows, 1, 256, device="cuda", dtype=torch.bfloat16)
        with model.alphas(alphas):
            D, E = layer.fold("default", torch.float64, None, [])
            owner = layer.packing("default").owner.cuda()
            alpha = torch.ones(rows, 1, 15, device="cuda", dtype=torch.float64)
            if alphas:
                alpha[:, 0, list(model.peft_config["default"].bundles).index("b_policy")] = alphas["b_policy"].cuda()
            nonlinear = layer.packing("default").nonlinear
            wanted = (activate((hidden - mean).double() @ D, nonlinear) * alpha[..., owner]) @ E
            plain = layer(hidden)
            with model.folded():
                assert fits(hidden, torch.bfloat16)
                layer(hidden)
                few = layer(hidden)
        for name, got in (("plain", plain), ("few_tokens", few)):
            error = float((got.double() - hidden.double() - wanted).norm() / wanted.norm())
            found[f"decode_{name}_relative_error_{rows}{'_by_row' if alphas else ''}"] = error
    hidden = torch.randn(1, 1, 256, device="cuda", dtype=torch.bfloat16)
    with model.folded():
        expected = layer(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(hidden)
        graph.replay()
    found["graph_replay_equals_eager"] = torch.equal(out, expected)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    record: dict[str, Any] = {
        **made_by(" ".join(["python", *sys.argv])),
    }
    for part in (correctness, decoding, compiled):  # one that breaks leaves the others their say
        try:
            record[part.__name__] = part()
        except Exception:
            record[part.__name__] = {"error": traceback.format_exc()}
    write(args.output, record)
    print(json.dumps(record, indent=2))
    sys.exit(
        not all(right(*item) for part in (correctness, decoding, compiled) for item in record[part.__name__].items())
    )


def right(name: str, value: Any) -> bool:
    """Whether an entry of the record is as it should be: true, or an error of rounding."""
    if isinstance(value, bool) or name == "error":
        return value is True
    low = any(word in name for word in ("bfloat16", "units_backward", "decode"))
    return value < (1e-2 if low else 1e-4)


if __name__ == "__main__":
    main()
