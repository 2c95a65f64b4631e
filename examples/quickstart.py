"""Two kinds of text, two bundles, one small model: a bundled adapter from start to end, in minutes on two CPU cores.

    python examples/quickstart.py

You will see, on SmolLM2-135M:
  1. two bundles attached, `b_plays` for Shakespeare and `b_docs` for docstrings of torch, and calibrated;
  2. both trained in the same batches, in one forward and one backward, each only by its own rows;
  3. the loss on held-out text with each of them switched on and off: a bundle helps its own kind, and with both off
     the model is the base model, bit for bit;
  4. the adapter saved, loaded again, and one `generate` whose rows differ only in their alphas.

Every line that starts with "check" is verified; the script stops with an error at the first that does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import warnings
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, get_peft_model
from rich import print
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import peft_bundles
from peft_bundles import BundleConfig
from studies.data.corpora import encode, load_texts
from studies.data.smollm import model_folder


KINDS = ("plays", "docs")  # the signals; bundle b_<kind> owns signal <kind>
ROWS, LENGTH = 4, 64  # a batch: two rows of each kind
HELD_OUT = 16  # rows of each kind to measure on
ALONE = 2  # steps that train one kind by itself, to show that the other bundle does not move
LEARNING_RATE = 1e-3


def bundle_config(seed: int) -> BundleConfig:
    """One bundle a signal, each in a sub-basis of its own: the directions they may write to are orthogonal, so neither
    can overwrite in the residual stream what the other puts there."""
    return BundleConfig(
        sub_bases=dict.fromkeys(KINDS, 0.25),
        bundles={f"b_{kind}": {"rank": 0.25, "sub_bases": [kind], "signals": {kind: 1.0}} for kind in KINDS},
        basis_seed=seed,
        task_type="CAUSAL_LM",
    )


def row_alphas(kinds: list[str]) -> dict[str, Tensor]:
    """Alphas (B,) that switch on, in every row, the bundle of its kind alone.

    Routing isolates parameters, not the function: a bundle that is on changes the forward of every row, and the other
    would learn to live with it. With the other one off in its rows, a bundle learns exactly what it would learn alone.
    """
    return {f"b_{kind}": torch.tensor([float(k == kind) for k in kinds]) for kind in KINDS}


def row_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of every row, (B,)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(1)


class Trainer:
    """A plain training loop, with what it shows."""

    def __init__(self, model: PeftModel, rows: dict[str, Tensor], steps: int) -> None:
        self.model, self.rows = model, {kind: iter(ids) for kind, ids in rows.items()}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        columns = (MofNCompleteColumn(), BarColumn(10), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("", total=steps)
        self.losses: dict[str, float] = {}
        self.norms: dict[str, float] = {}

    def step(self, kinds: list[str]) -> None:
        """One step on a batch whose rows are of these kinds."""
        ids = torch.stack([next(self.rows[kind]) for kind in kinds])
        with self.model.route(kinds), self.model.alphas(row_alphas(kinds)):
            losses = row_losses(self.model, ids)
        by_kind = {kind: losses[[k == kind for k in kinds]].mean() for kind in dict.fromkeys(kinds)}
        # quiet_loss keeps the bundles that learn here quiet on the calibration text; the others it leaves alone.
        (sum(by_kind.values()) + self.model.quiet_loss()).backward()
        self.model.finalize_grads()
        norms = self.model.clip_bundle_grads(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.norms.update({name: norm.item() for name, norm in norms.items()})
        for kind, loss in by_kind.items():  # a running mean: single rows differ a lot
            self.losses[kind] = 0.9 * self.losses.get(kind, loss.item()) + 0.1 * loss.item()
        losses_text, norms_text = (
            " ".join(f"{name} {value:.2f}" for name, value in table.items()) for table in (self.losses, self.norms)
        )
        self.progress.update(self.task, advance=1, description=f"loss {losses_text} | grad {norms_text}")

    def alone(self, kind: str) -> None:
        """A few steps on one kind only; the other kind's bundle must not change by one bit."""
        others = [p for other in KINDS if other != kind for p in self.model.bundle_parameters(f"b_{other}")]
        before = [p.detach().clone() for p in others]
        own = [p.detach().clone() for p in self.model.bundle_parameters(f"b_{kind}")]
        for _ in range(ALONE):
            self.step([kind] * ROWS)
        moved = any(not torch.equal(a, b) for a, b in zip(own, self.model.bundle_parameters(f"b_{kind}")))
        still = all(torch.equal(a, b) for a, b in zip(before, others))
        check(f"{ALONE} steps on {kind} alone: b_{kind} moved, the other bundle by not one bit", moved and still)


def check(what: str, held: bool) -> None:
    if not held:
        raise RuntimeError(f"check failed: {what}")
    print(f"[green]check[/]  {what}")


def switched(**on: float) -> dict[str, float]:
    """Alphas of all bundles: those given, the others off."""
    return {f"b_{kind}": on.get(kind, 0.0) for kind in KINDS}


