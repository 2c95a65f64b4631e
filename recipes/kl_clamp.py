"""One bundle learns plays, with and without the clamp on its KL to the base model.

    python recipes/kl_clamp.py                       # a GPU
    python recipes/kl_clamp.py --smoke               # two CPU cores

The clamp adds strength * max(0, KL - tau) to the loss. KL compares what the LM head reads in the bundle's columns with
the bundle on and off, in nats per token (`peft_bundles.objectives.kl_clamp`). Every entry of `clamps` in kl_clamp.yaml
is a separate run on the same rows. The table shows what each run learned and how far it moved from the base model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
import yaml
from peft import get_peft_model
from rich import print
from rich.table import Table
from torch import Tensor

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.objectives import LM
from peft_bundles.objectives.kl_clamp import KLClamp
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig
from studies import records
from studies.data.corpora import encode
from studies.data.smollm import model_folder
from studies.data.split import split_by_document
from studies.data.text import plays
from studies.measures.text import text_loss


BUNDLE = "b_text"


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder or Hub id of another causal LM")
    parser.add_argument("--output", help="folder for results.json")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    flags = vars(parser.parse_args(argv))
    config = yaml.safe_load(flags.pop("config").read_text())
    smoke = config.pop("smoke")
    return config | (smoke if flags["smoke"] else {}) | {k: v for k, v in flags.items() if v is not None}


def bundle_config(config: dict[str, Any]) -> BundleConfig:
    bundle = {"rank": config["rank"], "sub_bases": ["text"], "signals": {"lm": 1.0}}
    fields = {"quiet": config["quiet"], "basis_seed": config["seed"], "task_type": "CAUSAL_LM"}
    return BundleConfig(bundles={BUNDLE: bundle}, sub_bases={"text": config["rank"]}, **fields)


@torch.no_grad()
def kl_to_base(model: Any, ids: Tensor, rows: int = 8) -> float:
    """Mean KL(bundles on || base model) of the next token, in nats, over the tokens of ids (N, T)."""
    total = 0.0
    for part in ids.to(model.device).split(rows):
        on = model(input_ids=part, use_cache=False).logits.float().log_softmax(-1)
        with model.alphas({BUNDLE: 0.0}):
            base = model(input_ids=part, use_cache=False).logits.float().log_softmax(-1)
        total += float((on.exp() * (on - base)).sum())
    return total / ids.numel()


def measured(trainer: BundleTrainer, held_out: dict[str, Tensor]) -> dict[str, float]:
    """Loss and KL to the base on held-out rows, and the KL that the clamp acts on."""
    forward, model = trainer.forward, trainer.model
    clamp = KLClamp(model, {"lm": 1.0}, beta={BUNDLE: 1.0}, signals=forward.signals)
    ids = held_out["plays"].to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    on, base = forward.current("lm", batch).hidden, forward.reference(batch).hidden
    numbers = {"clamped_kl": float(clamp.kl(on.flatten(0, 1), base.flatten(0, 1), BUNDLE, forward))}
    with forward.eval_mode():
        for kind, rows in held_out.items():
            numbers |= {f"{kind}_loss": text_loss(model, rows), f"{kind}_kl": kl_to_base(model, rows)}
    return numbers


def run(config: dict[str, Any], clamp: dict[str, Any] | None, source: str, texts: dict[str, Any]) -> dict[str, Any]:
    """Train a fresh bundle under one setting of the clamp."""
    begun = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:
        args = BundleTrainingConfig(
            folder, seed=config["seed"], save_strategy="no", report_to="none", use_cpu=config["smoke"],
            kl_clamp=clamp and {"strength": {"lm": clamp["strength"]}, "tau": clamp["tau"], "beta": {BUNDLE: 1.0}},
            **config["training"],
        )  # fmt: skip
        base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(args.device)
        transformers.set_seed(config["seed"])  # of the bundles' first weights
        model = get_peft_model(base, bundle_config(config))
        peft_bundles.calibrate(model, texts["manual"][0], tokenizer, progress=False, **config["calibration"])
        length, rows = config["text"]["length"], config["text"]
        train = encode(tokenizer, texts["plays"][0], rows["train"], length)
        held_out = {kind: encode(tokenizer, texts[kind][1], rows["held_out"], length) for kind in ("plays", "manual")}
        objective = LM([{"input_ids": ids} for ids in train.tolist()])
        trainer = BundleTrainer(model, args, objective, tokenizer)
        before = measured(trainer, held_out)
        trainer.train(resume_from_checkpoint=False)
        after = measured(trainer, held_out)
    history = [{k: v for k, v in entry.items() if "loss" in k or "clamp" in k} for entry in trainer.state.log_history]
    return {
        "clamp": clamp,
        "before": before,
        "after": after,
        "history": history,
        "seconds": time.perf_counter() - begun,
    }


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("clamp", *runs[0]["after"], title="held-out rows after training: losses, and KL to the base in nats")
    for name, numbers in [("base model", runs[0]["before"]), *((str(r["clamp"] or "none"), r["after"]) for r in runs)]:
        table.add_row(name, *(f"{value:.3f}" for value in numbers.values()))
    print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = settings(argv)
    source = config["model"] or str(model_folder())
    documents = {"plays": plays(), "manual": dict(topics)}  # the manual is held out of training
    texts = {kind: split_by_document(pieces, config["seed"]) for kind, pieces in documents.items()}
    runs = [run(config, clamp, source, texts) for clamp in config["clamps"]]
    command = " ".join(["recipes/kl_clamp.py", *(sys.argv[1:] if argv is None else argv)])
    results = {**records.made_by(command), "settings": config, "runs": runs}
    records.write(Path(config["output"]) / "results.json", results)
    show(runs)
    return results


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
