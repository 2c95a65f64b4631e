"""Identities of bundles at linear layers on a GPU, where autograd runs the backward in a thread of its own.

    python benchmarks/gpu_linears.py --output benchmarks/results/gpu_linears.json

Each check is an error, and the bound that it must keep. Float32 without TF32, a tiny Llama.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bundles import BundleConfig, calibrate
from studies.records import made_by


SIGNALS = ["lm", "policy", "policy", "lm"]
BUNDLES = {
    "b_lora": {"rank": 5, "place": "all-linear", "signals": {"lm": 1.0}},
    "b_mlp": {"rank": 4, "place": "mlp", "kind": "mlp", "signals": {"policy": 1.0}},
    "b_both": {"rank": 8, "place": ["block", "attention"], "sub_bases": ["main"], "signals": {"policy": 0.5}},
}


def made(device: str) -> PeftModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=101))
    config = BundleConfig(bundles=BUNDLES, sub_bases={"main": 16}, init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config).to(device)


def gradients(model: Any, ids: torch.Tensor, checkpointing: bool) -> dict[str, torch.Tensor | None]:
    """Of routed rows under alphas that change before the backward, which runs after the contexts have closed."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    gates = torch.tensor([0.5, 1.0, 2.0, 0.0], device=ids.device)
    with model.alphas(b_lora=gates), model.route(SIGNALS):
        loss = model(input_ids=ids, labels=ids).loss
    model.set_alphas(b_mlp=3.0)
    loss.backward()
    model.finalize_grads()
    return {name: p.grad for name, p in model.named_parameters() if ".bundle_" in name}


def furthest(some: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of gradients relative to their size; infinite if one of them is missing."""
    worst = 0.0
    for name, gradient in some.items():
        if (gradient is None) != (other[name] is None):
            return float("inf")
        if gradient is not None:
            apart = (gradient.cpu() - other[name].cpu()).norm() / other[name].cpu().norm().clamp_min(1e-12)
            worst = max(worst, apart.item())
    return worst


def checks() -> dict[str, tuple[float, float]]:
    """Name of the check -> error and bound."""
    model, cpu = made("cuda"), made("cpu")
    ids = torch.randint(3, 101, (4, 24), generator=torch.Generator().manual_seed(0))
    on_gpu = ids.cuda()
    plain = gradients(model, on_gpu, False)
    with torch.no_grad(), model.disable_adapter():
        base = model(on_gpu).logits
    with torch.no_grad():
        off = model(on_gpu, alphas=dict.fromkeys(BUNDLES, 0.0)).logits
        at_once = model(on_gpu).logits
        prompt = model(on_gpu[:, :-1], use_cache=True)
        last = model(on_gpu[:, -1:], past_key_values=prompt.past_key_values).logits
    found = {
        "checkpointed gradients, backward after the contexts": (furthest(gradients(model, on_gpu, True), plain), 1e-4),
        "gradients on the CPU": (furthest(gradients(cpu, ids, False), plain), 1e-3),
        "alpha 0 is the base": ((off - base).abs().max().item(), 0.0),
        "prefill is decode": ((last[:, 0] - at_once[:, -1]).abs().max().item(), 1e-4),
    }
    calibrate(model, tokens=512, max_length=32, states_only=True, progress=False)
    model.train()(input_ids=on_gpu, labels=on_gpu).loss.backward()
    found["a step with the penalty is finite"] = (
        0.0 if all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None) else 1.0,
        0.0,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    torch.backends.cuda.matmul.allow_tf32 = False
    found = checks()
    record = {**made_by(f"python benchmarks/gpu_linears.py --output benchmarks/results/{output.name}"), "checks": found}
    output.write_text(json.dumps(record, indent=1) + "\n")
    for name, (error, bound) in found.items():
        print(f"{'ok' if error <= bound else 'WRONG'}: {name}: {error:.2e} (at most {bound:g})", flush=True)


if __name__ == "__main__":
    main()
