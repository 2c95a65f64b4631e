"""Two kinds of text, two bundles, one small model: from attaching to loading, in minutes on two CPU cores.

    python examples/quickstart.py

On SmolLM2-135M this script
  1. attaches two bundles, `b_plays` for Shakespeare and `b_docs` for docstrings of torch, and calibrates them;
  2. trains both in the same batches, with one forward and one backward; each row updates only its own bundle;
  3. measures the loss on held-out text with each bundle on and off;
  4. saves the adapter, loads it again, and generates three rows that differ only in their alphas.

Each line that starts with "check" is a test. The script stops with an error at the first test that fails.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

import peft_bundles
from peft_bundles import BundleConfig
from studies import records
from studies.data.corpora import encode, load_texts
from studies.data.smollm import model_folder


KINDS = ("plays", "docs")  # the signals; bundle b_<kind> owns signal <kind>
ROWS, LENGTH = 4, 64  # rows of a batch, tokens of a row
HELD_OUT = 16  # held-out rows of each kind
ALONE = 2  # steps on one kind only, to test that the other bundle does not change
LEARNING_RATE = 1e-3
SETTINGS = {
    "all on": {"b_plays": 1.0, "b_docs": 1.0},
    "plays off": {"b_plays": 0.0, "b_docs": 1.0},
    "docs off": {"b_plays": 1.0, "b_docs": 0.0},
    "all off": {"b_plays": 0.0, "b_docs": 0.0},
}


def bundle_config(seed: int) -> BundleConfig:
    """One bundle per signal, each in its own sub-basis: the two write to orthogonal directions."""
    return BundleConfig(
        sub_bases=dict.fromkeys(KINDS, 0.25),
        bundles={f"b_{kind}": {"rank": 0.25, "sub_bases": [kind], "signals": {kind: 1.0}} for kind in KINDS},
        basis_seed=seed,
        task_type="CAUSAL_LM",
    )


def row_alphas(kinds: list[str]) -> dict[str, Tensor]:
    """Alphas (B,) that switch on only the bundle of each row's kind.

    Routing isolates parameters, not the function: a bundle that is on changes the forward of every row, and the other
    bundle would learn to rely on it. With the other bundle off in its rows, a bundle learns what it would learn alone.
    """
    return {f"b_{kind}": torch.tensor([float(k == kind) for k in kinds]) for kind in KINDS}


def row_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of every row, (B,)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(1)


def train_step(
    model: PeftModel, optimizer: torch.optim.Optimizer, rows: dict[str, Iterator[Tensor]], kinds: list[str]
) -> dict[str, float]:
    """One step on a batch whose rows have these kinds; returns the loss of each kind."""
    ids = torch.stack([next(rows[kind]) for kind in kinds])
    with model.route(kinds), model.alphas(row_alphas(kinds)):
        losses = row_losses(model, ids)
    by_kind = {kind: losses[[k == kind for k in kinds]].mean() for kind in dict.fromkeys(kinds)}
    sum(by_kind.values()).backward()  # with the quiet penalty's gradient, which keeps the bundles small on other text
    model.finalize_grads()
    model.clip_bundle_grads(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {kind: loss.item() for kind, loss in by_kind.items()}


def train(model: PeftModel, rows: dict[str, Tensor], steps: int) -> None:
    """Train on mixed batches. Twice, train on one kind only and check that the other bundle does not change."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    unread = {kind: iter(ids) for kind, ids in rows.items()}
    mixed = [kind for kind in KINDS for _ in range(ROWS // 2)]
    # At the start and in the middle: by then, momentum would move a bundle whose gradient is zero instead of None.
    for _ in range(2):
        for kind in KINDS:
            before = weights(model)
            for _ in range(ALONE):
                train_step(model, optimizer, unread, [kind] * ROWS)
            changed = [name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])]
            what = f"{ALONE} steps on {kind} only changed b_{kind}, and not one bit of the other bundle"
            check(what, changed == [f"b_{kind}"])
        for _ in (bar := tqdm(range(steps // 2), unit="step", leave=False, disable=None)):
            losses = train_step(model, optimizer, unread, mixed)
            bar.set_postfix({kind: f"{loss:.2f}" for kind, loss in losses.items()})


def weights(model: PeftModel) -> dict[str, Tensor]:
    """All weights of each bundle, as one copied vector."""
    names = [f"b_{kind}" for kind in KINDS]
    return {name: torch.cat([p.detach().flatten() for p in model.bundle_parameters(name)]) for name in names}


def check(what: str, held: bool) -> None:
    if not held:
        raise RuntimeError(f"check failed: {what}")
    print(f"check  {what}")


@torch.no_grad()
def measure(model: PeftModel, held_out: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Held-out loss: kind of text -> setting -> loss."""
    losses: dict[str, dict[str, float]] = {kind: {} for kind in held_out}
    for setting, alphas in SETTINGS.items():
        with model.alphas(alphas):
            for kind, ids in held_out.items():
                losses[kind][setting] = float(row_losses(model, ids).mean())
    return losses


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def show(losses: dict[str, dict[str, float]]) -> None:
    print("loss, lower is better (in brackets: change from the base model, which is all off)")
    print(" " * 8 + "".join(f"{setting:>18}" for setting in SETTINGS))
    for kind, row in losses.items():
        cells = [f"{loss:.3f} ({loss - row['all off']:+.3f})" for loss in row.values()]
        print(f"{kind:8}" + "".join(f"{cell:>18}" for cell in cells))
    print("no bundle was trained on the manual")


@torch.no_grad()
def generate(model: PeftModel, tokenizer: Any) -> None:
    """One prompt, one batch, three rows that differ only in their alphas."""
    prompt = tokenizer("The first", return_tensors="pt").to(model.device)
    names = ("base", *KINDS)
    ids = model.generate(
        **{name: tensor.expand(len(names), -1) for name, tensor in prompt.items()},
        alphas=row_alphas(list(names)),  # "base" is not a kind, so both bundles are off in its row
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    print("one generate() call, one prompt, alphas per row:")
    for name, row in zip(names, ids):
        print(f"  {name:6} {' '.join(tokenizer.decode(row, skip_special_tokens=True).split())}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps on mixed batches")
    parser.add_argument("--output", default="outputs/quickstart", help="folder for the adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder or Hub id of another causal LM")
    parser.add_argument("--device", default="cpu", help="cpu, the default, or cuda")
    args = parser.parse_args(argv)
    start = time.perf_counter()

    def stage(title: str) -> None:
        print(f"\n{title}  ({time.perf_counter() - start:.0f} s)")

    torch.manual_seed(args.seed)

    stage("1. The base model and three kinds of text")
    path = args.model or str(model_folder())
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = load_texts(args.seed)
    for kind, (train_texts, held_out_texts) in texts.items():
        print(f"{kind}: {len(train_texts):,} pieces to train on, {len(held_out_texts):,} held out, of other documents")
    held_out = {kind: encode(tokenizer, split[1], HELD_OUT, LENGTH).to(args.device) for kind, split in texts.items()}
    probe = torch.cat([ids[:2] for ids in held_out.values()])
    base_logits = logits_of(base, probe)

    stage("2. Attach a bundle for each kind and calibrate on the manual")
    model = get_peft_model(base, bundle_config(args.seed))
    check("a fresh adapter is the base model, bit for bit", torch.equal(logits_of(model, probe), base_logits))
    # Use the manual instead of the model's own samples: on a CPU, reading is much faster than generating. Ten tokens
    # for each of the 576 directions are enough to find those of high variance.
    peft_bundles.calibrate(model, texts["manual"][0], tokenizer, tokens=6_000, max_length=128, progress=False)
    print(model.bundle_report())

    stage(f"3. Train {args.steps} steps on mixed batches of {ROWS} rows")
    rows = args.steps // 2 * ROWS + 2 * ALONE * ROWS  # of each kind
    kind_rows = {kind: encode(tokenizer, texts[kind][0], rows, LENGTH).to(args.device) for kind in KINDS}
    train(model.train(), kind_rows, args.steps)
    model.eval()

    stage("4. Measure on held-out text")
    losses = measure(model, held_out)
    show(losses)
    with model.alphas(SETTINGS["all off"]):
        same = torch.equal(logits_of(model, probe), base_logits)
    check("with all alphas 0 the logits are those of the base model, bit for bit", same)
    for kind in KINDS:
        check(f"b_{kind} lowers the loss on its own kind", losses[kind][f"{kind} off"] > losses[kind]["all on"])

    stage(f"5. Save to {args.output} and load on a fresh base model")
    model.save_pretrained(args.output)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    reloaded = PeftModel.from_pretrained(fresh, args.output).eval()
    same = torch.equal(logits_of(reloaded, probe), logits_of(model, probe))
    check("the logits of the loaded model are the same, bit for bit", same)
    generate(reloaded, tokenizer)

    flags = " ".join(f"--{name}={value}" for name, value in vars(args).items() if value)
    record = records.made_by(f"python examples/quickstart.py {flags}", device=args.device)
    measured = {"held_out_rows": HELD_OUT, "row_tokens": LENGTH, "held_out_loss": losses}
    seconds = round(time.perf_counter() - start)
    records.write(Path(args.output) / "results.json", {**record, **measured, "seconds": seconds})
    stage(f"All checks passed; the losses are in {args.output}/results.json")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