SETTINGS = {
    "all on": switched(plays=1.0, docs=1.0),
    "plays off": switched(docs=1.0),
    "docs off": switched(plays=1.0),
    "all off": switched(),
}


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
    table = Table("held-out text", *SETTINGS, title="loss, lower is better (in brackets: change from the base model)")
    for kind, row in losses.items():
        base = row["all off"]
        cells = [f"{row[s]:.3f} ({row[s] - base:+.3f})" if s != "all off" else f"{base:.3f}" for s in SETTINGS]
        table.add_row(kind if kind in KINDS else f"{kind} (nobody trains on it)", *cells)
    print(table)


@torch.no_grad()
def generate(model: PeftModel, tokenizer) -> None:
    """One prompt, one batch, three rows that differ only in their alphas."""
    prompt = tokenizer("The first", return_tensors="pt").to(model.device)
    names = ("base", *KINDS)
    ids = model.generate(
        **{name: tensor.expand(len(names), -1) for name, tensor in prompt.items()},
        alphas=row_alphas(list(names)),  # "base" is no kind, so nothing is on in its row
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    table = Table("alphas on", "continuation", title="one generate() call, one prompt, alphas per row", show_lines=True)
    for name, row in zip(names, ids):
        table.add_row("none" if name == "base" else f"b_{name}", tokenizer.decode(row, skip_special_tokens=True))
    print(table)


def record(path: Path, losses: dict[str, dict[str, float]], seconds: float, args: argparse.Namespace) -> None:
    """What was measured and with what, as JSON beside the adapter."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_bundles)}
    values = {
        "command": " ".join(["python", "examples/quickstart.py", *(f"--{k}={v}" for k, v in vars(args).items() if v)]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "held_out_rows": HELD_OUT,
        "row_tokens": LENGTH,
        "held_out_loss": losses,
        "seconds": round(seconds),
    }
    path.write_text(json.dumps(values, indent=2) + "\n")
    print(f"recorded in {path}")


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
        print(f"\n[bold]{title}[/]  [dim]{time.perf_counter() - start:.0f} s[/]")

    torch.manual_seed(args.seed)

    stage("1. The base model and three kinds of text")
    path = args.model or str(model_folder())
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = load_texts(args.seed)
    for kind, (train, held_out) in texts.items():
        print(f"{kind}: {len(train):,} pieces to train on, {len(held_out):,} held out, from other documents")
    held_out = {kind: encode(tokenizer, split[1], HELD_OUT, LENGTH).to(args.device) for kind, split in texts.items()}
    probe = torch.cat([ids[:2] for ids in held_out.values()])
    base_logits = logits_of(base, probe)

    stage("2. Attach a bundle for each kind and calibrate them on the manual")
    model = get_peft_model(base, bundle_config(args.seed))
    check("a fresh adapter is the base model, bit for bit", torch.equal(logits_of(model, probe), base_logits))
    # Given text and not the model's own samples: reading is many times faster than writing on a CPU. Ten tokens for
    # each of the 576 directions are enough to tell the loud ones from the quiet.
    peft_bundles.calibrate(model, texts["manual"][0], tokenizer, tokens=6_000, max_length=128, progress=False)
    print(model.bundle_report())

    mixed = [kind for kind in KINDS for _ in range(ROWS // 2)]
    stage(f"3. Train, mostly on mixed batches: rows {' '.join(mixed)}")
    # Twice, at the start and in the middle: by then the optimizer's momentum would move a bundle with a zero gradient.
    half = args.steps // 2
    rows = half * ROWS + 2 * ALONE * ROWS  # of each kind
    train = {kind: encode(tokenizer, texts[kind][0], rows, LENGTH).to(args.device) for kind in KINDS}
    trainer = Trainer(model.train(), train, 2 * (half + len(KINDS) * ALONE))
    with trainer.progress:
        for _ in range(2):
            for kind in KINDS:
                trainer.alone(kind)
            for _ in range(half):
                trainer.step(mixed)
    model.eval()

    stage("4. Measure on held-out text")
    losses = measure(model, held_out)
    show(losses)
    with model.alphas(SETTINGS["all off"]):
        check(
            "with all alphas off the logits are the base model's, bit for bit",
            torch.equal(logits_of(model, probe), base_logits),
        )
    for kind in KINDS:
        check(f"b_{kind} helps its own kind", losses[kind][f"{kind} off"] > losses[kind]["all on"])

    stage(f"5. Save to {args.output}, load on a fresh base model")
    model.save_pretrained(args.output)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    reloaded = PeftModel.from_pretrained(fresh, args.output).eval()
    check(
        "the reloaded model's logits are the same, bit for bit",
        torch.equal(logits_of(reloaded, probe), logits_of(model, probe)),
    )
    size = sum(f.stat().st_size for f in Path(args.output).iterdir()) / 2**20
    print(f"the adapter takes {size:.0f} MB")
    generate(reloaded, tokenizer)
    record(Path(args.output) / "results.json", losses, time.perf_counter() - start, args)

    stage("All checks held. In all")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers for it
    main()
