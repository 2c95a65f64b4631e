"""Write the golden checkpoints beside this file. `test_golden.py` reads them.

They were written by version 0.1.0, before its modules moved, and show that later versions read its files bit for bit.
So do not run this again to make a test pass: it is kept to show what the files hold. From the repository root:

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/golden/make.py

Every folder has what `save_pretrained` writes, without the README, and `expected.safetensors`: input ids, the logits of
the loaded model at two settings of alphas, and a sample of the base model's weights. Its metadata names the base model
and the second setting of alphas. Written twice, every file has the same bytes, but for the order of the metadata in
`basis.safetensors`.

A place inside another (`target_modules` that names blocks and their MLPs) is missing: version 0.1.0 writes such an
adapter and then refuses to load it, for the digest of its tensors depends on the order in which they are listed.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from models import batch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from test_golden import EXPECTED, GOLDEN, base, base_sample, outputs

import peft_bundles
from peft_bundles import PRESETS, BundleConfig


# Every kind of bundle but "full", every way to give a rank, and labels that only travel along.
MIXED: dict[str, Any] = {
    "sub_bases": {"left": 6, "right": 0.1, "common": 4},
    "bundles": {
        "b_mlp": {"rank": 6, "sub_bases": ["left"], "signals": {"lm": 1.0, "logic": 0.3}, "bottleneck": 3},
        "b_linear": {
            "rank": 0.1,
            "sub_bases": ["left", "right"],
            "adapter": "linear",
            "signals": {"policy": 1.0},
            "role": "signal",
            "alpha": 0.5,
        },
        "b_diag": {
            "rank": 2,
            "sub_bases": ["right"],
            "overlap": 0.5,
            "adapter": "diag",
            "role": "semantic",
            "topic": "law",
            "protected": True,
        },
    },
    "bottleneck": 0.5,
    "scaling": 2.0,
    "quiet": 5.0,
}
# Two bundles of the config's kind.
PAIR: dict[str, Any] = {
    "sub_bases": {"left": 8, "right": 6},
    "bundles": {
        "b_one": {"rank": 6, "sub_bases": ["left"], "signals": {"lm": 1.0}},
        "b_two": {"rank": 4, "sub_bases": ["left", "right"], "signals": {"policy": 1.0}},
    },
    "bottleneck": 0.1,
}

TWICE: dict[str, dict[str, Any]] = {  # written uncalibrated and calibrated
    **{f"preset_{name}": {"preset": name} for name in PRESETS},
    **{
        f"kind_{kind}_{projection}": {**PAIR, "adapter": kind, "projection": projection}
        for kind in ("mlp", "linear", "diag", "full")
        for projection in ("none", "tied")
    },
    "place_layers": {**MIXED, "layers_to_transform": [1]},
    "place_regex": {**MIXED, "target_modules": r".*\.layers\.1"},
    "basis_unsaved": {**MIXED, "basis_init": "random", "save_basis": False, "basis_seed": 5},
    "basis_random": {**MIXED, "basis_init": "random", "basis_seed": 3},
    "basis_pca": {**MIXED, "basis_init": "pca", "basis_rank": 24},
    "basis_null": {**MIXED, "basis_init": "null"},
    "norm_none": {**MIXED, "input_norm": "none"},
    "gpt2": MIXED,
}
ONCE: dict[str, dict[str, Any]] = {
    "modules_to_save": {**MIXED, "modules_to_save": ["norm"]},
    "refused_free": {**MIXED, "projection": "free"},
    "refused_identity": {**PAIR, "projection": "free", "adapter": "identity"},
}


def moved(model: PeftModel, seed: int) -> PeftModel:
    """The model with noise on everything that is trained, so that no bundle is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter(kind: str, fields: dict[str, Any], *, calibrated: bool = False, seed: int = 0) -> PeftModel:
    """A base model of that type with an adapter that is not the identity."""
    model = get_peft_model(base(kind), BundleConfig(task_type="CAUSAL_LM", **fields))
    if calibrated:
        peft_bundles.calibrate(model, tokens=200, max_length=16, progress=False)
    return moved(model, seed).eval()


def expect(name: str, kind: str) -> None:
    """Write `expected.safetensors` of the adapter in a folder, as it is loaded; remove READMEs."""
    folder = GOLDEN / name
    model, ids = PeftModel.from_pretrained(base(kind), folder).eval(), batch(rows=2, length=4)
    bundles = model.peft_config["default"].bundles
    alphas = {bundle: (0.25, 1.5, 0.0)[i % 3] for i, bundle in enumerate(bundles)}
    tensors = {"input_ids": ids, "base_sample": base_sample(base(kind)), **outputs(model, ids, alphas)}
    save_file(tensors, folder / EXPECTED, metadata={"about": json.dumps({"base": kind, "alphas": alphas})})
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    fixtures = [(name, fields, False) for name, fields in {**TWICE, **ONCE}.items()]
    fixtures += [(f"{name}_calibrated", f, True) for name, f in TWICE.items() if name != "preset_baseline"]
    for seed, (name, fields, calibrated) in enumerate(fixtures):
        kind = "gpt2" if name.startswith("gpt2") else "llama"
        adapter(kind, fields, calibrated=calibrated, seed=seed).save_pretrained(GOLDEN / name)
        expect(name, kind)

    several = adapter("llama", MIXED, seed=100)
    several.add_adapter("second", BundleConfig(task_type="CAUSAL_LM", **PAIR))
    several.set_adapter("second")
    moved(several, 101).save_pretrained(GOLDEN / "several_adapters")
    for name in ("several_adapters", "several_adapters/second"):
        expect(name, "llama")

    whole = adapter("llama", MIXED, calibrated=True, seed=102)
    peft_bundles.save_bundle(whole, "b_mlp", GOLDEN / "one_bundle_calibrated", {"steps": 3})
    expect("one_bundle_calibrated", "llama")
    whole.save_pretrained(GOLDEN / "shared_basis_calibrated")
    peft_bundles.save_basis(whole, GOLDEN / "shared_basis_calibrated")
    expect("shared_basis_calibrated", "llama")


if __name__ == "__main__":
    main()
